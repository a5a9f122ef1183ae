"""Tools as Kimi K2.5 and K2.6 are shown them. The expected texts are Kimi's own, or worked out by hand
from how its code prints each keyword."""

import json
import re
from pathlib import Path

import pytest

from k2lab.lab.config import LabError
from k2lab.text.typescript import typescript_tools

SHARED = Path(__file__).parents[2] / 'shared'
TEMPLATES = SHARED / 'templates' / 'cases.jsonl'
CASES = SHARED / 'cases' / 'training' / 'template_cases.jsonl'
S, I, N = {'type': 'string'}, {'type': 'integer'}, {'type': 'null'}


def tool(name: str, parameters=None, **more) -> dict:
    "One tool in OpenAI's format."
    function = {'name': name, **more} | ({} if parameters is None else {'parameters': parameters})
    return {'type': 'function', 'function': function}


def schema(required=(), **properties) -> dict:
    "The parameters of a function."
    return {'type': 'object', 'properties': properties, 'required': list(required)}


def declared(parameters=None, **more) -> str:
    "The lines between `namespace functions {` and its closing brace, for one function `f`."
    text = typescript_tools([tool('f', parameters, **more)])
    head, tail = '# Tools\n\n## functions\nnamespace functions {\n', '\n}\n'
    assert text.startswith(head) and text.endswith(tail)
    return text[len(head) : -len(tail)]


def member(one, name: str = 'x') -> str:
    "What stands for one required property, with its comments."
    text = declared(schema([name], **{name: one}))
    assert text.startswith('type f = (_: {\n') and text.endswith('\n}) => any;')
    return text[len('type f = (_: {\n') : -len('\n}) => any;')]


# Kimi's own texts


WEATHER = [
    tool(
        'get_weather',
        {
            'type': 'object',
            'required': ['city'],
            'properties': {
                'unit': {'type': 'string', 'enum': ['c', 'f']},
                'city': {'type': 'string', 'description': 'City, e.g. Zürich'},
            },
        },
        description='Weather now in a city.',
    ),
    tool(
        'add',
        schema('ab', b={'type': 'number'}, a={'type': 'number'}),
        description='Sum of two numbers.',
    ),
]
WEATHER_TEXT = """# Tools

## functions
namespace functions {
// Weather now in a city.
type get_weather = (_: {
  // City, e.g. Zürich
  city: string,
  unit?: "c" | "f"
}) => any;
// Sum of two numbers.
type add = (_: {
  a: number,
  b: number
}) => any;
}
"""
DOES = [
    tool('weather', schema(['city'], city=S), description='does weather'),
    tool('add', schema('ba', b={'type': 'number'}, a={'type': 'number'}), description='does add'),
]
DOES_TEXT = """# Tools

## functions
namespace functions {
// does weather
type weather = (_: {
  city: string
}) => any;
// does add
type add = (_: {
  a: number,
  b: number
}) => any;
}
"""


@pytest.mark.parametrize('tools, text', [(WEATHER, WEATHER_TEXT), (DOES, DOES_TEXT), ([], '')])
def test_kimis_own_texts(tools, text):
    assert typescript_tools(tools) == text


def rows(path: Path) -> list:
    "The rows of a file beside the repository; the test is skipped where it is absent."
    if not path.exists():
        pytest.skip(f'{path.name} is not here')
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_texts_that_tokenizers_hand_to_templates():
    found = [r for r in rows(TEMPLATES) if 'tools_ts_str' in (r.get('kwargs') or {})]
    assert len(found) == 3
    for r in found:
        assert typescript_tools(r['tools']) == r['kwargs']['tools_ts_str']


def test_texts_in_rendered_conversations():
    found = [r for r in rows(CASES) if r['release'] == 'K2.5/K2.6']
    assert len(found) == 46 and sum(bool(r['tools']) for r in found) == 24
    for r in found:
        printed = re.findall(r'tool_declare<\|im_middle\|>(.*?)<\|im_end\|>', r['expected'], re.S)
        assert printed == [text for text in [typescript_tools(r['tools'] or [])] if text]


# One keyword after the other


@pytest.mark.parametrize(
    'one, text',
    [
        (S, '  x: string'),
        (I, '  x: number'),
        ({'type': 'number'}, '  x: number'),
        ({'type': 'boolean'}, '  x: boolean'),
        (N, '  x: null'),
        ({'type': 'uuid'}, '  x: uuid'),  # a type of nobody's stands as it is
        ({}, '  x: any'),
        (True, '  x: any'),
        (False, '  x: null'),
    ],
)
def test_types(one, text):
    assert member(one) == text


@pytest.mark.parametrize(
    'one, text',
    [
        ({'type': ['string', 'null']}, '  x: string | null'),
        (
            {'type': ['object', 'array', 'integer', 'boolean']},
            '  x: {} | Array<any> | number | boolean',
        ),
        # the members of an object and the bounds of a number are not written in a list of types
        ({**schema(a=S), 'type': ['object', 'null']}, '  x: {} | null'),
        ({'type': ['integer', 'null'], 'minimum': 1}, '  x: number | null'),
        ({'anyOf': [S, I, N]}, '  x: string | number | null'),
        ({'anyOf': [{'type': 'array', 'items': S}, {}]}, '  x: Array<string> | any'),
        (
            {'anyOf': [{**S, 'description': 'lost'}, schema(['a'], a=S)]},
            '  x: string | {\n    a: string\n  }',
        ),
        ({'anyOf': [S], 'type': 'integer', 'enum': [1]}, '  x: string'),  # anyOf goes first
    ],
)
def test_unions(one, text):
    assert member(one) == text


@pytest.mark.parametrize(
    'one, text',
    [
        ({'enum': ['c', 'f']}, '"c" | "f"'),
        ({'type': 'string', 'enum': ['é"q', '月']}, '"é"q" | "月"'),  # no escapes
        ({'type': 'integer', 'enum': [1, -2]}, '1 | -2'),
        ({'type': 'number', 'enum': [1, 2.5, 1.0]}, '1 | 2.5 | 1.0'),
        ({'enum': [True, False, None, 'a', 3]}, 'True | False | None | "a" | 3'),  # as in Python
        ({'type': ['string', 'null'], 'enum': ['a', None]}, '"a" | None'),
        ({'type': ['integer'], 'enum': [3]}, '3'),
        ({'type': 'string', 'enum': ['a'], 'minLength': 1}, '"a"'),  # no bounds beside an enum
    ],
)
def test_enums(one, text):
    assert member(one) == f'  x: {text}'


@pytest.mark.parametrize(
    'one, comments',
    [
        ({**S, 'description': 'One line.'}, ['// One line.']),
        ({**S, 'description': 'Two\nlines, “é” */'}, ['// Two', '// lines, “é” */']),
        ({**S, 'description': 'a\n\n b\n'}, ['// a', '', '//  b', '']),  # empty lines stay empty
        ({**S, 'description': ''}, []),
        (
            {**S, 'pattern': '^a|"b"$', 'minLength': 0, 'maxLength': 9},
            ['// maxLength: 9, minLength: 0, pattern: ^a|"b"$'],
        ),
        ({**I, 'minimum': -1, 'maximum': 2.5}, ['// maximum: 2.5, minimum: -1']),
        ({'type': 'number', 'minimum': 0, 'maximum': 1e3}, ['// maximum: 1000.0, minimum: 0']),
        ({'type': 'array', 'minItems': 1, 'maxItems': 3}, ['// maxItems: 3, minItems: 1']),
        ({**S, 'minimum': 1, 'maxItems': 2}, []),  # bounds of other types
        # keywords without a place in the notation
        ({**I, 'exclusiveMinimum': 0, 'multipleOf': 2, 'format': 'int32', 'title': 'X'}, []),
        ({**S, 'oneOf': [{'const': 'a'}], 'examples': ['a']}, []),
        ({**S, 'default': 'é"'}, ['// Default: "é\\""']),
        ({**I, 'default': 0}, ['// Default: 0']),
        ({'type': 'number', 'default': 1.0}, ['// Default: 1.0']),
        ({'type': 'boolean', 'default': False}, ['// Default: False']),  # as in Python
        ({**S, 'default': None}, []),
        ({'anyOf': [S, N], 'default': [True, None]}, ['// Default: [true, null]']),  # as in JSON
        ({'enum': ['a'], 'default': {'b': 1, 'a': 'é'}}, ['// Default: {"a": "é", "b": 1}']),
        (
            {**I, 'default': 5, 'minimum': 1, 'description': 'How many.'},
            ['// How many.', '// minimum: 1', '// Default: 5'],
        ),
    ],
)
def test_comments(one, comments):
    assert member(one).split('\n')[:-1] == [f'  {line}' if line else '' for line in comments]


@pytest.mark.parametrize(
    'one, text',
    [
        ({'type': 'array'}, 'Array<any>'),
        ({'type': 'array', 'items': {}}, 'Array<any>'),
        ({'type': 'array', 'items': False}, 'Array<any>'),
        ({'type': 'array', 'items': {'type': 'array', 'items': I}}, 'Array<Array<number>>'),
        (
            {'type': 'array', 'items': {'enum': ['a', 'b'], 'description': 'Which.'}},
            'Array<\n    // Which.\n    "a" | "b"\n  >',
        ),
        (
            {'type': 'array', 'items': schema(['a'], a=S)},
            'Array<{\n    a: string\n  }>',
        ),
        (
            {'type': 'array', 'items': {**schema(a=S), 'description': 'One.'}},
            'Array<\n    // One.\n    {\n      a?: string\n    }\n  >',
        ),
        (
            {
                'type': 'array',
                'items': {'type': 'array', 'minItems': 2, 'items': {**S, 'minLength': 1}},
            },
            'Array<\n    // minItems: 2\n    Array<\n      // minLength: 1\n      string\n    >\n  >',
        ),
    ],
)
def test_arrays(one, text):
    assert member(one) == f'  x: {text}'


def test_members_of_objects():
    "Required ones first, each part in the order of its names; a name is written as it is."
    inner = {**schema(['to'], to=S, at={**I, 'description': 'Hour.'}), 'description': 'A trip.'}
    text = declared(schema(['z', 'b', 'ghost'], b=S, a=S, z=inner, B=S, **{'my key': S, '日': S}))
    assert text == (
        'type f = (_: {\n'
        '  b: string,\n'
        '  // A trip.\n'
        '  z: {\n'
        '    to: string,\n'
        '    // Hour.\n'
        '    at?: number\n'
        '  },\n'
        '  B?: string,\n'
        '  a?: string,\n'
        '  my key?: string,\n'
        '  日?: string\n'
        '}) => any;'
    )


@pytest.mark.parametrize(
    'allowed, text',
    [
        (None, '{}'),
        (True, '{\n    [k: string]: any\n  }'),
        (False, '{\n    [k: string]: never\n  }'),
        ({}, '{\n    [k: string]: any\n  }'),
        ({**S, 'description': 'lost'}, '{\n    [k: string]: string\n  }'),
        (schema(['a'], a=S), '{\n    [k: string]: {\n      a: string\n    }\n  }'),
    ],
)
def test_additional_properties(allowed, text):
    assert member({'type': 'object', 'additionalProperties': allowed}) == f'  x: {text}'


def test_additional_properties_stand_last():
    text = declared({**schema(a=S), 'additionalProperties': False})
    assert text == 'type f = (_: {\n  a?: string,\n  [k: string]: never\n}) => any;'


@pytest.mark.parametrize('parameters', [None, {}, {'type': 'object'}, schema()])
def test_a_function_without_parameters(parameters):
    assert declared(parameters) == 'type f = (_: {}) => any;'
    assert declared(parameters, description='Stop.\n\nNow.', strict=True) == (
        '// Stop.\n\n// Now.\ntype f = (_: {}) => any;'
    )
    assert declared(parameters, description=None) == declared(parameters)
    assert typescript_tools(
        [{'type': 'function', 'function': {'name': 'f', 'parameters': None}}]
    ) == (typescript_tools([tool('f', parameters)]))


def test_a_name_that_is_no_identifier_stands_as_it_is():
    assert 'type get-weather.2 = (_: {}) => any;' in typescript_tools([tool('get-weather.2')])


def test_definitions_become_interfaces():
    color = {'enum': ['red'], 'type': 'string', 'description': 'A color.\nOne.'}
    node = {**schema(['id'], id=S, next={'$ref': '#/$defs/Node'}), 'description': 'A node.'}
    parameters = schema(
        ['node'],
        node={'$ref': '#/$defs/Node', 'description': 'The first.'},
        color={'$ref': '#/$defs/Color', 'default': 'red'},
    )
    assert declared({**parameters, '$defs': {'Node': node, 'Color': color}}, description='Go.') == (
        '// A color.\n'
        '// One.\n'
        'interface Color "red"\n'
        '// A node.\n'
        'interface Node {\n'
        '  id: string,\n'
        '  next?: Node\n'
        '}\n'
        '// Go.\n'
        'type f = (_: {\n'
        '  // The first.\n'
        '  node: Node,\n'
        '  // Default: "red"\n'
        '  color?: Color\n'
        '}) => any;'
    )


def test_parameters_that_refer_to_themselves():
    "They get a name; required and optional members are then in one order, and no others are named."
    tree = schema(['value'], value=S, kids={'type': 'array', 'items': {'$ref': '#'}})
    assert declared({**tree, 'additionalProperties': False}, description='Plant.') == (
        'interface parameters {\n'
        '  kids?: Array<parameters>,\n'
        '  value: string\n'
        '}\n'
        '// Plant.\n'
        'type f = (_: parameters) => any;'
    )


def turned(value):
    "`value` with the keys of every dict in the opposite order."
    if isinstance(value, dict):
        return {k: turned(value[k]) for k in reversed(value)}
    return [turned(v) for v in value] if isinstance(value, list) else value


def test_the_order_of_keys_does_not_matter():
    defs = {'B': S, 'A': I}
    one = schema(['b'], b={'$ref': '#/$defs/A', 'default': {'y': 1, 'x': 2}}, a={'$ref': '#'})
    tools = [*WEATHER, tool('f', {**one, '$defs': defs}, description='Go.')]
    assert turned(tools) == tools and json.dumps(turned(tools)) != json.dumps(tools)
    assert typescript_tools(turned(tools)) == typescript_tools(tools)


def test_tools_are_left_as_they_were():
    before = json.dumps(WEATHER)
    typescript_tools(WEATHER)
    assert json.dumps(WEATHER) == before


# Refusals


@pytest.mark.parametrize(
    'one, words',
    [
        ({'oneOf': [S, I]}, r'x has oneOf and no type, enum, anyOf or \$ref'),
        ({'const': 'end'}, 'x has const and no type'),
        ({'description': 'A city.'}, 'x has description and no type'),
        ({'anyOf': [S, {'allOf': [S]}]}, r'x\.anyOf\[1\] has allOf and no type'),
        ({'type': 'array', 'items': {'not': S}}, r'x\.items has not and no type'),
        ({'type': 'array', 'items': [S, I]}, r'x\.items is \[.*\]; give a JSON schema'),
        ({'type': 'array', 'items': {'$ref': '#/$defs/A'}}, r"items\.\$ref is '#/\$defs/A'"),
        ({'$ref': '#/definitions/A'}, r"'#/definitions/A'; what it can refer to here: # \("),
        ({'$ref': 'https://example.org/a.json'}, r'\$ref is'),
        ({'$ref': None}, r'\$ref is None'),
        ({'type': ['string', 'uuid']}, r"type has 'uuid'; the types of a list: string, number"),
        ({'type': None}, r"x\.type is null; give a type's name"),
        ({'type': {'a': 1}}, r"x\.type is \{"),
        ({'type': 'string', 'enum': ['a', 1]}, 'enum has 1, which is not of its type, string'),
        ({'type': 'integer', 'enum': [1.5]}, 'enum has 1.5, which is not of its type, integer'),
        ({'type': ['null', 'boolean'], 'enum': [0]}, 'enum has 0'),
        ({'type': ['string', 'integer'], 'enum': ['a']}, 'give one type, or one and null'),
        ({'type': [], 'enum': ['a']}, 'give one type, or one and null'),
        ({'type': ['string', 'null', 'null'], 'enum': ['a']}, 'give one type, or one and null'),
        ({'enum': 'ab'}, r'x\.enum is "ab"; give a list'),
        ({'anyOf': {}}, r'x\.anyOf is \{\}; give a list of schemas'),
        ({**S, 'description': ['a']}, r'x\.description is \["a"\]; give a text'),
        ({'type': 'object', 'properties': None}, r'x\.properties is null'),
        ({'type': 'object', 'properties': {}, 'required': True}, r'x\.required is true'),
        ({'type': 'object', 'properties': {}, 'required': [['a']]}, r'x\.required is \["a"\]'),
        ({'type': 'object', 'additionalProperties': 1}, r'additionalProperties is 1'),
        ({'type': 'object', '$defs': ['A']}, r'x\.\$defs is \["A"\]'),
        ('string', 'x is "string"; give a JSON schema'),
        (None, 'x is null; give a JSON schema'),
    ],
)
def test_a_schema_that_the_notation_does_not_know_is_refused(one, words):
    with pytest.raises(LabError, match=words) as refused:
        declared(schema(x=one))
    message = str(refused.value)
    assert message.startswith('tools[0].function.parameters.properties.x') and '\n' not in message


@pytest.mark.parametrize(
    'tools, words',
    [
        ({'a': 1}, 'tools is {"a": 1}; give a list of tools'),
        (['f'], r'tools\[0\] is "f"; Kimi declares functions alone'),
        ([tool('f'), {'name': 'g'}], r'tools\[1\] is {"name": "g"}'),
        ([{'type': '_plugin', 'function': {'name': 'f'}}], r'tools\[0\] is {"type": "_plugin"'),
        ([{'function': {'name': 'f'}}], r'tools\[0\] is'),
        ([{'type': 'function'}], r'tools\[0\] is'),
        ([{'type': 'function', 'function': {}}], r'tools\[0\] is'),
        ([{'type': 'function', 'function': {'description': 'x'}}], r'function\.name is null'),
        ([tool('f', [1])], r'tools\[0\]\.function\.parameters is \[1\]'),
        ([tool('f', description=3)], r'function\.description is 3; give a text'),
        ([tool('f', {'$defs': {'A': True}})], r'parameters\.\$defs\.A is true'),
    ],
)
def test_what_is_no_tool_is_refused(tools, words):
    with pytest.raises(LabError, match=words):
        typescript_tools(tools)


def test_a_long_value_is_cut_in_the_message():
    with pytest.raises(LabError) as refused:
        typescript_tools([{'name': 'f', 'description': 'long ' * 100}])
    assert len(str(refused.value)) < 260 and '...;' in str(refused.value)
