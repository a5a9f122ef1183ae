"""Rows of others become conversations and preferences: what is expected is written out by hand, and no key is lost."""

import copy
import json
from pathlib import Path
from random import Random

import pytest

from k2lab.lab.config import LabError
from k2lab.text.layouts import (
    LAYOUTS,
    Spec,
    as_conversation,
    as_preference,
    conversations,
    layout_of,
    read_conversations,
    read_corpus,
)
from k2lab.text.rows import FORMATS, fault, read_rows, write_rows


def user(text):
    return {'role': 'user', 'content': text}


def said(text, **more):
    return {'role': 'assistant', 'content': text, **more}


def system(text):
    return {'role': 'system', 'content': text}


def call(number, name, arguments):
    return {'id': number, 'type': 'function', 'function': {'name': name, 'arguments': arguments}}


def result(number, text):
    return {'role': 'tool', 'content': text, 'tool_call_id': number}


CITY = {'type': 'object', 'properties': {'city': {'type': 'string'}}}
WEATHER = {'name': 'weather', 'description': 'Weather of a city', 'parameters': CITY}
TOOLS = [{'type': 'function', 'function': WEATHER}]
ASK = 'What is the capital of Norway?'
OSLO = {'messages': [user(ASK), said('Oslo')]}
PARALLEL = [
    user('Weather in Oslo and Rome?'),
    said(
        None,
        tool_calls=[
            call('call_a1', 'weather', '{"city": "Oslo"}'),
            call('call_a2', 'weather', {'city': 'Rome'}),
        ],
    ),
    result('call_a2', '9 C'),
    result('call_a1', '-3 C'),
    said('-3 C in Oslo, 9 C in Rome.'),
]

# name: (kind, layout, row, what it must become)
USUAL = {
    'alpaca': (
        'conversation',
        'alpaca',
        {'instruction': 'Give the capital.', 'input': 'Norway', 'output': 'Oslo'},
        {'messages': [user('Give the capital.\n\nNorway'), said('Oslo')]},
    ),
    'alpaca, empty input': (
        'conversation',
        'alpaca',
        {'instruction': 'Say hello in French.', 'input': '', 'output': 'Bonjour'},
        {'messages': [user('Say hello in French.'), said('Bonjour')]},
    ),
    'alpaca, no input': (
        'conversation',
        'alpaca',
        {'instruction': 'Say hello in French.', 'output': 'Bonjour'},
        {'messages': [user('Say hello in French.'), said('Bonjour')]},
    ),
    'alpaca, system and history': (
        'conversation',
        'alpaca',
        {
            'instruction': 'And of Sweden?',
            'input': '',
            'output': 'Stockholm',
            'system': 'Answer with one word.',
            'history': [[ASK, 'Oslo'], ['Of Italy?', 'Rome']],
        },
        {
            'messages': [
                system('Answer with one word.'),
                user(ASK),
                said('Oslo'),
                user('Of Italy?'),
                said('Rome'),
                user('And of Sweden?'),
                said('Stockholm'),
            ]
        },
    ),
    'sharegpt, tools': (
        'conversation',
        'sharegpt',
        {
            'conversations': [
                {'from': 'system', 'value': 'Be short.'},
                {'from': 'human', 'value': 'Weather in Oslo?'},
                {
                    'from': 'function_call',
                    'value': '{"name": "weather", "arguments": {"city": "Oslo"}}',
                },
                {'from': 'observation', 'value': '-3 C'},
                {'from': 'gpt', 'value': 'It is -3 C.'},
                {'from': 'human', 'value': 'And in Rome?'},
                {
                    'from': 'function_call',
                    'value': '[{"name": "weather", "arguments": {"city": "Rome"}}]',
                },
                {'from': 'tool', 'value': '9 C'},
                {'from': 'gpt', 'value': 'It is 9 C.'},
            ],
            'tools': json.dumps([WEATHER]),
        },
        {
            'messages': [
                system('Be short.'),
                user('Weather in Oslo?'),
                said(None, tool_calls=[call('functions.weather:0', 'weather', {'city': 'Oslo'})]),
                result('functions.weather:0', '-3 C'),
                said('It is -3 C.'),
                user('And in Rome?'),
                said(None, tool_calls=[call('functions.weather:1', 'weather', {'city': 'Rome'})]),
                result('functions.weather:1', '9 C'),
                said('It is 9 C.'),
            ],
            'tools': TOOLS,
        },
    ),
    'sharegpt, system beside': (
        'conversation',
        'sharegpt',
        {
            'conversations': [{'from': 'human', 'value': ASK}, {'from': 'gpt', 'value': 'Oslo'}],
            'system': 'Be short.',
            'tools': '[]',
        },
        {'messages': [system('Be short.'), user(ASK), said('Oslo')]},
    ),
    'hf messages': (
        'conversation',
        'messages',
        {
            'messages': [
                system('Be short.'),
                user(ASK),
                said('Oslo', weight=0),
                user('?'),
                said('!'),
            ]
        },
        {
            'messages': [
                system('Be short.'),
                user(ASK),
                said('Oslo', train=False),
                user('?'),
                said('!'),
            ]
        },
    ),
    'messages with thoughts': (
        'conversation',
        'messages',
        {
            'messages': [
                user([{'type': 'text', 'text': 'Capital'}, {'type': 'text', 'text': '?'}]),
                said('Oslo', thinking='A fjord.', train=False),
                user('Sure?'),
                said('Yes.', reasoning='Quite.'),
                user('Really?'),
                said('Yes!', reasoning_content=''),
            ]
        },
        {
            'messages': [
                user([{'type': 'text', 'text': 'Capital'}, {'type': 'text', 'text': '?'}]),
                said('Oslo', reasoning_content='A fjord.', train=False),
                user('Sure?'),
                said('Yes.', reasoning_content='Quite.'),
                user('Really?'),
                said('Yes!', reasoning_content=''),
            ]
        },
    ),
    'openai tools, parallel calls': (
        'conversation',
        'messages',
        {'messages': PARALLEL, 'tools': TOOLS},
        {'messages': PARALLEL, 'tools': TOOLS},
    ),
    'trl tools, without ids or content': (
        'conversation',
        'messages',
        {
            'messages': [
                user('Lights on in the hall.'),
                {
                    'role': 'assistant',
                    'tool_calls': [
                        {
                            'type': 'function',
                            'function': {'name': 'light', 'arguments': {'at': 'hall'}},
                        }
                    ],
                },
                {'role': 'tool', 'name': 'light', 'content': 'The lights are on.'},
                said('Done!'),
            ]
        },
        {
            'messages': [
                user('Lights on in the hall.'),
                said(None, tool_calls=[call('functions.light:0', 'light', {'at': 'hall'})]),
                result('functions.light:0', 'The lights are on.') | {'name': 'light'},
                said('Done!'),
            ]
        },
    ),
    'prompt and completion': (
        'conversation',
        'prompt_completion',
        {'prompt': ASK, 'completion': 'Oslo'},
        OSLO,
    ),
    'prompt and completion, messages': (
        'conversation',
        'prompt_completion',
        {'prompt': [user('Hi'), said('Hello'), user(ASK)], 'completion': [said('Oslo')]},
        {'messages': [user('Hi'), said('Hello', train=False), user(ASK), said('Oslo')]},
    ),
    'prompt and response': (
        'conversation',
        'prompt_response',
        {'prompt': ASK, 'response': 'Oslo'},
        OSLO,
    ),
    'prompt, reasoning, final': (
        'conversation',
        'prompt_reasoning_final',
        {'prompt': ASK, 'reasoning': 'A fjord.', 'final': 'Oslo', 'answer': 'Oslo', 'family': 'x'},
        {'messages': [user(ASK), said('Oslo', reasoning_content='A fjord.')]},
    ),
    'kto': ('conversation', 'unpaired', {'prompt': ASK, 'completion': 'Oslo', 'label': True}, OSLO),
    'question and answer': (
        'conversation',
        'question_answer',
        {'question': ASK, 'answer': 'Oslo'},
        OSLO,
    ),
    'text preference': (
        'preference',
        'preference',
        {'prompt': ASK, 'chosen': 'Oslo', 'rejected': 'Bergen'},
        {'messages': [user(ASK)], 'chosen': [said('Oslo')], 'rejected': [said('Bergen')]},
    ),
    'trl preference': (
        'preference',
        'preference',
        {
            'prompt': [user(ASK)],
            'chosen': [said('Oslo')],
            'rejected': [said('Bergen')],
            'tools': TOOLS,
        },
        {
            'messages': [user(ASK)],
            'chosen': [said('Oslo')],
            'rejected': [said('Bergen')],
            'tools': TOOLS,
        },
    ),
    'trl preference, implicit': (
        'preference',
        'preference_implicit',
        {
            'chosen': [system('Short.'), user('Hi'), said('Hello'), user(ASK), said('Oslo')],
            'rejected': [system('Short.'), user('Hi'), said('Hello'), user(ASK), said('Bergen')],
        },
        {
            'messages': [system('Short.'), user('Hi'), said('Hello'), user(ASK)],
            'chosen': [said('Oslo')],
            'rejected': [said('Bergen')],
        },
    ),
    'llama-factory preference': (
        'preference',
        'preference_sharegpt',
        {
            'conversations': [{'from': 'human', 'value': ASK}],
            'chosen': {'from': 'gpt', 'value': 'Oslo'},
            'rejected': {'from': 'gpt', 'value': 'Bergen'},
        },
        {'messages': [user(ASK)], 'chosen': [said('Oslo')], 'rejected': [said('Bergen')]},
    ),
    'alpaca preference': (
        'preference',
        'preference_alpaca',
        {
            'instruction': 'Give the capital.',
            'input': 'Norway',
            'chosen': 'Oslo',
            'rejected': 'Bergen',
        },
        {
            'messages': [user('Give the capital.\n\nNorway')],
            'chosen': [said('Oslo')],
            'rejected': [said('Bergen')],
        },
    ),
    'preference about a call': (
        'preference',
        'preference',
        {
            'prompt': [user('Weather in Oslo?')],
            'chosen': [
                said(None, tool_calls=[{'name': 'weather', 'arguments': '{"city": "Oslo"}'}])
            ],
            'rejected': [said('No idea.')],
        },
        {
            'messages': [user('Weather in Oslo?')],
            'chosen': [
                said(None, tool_calls=[call('functions.weather:0', 'weather', '{"city": "Oslo"}')])
            ],
            'rejected': [said('No idea.')],
        },
    ),
}
AS = {'conversation': as_conversation, 'preference': as_preference}
by_usual = pytest.mark.parametrize('name', USUAL)


@by_usual
def test_a_usual_layout_is_read_as_written_by_hand(name):
    kind, layout, row, expected = USUAL[name]
    before = copy.deepcopy(row)
    assert layout_of(row) == layout
    assert AS[kind](row) == expected
    assert conversations([row], 'a.jsonl', Spec(), kind)[0] == [expected]
    assert AS[kind](expected) == expected  # the lab's own rows stay as they are
    assert row == before


def written(path: Path, rows: list, how: str) -> Path:
    "A file of rows in one of four forms."
    if how == 'parquet':
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path / 'rows.parquet')
        return path / 'rows.parquet'
    lines = '\n\n'.join(json.dumps(row) for row in rows)
    name, text = {
        'jsonl': ('rows.jsonl', lines),
        'array': ('rows.json', json.dumps(rows, indent=1)),
        'lines in .json': ('rows.json', '\ufeff' + lines),
    }[how]
    (path / name).write_text(text, encoding='utf-8')
    return path / name


@pytest.mark.parametrize('how', ['jsonl', 'array', 'lines in .json', 'parquet'])
@by_usual
def test_a_file_is_read_like_its_rows(tmp_path, how, name):
    kind, layout, row, expected = USUAL[name]
    if how == 'parquet' and name in ('openai tools, parallel calls', 'messages with thoughts'):
        pytest.skip('one column cannot hold both text and objects')
    path = written(tmp_path, [row, row], how)
    rows, counts = read_conversations(path, Spec(), kind)
    assert rows == [expected] * 2
    assert counts['layout'] == layout and counts['rows'] == 2 and counts['bad'] == 0


def test_nulls_of_a_table_are_no_keys(tmp_path):
    "Arrow gives each object the fields of all: `tool_calls` of users, arguments of other calls."
    talk = [
        user('Weather, then files?'),
        said(
            None,
            tool_calls=[
                call('a', 'weather', {'city': 'Oslo'}),
                call('b', 'files', {'path': 'notes', 'deep': True}),
            ],
        ),
        result('a', '-3 C'),
        result('b', ''),
        said('Cold, and none.'),
    ]
    rows = [
        {'messages': talk, 'tools': TOOLS, 'source': 'x'},
        {'messages': OSLO['messages'], 'tools': None},
    ]
    read, counts = read_conversations(written(tmp_path, rows, 'parquet'))
    assert read == [{'messages': talk, 'tools': TOOLS}, OSLO]
    assert counts['ignored'] == {'source': 1}


CASES = Path(__file__).resolve().parents[2] / 'shared/cases/training'


@pytest.mark.skipif(not CASES.exists(), reason='the collected inputs are not here')
def test_collected_files_are_read():
    files = sorted((CASES / 'rows').iterdir())
    assert len(files) == 15
    for path in files:
        kind = 'preference' if 'preference' in path.name else 'conversation'
        rows, counts = read_conversations(path, kind=kind)
        assert rows and not counts['ignored'], path
    for name in ('messages', 'alpaca_history', 'tool_response', 'own_sft'):
        assert read_conversations(CASES / f'{name}.jsonl')[0], name
    for name in ('pairs_uneven', 'pairs_long_rejected'):
        assert read_conversations(CASES / f'{name}.jsonl', kind='preference')[0], name


@pytest.mark.parametrize(
    'format,row,kind',
    [
        ('domain_sft', {'instruction': 'a', 'input': 'b', 'output': 'c', 'licence': 'MIT'}, 0),
        ('reasoning_sft', {'prompt': 'a', 'reasoning': 'b', 'final': 'c', 'entry': {'x': 1}}, 0),
        ('distill_corpus', {'prompt': 'a', 'response': 'b', 'family': 'chain'}, 0),
        ('dpo_pairs', {'prompt': 'a', 'chosen': 'b', 'rejected': 'c', 'why': 'wrong'}, 1),
        ('messages', OSLO | {'tools': TOOLS}, 0),
    ],
)
def test_the_labs_own_formats_go_through_the_same_door(tmp_path, format, row, kind):
    assert fault(row, format) == '' and set(FORMATS[format]) <= row.keys()
    path = tmp_path / 'rows.jsonl.gz'
    write_rows(path, [row], format)  # with its manifest
    assert read_rows(path, format) == [row]
    rows, counts = read_conversations(path, kind=('conversation', 'preference')[kind])
    assert len(rows) == 1 and not counts['bad']
    path.write_bytes(path.read_bytes() + b' ')
    with pytest.raises(LabError, match='its manifest says'):
        read_conversations(path)


# --- no key is lost in silence


def leaves(value) -> set:
    "Each text, number and truth value in a row, JSON text opened."
    if isinstance(value, str) and value.lstrip()[:1] in ('{', '['):
        try:
            return leaves(json.loads(value))
        except ValueError:
            pass
    if isinstance(value, dict):
        return set().union(*map(leaves, value.values()))
    if isinstance(value, list):
        return set().union(*map(leaves, value))
    return set() if value is None else {value}


PLAIN = {
    'alpaca': {'instruction': 'q1', 'output': 'a1'},
    'sharegpt': {
        'conversations': [{'from': 'human', 'value': 'q1'}, {'from': 'gpt', 'value': 'a1'}]
    },
    'messages': {'messages': [user('q1'), said('a1')]},
    'prompt_completion': {'prompt': 'q1', 'completion': 'a1'},
    'prompt_completion, messages': {'prompt': [user('q1')], 'completion': [said('a1')]},
    'prompt_response': {'prompt': 'q1', 'response': 'a1'},
    'prompt_reasoning_final': {'prompt': 'q1', 'reasoning': 't1', 'final': 'a1'},
    'question_answer': {'question': 'q1', 'answer': 'a1'},
    'preference': {'prompt': 'q1', 'chosen': 'a1', 'rejected': 'b1'},
    'preference_implicit': {
        'chosen': [user('q1'), said('a1')],
        'rejected': [user('q1'), said('b1')],
    },
    'preference_messages': {
        'messages': [user('q1')],
        'chosen': [said('a1')],
        'rejected': [said('b1')],
    },
}
EXTRA = {
    'system': 'x1',
    'history': [['x1', 'x2']],
    'tools': [{'name': 'x1', 'parameters': {'type': 'object', 'title': 'x2'}}],
    'functions': [{'name': 'x1'}],
    'input': 'x1',
    'reasoning': 'x1',
    'thinking': 'x1',
    'reasoning_content': 'x1',
    'images': ['x1.png'],
    'label': 'x1',
    'kto_tag': 'x1',
    'weight': 17,
    'train': 'x1',
    'chat_template_kwargs': {'thinking': 'x1'},
    'context': 'x1',
    'answer': 'x1',
    'final': 'x1',
    'messages': [user('x1'), said('x2')],
    'completion': 'x1',
    'rejected': 'x1',
    'note': 'x1',
    'id': 'x1',
    'source': 'x1',
    'score': 17,
    'text': 'x1',
    'turns': [user('x1')],
}
MESSAGE_EXTRA = {
    'thinking': 'x1',
    'reasoning': 'x1',
    'reasoning_content': 'x1',
    'tool_calls': [call('x1', 'x2', '{"x3": "x4"}')],
    'tool_call_id': 'x1',
    'name': 'x1',
    'function_call': {'name': 'x1', 'arguments': '{}'},
    'images': ['x1'],
    'train_detail': [{'begin_offset': 17}],
    'weight': 17,
    'audio': {'id': 'x1'},
    'refusal': 'x1',
    'prefix': True,
    'timestamp': 'x1',
    'content_blocks': ['x1'],
}


def lists_in(row: dict):
    return [v for v in row.values() if isinstance(v, list) and v and isinstance(v[0], dict)]


def foreign_rows():
    "(name, row) of plain rows with one key more, in the row or in one of its messages."
    for name, plain in PLAIN.items():
        for key, value in EXTRA.items():
            if key not in plain:
                yield f'{name}+{key}', copy.deepcopy(plain) | {key: value}
        for at, _ in enumerate(lists_in(plain)):
            for key, value in MESSAGE_EXTRA.items():
                for place in (0, -1):
                    row = copy.deepcopy(plain)
                    lists_in(row)[at][place][key] = value
                    yield f'{name}[{at}][{place}]+{key}', row


FOREIGN = list(foreign_rows())


def fate(row: dict) -> str:
    "What became of a row: `refused`, `counted` (a key of it), `used` or `lost`."
    done = []
    for kind in AS:
        try:
            done = conversations([row], 'a.jsonl', Spec(), kind)
            break
        except LabError as error:
            assert '\n' not in str(error)
    if not done:
        return 'refused'
    counted = leaves([v for k, v in every_key(row) if k in done[1]['ignored']])
    there = leaves(done[0])
    texts = [one for one in there if isinstance(one, str)]
    missing = {
        one
        for one in leaves(row) - there - counted - ROLE_NAMES - {1}
        # `input` is joined to its instruction; `label: true` and `weight: 1` are the default
        if not (isinstance(one, str) and any(one.strip() in text for text in texts))
    }
    if missing:
        return f'lost: {missing}'
    return 'counted' if counted else 'used'


ROLE_NAMES = {'human', 'gpt', 'observation', 'function_call'}


def every_key(value):
    "Each (key, value) of objects at every depth."
    if isinstance(value, dict):
        for key, one in value.items():
            yield key, one
            yield from every_key(one)
    if isinstance(value, list):
        for one in value:
            yield from every_key(one)


def test_no_key_of_a_foreign_row_is_lost():
    fates = {name: fate(row) for name, row in FOREIGN}
    assert len(fates) == len(FOREIGN) >= 60
    assert {name: one for name, one in fates.items() if one.startswith('lost')} == {}
    kinds = list(fates.values())
    assert min(kinds.count(one) for one in ('refused', 'counted', 'used')) > 20
    for key in ('images', 'functions', 'kto_tag', 'weight', 'chat_template_kwargs', 'note', 'text'):
        assert {fates[f'{name}+{key}'] for name in PLAIN} == {'refused'}, key
    for key in ('id', 'source'):
        assert {fates[f'{name}+{key}'] for name in PLAIN} == {'counted'}, key
    assert fates['alpaca+history'] == fates['sharegpt+system'] == fates['messages+tools'] == 'used'


def test_a_lost_key_would_be_seen(monkeypatch):
    import k2lab.text.layouts as layouts

    monkeypatch.setattr(layouts, '_refuse', lambda *a: None)
    fates = [fate(row) for _, row in FOREIGN]
    assert sum(one.startswith('lost') for one in fates) > 60


JUNK = [
    *(
        None,
        0,
        1,
        True,
        1.5,
        '',
        ' ',
        'x',
        '[',
        '{}',
        '[1]',
        '\ud800',
        b'x',
        'function_call',
        'tool',
    ),
    *([], {}, ['x'], [{}], {'a': 1}, [[]], [None], {'role': 'user'}),
    *({'type': 'text', 'text': 'u'}, [{'type': 'text', 'text': 'u'}]),
]
SOME_KEYS = [*EXTRA, *MESSAGE_EXTRA, 'role', 'content', 'from', 'value', 'function', 'arguments']


def inner(value):
    "Each object and list at every depth."
    if isinstance(value, dict | list):
        yield value
        for one in value.values() if isinstance(value, dict) else value:
            yield from inner(one)


def damaged(row: dict, random) -> dict:
    "A row with one or two of its values changed, taken out or added."
    row = copy.deepcopy(row)
    for _ in range(random.randint(1, 2)):
        at = random.choice(list(inner(row)))
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        how, junk = random.random(), copy.deepcopy(random.choice(JUNK))
        if keys and how < 0.5:
            at[random.choice(keys)] = junk
        elif keys and how < 0.7:
            del at[random.choice(keys)]
        elif isinstance(at, dict):
            at[random.choice(SOME_KEYS)] = junk
        else:
            at.insert(random.randint(0, len(at)), junk)
    return row


def test_a_damaged_row_is_read_without_loss_or_refused_in_one_line():
    random, fates = Random(0), []
    for _ in range(3000):
        _, _, row, _ = USUAL[random.choice(list(USUAL))]
        row = damaged(row, random)
        fates.append(fate(row))
        assert not fates[-1].startswith('lost'), row
    assert fates.count('refused') > 1000 and len(fates) - fates.count('refused') > 300


def test_keys_to_leave_are_counted_in_rows():
    rows = [
        {'instruction': 'a', 'output': 'b', 'id': 1, 'images': ['x']},
        {'instruction': 'a', 'output': 'b', 'id': 2, 'note': None},
    ]
    read, counts = conversations(rows, 'a.jsonl', Spec(ignore=['images', 'note']))
    assert len(read) == 2
    assert counts['ignored'] == {'images': 1, 'note': 0, 'id': 2}
    talk = [user('a') | {'id': 1}, said('b', id=2)]
    assert conversations([{'messages': talk}], 'a')[1]['ignored'] == {'id': 1}
    assert (
        conversations([{'messages': [user('a'), said('b'), user('c')]}], 'a')[1]['unanswered'] == 1
    )


def test_ids_and_nulls_of_calls_are_kept():
    talk = [
        user('a'),
        said(None, tool_calls=[call('x', 'f', {'city': None, 'n': 1})]),
        result('x', 'b') | {'id': 'msg_3'},
        said('c'),
    ]
    rows, counts = conversations([{'messages': talk}], 'a', Spec(ignore=['id']))
    assert rows == [{'messages': [*talk[:2], result('x', 'b'), talk[3]]}]
    assert counts['ignored'] == {'id': 1} == conversations([{'messages': talk}], 'a')[1]['ignored']
    strict = [user('a'), said('b', tool_calls=[call('x', 'f', '{}')])]
    strict[1]['tool_calls'][0]['function']['strict'] = True
    rows, counts = conversations([{'messages': strict}], 'a', Spec(ignore=['strict']))
    assert counts['ignored'] == {'strict': 1} and 'strict' not in json.dumps(rows)
    parts = [{'type': 'text', 'text': 'a', 'image_url': None}]
    assert as_conversation({'messages': [user(parts), said('b')]})['messages'][0] == user(
        [{'type': 'text', 'text': 'a'}]
    )


@pytest.mark.parametrize(
    'text',
    [
        '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
        '<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}',
        '<think>So.</think>Call.<tool_call>',
    ],
)
def test_a_call_written_as_text_is_left_with_its_result(text):
    talk = [user('a'), said(text), {'role': 'tool', 'content': 'b'}, said('c')]
    assert as_conversation({'messages': talk})['messages'] == talk
    shared = [{'from': 'human', 'value': 'a'}, {'from': 'gpt', 'value': text}]
    shared += [{'from': 'tool', 'value': 'b'}, {'from': 'gpt', 'value': 'c'}]
    assert as_conversation({'conversations': shared})['messages'] == talk


def test_columns_and_roles_rename():
    row = {
        'system_prompt': 'Short.',
        'turns': [
            {'speaker': 'customer', 'said': 'Hi', 'nr': 1},
            {'speaker': 'agent', 'said': 'Hello', 'thought': 'Polite.'},
        ],
    }
    spec = Spec(
        columns={
            'system_prompt': 'system',
            'turns': 'messages',
            'speaker': 'role',
            'said': 'content',
            'thought': 'reasoning_content',
        },
        roles={'customer': 'user', 'agent': 'assistant'},
        ignore=['nr'],
    )
    rows, counts = conversations([row], 'a.jsonl', spec)
    assert rows[0]['messages'] == [
        system('Short.'),
        user('Hi'),
        said('Hello', reasoning_content='Polite.'),
    ]
    assert counts['ignored'] == {'nr': 1}
    orca = {'system': 'Short.', 'question': 'a', 'chosen': 'b', 'rejected': 'c'}
    assert as_preference(orca, spec=Spec({'question': 'prompt'}))['messages'][1] == user('a')
    binarized = {
        'prompt': 'a',
        'chosen': [user('a'), said('b')],
        'rejected': [user('a'), said('c')],
        'messages': [user('a'), said('b')],
    }
    spec = Spec(ignore=['prompt', 'messages'])
    assert as_preference(binarized, spec=spec)['rejected'] == [said('c')]


# --- what is refused: row, what the one line must name

CALLED = said(None, tool_calls=[call('a', 'f', '{}')])
REFUSED = [
    ([1], 'a row must be an object, this is list'),
    ({}, 'no layout has the keys none'),
    (
        {'instruction': 'a', 'response': 'b'},
        'alpaca, which also needs output; write columns: {YOURS: output}, where YOURS is one of response',
    ),
    (
        {'system_prompt': 's', 'question': 'a', 'response': 'b', 'id': 1},
        'needs prompt; write columns: {YOURS: prompt}, where YOURS is one of question',
    ),
    ({'prompt': 'a', 'messages': OSLO['messages']}, "key 'prompt' belongs to another layout"),
    ({'mesages': [user('a')]}, 'write columns: {mesages: messages}'),
    ({'text': 'a'}, 'plain text'),
    ({'instruction': 'a', 'output': None}, 'alpaca, which also needs output; add it'),
    ({'instruction': 'a', 'output': 'b', 'messages': [user('a')]}, 'fit messages and alpaca'),
    ({'prompt': 'a', 'completion': 'b', 'response': 'c'}, 'prompt_completion and prompt_response'),
    ({'instruction': 'a', 'output': 'b', 'sytem': 'c'}, "did you mean 'system'?"),
    ({'instruction': 'a', 'output': 'b', 'reasoning': 'c', 'thinking': 'd'}, 'both mean'),
    ({'instruction': 'a', 'output': 7}, 'output must be text, this is int: 7'),
    ({'instruction': 'a', 'output': ['b']}, 'output must be text, this is list'),
    ({'instruction': 'a', 'output': '  '}, 'output is empty'),
    ({'instruction': '', 'input': 'a', 'output': 'b'}, 'instruction is empty'),
    ({'instruction': 'a', 'input': 3, 'output': 'b'}, 'input must be text, this is int'),
    ({'instruction': 'a', 'output': 'b', 'system': ['c']}, 'system must be text, this is list'),
    ({'instruction': 'a', 'output': 'b', 'history': 'c'}, 'history must be a list'),
    ({'instruction': 'a', 'output': 'b', 'history': [['c']]}, 'history[0] must be a pair'),
    ({'instruction': 'a', 'output': 'b', 'history': [['c', 3]]}, 'history[0][1] must be text'),
    ({'instruction': 'a', 'output': 'b\ud83d'}, 'half a character'),
    ({'prompt': 'a', 'completion': 'b', 'label': False}, 'label is false'),
    ({'prompt': 'a', 'completion': 'b', 'label': 'good'}, "true or false, this is 'good'"),
    ({'prompt': [user('a')], 'completion': [user('b')]}, "completion[0] has role 'user'"),
    ({'prompt': [user('a')], 'completion': 'b', 'history': [['c', 'd']]}, 'history stands beside'),
    (
        {'prompt': [user('a')], 'completion': [said('b')], 'reasoning': 'c'},
        'reasoning stands beside',
    ),
    ({'messages': []}, 'messages is an empty conversation'),
    ({'messages': 'a'}, 'messages must be a list of messages, this is str'),
    ({'messages': ['a']}, 'messages[0] must be an object'),
    ({'messages': [{'content': 'a'}]}, 'messages[0].role must be text, this is NoneType'),
    ({'messages': [user('a')]}, 'nothing from the assistant'),
    ({'messages': [system('a'), said('b')]}, 'nothing from the user'),
    ({'messages': [user('a'), {'role': 'bot', 'content': 'b'}]}, "messages[1] has role 'bot'"),
    ({'messages': [user('a'), {'role': 'User', 'content': 'b'}]}, "did you mean 'user'?"),
    ({'messages': [{'role': 'developer', 'content': 'b'}]}, 'map it under roles:'),
    ({'messages': [user(''), said('b')]}, 'messages[0].content is empty'),
    ({'messages': [user('a'), said('')]}, 'messages[1].content is empty'),
    ({'messages': [user('a'), said(None)]}, 'no content and calls no tool'),
    ({'messages': [user('a'), said(None, tool_calls=[])]}, 'no content and calls no tool'),
    ({'messages': [user(5), said('b')]}, 'content must be text, this is int: 5'),
    ({'messages': [user({'text': 'a'}), said('b')]}, 'content must be text, this is dict'),
    ({'messages': [user([{'type': 'image_url'}]), said('b')]}, "part of type 'image_url'"),
    ({'messages': [user([{'type': 'text', 'text': 3}]), said('b')]}, 'must be text, this is int'),
    (
        {'messages': [user([{'type': 'text', 'text': 'a', 'cache_control': 1}]), said('b')]},
        "messages[0].content[0]: key 'cache_control'",
    ),
    ({'messages': [user([]), said('b')]}, 'messages[0].content is empty'),
    ({'messages': [user('a'), said('b', train=False)]}, 'no message of the assistant is trained'),
    ({'messages': [user('a'), said('b', weight=0)]}, 'no message of the assistant is trained'),
    ({'messages': [user('a'), said('b', weight=0.5)]}, 'weight must be 0 or 1, this is 0.5'),
    ({'messages': [user('a'), said('b', train='no')]}, "train must be true or false, this is 'no'"),
    ({'messages': [user('a'), said('b', train=True, weight=0)]}, 'differ'),
    ({'messages': [user('a') | {'train': True}, said('b')]}, 'only the assistant is trained'),
    ({'messages': [user('a') | {'tool_calls': [1]}, said('b')]}, "key 'tool_calls'"),
    ({'messages': [user('a'), result('a', 'b'), said('c')]}, 'without a call before it'),
    ({'messages': [user('a'), CALLED, result('b', 'c'), said('d')]}, "result of 'b'"),
    ({'messages': [user('a'), CALLED, *[result('a', 'c')] * 2, said('d')]}, "second result of 'a'"),
    ({'messages': [user('a'), CALLED, CALLED]}, "calls 'a' twice"),
    ({'messages': [user('a'), said(None, tool_calls={'a': 1})]}, 'must be a list of calls'),
    ({'messages': [user('a'), said(None, tool_calls=['a'])]}, 'tool_calls[0] must be an object'),
    ({'messages': [user('a'), said(None, tool_calls=[call('a', 'f', '{"b":')])]}, 'is no JSON'),
    ({'messages': [user('a'), said(None, tool_calls=[call('a', 'f', '[1]')])]}, 'this is list'),
    ({'messages': [user('a'), said(None, tool_calls=[call('a', 'f', None)])]}, 'NoneType'),
    ({'messages': [user('a'), said(None, tool_calls=[call('a', '', '{}')])]}, 'name is empty'),
    ({'messages': [user('a'), CALLED, {'role': 'tool', 'id': 'a', 'content': 'b'}]}, "key 'id'"),
    (
        {'messages': [user('a'), said(None, tool_calls=[call('a', 'f', '{"b": 1, "b": 2}')])]},
        'twice',
    ),
    ({'messages': OSLO['messages'], 'tools': '[' * 100_000}, 'tools is no JSON'),
    ({'messages': OSLO['messages'], 'tools': [{'name': 'f', 'x': b''}]}, 'a value that is no JSON'),
    ({'messages': OSLO['messages'], 'a\nb' * 100: 1, **{f'k{i}': i for i in range(99)}}, 'more'),
    ({'a\nb' * 100: 1, **{f'k{i}': i for i in range(99)}}, 'more'),
    ({'messages': [{'role': ['user'], 'content': 'a'}]}, 'role must be text, this is list'),
    ({'messages': OSLO['messages'], 'tools': '[{'}, 'tools is no JSON'),
    ({'messages': [user('a'), said(None, tool_calls=[call('a', 'f', '{"b": NaN}')])]}, 'NaN is no'),
    ({'messages': OSLO['messages'], 'tools': [{'name': 'f', 'x': float('inf')}]}, 'is no JSON'),
    ({'messages': OSLO['messages'], 'tools': {'name': 'f'}}, 'tools must be a list'),
    ({'messages': OSLO['messages'], 'tools': [{'description': 'f'}]}, 'tools[0].function.name'),
    ({'messages': OSLO['messages'], 'tools': [{'type': 'web_search'}]}, 'tools[0] is no function'),
    ({'messages': [system('a'), *OSLO['messages']], 'system': 'b'}, 'list system under ignore:'),
    ({'prompt': 'a', 'chosen': 'b', 'rejected': 'c'}, 'read it as kind preference'),
]


@pytest.mark.parametrize('row,message', REFUSED, ids=lambda v: v if isinstance(v, str) else '')
def test_a_bad_row_is_refused_in_one_line(row, message):
    good = OSLO
    with pytest.raises(LabError) as e:
        conversations([good, row], 'a.jsonl')
    assert str(e.value).startswith('a.jsonl: row 2: ') and message in str(e.value)
    assert '\n' not in str(e.value) and len(str(e.value)) < 400


@pytest.mark.parametrize(
    'row,message',
    [
        ({'prompt': 'a', 'completion': 'b', 'label': True}, 'DPO compares two replies'),
        ({'prompt': 'a', 'completion': 'b'}, 'chosen and rejected'),
        ({'chosen': 'a b', 'rejected': 'a c'}, 'give the prompt under the key prompt'),
        ({'prompt': 'a', 'chosen': 'b', 'rejected': 'b'}, 'equal'),
        ({'prompt': 'a', 'chosen': '', 'rejected': 'b'}, 'chosen is empty'),
        (
            {'prompt': [user('a')], 'chosen': [user('a'), said('b')], 'rejected': [said('c')]},
            'repeats',
        ),
        (
            {'chosen': [user('a'), said('b')], 'rejected': [user('c'), said('d')]},
            'the prompt must end',
        ),
        (
            {'chosen': [user('a'), said('b')], 'rejected': [user('a')]},
            'rejected must begin and end',
        ),
        (
            {'prompt': [user('a'), said('b')], 'chosen': [said('c')], 'rejected': [said('d')]},
            'must end',
        ),
        (
            {'prompt': 'a', 'chosen': [said('b', weight=0)], 'rejected': 'c'},
            'chosen says train: false',
        ),
        ({'prompt': [system('a')], 'chosen': [said('c')], 'rejected': [said('d')]}, 'must end'),
    ],
)
def test_a_bad_preference_is_refused_in_one_line(row, message):
    with pytest.raises(LabError) as e:
        conversations([row], 'a.jsonl', Spec(), 'preference')
    assert str(e.value).startswith('a.jsonl: row 1: ') and message in str(e.value)
    assert '\n' not in str(e.value)


def test_a_file_of_two_layouts_is_refused():
    rows = [OSLO, OSLO, {'prompt': 'a', 'response': 'b'}]
    with pytest.raises(LabError) as e:
        conversations(rows, 'a.jsonl', allow_bad=5)
    assert str(e.value).startswith('a.jsonl: row 3: layout prompt_response, but a.jsonl: row 1 has')


def test_bad_rows_are_allowed_by_number_and_counted():
    rows = [OSLO, {'messages': []}, OSLO, {'messages': 3}]
    read, counts = conversations(rows, 'a.jsonl', allow_bad=2)
    assert len(read) == 2 and counts['rows'] == 2 and counts['bad'] == 2
    with pytest.raises(LabError, match='row 2: .*and 1 more bad rows; 1 allowed'):
        conversations(rows, 'a.jsonl', allow_bad=1)
    with pytest.raises(LabError, match='a.jsonl: no rows'):
        conversations(rows[1::2], 'a.jsonl', allow_bad=2)


@pytest.mark.parametrize(
    'name,data,message',
    [
        ('a.jsonl', b'', 'a.jsonl: no rows'),
        (
            'a.jsonl',
            b'{"prompt": "a", "prompt": "b", "response": "c"}',
            "'prompt' is written twice",
        ),
        (
            'a.json',
            b'[{"prompt": "a", "prompt": "b", "response": "c"}]',
            "'prompt' is written twice",
        ),
        ('a.json', b'[]', 'a.json: no rows'),
        ('a.json', b'[{"prompt": "a"', 'a.json: not a list in JSON'),
        ('a.json', b'[1]', 'a.json: row 1: a row must be an object'),
        ('a.jsonl', b'\n{"prompt": "a", "response": "b"}\n\n{"prompt"', 'a.jsonl:4: not JSON'),
        ('a.jsonl', b'{"prompt": "a", "response": "\xff"}', 'a.jsonl:1: not UTF-8'),
        ('a.parquet', b'PAR1 cut', 'a.parquet: cannot be read as parquet'),
        ('a.parquet', b'version https://git-lfs', 'a.parquet: cannot be read as parquet'),
        ('a.json.gz', b'\x1f\x8b\x08cut', 'a.json.gz: cannot be unpacked'),
    ],
)
def test_a_broken_file_is_refused_with_its_place(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(LabError) as e:
        read_conversations(tmp_path / name)
    assert message in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize(
    'make,message',
    [
        (lambda: Spec(layout='alpacca'), "did you mean 'alpaca'?"),
        (lambda: Spec(columns={'q': 'promt'}), "did you mean 'prompt'?"),
        (lambda: Spec(roles={'bot': 'asistant'}), "did you mean 'assistant'?"),
        (lambda: Spec(ignore='id'), 'a list of keys, this is str'),
        (lambda: Spec(columns={'a': 'prompt'}, ignore=['a']), 'leave one'),
        (lambda: conversations([OSLO], 'a', kind='pairs'), "unknown kind 'pairs'"),
    ],
)
def test_what_the_user_says_is_checked(make, message):
    with pytest.raises(LabError) as e:
        make()
    assert message in str(e.value) and '\n' not in str(e.value)


def test_every_layout_has_a_row_here():
    named = {layout for _, layout, _, _ in USUAL.values()} | set(PLAIN)
    assert set(LAYOUTS) <= named


def test_a_text_beside_a_reply_is_not_taken_for_a_document(tmp_path):
    path = tmp_path / 'alpaca.jsonl'
    path.write_text('{"instruction": "a", "input": "", "output": "b", "text": "Below is ..."}\n')
    with pytest.raises(LabError, match=r'alpaca.jsonl:1: text stands beside .*instruction'):
        read_corpus(path)
    rows, counts = read_corpus(path, Spec(ignore=['text']))
    assert rows[0]['messages'][1]['content'] == 'b' and counts['ignored'] == {'text': 1}
    rows, _ = read_corpus(path, Spec(ignore=['instruction', 'input', 'output']))
    assert rows[0]['text'] == 'Below is ...'
