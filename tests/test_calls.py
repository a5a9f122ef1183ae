"Calls: every spelling that public reports name, cut anywhere; half a call and a foreign name are never a call."

import json
import random
import time

import pytest

from k2lab.lab.config import LabError
from k2lab.text.calls import (
    CALL_TOKENS,
    END_OF_TURN,
    ReplyReader,
    joined,
    message_of,
    parse_reply,
    reply_message,
)
from k2lab.text.chat import markup_read

SECTION, SECTION_END = '<|tool_calls_section_begin|>', '<|tool_calls_section_end|>'
CALL, ARGUMENTS, END = '<|tool_call_begin|>', '<|tool_call_argument_begin|>', '<|tool_call_end|>'
ROME = '{"city": "Rome"}'
WEATHER = dict(type='object', properties=dict(city=dict(type='string')), required=['city'])


def tool(name: str, **parameters) -> dict:
    return dict(type='function', function=dict(name=name, parameters=parameters))


TOOLS = [
    tool('get_weather', **WEATHER),
    tool('get_time', properties=dict(zone={}), required=['zone']),
    tool('a.b.c'),
    tool('list-tasks'),
    tool('now'),
]


def k2(number: str, arguments: str = ROME, end: str = END) -> str:
    "A call as K2 writes it."
    return f'{CALL}{number}{ARGUMENTS}{arguments}{end}'


W = 'functions.get_weather:0'


def streamed(text: str, cuts=None, tools=None, opened=None) -> dict:
    "What a reader makes of a text that comes in pieces, by default of one character."
    cuts = range(1, len(text)) if cuts is None else cuts
    reader, deltas = ReplyReader(tools, opened), []
    for start, end in zip([0, *cuts], [*cuts, len(text)]):
        deltas += reader.feed(text[start:end])
    reply = joined(deltas + reader.close())
    return reply | ({'unread': reader.unread} if reader.unread else {})


# name: (text, names of the calls, content); the reports that name it stand with it
READ = {
    'two in one section': (
        SECTION + k2(W) + k2('functions.get_time:1') + SECTION_END,
        ['get_weather', 'get_time'],
        '',
    ),
    'no prefix (vllm 27565)': (SECTION + k2('get_weather:0') + SECTION_END, ['get_weather'], ''),
    'no index (litellm chutes)': (SECTION + k2(' get_weather ') + SECTION_END, ['get_weather'], ''),
    'a dotted name': (SECTION + k2('functions.a.b.c:1') + SECTION_END, ['a.b.c'], ''),
    'a name in a namespace': (k2('functions.default_api.get_weather:0'), ['get_weather'], ''),
    'a hyphen (vllm 22149, dynamo 8532)': (k2('functions.list-tasks:0'), ['list-tasks'], ''),
    'line breaks (vllm 38441)': (
        k2('functions.get_weather\n:0\n', '\n{"city":\n "Rome"}\n'),
        ['get_weather'],
        '',
    ),
    'a cleaned id (exo 2282)': (k2('functions_get_weather_3'), ['get_weather'], ''),
    'no dot, no colon (sglang 21377)': (k2('functionsget_weather5'), ['get_weather'], ''),
    'an id of OpenAI (sglang 18178)': (k2('call_6b0e7c24f0'), ['get_weather'], ''),
    'a counter (sglang 25362)': (k2('call00003'), ['get_weather'], ''),
    'a name in the arguments (vllm 32146)': (
        k2('call_a1', '{"name": "now", "path": "/"}'),
        ['now'],
        '',
    ),
    'singular tokens (llama.cpp 17376)': (
        SECTION.replace('calls', 'call') + k2(W) + SECTION_END.replace('calls', 'call'),
        ['get_weather'],
        '',
    ),
    'no section (vllm 32216)': ('Sure. ' + k2(W), ['get_weather'], 'Sure.'),
    'no section end (dynamo 8208)': (SECTION + k2(W), ['get_weather'], ''),
    'no section begin': (k2(W) + SECTION_END + 'So.', ['get_weather'], 'So.'),
    'no call token (mlxcel 766)': (
        SECTION + k2(W).removeprefix(CALL) + SECTION_END,
        ['get_weather'],
        '',
    ),
    'no argument token': (f'{CALL}{W} {ROME}{END}', ['get_weather'], ''),
    'no call end': (
        SECTION + k2(W, end='') + k2('functions.now:1', '{}', '') + SECTION_END,
        ['get_weather', 'now'],
        '',
    ),
    'no end at all': (SECTION + k2(W, end='') + '<|im_end|>', ['get_weather'], ''),
    'an argument end (pi proxy)': (
        k2(W, end='<|tool_call_argument_end|>' + END) + SECTION_END,
        ['get_weather'],
        '',
    ),
    'every token twice': (
        SECTION * 2 + CALL + k2(W).replace(ARGUMENTS, ARGUMENTS * 2) + END + SECTION_END * 2,
        ['get_weather'],
        '',
    ),
    'in an open thought (sglang 19552)': (
        '<think>I look.' + SECTION + k2(W) + SECTION_END,
        ['get_weather'],
        '',
    ),
    'closed after the section (llxprt 749)': (
        '<think>I look.' + SECTION + k2(W) + SECTION_END + '</think>So.',
        ['get_weather'],
        'So.',
    ),
    'words in the section (vllm 28543)': (
        'Hi.' + SECTION + ' spurious ' + k2(W) + SECTION_END,
        ['get_weather'],
        'Hi.',
    ),
    'words between calls': (
        SECTION + k2(W) + ' and ' + k2('functions.now:1') + SECTION_END,
        ['get_weather', 'now'],
        '',
    ),
    'text after the section': (SECTION + k2(W) + SECTION_END + 'After.', ['get_weather'], 'After.'),
    'two sections (vllm 24478)': (
        SECTION + k2(W) + SECTION_END + SECTION + k2('functions.now:1') + SECTION_END,
        ['get_weather', 'now'],
        '',
    ),
    'no arguments': (SECTION + k2('functions.now:0', '') + SECTION_END, ['now'], ''),
    'a quoted token (vllm 44137)': (
        k2(W, json.dumps(dict(city=CALL + END + SECTION_END + '"'))),
        ['get_weather'],
        '',
    ),
    'an open string': (k2(W, '{"city": "Rome}') * 2, ['get_weather', 'get_weather'], ''),
    'text for arguments (Kimi-K2 26)': (k2(W, json.dumps(ROME)), ['get_weather'], ''),
    'an empty section': (SECTION + SECTION_END + 'So.', [], 'So.'),
    "Qwen's tags": (
        'So.\n<tool_call>\n{"name": "now", "arguments": {"a": "</tool_call>"}}\n</tool_call>',
        ['now'],
        'So.',
    ),
}


@pytest.mark.parametrize('name', READ)
def test_a_call_is_found_and_no_markup_is_left(name):
    text, names, content = READ[name]
    reply = parse_reply(text, TOOLS)
    assert [c['function']['name'] for c in reply['tool_calls']] == names
    assert reply['content'] == content
    assert not any(token in (reply['reasoning'] or '') for token in CALL_TOKENS)


# what stays text to the last letter: half a call, no tool, or only words about tokens
TEXT = {
    'an unknown tool': SECTION + k2('functions.get_tide:0') + SECTION_END,
    'a foreign id of an unknown tool': k2('call_a1', '{"tide": 1}'),
    'a foreign id that two tools take': k2('call_a1', '{}'),
    'a word for an id': k2('call_back'),
    'half an argument': SECTION + k2(W, '{"city": "Ro', ''),
    'half an id': SECTION + CALL + 'functions.get_wea',
    'an id without its end': SECTION + CALL + W,
    'a section only': 'Sure.' + SECTION,
    'words about tokens': f'K2 writes {SECTION}, then {CALL}, and ends with {SECTION_END}.',
    'an end only': f'{END}{SECTION_END} So.',
    "no JSON in Qwen's tags": '<tool_call>\nnot json\n</tool_call>',
    "no name in Qwen's tags": '<tool_call>{"arguments": {}}</tool_call>',
    'half a token': 'a <|tool_call_be',
    'an end of turn in the middle': 'a<|im_end|>b',
}


@pytest.mark.parametrize('name', TEXT)
def test_what_is_no_call_stays_whole(name):
    assert parse_reply(TEXT[name], TOOLS) == dict(reasoning=None, content=TEXT[name], tool_calls=[])


def test_without_tools_nothing_is_a_call_and_unknown_tools_leave_any_name():
    text = SECTION + k2('functions.get_tide:0') + SECTION_END
    assert parse_reply(text, [])['content'] == text
    assert parse_reply(text)['tool_calls'][0]['function']['name'] == 'get_tide'
    assert parse_reply(k2('call_a1'))['tool_calls'][0]['id'] == 'call_a1'


def test_a_known_and_an_unknown_call_in_one_section():
    unknown = k2('functions.get_tide:0')
    reply = parse_reply(SECTION + unknown + k2(W) + SECTION_END, TOOLS)
    assert [c['id'] for c in reply['tool_calls']] == [W] and reply['content'] == unknown


def test_arguments_and_ids_are_as_said():
    reply = parse_reply(SECTION + k2(W, 'no {json') + k2(W) + k2('get_weather:7') + SECTION_END)
    assert [c['function']['arguments'] for c in reply['tool_calls']] == ['no {json', ROME, ROME]
    ids = [c['id'] for c in reply['tool_calls']]
    assert ids == [W, 'functions.get_weather:1', 'get_weather:7']
    assert parse_reply(READ['no arguments'][0])['tool_calls'][0]['function']['arguments'] == '{}'
    quoted = READ['a quoted token (vllm 44137)'][0]
    said = parse_reply(quoted)['tool_calls'][0]['function']['arguments']
    assert json.loads(said)['city'] == CALL + END + SECTION_END + '"'


def test_what_is_neither_is_reported():
    unread = {name: parse_reply(text, TOOLS).get('unread') for name, (text, *_) in READ.items()}
    assert {name: text for name, text in unread.items() if text} == {
        'closed after the section (llxprt 749)': '</think>',
        'words in the section (vllm 28543)': ' spurious ',
        'words between calls': ' and ',
        'an empty section': SECTION + SECTION_END,
    }


def test_thoughts_by_what_the_prompt_opened():
    assert parse_reply('a</think>b')['reasoning'] == 'a'
    assert parse_reply('a</think>b', opened=True)['reasoning'] == 'a'
    assert parse_reply('a</think>b', opened=False)['content'] == 'a</think>b'
    assert parse_reply('a', opened=True) == dict(reasoning='a', content='', tool_calls=[])
    assert parse_reply('<think>a</think>b', opened=True)['reasoning'] == 'a'
    mention = f'<think>Not {SECTION} yet.</think>Yes.{SECTION}{k2(W)}{SECTION_END}'
    reply = parse_reply(mention, TOOLS)
    assert reply['reasoning'] == f'Not {SECTION} yet.' and reply['content'] == 'Yes.'
    reader = ReplyReader(opened=False)
    assert [reader.feed(t) for t in ('a', 'b')] == [[dict(content='a')], [dict(content='b')]]


@pytest.mark.parametrize('tools', [None, [], TOOLS], ids=['any', 'none', 'tools'])
@pytest.mark.parametrize('opened', [None, True, False])
def test_a_stream_says_what_the_whole_says(tools, opened):
    texts = [text for text, *_ in READ.values()] + list(TEXT.values())
    rng = random.Random(0)
    for text in [
        f'{start}{text}{end}'
        for text in texts
        for start, end in (('', ''), ('<think>a', '<|im_end|>'))
    ]:
        whole = parse_reply(text, tools, opened)
        assert streamed(text, None, tools, opened) == whole, text
        for _ in range(3):
            cuts = sorted(rng.sample(range(1, len(text)), min(3, len(text) - 1)))
            assert streamed(text, cuts, tools, opened) == whole, (text, cuts)


@pytest.mark.parametrize(
    'text', [READ['every token twice'][0], READ['a quoted token (vllm 44137)'][0]]
)
def test_every_cut(text):
    whole = parse_reply(text, TOOLS)
    assert all(streamed(text, [i], TOOLS) == whole for i in range(1, len(text)))


PARTS = [
    *CALL_TOKENS,
    *END_OF_TURN,
    '<think>',
    '</think>',
    W,
    'now:1',
    'call_a1',
    ROME,
    '{"a": "',
    '"',
]
PARTS += ['\\', '{', '}', '<', '|>', ' ', '\n', 'Hi.', '{"name": "now", "arguments": {}}', '7']


def test_random_texts_are_read_the_same_however_they_are_cut():
    rng = random.Random(1)
    for _ in range(400):
        text = ''.join(rng.choices(PARTS, k=rng.randint(1, 14)))
        tools, opened = rng.choice([None, TOOLS]), rng.choice([None, True, False])
        whole = parse_reply(text, tools, opened)
        assert streamed(text, None, tools, opened) == whole, (text, tools is None, opened)
        ids = [c['id'] for c in whole['tool_calls']]
        assert len(set(ids)) == len(ids) and all(ids)
        if not ids:  # nothing is lost
            said = (whole['reasoning'] or '') + whole['content'] + whole.get('unread', '')
            for token in (*END_OF_TURN, '<think>', '</think>'):
                said, text = said.replace(token, ''), text.replace(token, '')
            assert sorted(''.join(said.split())) == sorted(''.join(text.split()))


def test_a_reply_that_is_cut_is_never_another_call():
    text = f'<think>So.</think>Yes.{SECTION}{k2(W)}{k2("functions.now:1", "{}")}{SECTION_END}'
    whole = parse_reply(text, TOOLS)['tool_calls']
    for end in range(len(text)):
        reply = parse_reply(text[:end], TOOLS)
        assert reply['tool_calls'] == whole[: len(reply['tool_calls'])], text[:end]
        begun = text[:end].count(ARGUMENTS)
        assert begun == len(reply['tool_calls']) or ARGUMENTS in reply['content']


@pytest.mark.parametrize(
    'text',
    [
        '<|im_end|>' * 10000 + 'x',
        SECTION * 10000,
        CALL * 10000,
        k2('f:0', '{"a: ') * 3000,
        k2('f:0', '"') * 3000,
        CALL + 'f' + ARGUMENTS * 10000,
        '<tool_call>' * 10000,
        k2('f:0', '[' * 100000),
        (SECTION + 'x') * 10000,
    ],
    ids=['ends', 'sections', 'calls', 'quotes', 'odd', 'arguments', 'tags', 'deep', 'words'],
)
def test_hostile_text_costs_no_more_than_its_length(text):
    start = time.process_time()
    whole = parse_reply(text, None, False)
    assert streamed(text, range(8, len(text), 8), None, False) == whole
    assert time.process_time() - start < 20


def test_a_message_has_openai_shape():
    message = reply_message(READ['two in one section'][0], TOOLS)
    assert message['content'] is None and 'reasoning_content' not in message
    assert message == message_of(streamed(READ['two in one section'][0], None, TOOLS))
    assert set(message['tool_calls'][0]) == {'id', 'type', 'function'}


@pytest.mark.parametrize(
    'text,why',
    [
        (READ['words in the section (vllm 28543)'][0], r' spurious '),
        (READ['closed after the section (llxprt 749)'][0], '</think>'),
        (READ['no end at all'][0], 'a call that does not end'),
        (READ['no call token (mlxcel 766)'][0], 'a call that does not end'),
    ],
)
def test_rows_with_such_markup_are_refused(text, why):
    message = dict(role='assistant', content=text)
    with pytest.raises(LabError, match='cannot be read as one reply') as refused:
        markup_read(message, 'message 1')
    assert why in str(refused.value)
    assert markup_read(message, 'message 1', as_said=True) == message
