"Tokens: masks, chunks and the ledger against values worked out by hand, on lists and on tensors."
import random
import pytest
from k2lab.chat import build_tokenizer, encode, pair_spans
from k2lab.core import LabError
from k2lab.tokens import Ledger, batch_rows, chunks, concatenate, encode_row, encode_rows, mask_html, mask_runs, mask_text, speech, stream_hash

@pytest.fixture(scope='module', params=['kimi', 'qwen'])
def tok(request): return build_tokenizer(['user assistant system 12 + 3 = 15, so 15. A graph has nodes.'] * 20, 330, request.param)

ROWS = [dict(prompt='12 + 3?', reasoning='12 + 3 = 15', final='15'), dict(instruction='A graph?', input='G', output='nodes'), dict(prompt='a', response='<think>b</think>c'), dict(prompt='a', response='d')]

@pytest.mark.parametrize('row,said', list(zip(ROWS, ['<think>12 + 3 = 15</think>15<|im_end|>', 'nodes<|im_end|>', '<think>b</think>c<|im_end|>', 'd<|im_end|>'])))
def test_exactly_the_reply_is_trained(tok, row, said):
    e = encode_row(tok, row, 'S')
    assert tok.decode([i for i, m in zip(*e.values()) if m]) == said and mask_text(tok, e).endswith(f'⟦{said}⟧') and mask_text(tok, e).count('⟦') == 1
    assert len(e['input_ids']) == len(e['completion_mask'])

def test_drops_are_counted_and_whole(tok):
    lengths = [len(encode_row(tok, r)['input_ids']) for r in ROWS]
    limit = sorted(lengths)[1]
    kept, counts = encode_rows(tok, ROWS, '', limit)
    assert [len(e['input_ids']) for e in kept] == [n for n in lengths if n <= limit]
    assert counts == dict(rows=len(kept), dropped=len(ROWS) - len(kept), tokens=sum(n for n in lengths if n <= limit), trained_tokens=sum(sum(e['completion_mask']) for e in kept), longest=max(lengths))
    with pytest.raises(LabError, match=f'shortest has {min(lengths)}'): encode_rows(tok, ROWS, '', 3)
    assert encode_rows(tok, [], '', 3) == ([], dict(rows=0, dropped=0, tokens=0, trained_tokens=0, longest=0))

def test_concatenate_loses_nothing(tok):
    texts = ['A graph.', '', 'nodes [EOS]<|endoftext|><|im_end|>', '12 + 3']
    rows = concatenate(tok, texts, 7)
    flat = [i for r in rows for i in r['input_ids']]
    assert all(len(r['input_ids']) == 7 for r in rows[:-1]) and 0 < len(rows[-1]['input_ids']) <= 7 and all(set(r['completion_mask']) == {1} for r in rows)
    assert flat.count(tok.eos_token_id) == 4 and tok.decode(flat) == ''.join(t + tok.eos_token for t in texts)
    with pytest.raises(LabError, match='at least 2'): concatenate(tok, texts, 1)
    assert concatenate(tok, [], 7) == [] and chunks([], 3) == []

def tensors(batch):
    torch = pytest.importorskip('torch')
    return {k: torch.tensor(v) for k, v in batch.items()}

@pytest.mark.parametrize('as_batch', [dict, tensors])
def test_ledger_by_hand(as_batch):
    tok = build_tokenizer(['a b c d'], 280)
    think, close, end, a, b = tok.convert_tokens_to_ids(['<think>', '</think>', '<|im_end|>', 'a', 'b'])
    ledger = Ledger(tok)
    ledger.add(as_batch(dict(input_ids=[[a, think, b, close, a, end], [a, b, end, 0, 0, 0]], attention_mask=[[1] * 6, [1] * 3 + [0] * 3],
                             labels=[[-100, think, b, close, a, end], [a, b, end, -100, -100, -100]])))
    ledger.add(as_batch(dict(input_ids=[[0, a, b, end]], attention_mask=[[0, 1, 1, 1]], completion_mask=[[0, 0, 1, 1]])))
    s = ledger.summary()
    assert (s['batches'], s['rows'], s['tokens'], s['trained_tokens'], s['ends_of_turn']) == (2, 3, 12, 9, 3)
    assert s['trained_by_kind'] == dict(think=3, answer=3, end=3) and s['padding_share'] == round(4 / 16, 4)
    assert s['stream_sha256'] == stream_hash([dict(input_ids=i) for i in ([a, think, b, close, a, end], [a, b, end], [a, b, end])])

def test_ledger_matches_trl_collators():
    "The ledger of what TRL's own collators make of our examples equals the masks."
    from trl.trainer.dpo_trainer import DataCollatorForPreference
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
    tok = build_tokenizer(['user assistant a b c d'] * 5, 300)
    examples, counts = encode_rows(tok, ROWS, 'S')
    ledger = Ledger(tok)
    ledger.add(DataCollatorForLanguageModeling(tok.pad_token_id)([dict(input_ids=e['input_ids'], labels=[i if m else -100 for i, m in zip(*e.values())]) for e in examples]))
    assert ledger.summary()['trained_tokens'] == counts['trained_tokens'] and ledger.tokens == counts['tokens'] and ledger.summary()['stream_sha256'] == stream_hash(examples)
    parts = [encode(tok, s)[0] for s in pair_spans(dict(prompt='p', chosen='<think>a</think>b', rejected='c d a b'))]
    ledger = Ledger(tok)
    ledger.add(DataCollatorForPreference(tok.pad_token_id)([dict(zip(('prompt_ids', 'chosen_ids', 'rejected_ids'), parts))]))
    s = ledger.summary()
    assert (s['rows'], s['trained_tokens'], s['ends_of_turn']) == (2, len(parts[1]) + len(parts[2]), 2) and s['tokens'] == 2 * len(parts[0]) + s['trained_tokens']

def test_batches_without_labels_are_refused():
    with pytest.raises(LabError, match='it has input_ids'): list(batch_rows(dict(input_ids=[[1]])))
    assert list(batch_rows(dict(input_ids=[[1, 2]], labels=[[1, 2]]))) == [([1, 2], [0, 1])]

def test_speech_ends_with_its_turn():
    names = {1: '<think>', 2: '</think>', 3: '<|im_end|>', 4: '<|tool_calls_section_begin|>', 5: '<|tool_calls_section_end|>'}
    assert list(speech([0, 1, 0, 2, 0, 4, 0, 5, 3, 0], names)) == ['answer', 'think', 'think', 'think', 'answer', 'call', 'call', 'call', 'end', 'answer']
    assert list(speech([1, 0, 3, 0], names)) == ['think', 'think', 'end', 'answer']

def test_hash_sees_order_rows_and_ids():
    streams = [[[1, 2], [3]], [[1], [2, 3]], [[3], [1, 2]], [[1, 2, 3]], [[1, 2], [4]]]
    assert len({stream_hash([dict(input_ids=r) for r in s]) for s in streams}) == len(streams)

def test_viewer_escapes_and_stays_small(tok):
    e = encode_row(tok, dict(prompt='<script>' + 'x' * 5000, response='é<b>😀'))
    page = mask_html(tok, e)
    assert '<script' not in page and '<b>' not in page and len(page) < 3000 and 'é&lt;b&gt;😀' in page
    assert ''.join(t for t, *_ in mask_runs(tok, e)) == tok.decode(e['input_ids'])

def test_a_ledger_that_waits_counts_what_was_trained(tmp_path):
    "max_steps in mid-epoch: TRL collates one batch more than it trains."
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
    from k2lab.model import small_model
    tok = build_tokenizer(['user assistant a b c d'] * 5, 300)
    ledger, eager = Ledger(tok, wait=True), Ledger(tok)
    class Passing(TrainerCallback):
        def on_substep_end(self, *args, **kw): ledger.passed()
        def on_step_end(self, *args, **kw): ledger.passed()
    collator = DataCollatorForLanguageModeling(tok.pad_token_id)
    def collate(rows):
        batch = collator(rows)
        ledger.add(batch); eager.add(batch)
        return batch
    rows = [dict(input_ids=e['input_ids'], labels=e['input_ids']) for e in encode_rows(tok, ROWS * 5, 'S')[0]]
    args = SFTConfig(output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=3, use_cpu=True, bf16=False, report_to='none', save_strategy='no', disable_tqdm=True, max_length=None, gradient_checkpointing=False)
    SFTTrainer(small_model('qwen', 'smoke', build_tokenizer(['user assistant a b c d'] * 5, 300)), args, train_dataset=Dataset.from_list(rows), processing_class=tok, data_collator=collate, callbacks=[Passing()]).train()
    assert (ledger.batches, ledger.rows, eager.batches) == (6, 12, 7)

def test_a_ledger_without_batches_complains(tok):
    with pytest.raises(LabError, match='dataloader_num_workers'): Ledger(tok, wait=True).passed()
