"""Typed functions as tools, and transcripts: what is taken, what is refused by name, what can be trained on."""

import enum
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from html.parser import HTMLParser
from typing import Annotated, Any, Literal, Optional

import pytest
from pydantic import BaseModel, Field

from k2lab.lab.config import LabError
from k2lab.models.load import open_tokenizer, smoke_model
from k2lab.serving.agent import PYTHON, run_call
from k2lab.serving.tools import declared, tools_in, toolset
from k2lab.serving.transcripts import Transcript, page, row_fault, row_of
from k2lab.text.chat import rendered
from k2lab.text.masks import row_examples
from k2lab.text.rows import read_rows
from k2lab.text.typescript import typescript_tools


class Colour(enum.Enum):
    RED = 'red'
    BLUE = 'blue'


@dataclass
class Point:
    x: int
    y: float = 0.0


class Tree(BaseModel):
    name: str
    title: str = ''
    children: list['Tree'] = []


def everything(
    text: str,
    _under: int,
    schema: bool,
    point: Point,
    tree: Tree | None = None,
    kind: Literal['a', 'b'] = 'a',
    maybe: Optional[int] = None,  # noqa: UP045  the old spelling is a case of its own
    many: list[int] = [],  # noqa: B006
    table: dict[str, float] | None = None,
    pair: tuple[int, str] = (1, 'x'),
    colour: Colour = Colour.RED,
    day: date | None = None,
    *,
    free: Any,
    bounded: Annotated[int, Field(ge=1, le=9, description='one digit')] = 1,
) -> str:
    """Take anything.

    Args:
        text: what is said
        bounded: not this, `Field` says it
    """
    return repr((text, _under, schema, point, tree, kind, maybe, many, table, pair, colour, day))


def call(function, tools=None, **arguments) -> str:
    "What the model gets for a call of a function with these arguments."
    tools = tools or toolset([function])
    return run_call(
        dict(function=dict(name=function.__name__, arguments=json.dumps(arguments))), tools
    )


GIVEN = dict(text='t', _under='7', schema=True, point=dict(x=1), free=[1])


def test_every_kind_of_parameter_is_declared_and_arrives():
    schema = declared(everything)[0]['function']['parameters']
    assert schema['required'] == ['text', '_under', 'schema', 'point', 'free']
    assert schema['additionalProperties'] is False
    known = schema['properties']
    assert known['text'] == dict(type='string', description='what is said')
    assert known['bounded']['description'] == 'one digit' and known['bounded']['maximum'] == 9
    assert known['kind']['enum'] == ['a', 'b'] and known['many']['items'] == dict(type='integer')
    assert schema['$defs']['Tree']['properties']['title'] == dict(type='string', default='')
    got = call(
        everything, **GIVEN, tree=dict(name='n', children=[dict(name='m')]), day='2026-02-03'
    )
    assert "('t', 7, True, Point(x=1, y=0.0), Tree(name='n'" in got
    assert 'datetime.date(2026, 2, 3)' in got and 'Colour.RED' in got
    many = call(everything, **GIVEN, colour='blue', table=dict(a=1), pair=[2, 'y'], many=['3'])
    assert "[3], {'a': 1.0}, (2, 'y'), <Colour.BLUE: 'blue'>" in many


def test_the_declaration_is_taken_by_every_template_of_the_lab():
    declarations = [d for d, _ in toolset([everything, share]).values()]
    assert 'type everything = (_: {' in typescript_tools(declarations)
    tok = open_tokenizer(smoke_model('k2'))
    assert '"everything"' in rendered(tok, [dict(role='user', content='?')], declarations)


MISTAKES = {
    'a word for a number': (dict(_under='seven'), '_under: Input should be a valid integer'),
    'a field missing inside': (dict(point=dict(y=1)), 'point.x: Field required'),
    'a value of no literal': (dict(kind='c'), "kind: Input should be 'a' or 'b'"),
    'out of bounds': (dict(bounded=10), 'bounded: Input should be less than or equal to 9'),
    'unknown': (dict(other=1), "no argument 'other'"),
    'a number for a text': (dict(text=3), "the argument 'text' must be a string"),
    'null': (dict(point=None), 'point'),
    'an object for a list': (dict(many={'0': 1}), 'many: Input should be a valid list'),
    'deep': (dict(tree=dict(name='n', children=[dict(name=3)])), 'tree.children.0.name'),
}


@pytest.mark.parametrize('case', MISTAKES)
def test_wrong_arguments_are_told_in_words(case):
    given, words = MISTAKES[case]
    got = call(everything, **(GIVEN | given))
    assert got.startswith('error: ') and words in got and 'pydantic' not in got


def test_a_missing_argument_is_told():
    assert call(everything, text='t') == "error: the argument '_under' is missing"


def share(part: float, whole: float) -> str:
    "The share."
    return f'{part / whole:.2f}'


def inner(n: int) -> int:
    "Check something inside."
    return declared_inner(n='x')


def declared_inner(n: int) -> int:
    "Twice."
    return 2 * n


def test_an_error_of_the_functions_own_work_keeps_its_type():
    assert call(share, part=1, whole=0) == 'error: ZeroDivisionError: float division by zero'

    def parse(text: str) -> str:
        "Parse a point."
        return str(Tree.model_validate_json(text))

    assert 'error: ValidationError: 1 validation error for Tree' in call(parse, text='{}')


def stars(*many: int):
    "Stars."


def keywords(**many: int):
    "Keywords."


def slash(x: int, /):
    "Slash."


def bare(x):
    "Bare."


def silent(x: int):
    pass


async def later(x: int):
    "Later."


def many(x: int):
    "Many."
    yield x


def odd(x: Callable):
    "Odd."


def unknown(x: 'Nothing'):  # noqa: F821
    "Unknown."


def nan(x: float = float('nan')):
    "No number."


def anything(x: Any = None):
    "Anything."


class Plain:
    "No type of pydantic's."


def plain(x: Plain):
    "Plain."


def ünderstand(x: int):
    "A name that servers refuse."


REFUSED = {
    stars: "its parameter '*many: int' takes any number",
    keywords: "its parameter '**many: int' takes any number",
    slash: 'remove the `/`',
    bare: "its parameter 'x' has no type",
    silent: 'it has no docstring',
    later: 'it is async',
    many: 'it yields',
    odd: 'its signature has no JSON schema',
    unknown: "name 'Nothing' is not defined",
    nan: 'its signature has no JSON schema',
    anything: 'has default and no type',
    plain: 'its signature has no JSON schema',
    ünderstand: 'it has no name that a model can write',
    max: 'it has no signature',
    Point: 'it has no docstring',
    functools.partial(share, 1): 'it has no name',
    3: 'it has no name',
}


@pytest.mark.parametrize(
    'function', REFUSED, ids=lambda f: getattr(f, '__name__', type(f).__name__)
)
def test_what_is_no_tool_is_refused_by_name(function):
    with pytest.raises(LabError) as e:
        toolset([function])
    assert REFUSED[function] in str(e.value) and '\n' not in str(e.value)
    assert getattr(function, '__name__', '') in str(e.value)


def test_a_method_of_an_object_is_a_tool():
    class Shelf:
        def __init__(self):
            self.books = ['one']

        def look(self, number: int) -> str:
            "A book on the shelf."
            return self.books[number]

    assert call(Shelf().look, toolset([Shelf().look]), number=0) == 'one'


def test_files_of_tools(tmp_path):
    (tmp_path / 'beside.py').write_text('FACTOR = 3\n')
    (tmp_path / 'mine.py').write_text(
        'from __future__ import annotations\nfrom dataclasses import dataclass\n'
        'from json import dumps\nfrom beside import FACTOR\n\n@dataclass\nclass P:\n    x: int\n\n'
        'def triple(p: P) -> int:\n    "Three times."\n    return FACTOR * p.x\n\n'
        'def _hidden(x): ...\n'
    )
    tools = tools_in(tmp_path / 'mine.py')
    assert list(tools) == ['triple']
    one = dict(function=dict(name='triple', arguments='{"p": {"x": 2}}'))
    assert run_call(one, tools) == '6'
    refused = {
        'TOOLS = 3\n': 'TOOLS must be a list',
        'TOOLS = []\n': 'defines no function',
        'X = 1\n': 'defines no function',
        'import nothing_of_that_name\n': 'mine.py:1: ModuleNotFoundError',
        '\nraise SystemExit(3)\n': 'mine.py:2: SystemExit: 3',
        'def go(\n': 'mine.py:1: SyntaxError',
        '\x00': 'mine.py',
    }
    for text, words in refused.items():
        (tmp_path / 'mine.py').write_text(text)
        with pytest.raises(LabError) as e:
            tools_in(tmp_path / 'mine.py')
        assert words in str(e.value) and '\n' not in str(e.value)
    for path in (tmp_path, tmp_path / 'none.py'):
        with pytest.raises(LabError):
            tools_in(path)


HOSTILE = '</div><script>alert(1)</script><img src=x onerror=alert(1)>\x00\x1b[2J\ud83d\u2028\u202e'


class Tags(HTMLParser):
    "What a page is made of."

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.texts = [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data):
        self.texts.append(data)


def conversation(*more: dict) -> list[dict]:
    return [dict(role='user', content='Hello?'), dict(role='assistant', content='Hi.'), *more]


def test_a_page_has_no_script_and_nothing_from_elsewhere_whatever_was_said():
    given = dict(name=HOSTILE, arguments=HOSTILE)
    messages = [dict(role='system', content=HOSTILE), dict(role='user', content=HOSTILE)]
    messages += [
        dict(
            role='assistant',
            content=HOSTILE,
            reasoning_content=HOSTILE,
            tool_calls=[dict(id=HOSTILE, function=given)],
        ),
        dict(role='tool', tool_call_id=HOSTILE, content=HOSTILE),
    ]
    text = page([row_of(messages, [])], HOSTILE)
    text.encode()
    found = Tags(text)
    assert not {'script', 'img', 'link', 'iframe'} & set(found.tags)
    assert not [name for name in found.attributes if name.startswith('on') or name == 'src']
    assert '\x00' not in text and '\x1b' not in text
    assert ''.join(found.texts).count('alert(1)') >= 14
    assert 'prefers-color-scheme:dark' in text and "default-src 'none'" in text


CALL = dict(id='functions.python:0', type='function')
UNTRAINABLE = {
    'a question alone': ([dict(role='user', content='?')], 'nothing from the assistant'),
    'all cut off': (
        [
            dict(role='user', content='?'),
            dict(role='assistant', content='Well', train=False),
        ],
        'no message of the assistant is trained',
    ),
    'markup that is no call': (
        conversation(dict(role='assistant', content='<|tool_call_begin|>half')),
        'markup',
    ),
    'a call with a foreign id': (
        conversation(
            dict(
                role='assistant',
                content='',
                tool_calls=[dict(CALL, id='x', function=dict(name='python', arguments='{}'))],
            )
        ),
        'K2 writes functions.python:0',
    ),
}


@pytest.mark.parametrize('case', UNTRAINABLE)
def test_rows_that_cannot_be_trained_on_stay_out_of_the_file_and_are_told(case, tmp_path):
    messages, words = UNTRAINABLE[case]
    kept = Transcript(tmp_path / 'talk', [PYTHON])
    kept.keep(messages)
    assert not (tmp_path / 'talk.jsonl').exists() and words in kept.faults()[0]
    assert words in (tmp_path / 'talk.html').read_text()
    kept.begin()
    kept.keep(conversation())
    [row] = read_rows(tmp_path / 'talk.jsonl', 'messages')
    assert row_examples(open_tokenizer(smoke_model('k2')), row) and row_fault(row) == ''


@pytest.mark.parametrize('text', ['\x85', '\u2028', '\u2029', '\x0b', '\x0c', '\x1c', '\x1d\x1e'])
def test_characters_that_some_take_for_line_ends_stay_in_their_row(text, tmp_path):
    kept = Transcript(tmp_path / 'talk')
    said = f'one{text}two'
    kept.keep(conversation(dict(role='user', content=said), dict(role='assistant', content=said)))
    [row] = read_rows(tmp_path / 'talk.jsonl', 'messages')
    assert row['messages'][-1]['content'] == said


def test_half_characters_and_secrets_do_not_reach_the_files(tmp_path, monkeypatch):
    secret = 'q8Zr2LxV7mN4tB9wKc3D'
    monkeypatch.setenv('MY_API_KEY', secret)
    kept = Transcript(tmp_path / 'talk')
    kept.keep(conversation(dict(role='user', content=f'\ud83d {secret}')))
    for path in tmp_path.iterdir():
        text = path.read_text()
        assert secret not in text and '***' in text and '\\ud83d' in text
