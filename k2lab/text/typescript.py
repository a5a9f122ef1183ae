"""Declarations of tools in the notation like TypeScript that Kimi K2.5 and K2.6 are trained on.

The chat templates of these checkpoints print the variable `tools_ts_str`, which Python code in the
checkpoint's folder fills in. K2 Lab runs no code of a checkpoint; this module gives the same text.
The notation writes types, enums, unions, references, descriptions, defaults and a few bounds.
Other keywords of JSON Schema (`format`, `title`, `oneOf` beside a `type`) leave no trace in it.
Kimi's code falls back to JSON where it cannot write a schema; here such a schema is refused."""

import json
from dataclasses import dataclass, field
from typing import Any

from k2lab.lab.config import LabError

INDENT = '  '
FORMS = ('$ref', 'anyOf', 'enum', 'type')  # the first of these that a schema has decides its type
UNION = {
    'string': 'string',
    'number': 'number',
    'integer': 'number',
    'boolean': 'boolean',
    'null': 'null',
    'object': '{}',
    'array': 'Array<any>',
}  # what stands for each member of a list of types
BOUNDS = {
    'string': ('maxLength', 'minLength', 'pattern'),
    'number': ('maximum', 'minimum'),
    'integer': ('maximum', 'minimum'),
    'array': ('maxItems', 'minItems'),
}  # the constraints that are written, each type's in this order
VALUES = {'string': str, 'number': (int, float), 'integer': int, 'boolean': bool}


@dataclass
class _Scope:
    "What the schemas of one function can refer to, and whether one refers to the whole (`#`)."

    definitions: dict = field(default_factory=dict)
    refers_to_root: bool = False


@dataclass
class _Members:
    "The members of an object as text: properties by name, and `additionalProperties`."

    properties: dict[str, str]
    required: list[str]
    others: list[str]

    def ordered(self) -> list[str]:
        "Required members by name, then optional ones by name, then what stands for any other."
        first = [text for name, text in self.properties.items() if name in self.required]
        then = [text for name, text in self.properties.items() if name not in self.required]
        return first + then + self.others


def _short(value: Any) -> str:
    "`value` as JSON, cut after 80 characters."
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 80 else f'{text[:77]}...'


def _typed(value: Any, kind: type, what: str, where: str) -> Any:
    "`value` if it is of `kind`, else a `LabError`."
    if isinstance(value, kind):
        return value
    raise LabError(f'{where} is {_short(value)}; give {what}')


def _sorted(value: Any) -> Any:
    "`value` with the keys of every dict in order, as Kimi's tokenizer sorts tools."
    if isinstance(value, dict):
        return {k: _sorted(value[k]) for k in sorted(value)}
    return [_sorted(v) for v in value] if isinstance(value, list) else value


def _braces(lines: list[str], indent: str) -> str:
    "Members between braces, one a line."
    return '{\n' + ',\n'.join(lines) + f'\n{indent}}}' if lines else '{}'


def _description(holder: dict, indent: str, where: str) -> list[str]:
    "The lines of a description as comments; an empty line stays empty, without slashes."
    text = _typed(holder.get('description') or '', str, 'a text', f'{where}.description')
    return [f'{indent}// {line}' if line else '' for line in text.split('\n')] if text else []


def _form(schema: Any, where: str) -> str:
    "The keyword that decides the type of `schema`, '' where anything fits; `LabError` for others."
    if isinstance(schema, bool) or schema == {}:
        return ''
    _typed(schema, dict, 'a JSON schema: an object, true or false', where)
    for form in FORMS:
        if form in schema:
            return form
    raise LabError(
        f'{where} has {", ".join(schema)} and no type, enum, anyOf or $ref; '
        "Kimi's notation for tools knows no other keyword that decides a type: give it one of these"
    )


def _comments(schema: Any, indent: str, where: str) -> list[str]:
    "The comment lines above a member: its description, then its bounds."
    form = _form(schema, where)
    if not form:
        return []
    kind = schema['type'] if form == 'type' and isinstance(schema['type'], str) else ''
    bounds = ', '.join(f'{b}: {schema[b]}' for b in BOUNDS.get(kind, ()) if b in schema)
    return _description(schema, indent, where) + ([f'{indent}// {bounds}'] if bounds else [])


def _default(schema: Any, indent: str) -> list[str]:
    "The comment line of a default; numbers and booleans are written as Python writes them."
    value = schema.get('default') if isinstance(schema, dict) else None
    if value is None:
        return []
    plain = isinstance(value, int | float)
    return [
        f'{indent}// Default: {repr(value) if plain else json.dumps(value, ensure_ascii=False)}'
    ]


def _reference(ref: Any, scope: _Scope, where: str) -> str:
    "The name of the interface that `ref` points to; `LabError` if it is not one that is known."
    if ref == '#':
        scope.refers_to_root = True
        return 'parameters'
    name = str(ref).split('/')[-1]
    if str(ref).startswith('#/$defs/') and name in scope.definitions:
        return name
    known = ', '.join(['#', *(f'#/$defs/{d}' for d in scope.definitions)])
    raise LabError(
        f'{where}.$ref is {ref!r}; what it can refer to here: {known} '
        '(definitions stand in `$defs` of the parameters, not in `definitions`)'
    )


def _enum(schema: dict, where: str) -> str:
    "The values of an enum; `LabError` if one is not of the declared type, which may include null."
    values, kind = _typed(schema['enum'], list, 'a list', f'{where}.enum'), schema.get('type', '')
    if isinstance(kind, list):
        rest = [k for k in kind if k != 'null'] or ['null']
        if len(kind) > 2 or len(rest) > 1 or not kind:
            raise LabError(f'{where}.type is {kind} beside an enum; give one type, or one and null')
        kind = rest[0]
    _typed(kind, str, "a type's name or a list of them", f'{where}.type')
    wrong = [v for v in values if v is not None and not isinstance(v, VALUES.get(kind, object))]
    if wrong:
        raise LabError(f'{where}.enum has {wrong[0]!r}, which is not of its type, {kind}')
    return ' | '.join(f'"{v}"' if isinstance(v, str) else str(v) for v in values)


def _union(kinds: list, where: str) -> str:
    "A list of types as a union; `LabError` for a type that JSON Schema does not have."
    wrong = [k for k in kinds if not isinstance(k, str) or k not in UNION]
    if wrong:
        raise LabError(f'{where}.type has {wrong[0]!r}; the types of a list: {", ".join(UNION)}')
    return ' | '.join(UNION[k] for k in kinds)


def _array(schema: dict, indent: str, scope: _Scope, where: str) -> str:
    "An array; its items stand on lines of their own where they have comments."
    items, where, deeper = schema.get('items') or {}, f'{where}.items', indent + INDENT
    comments = _comments(items, deeper, where)
    if not comments:
        return f'Array<{_type(items, indent, scope, where)}>'
    return '\n'.join(
        ['Array<', *comments, deeper + _type(items, deeper, scope, where), f'{indent}>']
    )


def _others(schema: dict, indent: str, scope: _Scope, where: str) -> list[str]:
    "The line that stands for properties without a name, if `additionalProperties` says anything."
    allowed, where = schema.get('additionalProperties'), f'{where}.additionalProperties'
    if allowed is None:
        return []
    text = 'never' if allowed is False else _type(allowed, indent, scope, where)
    return [f'{indent}[k: string]: {text}']


def _property(name: str, schema: Any, mark: str, indent: str, scope: _Scope, where: str) -> str:
    "One property with its comments."
    text = f'{indent}{name}{mark}: {_type(schema, indent, scope, where)}'
    return '\n'.join([*_comments(schema, indent, where), *_default(schema, indent), text])


def _members(schema: dict, indent: str, scope: _Scope, where: str) -> _Members:
    "The members of an object; its definitions are known from here on."
    defs = _typed(schema.get('$defs') or {}, dict, 'an object of schemas', f'{where}.$defs')
    scope.definitions.update(defs)
    others = _others(schema, indent, scope, where)
    if 'properties' not in schema:
        return _Members({}, [], others)
    where_to = f'{where}.properties'
    named = _typed(schema['properties'], dict, 'an object of schemas', where_to)
    required = _typed(schema.get('required', []), list, 'a list of names', f'{where}.required')
    for name in required:
        _typed(name, str, 'the name of a property', f'{where}.required')
    properties = {
        n: _property(n, s, '' if n in required else '?', indent, scope, f'{where_to}.{n}')
        for n, s in named.items()
    }
    return _Members(properties, required, others)


def _type(schema: Any, indent: str, scope: _Scope, where: str) -> str:
    "A schema as a type, its further lines indented by `indent`."
    form = _form(schema, where)
    if not form:
        return 'null' if schema is False else 'any'
    value = schema[form]
    if form == '$ref':
        return _reference(value, scope, where)
    if form == 'anyOf':
        branches = enumerate(_typed(value, list, 'a list of schemas', f'{where}.anyOf'))
        return ' | '.join(_type(s, indent, scope, f'{where}.anyOf[{i}]') for i, s in branches)
    if form == 'enum':
        return _enum(schema, where)
    if isinstance(value, list):
        return _union(value, where)
    if value == 'object':
        return _braces(_members(schema, indent + INDENT, scope, where).ordered(), indent)
    if value == 'array':
        return _array(schema, indent, scope, where)
    _typed(value, str, "a type's name or a list of them", f'{where}.type')
    return 'number' if value == 'integer' else value


def _definition(name: str, schema: Any, scope: _Scope, where: str) -> list[str]:
    "The lines of an interface that a definition becomes."
    _typed(schema, dict, 'a JSON schema: an object', where)
    return [
        *_description(schema, '', where),
        f'interface {name} {_type(schema, "", scope, where)}',
    ]


def _function(function: dict, where: str) -> list[str]:
    "The lines that declare one function: what its schema refers to, its description, its type."
    name = _typed(function.get('name'), str, 'the name of the function', f'{where}.name')
    schema, where_to, scope = function.get('parameters') or {}, f'{where}.parameters', _Scope()
    _typed(schema, dict, 'a JSON schema: an object', where_to)
    members = _members(schema, INDENT, scope, where_to)
    lines, argument = [], _braces(members.ordered(), '')
    if scope.refers_to_root:  # then the argument gets a name, and its members stand by name alone
        argument = 'parameters'
        lines = [f'interface parameters {_braces(list(members.properties.values()), "")}']
    for each, definition in list(scope.definitions.items()):
        lines += _definition(each, definition, scope, f'{where_to}.$defs.{each}')
    return [*lines, *_description(function, '', where), f'type {name} = (_: {argument}) => any;']


def typescript_tools(tools: list[dict]) -> str:
    """What the chat templates of Kimi K2.5 and K2.6 print as `tools_ts_str`; '' without tools.

    `tools` are in OpenAI's format, `{"type": "function", "function": {...}}`; the order of their
    keys does not matter. `LabError` if a tool is of another kind, or if its schema has what the
    notation does not know: no type, a reference outside `$defs`, values of another type."""
    lines = []
    for i, tool in enumerate(_typed(tools or [], list, 'a list of tools', 'tools')):
        function = tool.get('function') if isinstance(tool, dict) else None
        if not function or not isinstance(function, dict) or tool.get('type') != 'function':
            raise LabError(
                f'tools[{i}] is {_short(tool)}; Kimi declares functions '
                'alone: give {"type": "function", "function": {"name": ..., "parameters": ...}}'
            )
        lines += _function(_sorted(function), f'tools[{i}].function')
    body = ['# Tools', '', '## functions', 'namespace functions {', *lines, '}', '']
    return '\n'.join(body) if lines else ''
