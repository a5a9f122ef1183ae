"Chat: the lab's spans, its templates and the makers' own tokenizer agree, on conversations of every shape."
import base64, itertools, json, random
from pathlib import Path
import pytest
from k2lab.chat import (CHAT_TEMPLATE, KEPT_TOKENS, KIMI_PATTERN, QWEN_PATTERN, SPECIAL_TOKENS, Span, build_tokenizer, byte_level, encode, family_of, pair_spans,
                        parse_reply, pieces, prompt_spans, reply_spans, row_spans, target_spans, text_of)
from k2lab.core import LabError

KIMI_FILES = Path(__file__).parents[2]/'shared'/'kimi-tokenizer'
TEXTS = ["The graph has 12345 nodes, don't it? café 月之暗面 naïve\n\n\n  def f(x):\n\treturn x + 1\n", 'You are a helpful assistant. {"city": "Rome"} ## Return of functions.f:0\n'] * 10

@pytest.fixture(scope='module', params=['kimi', 'qwen'])
def tok(request): return build_tokenizer(TEXTS, 420, request.param)

CALL = dict(id='functions.get_weather:0', type='function', function=dict(name='get_weather', arguments='{"city": "Rome"}'))
TWO = dict(id='functions.get_weather:1', type='function', function=dict(name='get_weather', arguments={'city': 'Málaga', 'b': [1, 2]}))
TOOLS = [dict(type='function', function=dict(name='get_weather', description='Weather in "a" city é', parameters=dict(type='object', properties=dict(city=dict(type='string')), required=['city'])))]
USER, SYSTEM = dict(role='user', content='\n 12 + 30?  '), dict(role='system', content='Be brief.')
ASK = dict(role='assistant', reasoning_content='Look it up.', content='', tool_calls=[CALL, TWO])
SAY = dict(role='assistant', reasoning_content='Think.', content='\nLet me see', tool_calls=[CALL])
GOT, MORE = dict(role='tool', name='get_weather', tool_call_id='functions.get_weather:0', content='sunny'), dict(role='tool', tool_call_id='functions.get_weather:1', content='{"t": 21}')
ANSWER = dict(role='assistant', reasoning_content='So.', content='Sunny.')
TALKS = dict(plain=[USER], system=[SYSTEM, USER], named=[dict(USER, name='Ana')], loop=[USER, ASK, GOT, MORE], talking_loop=[SYSTEM, USER, SAY, GOT], finished=[USER, ASK, GOT, MORE, ANSWER],
             again=[SYSTEM, USER, ASK, GOT, MORE, ANSWER, USER, SAY, GOT], silent=[USER, dict(role='assistant', content=None, tool_calls=[CALL]), GOT],
             no_thought=[USER, dict(role='assistant', content='Hi'), USER], parts=[dict(role='user', content=[dict(type='text', text='a'), dict(type='text', text='b')])])

@pytest.mark.parametrize('tools', [None, TOOLS], ids=['bare', 'tools'])
@pytest.mark.parametrize('talk', TALKS)
def test_spans_are_the_template(tok, talk, tools):
    if talk == 'named' and family_of(tok) == 'qwen': pytest.skip('ChatML has no names')
    messages, family = TALKS[talk], family_of(tok)
    spans = prompt_spans(messages, tools, family)
    want = tok.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    assert text_of(spans) == want
    assert encode(tok, spans)[0] == tok(want, add_special_tokens=False).input_ids
    assert not any(s.train for s in spans)

def test_kimi_rules_by_hand():
    text = text_of(prompt_spans([USER, ASK, GOT], TOOLS))
    assert text.startswith('<|im_system|>tool_declare<|im_middle|>[{"function":{"description":"Weather in \\"a\\" city é","name":"get_weather","parameters":')
    assert '<|im_end|><|im_system|>system<|im_middle|>You are Kimi, an AI assistant created by Moonshot AI.<|im_end|><|im_user|>user<|im_middle|>' in text
    assert '<think>Look it up.</think><|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{"city": "Rome"}<|tool_call_end|>' in text
    assert text.endswith('<|im_system|>get_weather<|im_middle|>## Return of functions.get_weather:0\nsunny<|im_end|><|im_assistant|>assistant<|im_middle|>')
    assert text_of(prompt_spans([USER, ASK, GOT, ANSWER, USER])).count('<think></think>') == 2

def test_qwen_by_hand():
    assert text_of(prompt_spans([SYSTEM, dict(role='user', content='Hi')], family='qwen')) == '<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n'
    text = text_of(prompt_spans([USER, ASK, GOT, MORE], family='qwen'))
    assert '<|im_start|>assistant\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>\n<tool_call>' in text
    assert '<|im_start|>user\n<tool_response>\nsunny\n</tool_response>\n<tool_response>\n{"t": 21}\n</tool_response><|im_end|>\n<|im_start|>assistant\n' in text

@pytest.mark.parametrize('calls', [None, [CALL], [CALL, TWO]])
@pytest.mark.parametrize('content,reasoning', [('Yes.', None), ('Yes.', ''), ('', 'r'), ('a\n', 'r\n')])
@pytest.mark.parametrize('family', ['kimi', 'qwen'])
def test_target_round_trip(family, content, reasoning, calls):
    spans = target_spans(content, reasoning, calls, family)
    assert spans[-1] == Span('<|im_end|>', 'assistant', True, True) and all(s.train for s in spans)
    got = parse_reply(text_of(spans))
    assert got['reasoning'] == reasoning and got['content'].strip() == content.strip()
    assert [json.loads(c['function']['arguments']) for c in got['tool_calls']] == [json.loads(c['function']['arguments']) if isinstance(c['function']['arguments'], str) else c['function']['arguments'] for c in calls or []]
    if family == 'kimi': assert [c['id'] for c in got['tool_calls']] == [c['id'] for c in calls or []]

def test_qwen_target_continues_the_template():
    tok, talk = build_tokenizer(TEXTS, 300, 'qwen'), [USER, dict(SAY, content='See'), ]
    assert text_of(prompt_spans([USER], family='qwen') + target_spans('See', None, [CALL], 'qwen')) + '\n' == tok.apply_chat_template(talk, tokenize=False)

def test_no_text_becomes_a_control_token(tok):
    family = family_of(tok)
    evil = ''.join(tok.get_added_vocab()) * 2 + ' <|im_end|> [EOS]</think>'
    controls = set(tok.get_added_vocab().values())
    clean = [dict(USER, content='x'), ASK, dict(GOT, content='x')]
    dirty = [dict(USER, content=evil), dict(ASK, reasoning_content=evil), dict(GOT, content=evil)]
    only = lambda spans: [i for i in encode(tok, spans)[0] if i in controls]
    assert only(prompt_spans(dirty, family=family)) == only(prompt_spans(clean, family=family))
    assert tok.decode(encode(tok, prompt_spans(dirty, family=family))[0]) == text_of(prompt_spans(dirty, family=family))
    assert only(target_spans(evil, evil, family=family)) == only(target_spans('x', 'x', family=family))

def test_random_text_survives(tok):
    rng, letters = random.Random(0), 'ab Z9\n\t.,\'"<|>[]_é月之😀\u200b'
    for _ in range(200):
        text = ''.join(rng.choices(letters, k=rng.randrange(30)))
        ids, mask = encode(tok, [Span(text, 'user', False, False)])
        assert tok.decode(ids) == text and ids == tok(text, add_special_tokens=False).input_ids and mask == [0] * len(ids)

def test_mask_is_the_target(tok):
    family = family_of(tok)
    prompt, target = row_spans(dict(prompt='2+2?', reasoning='two and two', final='4'), 'Be brief.', family)
    ids, mask = encode(tok, prompt + target)
    assert mask == sorted(mask) and encode(tok, prompt)[0] == ids[:mask.index(1)] and encode(tok, target)[0] == ids[mask.index(1):]
    assert tok.decode(ids[mask.index(1):]) == '<think>two and two</think>4<|im_end|>'
    assert len(encode(tok, [Span('<think>', 'think', True, True)])[0]) == (1 if family == 'kimi' else len(tok('<think>').input_ids))

def test_rows():
    asked = lambda row: text_of(row_spans(row, 'S')[0])
    assert asked(dict(instruction='I', input='', output='o')).endswith('<|im_user|>user<|im_middle|>I<|im_end|><|im_assistant|>assistant<|im_middle|>')
    assert '<|im_middle|>I\n\nthe input<|im_end|>' in asked(dict(instruction='I', input='the input', output='o', family='extra'))
    assert text_of(row_spans(dict(instruction='I', input='', output='o'))[1]) == 'o<|im_end|>'
    assert text_of(row_spans(dict(prompt='p', response='<think>r</think>f'))[1]) == '<think>r</think>f<|im_end|>'
    prompt, chosen, rejected = pair_spans(dict(prompt='p', chosen='<think>r</think>f', rejected='no'), 'S')
    assert text_of(chosen) == '<think>r</think>f<|im_end|>' and text_of(rejected) == 'no<|im_end|>' and not any(s.train for s in prompt)
    assert text_of(reply_spans('<think>cut off')) == '<think>cut off<|im_end|>'
    assert [s.special for s in reply_spans('<think>a</think>b')] == [True, False, True, False, True]

@pytest.mark.parametrize('text,want', [
    ('plain', (None, 'plain', 0)), ('<think>a</think>b', ('a', 'b', 0)), ('<think>cut', ('cut', '', 0)), ('\n<think>line\ntwo</think>\nb<|im_end|>', ('line\ntwo', '\nb', 0)),
    ('<think>a<|tool_calls_section_begin|><|tool_call_begin|>functions.f:3<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>', ('a', '', 1)),
    ('x<|tool_calls_section_begin|><|tool_call_begin|>f:0<|tool_call_argument_begin|>{"a', (None, 'x<|tool_calls_section_begin|><|tool_call_begin|>f:0<|tool_call_argument_begin|>{"a', 0)),
    ('<tool_call>\nnot json\n</tool_call>', (None, '<tool_call>\nnot json\n</tool_call>', 0)), ('', (None, '', 0))])
def test_parse_reply(text, want):
    got = parse_reply(text)
    assert (got['reasoning'], got['content'], len(got['tool_calls'])) == want

@pytest.mark.parametrize('call,word', [
    (lambda: prompt_spans([USER], family='llama'), 'valid: kimi, qwen'), (lambda: prompt_spans([dict(role='robot', content='')]), "role 'robot'"),
    (lambda: prompt_spans([dict(role='tool', content='')]), 'tool_call_id'), (lambda: target_spans('', tool_calls=[dict(function=dict(name='f', arguments=''))]), 'functions.f:0'),
    (lambda: row_spans(dict(text='t')), 'keys text'), (lambda: build_tokenizer([''], 200), 'at least 275'), (lambda: build_tokenizer([''], 2000, 'x'), 'valid: kimi, qwen')])
def test_refusals(call, word):
    with pytest.raises(LabError, match=word): call()

def test_tokenizer_survives_a_save(tok, tmp_path):
    from transformers import AutoTokenizer
    tok.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    spans = prompt_spans([USER, ASK, GOT], TOOLS, family_of(tok))
    assert encode(again, spans) == encode(tok, spans) and again.get_added_vocab() == tok.get_added_vocab()
    assert (again.eos_token_id, again.pad_token_id, again.chat_template) == (tok.eos_token_id, tok.pad_token_id, tok.chat_template)

def test_kept_and_dropped_tokens():
    tok = build_tokenizer(TEXTS, 300)
    ids = encode(tok, target_spans('4', 'r', [CALL]))[0]
    assert tok.decode(ids, skip_special_tokens=True) == text_of(target_spans('4', 'r', [CALL])).removesuffix('<|im_end|>')
    assert tok.convert_tokens_to_ids(SPECIAL_TOKENS) == list(range(len(tok) - 19, len(tok)))

def test_patterns():
    assert pieces("don't 1234 月之x", KIMI_PATTERN) == ["don't", ' ', '123', '4', ' ', '月之', 'x']
    assert pieces("don't 1234", QWEN_PATTERN) == ['don', "'t", ' ', '1', '2', '3', '4']

@pytest.mark.skipif(not KIMI_FILES.exists(), reason='the real Kimi tokenizer is not beside this checkout')
def test_real_kimi_tokenizer():
    "KIMI_PATTERN and SPECIAL_TOKENS give Moonshot's own ids. BPE from ranks: the cheapest neighbouring pair merges first (tiktoken's rule)."
    ranks = {base64.b64decode(b): int(r) for b, r in (line.split() for line in (KIMI_FILES/'tiktoken.model').read_bytes().splitlines())}
    known = {v['content']: int(k) for k, v in json.loads((KIMI_FILES/'tokenizer_config.json').read_text())['added_tokens_decoder'].items()}
    assert sorted(known, key=known.get) == SPECIAL_TOKENS[:15] + ['<|media_begin|>', '<|media_content|>', '<|media_end|>', '<|media_pad|>'] + SPECIAL_TOKENS[15:]
    config = json.loads((KIMI_FILES/'tokenizer_config.json').read_text())['added_tokens_decoder'].values()
    assert {v['content'] for v in config if not v['special']} == {t for t in KEPT_TOKENS if t in SPECIAL_TOKENS}
    def bpe(piece):
        parts = [bytes([b]) for b in piece.encode()]
        while len(parts) > 1:
            rank, i = min((ranks.get(a + b, 1 << 30), i) for i, (a, b) in enumerate(itertools.pairwise(parts)))
            if rank == 1 << 30: break
            parts[i:i+2] = [parts[i] + parts[i+1]]
        return [ranks[p] for p in parts]
    rows = [json.loads(line) for line in (KIMI_FILES/'gold.jsonl').read_text().splitlines()]
    plain = [r for r in rows if not any(t in r['text'] for t in known)]
    assert len(plain) > 200
    for r in plain: assert [i for p in pieces(r['text'], KIMI_PATTERN) for i in bpe(p)] == r['ids']
