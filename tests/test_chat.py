"Chat: the lab's spans, its templates and the makers' own tokenizer agree, on conversations of every shape."

import base64
import json
import random
import unicodedata
from pathlib import Path

import pytest

from k2lab.lab.config import LabError
from k2lab.text.calls import parse_reply
from k2lab.text.chat import (
    Conversation,
    call_ids,
    check_call,
    check_messages,
    encode,
    markup_read,
    prompt_ids,
)
from k2lab.text.masks import encode_row, pair_row, row_examples
from k2lab.text.tokenizer import (
    CHAT_FAMILIES,
    CHAT_TEMPLATE,
    KEPT_TOKENS,
    KIMI_PATTERN,
    QWEN_PATTERN,
    SPECIAL_TOKENS,
    build_tokenizer,
    family_of,
    load_kimi_tokenizer,
    plain_tokenizer,
    pretokens,
)

KIMI_FILES = Path(__file__).parents[2] / 'shared' / 'kimi-tokenizer'
TEXTS = [
    "The graph has 12345 nodes, don't it? café 月之暗面 naïve\n\n\n  def f(x):\n\treturn x + 1\n",
    'You are a helpful assistant. {"city": "Rome"} ## Return of functions.f:0\n',
] * 10


@pytest.fixture(scope='module', params=list(CHAT_FAMILIES))
def tok(request):
    return build_tokenizer(TEXTS, 420, request.param)


CALL = dict(
    id='functions.get_weather:0',
    type='function',
    function=dict(name='get_weather', arguments='{"city": "Rome"}'),
)
TWO = dict(
    id='functions.get_weather:1',
    type='function',
    function=dict(name='get_weather', arguments={'city': 'Málaga', 'b': [1, 2]}),
)
TOOLS = [
    dict(
        type='function',
        function=dict(
            name='get_weather',
            description='Weather in "a" city é',
            parameters=dict(
                type='object', properties=dict(city=dict(type='string')), required=['city']
            ),
        ),
    )
]
USER, SYSTEM = dict(role='user', content='\n 12 + 30?  '), dict(role='system', content='Be brief.')
ASK = dict(role='assistant', reasoning_content='Look it up.', content='', tool_calls=[CALL, TWO])
SAY = dict(role='assistant', reasoning_content='Think.', content='\nLet me see', tool_calls=[CALL])
GOT, MORE = (
    dict(role='tool', name='get_weather', tool_call_id='functions.get_weather:0', content='sunny'),
    dict(role='tool', tool_call_id='functions.get_weather:1', content='{"t": 21}'),
)
ANSWER = dict(role='assistant', reasoning_content='So.', content='Sunny.')
TALKS = dict(
    plain=[USER],
    system=[SYSTEM, USER],
    named=[dict(USER, name='Ana')],
    loop=[USER, ASK, GOT, MORE],
    talking_loop=[SYSTEM, USER, SAY, GOT],
    finished=[USER, ASK, GOT, MORE, ANSWER],
    again=[SYSTEM, USER, ASK, GOT, MORE, ANSWER, USER, SAY, GOT],
    silent=[USER, dict(role='assistant', content=None, tool_calls=[CALL]), GOT],
    no_thought=[USER, dict(role='assistant', content='Hi'), USER],
    parts=[dict(role='user', content=[dict(type='text', text='a'), dict(type='text', text='b')])],
    reminded=[SYSTEM, USER, SYSTEM, USER],
    twice=[USER, ANSWER, ANSWER, USER],
    interrupted=[USER, ASK, USER],
)


TOKENIZERS = {}


def of(family: str):
    "The tokenizer of a family, built once."
    if family not in TOKENIZERS:
        TOKENIZERS[family] = build_tokenizer(TEXTS, 420, family)
    return TOKENIZERS[family]


def prompt_text(messages, tools=None, family='kimi') -> str:
    talk = Conversation(of(family), messages, tools)
    return talk.letters.show(talk.prompt())


def reply_text(content, reasoning=None, calls=None, family='kimi') -> str:
    "The reply to a short question as text."
    reply = dict(role='assistant', content=content, tool_calls=calls)
    if reasoning is not None:
        reply['reasoning_content'] = reasoning
    talk = Conversation(of(family), [USER, reply])
    return talk.letters.show(talk.reply(1))


@pytest.mark.parametrize('tools', [None, TOOLS], ids=['bare', 'tools'])
@pytest.mark.parametrize('talk', TALKS)
def test_a_prompt_is_what_the_template_prints(tok, talk, tools):
    if talk == 'named' and family_of(tok) == 'qwen':
        pytest.skip('ChatML has no names')
    want = tok.apply_chat_template(
        TALKS[talk], tools=tools, tokenize=False, add_generation_prompt=True
    )
    assert prompt_ids(tok, TALKS[talk], tools) == tok(want, add_special_tokens=False).input_ids


def test_kimi_rules_by_hand():
    text = prompt_text([USER, ASK, GOT], TOOLS)
    assert text.startswith(
        '<|im_system|>tool_declare<|im_middle|>[{"function":{"description":"Weather in '
        '\\"a\\" city é","name":"get_weather","parameters":'
    )
    assert (
        '<|im_end|><|im_system|>system<|im_middle|>You are Kimi, an AI assistant created '
        'by Moonshot AI.<|im_end|><|im_user|>user<|im_middle|>' in text
    )
    assert (
        '<think>Look it up.</think><|tool_calls_section_begin|>'
        '<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{"city": '
        '"Rome"}<|tool_call_end|>' in text
    )
    assert text.endswith(
        '<|im_system|>get_weather<|im_middle|>## Return of functions.get_weather:0\n'
        'sunny<|im_end|><|im_assistant|>assistant<|im_middle|>'
    )
    assert prompt_text([USER, ASK, GOT, ANSWER, USER]).count('<think></think>') == 2


def test_qwen_by_hand():
    assert (
        prompt_text([SYSTEM, dict(role='user', content='Hi')], family='qwen')
        == '<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n'
    )
    text = prompt_text([USER, ASK, GOT, MORE], family='qwen')
    assert (
        '<|im_start|>assistant\n<tool_call>\n{"name": "get_weather", "arguments": '
        '{"city": "Rome"}}\n</tool_call>\n<tool_call>' in text
    )
    assert (
        '<|im_start|>user\n<tool_response>\nsunny\n</tool_response>\n<tool_response>\n'
        '{"t": 21}\n</tool_response><|im_end|>\n<|im_start|>assistant\n' in text
    )


@pytest.mark.parametrize('calls', [None, [CALL], [CALL, TWO]])
@pytest.mark.parametrize(
    'content,reasoning', [('Yes.', None), ('Yes.', ''), ('', 'r'), ('a\n', 'r\n')]
)
@pytest.mark.parametrize('family', CHAT_FAMILIES)
def test_a_reply_is_read_back(family, content, reasoning, calls):
    text = reply_text(content, reasoning, calls, family)
    assert text.endswith('<|im_end|>') and text.count('<|im_end|>') == 1
    got = parse_reply(text)
    empty = '' if family == 'kimi' else None  # a thinking model says that it did not think
    assert got['reasoning'] == (empty if reasoning is None else reasoning)
    assert got['content'].strip() == content.strip()
    assert [json.loads(c['function']['arguments']) for c in got['tool_calls']] == [
        json.loads(c['function']['arguments'])
        if isinstance(c['function']['arguments'], str)
        else c['function']['arguments']
        for c in calls or []
    ]
    if family != 'qwen':
        assert [c['id'] for c in got['tool_calls']] == [c['id'] for c in calls or []]


def test_replies_by_hand():
    calls = (
        '<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0'
        '<|tool_call_argument_begin|>{"city": "Rome"}<|tool_call_end|><|tool_calls_section_end|>'
    )
    assert reply_text('4') == '<think></think>4<|im_end|>'
    assert reply_text('4', 'r') == '<think>r</think>4<|im_end|>'
    assert reply_text('', 'r', [CALL]) == f'<think>r</think>{calls}<|im_end|>'
    assert reply_text('4', family='kimi_instruct') == '4<|im_end|>'
    assert reply_text('See', None, [CALL], 'kimi_instruct') == f'See{calls}<|im_end|>'
    assert reply_text('4', 'r', family='qwen') == '<think>r</think>4<|im_end|>'
    assert reply_text('See', None, [CALL], 'qwen') == (
        'See\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'
    )


def test_no_text_becomes_a_control_token(tok):
    evil = ''.join(tok.get_added_vocab()) * 2 + ' <|im_end|> [EOS]</think>'
    controls = set(tok.get_added_vocab().values())
    clean = [dict(USER, content='x'), ASK, dict(GOT, content='x')]
    dirty = [dict(USER, content=evil), dict(ASK, reasoning_content=evil), dict(GOT, content=evil)]
    only = lambda ids: [i for i in ids if i in controls]
    assert only(prompt_ids(tok, dirty)) == only(prompt_ids(tok, clean))
    talk = Conversation(tok, dirty)
    assert tok.decode(prompt_ids(tok, dirty)) == talk.letters.show(talk.prompt())
    replies = [
        Conversation(tok, [USER, dict(ANSWER, content=text, reasoning_content=text)]).turn_ids(1)[1]
        for text in (evil, 'x')
    ]
    assert only(replies[0]) == only(replies[1]) and len(replies[0]) > len(replies[1])


def test_private_characters_are_refused():
    with pytest.raises(LabError, match='private characters'):
        prompt_ids(of('kimi'), [dict(USER, content='\U0010f000')])


def test_random_text_survives(tok):
    rng, letters = random.Random(0), 'ab Z9\n\t.,\'"<|>[]_é月之😀\u200b'
    for _ in range(200):
        text = ''.join(rng.choices(letters, k=rng.randrange(30)))
        ids = encode(tok, text)
        assert tok.decode(ids) == text and ids == tok(text, add_special_tokens=False).input_ids


def test_mask_is_the_reply(tok):
    row = dict(prompt='2+2?', reasoning='two and two', final='4')
    example = encode_row(tok, row, 'Be brief.')
    ids, mask = example['input_ids'], example['completion_mask']
    asked = [dict(role='system', content='Be brief.'), dict(role='user', content='2+2?')]
    assert mask == sorted(mask) and prompt_ids(tok, asked) == ids[: mask.index(1)]
    assert tok.decode(ids[mask.index(1) :]) == '<think>two and two</think>4<|im_end|>'
    think = tok.get_added_vocab().get('<think>')
    assert (think in ids[mask.index(1) :]) == (family_of(tok) == 'kimi')


def test_rows():
    tok = of('kimi')

    def parts(row):
        example = encode_row(tok, row, 'S')
        start = example['completion_mask'].index(1)
        ids = example['input_ids']
        return tok.decode(ids[:start]), tok.decode(ids[start:])

    prompt, reply = parts(dict(instruction='I', input='', output='o'))
    assert prompt.endswith(
        '<|im_user|>user<|im_middle|>I<|im_end|><|im_assistant|>assistant<|im_middle|>'
    )
    assert reply == '<think></think>o<|im_end|>'
    row = dict(instruction='I', input='the input', output='o', family='extra')
    assert '<|im_middle|>I\n\nthe input<|im_end|>' in parts(row)[0]
    assert parts(dict(prompt='p', response='<think>r</think>f'))[1] == '<think>r</think>f<|im_end|>'
    pair = pair_row(tok, dict(prompt='p', chosen='<think>r</think>f', rejected='no'), 'S')
    assert [tok.decode(pair[k]) for k in ('chosen_ids', 'rejected_ids')] == [
        '<think>r</think>f<|im_end|>',
        '<think></think>no<|im_end|>',
    ]
    pair = pair_row(tok, dict(prompt='p', chosen='f', rejected='<think>cut off'), 'S')
    assert tok.decode(pair['rejected_ids']) == '<think>cut off<|im_end|>'


LOOP = [
    USER,
    ASK,
    GOT,
    MORE,
    ANSWER,
    dict(role='user', content='And now?'),
    dict(ANSWER, content='Rain.'),
]


def trained(tok, example) -> list[str]:
    "The trained stretches of an example as text."
    ids, out = example['input_ids'], []
    for i, m in enumerate(example['completion_mask']):
        if m and not example['completion_mask'][i - 1]:
            out.append([])
        if m:
            out[-1].append(ids[i])
    return [tok.decode(part) for part in out]


def test_each_reply_of_a_conversation_is_trained_once():
    calls = reply_text('', 'Look it up.', [CALL, TWO]).removesuffix('<|im_end|>')
    examples = row_examples(of('kimi'), dict(messages=LOOP, tools=TOOLS))
    assert [trained(of('kimi'), e) for e in examples] == [
        [f'{calls}<|im_end|>', '<think>So.</think>Sunny.<|im_end|>'],
        ['<think>So.</think>Rain.<|im_end|>'],
    ]  # the template keeps thoughts while tools run, and takes them out of finished turns
    bare = [{k: v for k, v in m.items() if k != 'reasoning_content'} for m in LOOP]
    instruct = of('kimi_instruct')
    (one,) = row_examples(instruct, dict(messages=bare, tools=TOOLS))
    assert [len(t) > 10 for t in trained(instruct, one)] == [True, True, True]
    assert trained(instruct, one)[1:] == ['Sunny.<|im_end|>', 'Rain.<|im_end|>']


def test_which_replies_are_trained():
    tok = of('kimi')
    row = dict(messages=LOOP, tools=TOOLS)
    assert [trained(tok, e) for e in row_examples(tok, row, replies='last')] == [
        ['<think>So.</think>Rain.<|im_end|>']
    ]
    quiet = [dict(m, train=False) if m is LOOP[-1] else m for m in LOOP]
    assert len(row_examples(tok, dict(row, messages=quiet))) == 1
    with pytest.raises(LabError, match="unknown value 'first'; valid: all, last"):
        row_examples(tok, row, replies='first')
    with pytest.raises(LabError, match='makes 2 examples'):
        encode_row(tok, row)


def test_ids_of_calls_by_other_makers():
    ask = dict(ASK, tool_calls=[dict(CALL, id='call_a8f3'), dict(TWO, id='call_b')])
    got = [dict(GOT, tool_call_id='call_a8f3'), dict(MORE, tool_call_id='call_b')]
    (example,) = row_examples(of('kimi'), dict(messages=[USER, ask, *got, ANSWER], tools=TOOLS))
    (same,) = row_examples(of('kimi'), dict(messages=LOOP[:5], tools=TOOLS))
    assert example == same
    assert call_ids([ASK])[0]['tool_calls'] == ASK['tool_calls']


def test_no_two_calls_share_an_id():
    ask = lambda *ids: dict(ASK, tool_calls=[dict(CALL, id=i) for i in ids])
    got = lambda *ids: [dict(GOT, tool_call_id=i) for i in ids]
    again = [
        ask('a'),
        *got('a'),
        ask('a'),
        *got('a'),
        ask('a'),
        *got('a'),
    ]  # a maker that starts over
    mixed = [ask('functions.get_weather:1', 'b'), *got('functions.get_weather:1', 'b')]
    for messages in (again, mixed):
        ids = [c['id'] for m in call_ids(messages) for c in m.get('tool_calls') or []]
        assert len(set(ids)) == len(ids)
        assert [m['tool_call_id'] for m in call_ids(messages) if m['role'] == 'tool'] == ids


def test_a_reply_with_nothing_before_it():
    row = dict(messages=[dict(role='assistant', content='Hi'), USER, ANSWER])
    with pytest.raises(LabError, match='message 0: nothing stands before this reply'):
        row_examples(of('qwen'), row)
    row['messages'][0]['train'] = False
    (example,) = row_examples(of('qwen'), row)
    assert trained(of('qwen'), example) == ['<think>So.</think>Sunny.<|im_end|>']


def test_the_name_of_a_speaker_is_printed_or_refused():
    row = dict(messages=[dict(USER, name='Ana'), ANSWER])
    assert '>Ana<|im_middle|>' in of('kimi').decode(encode_row(of('kimi'), row)['input_ids'])
    with pytest.raises(LabError, match='does not print the names of speakers'):
        encode_row(of('qwen'), row)


@pytest.mark.parametrize(
    'text,thought,content',
    [
        ('<think>a</think>b', 'a', 'b'),
        ('a</think>b', 'a', 'b'),  # the prompt opened the thought
        ('\n<think>line\ntwo</think>\nb', 'line\ntwo', '\nb'),
    ],
)
def test_thoughts_written_as_letters(text, thought, content):
    read = markup_read(dict(role='assistant', content=text), 'message 1')
    assert (read['reasoning_content'], read['content']) == (thought, content)


def test_calls_written_as_letters_become_control_tokens():
    tok, written = of('kimi'), reply_text('', 'Hm.', [CALL, TWO]).removesuffix('<|im_end|>')
    example = encode_row(tok, dict(prompt='Weather?', response=written))
    names = {i: t for t, i in tok.get_added_vocab().items()}
    learned = [i for i, m in zip(example['input_ids'], example['completion_mask']) if m]
    tool_tags = [names[i] for i in learned if '<|tool_' in names.get(i, '')]
    assert len(tool_tags) == 8 and len(set(tool_tags)) == 5
    assert tok.decode(learned) == f'{written}<|im_end|>'


@pytest.mark.parametrize(
    'text',
    [
        'Yes. <think>Why?</think>',
        '<think>a</think><think>b</think>c',
        '<think>cut off',
        'x<|tool_calls_section_begin|><|tool_call_begin|>f:0<|tool_call_argument_begin|>{"a',
        '<tool_call>\nnot json\n</tool_call>',
    ],
)
def test_markup_that_is_not_whole_is_refused(text):
    with pytest.raises(LabError, match='message 1: markup in its text cannot be read as one reply'):
        markup_read(dict(role='assistant', content=text), 'message 1')


@pytest.mark.parametrize(
    'text,want',
    [
        ('plain', (None, 'plain', 0)),
        ('<think>a</think>b', ('a', 'b', 0)),
        ('<think>cut', ('cut', '', 0)),
        ('\n<think>line\ntwo</think>\nb<|im_end|>', ('line\ntwo', '\nb', 0)),
        (
            '<think>a<|tool_calls_section_begin|><|tool_call_begin|>functions.f:3'
            '<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>',
            ('a', '', 1),
        ),
        (
            'x<|tool_calls_section_begin|><|tool_call_begin|>f:0<|tool_call_argument_begin|>{"a',
            (
                None,
                'x<|tool_calls_section_begin|><|tool_call_begin|>f:0<|tool_call_argument_begin|>{"a',
                0,
            ),
        ),
        ('<tool_call>\nnot json\n</tool_call>', (None, '<tool_call>\nnot json\n</tool_call>', 0)),
        ('', (None, '', 0)),
    ],
)
def test_parse_reply(text, want):
    got = parse_reply(text)
    assert (got['reasoning'], got['content'], len(got['tool_calls'])) == want


def function(arguments, name='get_weather'):
    return dict(name=name, arguments=arguments)


def checked(*messages, ids=True):
    return lambda: check_messages(messages, ids)


def learned(**call):
    return lambda: check_call(dict(CALL, **call))


@pytest.mark.parametrize(
    'call,word',
    [
        (checked(dict(role='robot', content='')), "message 0 has role 'robot'"),
        (
            lambda: prompt_ids(of('kimi'), [USER, dict(role='user', content=5)]),
            'message 1 has content of type int',
        ),
        (
            lambda: prompt_ids(of('kimi'), [dict(role='user', content=[dict(type='image_url')])]),
            "message 0 has a part of type 'image_url'",
        ),
        (checked(dict(USER, tool_calls=[CALL])), "message 0 has tool calls but role 'user'"),
        (
            checked(dict(role='tool', content='')),
            'message 0 is a tool result without its tool_call_id',
        ),
        (checked(USER, GOT), 'message 1 is a tool result, but nothing before it calls'),
        (checked(USER, GOT, ids=False), 'message 1 is a tool result, but nothing'),
        (
            checked(USER, SAY, MORE),
            "message 2 is the result of 'functions.get_weather:1'.*called were functions.get_weather:0",
        ),
        (
            checked(USER, dict(SAY, tool_calls=[dict(CALL, id='')])),
            'no id; K2 needs one like functions.get_weather:0',
        ),
        (
            checked(USER, dict(SAY, tool_calls=[dict(CALL, function=dict(name='f'))])),
            "message 1 calls 'f' without arguments",
        ),
        (
            checked(USER, dict(SAY, tool_calls=[dict(CALL, function=function('{}', None))])),
            'without a function name',
        ),
        (learned(id=''), 'functions.get_weather:0'),
        (learned(id='call_a8f3'), "has the id 'call_a8f3'"),
        (learned(id='functions.other:0'), "has the id 'functions.other:0'"),
        (learned(id='functions.get_weather'), 'has the id'),
        (learned(function=function('{"city": ')), 'not JSON'),
        (learned(function=function('[1]')), 'no JSON object'),
        (learned(function=function('{}', 'a.b'), id='functions.a.b:0'), 'rename the tool'),
        (
            lambda: check_call(dict(CALL, id='x', function=function('{')), ids=False),
            'not JSON',
        ),
        (lambda: encode_row(of('kimi'), dict(text='t')), 'text'),
        (
            lambda: encode_row(of('kimi'), dict(instruction='Ask', input='', output=' \n')),
            'output is empty',
        ),
        (
            lambda: encode_row(of('qwen'), dict(prompt='Ask', reasoning='r', final='')),
            'final is empty',
        ),
        (
            lambda: encode_row(of('kimi'), dict(prompt='Ask', response='<think>cut off')),
            'a thought that does not end',
        ),
        (
            lambda: encode_row(of('kimi'), dict(prompt='Ask', response='<think>7 * 6</think>')),
            r'messages\[1\].content is empty',
        ),
        (lambda: pair_row(of('kimi'), dict(prompt='Ask', chosen='', rejected='no')), 'chosen'),
        (lambda: build_tokenizer([''], 200), 'at least 275'),
        (lambda: build_tokenizer([''], 2000, 'x'), 'valid: kimi, kimi_instruct, qwen'),
    ],
)
def test_refusals(call, word):
    with pytest.raises(LabError, match=word):
        call()


def test_what_a_prompt_may_hold_and_a_reply_may_not():
    odd = dict(ASK, tool_calls=[dict(CALL, id='call_a8f3', function=function('{"city": '))])
    talk = [USER, odd, dict(GOT, tool_call_id='call_a8f3')]
    assert (
        '<|tool_call_begin|>call_a8f3<|tool_call_argument_begin|>{"city": <|tool_call_end|>'
        in prompt_text(talk)
    )
    broken = dict(
        role='assistant', content='', tool_calls=[dict(CALL, function=function('{"a": '))]
    )
    row = dict(messages=[USER, dict(broken, content='See')])
    with pytest.raises(LabError, match='JSON'):
        encode_row(of('kimi'), row)


def test_instruct_by_hand():
    assert prompt_text([USER, ASK, GOT, MORE], family='kimi_instruct') == (
        '<|im_system|>system<|im_middle|>You are Kimi, an AI assistant created by '
        'Moonshot AI.<|im_end|><|im_user|>user<|im_middle|>\n 12 + 30?  '
        '<|im_end|><|im_assistant|>assistant<|im_middle|>'
        '<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0'
        '<|tool_call_argument_begin|>{"city": "Rome"}<|tool_call_end|>'
        '<|tool_call_begin|>functions.get_weather:1<|tool_call_argument_begin|>'
        '{"city": "Málaga", "b": [1, 2]}<|tool_call_end|><|tool_calls_section_end|>'
        '<|im_end|><|im_system|>get_weather<|im_middle|>## Return of '
        'functions.get_weather:0\nsunny<|im_end|>'
        '<|im_system|>tool<|im_middle|>## Return of functions.get_weather:1\n{"t": '
        '21}<|im_end|><|im_assistant|>assistant<|im_middle|>'
    )


def test_tokenizer_survives_a_save(tok, tmp_path):
    from transformers import AutoTokenizer

    tok.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert prompt_ids(again, [USER, ASK, GOT], TOOLS) == prompt_ids(tok, [USER, ASK, GOT], TOOLS)
    assert again.get_added_vocab() == tok.get_added_vocab()
    assert (again.eos_token_id, again.pad_token_id, again.chat_template) == (
        tok.eos_token_id,
        tok.pad_token_id,
        tok.chat_template,
    )


def test_kept_and_dropped_tokens():
    tok = build_tokenizer(TEXTS, 300)
    said = reply_text('4', 'r', [CALL])
    assert tok.decode(encode(tok, said), skip_special_tokens=True) == said.removesuffix(
        '<|im_end|>'
    )
    assert tok.convert_tokens_to_ids(SPECIAL_TOKENS) == list(range(len(tok) - 19, len(tok)))


def test_patterns():
    assert pretokens("don't 1234 月之x", KIMI_PATTERN) == [
        "don't",
        ' ',
        '123',
        '4',
        ' ',
        '月之',
        'x',
    ]
    assert pretokens("don't 1234", QWEN_PATTERN) == ['don', "'t", ' ', '1', '2', '3', '4']


NAMED = ['[BOS]', '[EOS]', None, *SPECIAL_TOKENS[2:-2], None, None, '[UNK]', '[PAD]']


def kimi_folder(
    folder,
    more=(b'ab', b'abc', b'bc', b'bcd', b'Wxyz', b' 7', b'\xe6\x9c', b'\xe6\x9c\x88'),
    named=NAMED,
):
    "A vocabulary in Kimi's two files: the bytes, eight tokens, control tokens with ids left out between them."
    tokens = [*(bytes([b]) for b in reversed(range(256))), *more]
    (folder / 'tiktoken.model').write_bytes(
        b''.join(base64.b64encode(t) + b' %d\n' % i for i, t in enumerate(tokens))
    )
    decoder = {
        str(264 + i): dict(content=t, special=t not in KEPT_TOKENS)
        for i, t in enumerate(named)
        if t
    }
    (folder / 'chat_template.jinja').write_text(CHAT_TEMPLATE)
    (folder / 'tokenizer_config.json').write_text(
        json.dumps(
            dict(
                added_tokens_decoder=decoder,
                bos_token='[BOS]',
                eos_token='[EOS]',
                pad_token='[PAD]',
                unk_token='[UNK]',
            )
        )
    )
    return folder


def test_a_tiktoken_file_by_hand(tmp_path):
    tok = load_kimi_tokenizer(kimi_folder(tmp_path))
    byte = lambda text: [255 - b for b in text.encode()]
    ids = lambda text: tok(text, add_special_tokens=False).input_ids
    assert ids('abcd') == [257, *byte('d')]  # ab (rank 256) joins before bc (258), then abc (257)
    assert ids('Wxyz') == [260] and ids('Wxyzz') == byte(
        'Wxyzz'
    )  # a whole piece is taken whole; no two tokens make it
    assert ids(' 7') == byte(' 7')  # the pattern cuts before a digit
    assert (
        ids('月') == [263]
        and ids('有') == [262, *byte('有')[2:]]
        and tok.decode(ids('月有')) == '月有'
    )
    assert (
        ids('<|im_end|>[PAD]') == [267, len(tok) - 1]
        and ids('<|reserved_token_266|>') == [266]
        and len(tok) == 264 + len(NAMED)
    )
    assert (tok.bos_token_id, tok.eos_token_id, tok.unk_token_id, tok.pad_token_id) == (
        264,
        265,
        len(tok) - 2,
        len(tok) - 1,
    ) and family_of(tok) == 'kimi'
    assert tok.decode([267, *ids('<think>')], skip_special_tokens=True) == '<think>' and tok(
        'a月b', return_offsets_mapping=True
    ).offset_mapping == [(0, 1), (1, 2), (2, 3)]
    prompt = prompt_ids(tok, [dict(role='user', content='<think>')])
    assert (
        bytes(byte('<think>')) in bytes(i % 256 for i in prompt) and ids('<think>')[0] not in prompt
    )


def test_a_tiktoken_file_saved_and_opened(tmp_path):
    from k2lab.models.load import open_tokenizer

    tok = open_tokenizer(kimi_folder(tmp_path))
    tok.save_pretrained(tmp_path / 'saved')
    again, text = (
        open_tokenizer(tmp_path / 'saved'),
        "don't abcd Wxyz 1234 月有<|im_end|>[EOS]<|reserved_token_266|>",
    )
    assert (
        (tmp_path / 'saved' / 'tokenizer.json').exists()
        and again(text).input_ids == tok(text).input_ids
        and again.get_added_vocab() == tok.get_added_vocab()
    )
    assert (
        again.chat_template == tok.chat_template == CHAT_FAMILIES['kimi'].template
        and again.eos_token == '[EOS]'
    )


def test_the_template_is_the_one_in_the_folder(tmp_path):
    from k2lab.models.load import open_tokenizer

    folder = kimi_folder(tmp_path)
    (folder / 'chat_template.jinja').write_text("{{ messages[0].content }}<|im_end|>")
    assert open_tokenizer(folder).chat_template == "{{ messages[0].content }}<|im_end|>"
    (folder / 'chat_template.jinja').unlink()
    config = json.loads((folder / 'tokenizer_config.json').read_text())
    (folder / 'tokenizer_config.json').write_text(json.dumps(dict(config, chat_template='own')))
    assert open_tokenizer(folder).chat_template == 'own'
    (folder / 'tokenizer_config.json').write_text(json.dumps(config))
    with pytest.raises(LabError, match="has no chat template.*put the model's chat_template.jinja"):
        prompt_ids(open_tokenizer(folder), [USER])


def test_tiktoken_files_that_are_refused(tmp_path):
    from k2lab.models.load import open_tokenizer

    with pytest.raises(LabError, match='neither tokenizer.json nor tiktoken.model'):
        open_tokenizer(tmp_path)
    path = kimi_folder(tmp_path) / 'tiktoken.model'
    whole = path.read_bytes()
    for data, word in (
        (b'version https://git-lfs', 'line 1: not a token'),
        (whole + b'YWI= x\n', 'line 265'),
        (whole[:-7], 'line 264: not a token'),
        (whole[:-3], 'ranks of 264 tokens are not 0 to 263'),
        (
            b''.join(whole.splitlines(True)[:-1]),
            'has 263 tokens, but the control tokens of tokenizer_config.json begin at 264',
        ),
        (b''.join(whole.splitlines(True)[9:]), '9 of the 256 bytes'),
        (whole + base64.b64encode(b'zz') + b' 300', 'not 0 to 264'),
        (
            whole.replace(base64.b64encode(b'Wxyz'), base64.b64encode(b'[EOS]')),
            r'\[EOS\] is also an ordinary token',
        ),
    ):
        path.write_bytes(data)
        with pytest.raises(LabError, match=word):
            load_kimi_tokenizer(tmp_path)
    (tmp_path / 'tokenizer_config.json').unlink()
    with pytest.raises(LabError, match='tokenizer_config.json missing'):
        open_tokenizer(tmp_path)


def test_a_hub_tokenizer_is_fetched_without_code(tmp_path, monkeypatch):
    from k2lab.models.load import open_tokenizer

    wanted = []
    monkeypatch.setattr(
        'huggingface_hub.snapshot_download',
        lambda place, allow_patterns, **more: (
            wanted.append((place, allow_patterns)) or str(kimi_folder(tmp_path))
        ),
    )
    assert family_of(open_tokenizer('moonshotai/Kimi-K2-Thinking')) == 'kimi'
    assert (
        wanted[0][0] == 'moonshotai/Kimi-K2-Thinking'
        and 'tiktoken.model' in wanted[0][1]
        and not any(p.endswith('.py') or p == '*' for p in wanted[0][1])
    )

    def offline(*_, **__):
        raise FileNotFoundError('not in the cache')

    monkeypatch.setattr('huggingface_hub.snapshot_download', offline)
    with pytest.raises(
        LabError, match='moonshotai/Kimi-K2-Thinking: no such folder, and .*not in the cache'
    ):
        open_tokenizer('moonshotai/Kimi-K2-Thinking')


needs_kimi = pytest.mark.skipif(
    not KIMI_FILES.exists(), reason='the real Kimi tokenizer is not beside this checkout'
)


@needs_kimi
def test_real_kimi_tokenizer(tmp_path):
    "Moonshot's own ids on all rows; those were made with special strings as plain text."
    from transformers import PreTrainedTokenizerFast

    tok = load_kimi_tokenizer(KIMI_FILES)
    config = json.loads((KIMI_FILES / 'tokenizer_config.json').read_text())
    known = {
        v['content']: (int(k), v['special']) for k, v in config['added_tokens_decoder'].items()
    }
    assert (
        len(tok)
        == 163840
        == json.loads((KIMI_FILES / 'config.json').read_text())['text_config']['vocab_size']
    )
    assert {
        t.content: (i, t.special)
        for i, t in tok.added_tokens_decoder.items()
        if not t.content.startswith('<|reserved')
    } == known
    assert (
        list(known)
        == SPECIAL_TOKENS[:15]
        + ['<|media_begin|>', '<|media_content|>', '<|media_end|>', '<|media_pad|>']
        + SPECIAL_TOKENS[15:]
    )
    assert {t for t, (_, special) in known.items() if not special} == {
        t for t in KEPT_TOKENS if t in SPECIAL_TOKENS
    }
    assert all(
        getattr(tok, k) == config[k] for k in ('bos_token', 'eos_token', 'pad_token', 'unk_token')
    )
    tok.save_pretrained(tmp_path)
    rows = [json.loads(line) for line in (KIMI_FILES / 'gold.jsonl').read_text().splitlines()]
    special = [r for r in rows if any(t in r['text'] for t in known)]
    assert (len(rows), len(special)) == (260, 2)
    for each in (tok, PreTrainedTokenizerFast.from_pretrained(tmp_path)):
        assert [
            plain_tokenizer(each).encode(r['text'], add_special_tokens=False).ids for r in rows
        ] == [r['ids'] for r in rows]
        assert [
            r for r in rows if each(r['text'], add_special_tokens=False).input_ids != r['ids']
        ] == special
        assert (
            each("print('<|im_end|>')", add_special_tokens=False).input_ids
            == [2676, 1177, known['<|im_end|>'][0], 3432]
            and each.decode(rows[-1]['ids']) == rows[-1]['text']
        )


# parity: the trainer, the template in the tokenizer, evaluation and the server read the same ids

WORDS = [
    "It's",
    'the graph',
    '12345',
    '3.14',
    '1_000',
    '月之暗面',
    'こんにちは',
    '😀👩‍👩‍👧',
    'naïve',
    'n\u0303o',
    '\u0301',
    'def f(x):\n\treturn x**2',
    '{"a": [1, 2]}',
    '<b>',
    '## Return of f',
    '\n\n',
    '  ',
    ' ',
    '\r\n',
    "I'LL",
    'Ω',
    'שלום',
    'مرحبا',
    '\u200b',
    '[1]',
    '|>',
    '<|',
    'user',
    'assistant',
    '<tool_response>',
]


def words(rng, special=()) -> str:
    "Up to eight pieces of text, joined with or without spaces; sometimes none."
    return (
        rng.choice(['', ' ']).join(rng.choices(WORDS, k=rng.choice([0, 1, 1, 2, 3, 5, 8])))
        + (rng.choice(special) if special and rng.random() < 0.5 else '')
        + rng.choice(['', '', ' ', '\n'])
    )


def content(rng, special):
    "Text, or a list of parts."
    return (
        words(rng, special)
        if rng.random() < 0.9
        else [dict(type='text', text=words(rng, special)) for _ in range(rng.randrange(3))]
    )


def tool_round(rng, number, special) -> list:
    "An assistant's call or two, and their results."
    values = [
        {'city': words(rng, special)},
        json.dumps(
            {'q': words(rng, special), 'n': rng.randrange(99)}, ensure_ascii=rng.random() < 0.5
        ),
        {},
        '{}',
    ]
    calls = [
        dict(
            id=f'functions.{name}:{number + i}',
            type='function',
            function=dict(name=name, arguments=rng.choice(values)),
        )
        for i, name in enumerate(rng.choices(['get_weather', 'python'], k=rng.choice([1, 1, 2])))
    ]
    ask = dict(
        role='assistant',
        content=rng.choice([None, '', words(rng, special)]),
        tool_calls=calls,
        **({'reasoning_content': words(rng, special)} if rng.random() < 0.7 else {}),
    )
    return [
        ask,
        *(
            dict(
                role='tool',
                tool_call_id=c['id'],
                content=content(rng, special),
                **({'name': c['function']['name']} if rng.random() < 0.5 else {}),
            )
            for c in calls
        ),
    ]


def conversation(rng, special=()) -> tuple:
    "(messages, tools), ending with a user's turn or a tool's result; texts contain `special` strings."
    messages = [dict(role='system', content=words(rng, special))] if rng.random() < 0.5 else []
    for turn in range(rng.choice([1, 1, 2, 3])):
        if turn:
            messages.append(
                dict(
                    role='assistant',
                    content=words(rng, special),
                    **({'reasoning_content': words(rng, special)} if rng.random() < 0.7 else {}),
                )
            )
        if turn and rng.random() < 0.1:
            messages.append(dict(role='system', content=words(rng, special)))
        messages.append(dict(role='user', content=content(rng, special)))
        for _ in range(rng.choice([0, 0, 1, 2])):
            messages += tool_round(
                rng, sum(len(m.get('tool_calls') or []) for m in messages), special
            )
    return messages, rng.choice(
        [
            None,
            TOOLS,
            [
                *TOOLS,
                dict(
                    type='function',
                    function=dict(name='python', parameters=dict(type='object', properties={})),
                ),
            ],
        ]
    )


def conversations(special=()) -> list:
    "500 conversations, the same each time."
    rng = random.Random(20)
    return [conversation(rng, special) for _ in range(500)]


class NoModel:
    "What the server asks of a model before it computes anything."

    config = type('Config', (), dict(max_position_embeddings=1 << 20, _attn_implementation='sdpa'))

    def eval(self):
        return self


def real_kimi(folder):
    "Moonshot's tokenizer with the lab's template for K2-Thinking."
    for name in ('tiktoken.model', 'tokenizer_config.json'):
        (folder / name).symlink_to(KIMI_FILES / name)
    (folder / 'chat_template.jinja').write_text(CHAT_TEMPLATE)
    return load_kimi_tokenizer(folder)


@pytest.fixture(
    scope='module', params=['k2', 'qwen', 'kimi_instruct', pytest.param('real', marks=needs_kimi)]
)
def sides(request, tmp_path_factory):
    "A shipped, K2-Instruct or real K2 tokenizer, and a function that asks a server for ids."
    pytest.importorskip('torch')
    from fastapi.testclient import TestClient

    from k2lab.models.load import open_tokenizer, shipped
    from k2lab.serving import server

    tok = (
        real_kimi(tmp_path_factory.mktemp('kimi'))
        if request.param == 'real'
        else build_tokenizer(TEXTS, 420, 'kimi_instruct')
        if request.param == 'kimi_instruct'
        else open_tokenizer(shipped(request.param))
    )
    client = TestClient(
        server.create_app(NoModel(), tok, 'tiny', 'secret'),
        headers={'authorization': 'Bearer secret'},
    )

    def served(messages, tools=None):
        answer = client.post(
            '/tokenize', json=dict(messages=messages, tools=tools, add_generation_prompt=True)
        ).json()
        assert answer['count'] == len(answer['tokens']) and answer['max_model_len'] == 1 << 20
        return answer['tokens']

    return tok, served


def test_conversations_are_the_same_ids_everywhere(sides):
    tok, served = sides
    talks = conversations()
    assert (
        sum(bool(t) for _, t in talks) > 250
        and sum(any(m['role'] == 'tool' for m in ms) for ms, _ in talks) > 200
        and sum(ms[-1]['role'] == 'tool' for ms, _ in talks) > 100
    )
    for messages, tools in talks:
        ids = prompt_ids(tok, messages, tools)
        assert ids == tok.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, return_dict=False
        )
        assert ids == served(messages, tools)


def test_rows_are_the_same_ids_everywhere(sides):
    "Training, evaluation and server share the prompt ids; the trained part is the answer and its end."
    from k2lab.text.audit import Audit
    from k2lab.text.masks import encode_row
    from k2lab.training.metrics import prompts_of

    (tok, served), rng = sides, random.Random(21)
    audit = Audit(tok)
    for _ in range(200):
        system, row = (
            rng.choice(['', 'Be brief.']),
            dict(prompt='Q ' + words(rng), response=words(rng) + ' A'),
        )
        messages = [
            *([dict(role='system', content=system)] if system else []),
            dict(role='user', content=row['prompt']),
        ]
        example = encode_row(tok, row, system)
        ids, mask = example['input_ids'], example['completion_mask']
        prompt = ids[: mask.index(1)]
        assert (
            prompt
            == tok.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            == prompts_of(tok, [row], system)[0]
            == served(messages)
        )
        empty = '<think></think>' if family_of(tok) == 'kimi' else ''
        said = f'{empty}{row["response"]}<|im_end|>'
        assert tok.decode(ids[len(prompt) :]) == (
            unicodedata.normalize('NFC', said) if family_of(tok) == 'qwen' else said
        )
        assert audit.wrong(dict(input_ids=[ids], completion_mask=[mask])) is None


def test_special_strings_of_users_are_the_one_difference(sides):
    "The template lets a user forge control tokens; the lab has only those of its own headers."
    tok, served = sides
    controls, forged = tok.get_added_vocab(), 0
    numbers = set(controls.values())
    special = [t for t in controls if not t.startswith('<|reserved')]
    for messages, tools in conversations(special):
        ids, theirs = (
            prompt_ids(tok, messages, tools),
            tok.apply_chat_template(
                messages, tools=tools, add_generation_prompt=True, return_dict=False
            ),
        )
        own = [i for i in ids if i in numbers]
        assert ids == served(messages, tools) and tok.decode(ids) == tok.decode(theirs)
        if len(own) == sum(i in numbers for i in theirs):
            assert ids == theirs
        else:
            forged += 1
            assert len(own) < sum(i in numbers for i in theirs)
    assert forged > 300
