"Tokens: masks, chunks and the ledger against values worked out by hand, on lists and on tensors."

import random
from functools import reduce

import pytest

from k2lab.lab.config import LabError
from k2lab.text.audit import Audit, batch_rows
from k2lab.text.chat import generation_prompts
from k2lab.text.ledger import Ledger, chained, speech
from k2lab.text.masks import (
    chunks,
    concatenate,
    encode_row,
    encode_rows,
    mask_html,
    mask_runs,
    mask_text,
    pair_row,
)
from k2lab.text.packing import best_fit, pack, packed_batch
from k2lab.text.tokenizer import build_tokenizer


@pytest.fixture(scope='module', params=['kimi', 'qwen'])
def tok(request):
    return build_tokenizer(
        ['user assistant system 12 + 3 = 15, so 15. A graph has nodes.'] * 20, 330, request.param
    )


ROWS = [
    dict(prompt='12 + 3?', reasoning='12 + 3 = 15', final='15'),
    dict(instruction='A graph?', input='G', output='nodes'),
    dict(prompt='a', response='<think>b</think>c'),
    dict(prompt='a', response='d'),
]


@pytest.mark.parametrize(
    'row,said',
    list(
        zip(
            ROWS,
            [
                '<think>12 + 3 = 15</think>15<|im_end|>',
                '<think></think>nodes<|im_end|>',
                '<think>b</think>c<|im_end|>',
                '<think></think>d<|im_end|>',
            ],
        )
    ),
)
def test_exactly_the_reply_is_trained(tok, row, said):
    e = encode_row(tok, row, 'S')
    if '<think>' not in tok.get_added_vocab():
        said = said.removeprefix(
            '<think></think>'
        )  # only a thinking model says that it did not think
    assert (
        tok.decode([i for i, m in zip(*e.values()) if m]) == said
        and mask_text(tok, e).endswith(f'⟦{said}⟧')
        and mask_text(tok, e).count('⟦') == 1
    )
    assert len(e['input_ids']) == len(e['completion_mask'])


def test_drops_are_counted_and_whole(tok):
    lengths = [len(encode_row(tok, r)['input_ids']) for r in ROWS]
    limit = sorted(lengths)[1]
    kept, counts = encode_rows(tok, ROWS, '', limit)
    assert [len(e['input_ids']) for e in kept] == [n for n in lengths if n <= limit]
    assert counts == dict(
        rows=len(kept),
        dropped=len(ROWS) - len(kept),
        tokens=sum(n for n in lengths if n <= limit),
        trained_tokens=sum(sum(e['completion_mask']) for e in kept),
        longest=max(lengths),
    )
    with pytest.raises(LabError, match=f'shortest has {min(lengths)}'):
        encode_rows(tok, ROWS, '', 3)
    assert encode_rows(tok, [], '', 3) == (
        [],
        dict(rows=0, dropped=0, tokens=0, trained_tokens=0, longest=0),
    )


def test_concatenate_loses_nothing(tok):
    texts = ['A graph.', '', 'nodes [EOS]<|endoftext|><|im_end|>', '12 + 3']
    rows = concatenate(tok, texts, 7)
    flat = [i for r in rows for i in r['input_ids']]
    assert (
        all(len(r['input_ids']) == 7 for r in rows[:-1])
        and 0 < len(rows[-1]['input_ids']) <= 7
        and all(set(r['completion_mask']) == {1} for r in rows)
    )
    assert flat.count(tok.eos_token_id) == 4 and tok.decode(flat) == ''.join(
        t + tok.eos_token for t in texts
    )
    with pytest.raises(LabError, match='at least 2'):
        concatenate(tok, texts, 1)
    assert concatenate(tok, [], 7) == [] and chunks([], 3) == []


def labelled(examples) -> list:
    "Examples with labels instead of a mask."
    return [
        {
            **{k: v for k, v in e.items() if k != 'completion_mask'},
            'labels': [i if m else -100 for i, m in zip(e['input_ids'], e['completion_mask'])],
        }
        for e in examples
    ]


def tensors(batch):
    torch = pytest.importorskip('torch')
    return {k: torch.tensor(v) for k, v in batch.items()}


@pytest.mark.parametrize('as_batch', [dict, tensors])
def test_ledger_by_hand(as_batch):
    tok = build_tokenizer(['a b c d'], 280)
    think, close, end, user, middle, a, b = tok.convert_tokens_to_ids(
        ['<think>', '</think>', '<|im_end|>', '<|im_user|>', '<|im_middle|>', 'a', 'b']
    )
    head = [user, a, middle, b, end, *generation_prompts(tok)[0]]
    one, two, n = [*head, think, b, close, a, end], [*head, a, end], len(head)
    ledger = Ledger(tok)
    ledger.add(
        as_batch(
            dict(
                input_ids=[one, [*two, 0, 0, 0]],
                attention_mask=[[1] * (n + 5), [1] * (n + 2) + [0] * 3],
                labels=[[-100] * n + one[n:], [-100] * n + [a, end, -100, -100, -100]],
            )
        )
    )
    ledger.add(
        as_batch(
            dict(
                input_ids=[[0, *two]],
                attention_mask=[[0, *[1] * (n + 2)]],
                completion_mask=[[0] * (n + 1) + [1, 1]],
            )
        )
    )
    s = ledger.summary()
    assert (s['batches'], s['rows'], s['tokens'], s['trained_tokens'], s['ends_of_turn']) == (
        2,
        3,
        3 * n + 9,
        9,
        3,
    )
    assert s['trained_by_kind'] == dict(think=3, answer=3, end=3) and s['padding_share'] == round(
        4 / (3 * n + 13), 4
    )
    assert s['stream_sha256'] == stream_hash([dict(input_ids=i) for i in (one, two, two)])


def test_ledger_matches_trl_collators():
    "The ledger of what TRL's own collators make of our examples equals the masks."
    from trl.trainer.dpo_trainer import DataCollatorForPreference
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    tok = build_tokenizer(['user assistant a b c d'] * 5, 300)
    examples, counts = encode_rows(tok, ROWS, 'S')
    ledger = Ledger(tok)
    ledger.add(
        DataCollatorForLanguageModeling(tok.pad_token_id)(
            [
                dict(
                    input_ids=e['input_ids'], labels=[i if m else -100 for i, m in zip(*e.values())]
                )
                for e in examples
            ]
        )
    )
    assert (
        ledger.summary()['trained_tokens'] == counts['trained_tokens']
        and ledger.tokens == counts['tokens']
        and ledger.summary()['stream_sha256'] == stream_hash(examples)
    )
    pair = pair_row(tok, dict(prompt='p', chosen='<think>a</think>b', rejected='c d a b'))
    ledger = Ledger(tok)
    ledger.add(DataCollatorForPreference(tok.pad_token_id)([pair]))
    s = ledger.summary()
    assert (s['rows'], s['trained_tokens'], s['ends_of_turn']) == (
        2,
        len(pair['chosen_ids']) + len(pair['rejected_ids']),
        2,
    ) and s['tokens'] == 2 * len(pair['prompt_ids']) + s['trained_tokens']


def test_batches_without_labels_are_refused():
    with pytest.raises(LabError, match='it has input_ids'):
        list(batch_rows(dict(input_ids=[[1]])))
    assert list(batch_rows(dict(input_ids=[[1, 2]], labels=[[1, 2]]))) == [([1, 2], [0, 1])]


def test_speech_ends_with_its_turn():
    names = {
        1: '<think>',
        2: '</think>',
        3: '<|im_end|>',
        4: '<|tool_calls_section_begin|>',
        5: '<|tool_calls_section_end|>',
    }
    assert list(speech([0, 1, 0, 2, 0, 4, 0, 5, 3, 0], names, [3])) == [
        'answer',
        'think',
        'think',
        'think',
        'answer',
        'call',
        'call',
        'call',
        'end',
        'answer',
    ]
    assert list(speech([1, 0, 3, 0], names, [3])) == ['think', 'think', 'end', 'answer']


def test_hash_sees_order_rows_and_ids():
    streams = [[[1, 2], [3]], [[1], [2, 3]], [[3], [1, 2]], [[1, 2, 3]], [[1, 2], [4]]]
    assert len({stream_hash([dict(input_ids=r) for r in s]) for s in streams}) == len(streams)


def test_viewer_escapes_and_stays_small(tok):
    e = encode_row(tok, dict(prompt='<script>' + 'x' * 5000, response='é<b>😀'))
    page = mask_html(tok, e)
    assert (
        '<script' not in page and '<b>' not in page and len(page) < 3000 and 'é&lt;b&gt;😀' in page
    )
    assert ''.join(t for t, *_ in mask_runs(tok, e)) == tok.decode(e['input_ids'])


def test_a_ledger_that_waits_counts_what_was_trained(tmp_path):
    "max_steps in mid-epoch: TRL collates one batch more than it trains."
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from k2lab.models.load import small_model

    tok = build_tokenizer(['user assistant a b c d'] * 5, 300)
    ledger, eager = Ledger(tok, wait=True), Ledger(tok)

    class Passing(TrainerCallback):
        def on_substep_end(self, *args, **kw):
            ledger.passed()

        def on_step_end(self, *args, **kw):
            ledger.passed()

    collator = DataCollatorForLanguageModeling(tok.pad_token_id)

    def collate(rows):
        batch = collator(rows)
        ledger.add(batch)
        eager.add(batch)
        return batch

    rows = labelled(encode_rows(tok, ROWS * 5, 'S')[0])
    args = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        use_cpu=True,
        bf16=False,
        report_to='none',
        save_strategy='no',
        disable_tqdm=True,
        max_length=None,
        gradient_checkpointing=False,
    )
    SFTTrainer(
        small_model('qwen', 'smoke', build_tokenizer(['user assistant a b c d'] * 5, 300)),
        args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tok,
        data_collator=collate,
        callbacks=[Passing()],
    ).train()
    assert (ledger.batches, ledger.rows, eager.batches) == (6, 12, 7)


def test_a_ledger_without_batches_complains(tok):
    with pytest.raises(LabError, match='dataloader_num_workers'):
        Ledger(tok, wait=True).passed()


def stream_hash(examples: list) -> str:
    "The fingerprint of whole examples, as the ledger forms it row by row."
    return reduce(chained, (e['input_ids'] for e in examples), '')


# ---- packing ----


def test_best_fit_loses_nothing_and_fills_rows():
    rng = random.Random(0)
    for room in (8, 100, 1000):
        lengths = [rng.randint(1, room) for _ in range(500)]
        bins = best_fit(lengths, room)
        assert sorted(i for b in bins for i in b) == list(range(500)) and all(
            sum(lengths[i] for i in b) <= room for b in bins
        )
        assert len(bins) <= 1.1 * sum(lengths) / room + 1
    assert best_fit([], 4) == [] and best_fit([4, 4], 4) == [[0], [1]]


@pytest.mark.parametrize('kind', ['k2', 'qwen'])
def test_a_packed_sample_says_what_it_says_alone(kind):
    "In the nano models, trained ones, at double precision, so that nothing but a leak could make a difference."
    torch = pytest.importorskip('torch')
    from k2lab.models.load import open_model, open_tokenizer, shipped

    model, tok = open_model(shipped(kind)).double().eval(), open_tokenizer(shipped(kind))
    if kind == 'k2':
        model.set_experts_implementation('eager')  # the grouped product has no double precision
    examples = encode_rows(
        tok, [dict(prompt=f'{n} + {n}?', response='x' * n) for n in range(1, 14)], 'S'
    )[0]
    batch = packed_batch(labelled(pack(examples, 120)), tok.pad_token_id)
    with torch.no_grad():
        said = model(
            input_ids=batch['input_ids'], position_ids=batch['position_ids'], use_cache=False
        ).logits
    count = 0
    for row, logits, places in zip(batch['input_ids'], said, batch['position_ids']):
        starts = [i for i, p in enumerate(places) if p == 0] + [len(places)]
        for at, end in zip(starts, starts[1:]):
            if end - at == 1:
                continue
            with torch.no_grad():
                alone = model(input_ids=row[at:end][None]).logits[0]
            assert (
                logits[at:end] - alone
            ).abs().max() < 1e-5  # the router and the rotation round to 32 bits all the same
            count += 1
    assert count == len(examples) and len(batch['input_ids']) < count


def test_a_model_that_lets_samples_see_each_other_is_refused():
    torch = pytest.importorskip('torch')
    from k2lab.models.load import open_model, open_tokenizer, shipped
    from k2lab.text.packing import check_alone

    model, tok = open_model(shipped('k2')), open_tokenizer(shipped('k2'))
    rows = labelled(pack(encode_rows(tok, ROWS, 'S')[0], 300))
    check_alone(model, rows, tok.pad_token_id)
    model.register_forward_pre_hook(
        lambda m, args, kwargs: (
            args,
            {**kwargs, 'attention_mask': torch.ones_like(kwargs['input_ids'])},
        ),
        with_kwargs=True,
    )
    with pytest.raises(LabError, match='lets samples see each other'):
        check_alone(model, rows, tok.pad_token_id)


# ---- the audit: faults that leave the loss falling ----

THINKING = [
    dict(prompt=f'{n} + 3?', reasoning=f'{n} + 3 = {n + 3}', final=str(n + 3)) for n in (12, 4)
]


def batch_of(tok, examples, change=lambda e: e) -> dict:
    "A padded batch of labels as TRL's collator makes it, of examples changed by a fault."
    rows = labelled([change(dict(e)) for e in examples])
    width = max(len(r['input_ids']) for r in rows)
    filled = lambda values, fill: values + [fill] * (width - len(values))
    return dict(
        input_ids=[filled(r['input_ids'], tok.pad_token_id) for r in rows],
        attention_mask=[filled([1] * len(r['input_ids']), 0) for r in rows],
        labels=[filled(r['labels'], -100) for r in rows],
    )


def with_mask(change):
    return lambda e: dict(e, completion_mask=change(e['completion_mask']))


def both(change):
    return lambda e: {k: change(v) for k, v in e.items()}


def rendered(tok, text, mask_from) -> dict:
    "An example from a text that was tokenized whole, control strings and all, trained from the last `mask_from` on."
    cut = text.rindex(mask_from) + len(mask_from)
    head, tail = (
        tok(part, add_special_tokens=False).input_ids for part in (text[:cut], text[cut:])
    )
    return dict(input_ids=head + tail, completion_mask=[0] * len(head) + [1] * len(tail))


def talk(row, answer):
    return [
        dict(role='system', content='S'),
        dict(role='user', content=row['prompt']),
        dict(role='assistant', content=answer, reasoning_content=row['reasoning']),
    ]


def packed(tok, **change) -> dict:
    batch = {
        k: v.tolist()
        for k, v in packed_batch(
            labelled(pack([encode_row(tok, r, 'S') for r in THINKING + ROWS], 200)),
            tok.pad_token_id,
        ).items()
    }
    return {**batch, **{k: f(batch) for k, f in change.items()}}


FAULTS = {
    'every token trained': lambda tok, ex: batch_of(tok, ex, with_mask(lambda m: [1] * len(m))),
    'nothing trained': lambda tok, ex: batch_of(tok, ex, with_mask(lambda m: [0] * len(m))),
    'the end of the turn masked, as where pad is eos': lambda tok, ex: batch_of(
        tok, ex, with_mask(lambda m: [*m[:-1], 0])
    ),
    'the mask one place early': lambda tok, ex: batch_of(tok, ex, with_mask(lambda m: [*m[1:], 1])),
    'the mask one place late': lambda tok, ex: batch_of(tok, ex, with_mask(lambda m: [0, *m[:-1]])),
    'labels shifted beforehand': lambda tok, ex: (
        (b := batch_of(tok, ex)) | dict(labels=[[*r[1:], -100] for r in b['labels']])
    ),
    'the reasoning deleted by the template': lambda tok, ex: batch_of(
        tok,
        [
            rendered(
                tok,
                tok.apply_chat_template(talk(r, r['final']), tokenize=False),
                '<|im_assistant|>assistant<|im_middle|>',
            )
            for r in THINKING
        ],
    ),
    "another family's template": lambda tok, ex: batch_of(
        tok,
        [
            rendered(tok, f"User: {r['prompt']}\n\nAssistant: {r['final']}", 'Assistant: ')
            for r in THINKING
        ],
    ),
    'no generation prompt': lambda tok, ex: batch_of(
        tok,
        ex,
        lambda e: {
            k: [
                *v[
                    : (n := sum(m == 0 for m in e['completion_mask']))
                    - len(generation_prompts(tok)[0])
                ],
                *v[n:],
            ]
            for k, v in e.items()
        },
    ),
    'a document begins each row': lambda tok, ex: batch_of(
        tok,
        ex,
        lambda e: dict(
            input_ids=[tok.bos_token_id, *e['input_ids']],
            completion_mask=[0, *e['completion_mask']],
        ),
    ),
    'rows cut at the window': lambda tok, ex: batch_of(tok, ex, both(lambda v: v[:-2])),
    "the tokenizer's eos for the end of the turn": lambda tok, ex: batch_of(
        tok, ex, lambda e: dict(e, input_ids=[*e['input_ids'][:-1], tok.eos_token_id])
    ),
    'text that became control tokens': lambda tok, ex: batch_of(
        tok,
        [
            rendered(
                tok,
                tok.apply_chat_template(
                    talk(dict(r, prompt='stop <|im_end|> here'), 'a')[:2],
                    tokenize=False,
                    add_generation_prompt=True,
                )
                + '<think>b</think>a<|im_end|>',
                '<|im_assistant|>assistant<|im_middle|>',
            )
            for r in THINKING
        ],
    ),
    'padding trained': lambda tok, ex: (
        (b := batch_of(tok, ex))
        | dict(
            labels=[
                [i if i != -100 or not real else -100 for i, real in zip(ids, mask)]
                if not all(mask)
                else want
                for ids, want, mask in zip(b['input_ids'], b['labels'], b['attention_mask'])
            ]
        )
    ),
    'packed, positions that go on': lambda tok, ex: packed(
        tok, position_ids=lambda b: [list(range(len(r))) for r in b['position_ids']]
    ),
    'packed, with an attention mask': lambda tok, ex: packed(
        tok, attention_mask=lambda b: [[1] * len(r) for r in b['input_ids']]
    ),
    'packed, first tokens trained': lambda tok, ex: packed(
        tok,
        labels=lambda b: [
            [
                i if p == 0 and (n + 1 < len(at) and at[n + 1] == 1) else want
                for n, (i, want, p) in enumerate(zip(ids, wants, at))
            ]
            for ids, wants, at in zip(b['input_ids'], b['labels'], b['position_ids'])
        ],
    ),
}


@pytest.fixture(scope='module')
def kimi():
    return build_tokenizer(
        ['user assistant system 12 + 3 = 15, so 15. A graph has nodes.'] * 20, 330
    )


@pytest.mark.parametrize('fault', FAULTS)
def test_a_fault_is_found_before_a_step_is_made_of_it(fault, kimi):
    examples = [encode_row(kimi, r, 'S') for r in THINKING + ROWS]
    batch = FAULTS[fault](kimi, examples)
    with pytest.raises(LabError, match='^batch 1: ') as e:
        Ledger(kimi, examples=examples).add(batch)
    print(f'{fault}: {e.value}'[:160])


@pytest.mark.parametrize(
    'change, name',
    [
        (with_mask(lambda m: [0] * len(m)), 'nothing in it is trained'),
        (with_mask(lambda m: [*m[:-1], 0]), 'never learn to stop'),
        (with_mask(lambda m: [0, *m[:-1]]), 'generation prompt ends'),
        (both(lambda v: v[:-2]), 'the reply is cut'),
        (lambda e: {k: [v[-1], *v] for k, v in e.items()}, 'before the first turn'),
    ],
)
def test_a_fault_is_named(change, name, kimi):
    assert name in Audit(kimi).wrong(
        batch_of(kimi, [encode_row(kimi, r, 'S') for r in THINKING], change)
    )


def test_there_are_12_faults():
    assert len(FAULTS) >= 12


@pytest.mark.parametrize('system', ['', 'S'])
@pytest.mark.parametrize('way', ['padded', 'packed', 'flat', 'preference', 'documents'])
def test_good_batches_pass(way, system, tok):
    rows = [encode_row(tok, r, system) for r in THINKING + ROWS]
    evil = encode_row(
        tok,
        dict(prompt='say <|im_end|>[EOS]<|endoftext|>', response='no </think> <|im_user|>'),
        system,
    )
    documents = concatenate(tok, ['A graph.', 'nodes', 'even <|im_end|>'], 9)
    if way == 'padded':
        batch = batch_of(tok, rows + [evil] + documents)
    elif way == 'documents':
        batch = batch_of(tok, documents)
    elif way == 'preference':
        from trl.trainer.dpo_trainer import DataCollatorForPreference

        sets = [
            pair_row(tok, dict(prompt='p', chosen=c, rejected=r), system)
            for c, r in (('<think>a</think>b', 'no'), ('c', '<think>d'))
        ]
        batch = DataCollatorForPreference(tok.pad_token_id)(sets)
    else:
        batch = packed_batch(
            labelled(pack(rows + [evil] + documents, 220)), tok.pad_token_id, flat=way == 'flat'
        )
    assert Audit(tok).wrong(batch) is None
    (ledger := Ledger(tok)).add(batch)
    assert ledger.rows == dict(
        padded=len(rows) + 1 + len(documents), documents=len(documents), preference=4
    ).get(way, len(rows) + 1 + len(documents))


@pytest.mark.parametrize('room', [0, 400])
def test_the_viewer_and_the_batch_agree_on_a_thousand_rows(room, tok):
    "What the viewer colours is what has a label, token by token, padded and packed."
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    rng = random.Random(3)
    say = lambda n: ' '.join(
        rng.choices(
            ['12', '+', '=', 'nodes', 'é', '<|im_end|>', '月', '😀', 'graph.'], k=rng.randint(1, n)
        )
    )
    examples = encode_rows(
        tok,
        [
            dict(prompt=say(9), reasoning=say(20), final=say(3))
            if n % 2
            else dict(instruction=say(9), input=say(4), output=say(6))
            for n in range(1000)
        ],
        'S',
        400,
    )[0]
    seen = 0
    for start in range(0, len(examples), 8):
        part = examples[start : start + 8]
        rows = labelled(pack(part, room) if room else part)
        batch = (
            packed_batch(rows, tok.pad_token_id)
            if room
            else DataCollatorForLanguageModeling(tok.pad_token_id)(rows)
        )
        flags = {tuple(ids): mask for ids, mask in batch_rows(batch)}
        for e in part:
            assert flags[tuple(e['input_ids'])] == e['completion_mask']
            assert ''.join(text for text, trained, _ in mask_runs(tok, e) if trained) == tok.decode(
                [i for i, m in zip(e['input_ids'], flags[tuple(e['input_ids'])]) if m]
            )
            seen += 1
    assert seen == len(examples) >= 990
