"""`k2lab runs`: the runs that pass a test, in an order, in columns."""

import operator
import os
import re
from collections.abc import Callable
from typing import Any

from k2lab.cli.index import json_text, summaries
from k2lab.cli.progress import begun, outcome, wall
from k2lab.cli.tables import fitting_table
from k2lab.lab.config import SCALES, LabError, did_you_mean, lab_path, one_of, yaml_value
from k2lab.lab.display import clock, short

STATES = ('prepared', 'running', 'complete', 'failed', 'interrupted', 'unknown', 'unreadable')


def campaign(record: dict) -> str:
    "The campaign in whose folder a run lies."
    return os.path.basename(os.path.dirname(record['folder']))


def is_promoted(record: dict) -> bool:
    "Whether what a run saved has taken over its names."
    from k2lab.lab.records import promoted

    return promoted(record)


# what `--where`, `--sort` and `--columns` name: a value of a record
FIELDS: dict[str, Callable] = {
    'campaign': campaign,
    'run': lambda r: os.path.basename(r['folder']),
    'stage': lambda r: r.get('stage'),
    'scale': lambda r: r.get('scale'),
    'seed': lambda r: r.get('seed'),
    'status': lambda r: r['status'],
    'reason': lambda r: r.get('reason') or None,
    'promoted': is_promoted,
    'edited': lambda r: bool(r.get('edited')),
    'started': lambda r: r.get('started') or None,
    'wall': lambda r: round(wall(r), 3) or None,
    'peak_gib': lambda r: r.get('peak_gib'),
    'gpu_peak_gib': lambda r: r.get('gpu_peak_gib'),
    'measure': lambda r: first_measure(r) or None,
    'parents': lambda r: parents(r),
    'saves': lambda r: list(r['saves']),
    'tag': lambda r: r.get('tags', []),
    'note': lambda r: [note['text'] for note in r.get('notes', [])],
}


def first_measure(record: dict) -> str:
    "A run's first measure, before and after."
    m = next(iter(record['metrics']), None)
    if not m:
        return ''
    before = '' if m['before'] is None else f'{short(m["before"])} -> '
    return f'{m["measure"]} {before}{short(m["after"])}'


def parents(record: dict) -> list[str]:
    "The runs that a run read from."
    return list(dict.fromkeys(p['run'] for p in record['parents'] if p.get('run')))


def inner(values: dict, path: str):
    "The value at a dotted name in nested dictionaries, None where there is none."
    if path in values:
        return values[path]
    head, _, rest = path.partition('.')
    block = values.get(head)
    return inner(block, rest) if rest and isinstance(block, dict) else None


def value(record: dict, field: str) -> Any:
    "A field of a record: one of `FIELDS`, `measure.NAME` (after, else before) or `config.KEY`; None if unknown."
    kind, _, name = field.partition('.')
    if field in FIELDS:
        return FIELDS[field](record)
    if kind == 'config':
        return inner(record['config'], name)
    rows = [m for m in record['metrics'] if m['measure'] == name]
    both = [rows[-1].get('after'), rows[-1].get('before')] if rows else []
    return next((v for v in both if v is not None), None)


def check_field(field: str, records: list[dict], where: str) -> str:
    "`field` if it is one of `FIELDS`, or a measure or a key that some run has; else a `LabError`."
    kind, dot, name = field.partition('.')
    if not dot or kind not in ('measure', 'config'):
        return one_of('field', field, [*FIELDS, 'measure.NAME', 'config.KEY'], where)
    if kind == 'measure':
        known = dict.fromkeys(m['measure'] for r in records for m in r['metrics'])
        found = name in known
    else:
        known = dict.fromkeys(f'{k}' for r in records for k in r['config'])
        found = any(inner(r['config'], name) is not None for r in records) or name in known
    if records and not found:
        near = did_you_mean(name, known) or f"; there are: {', '.join(known) or 'none'}"
        raise LabError(f"{where}: no run has the {kind} '{name}'{near}")
    return field


# ---- tests ---------------------------------------------------------------------------------------

OPERATORS = {
    '<=': operator.le,
    '>=': operator.ge,
    '!=': operator.ne,
    '<': operator.lt,
    '>': operator.gt,
    '=': operator.eq,
}
CHOICES = {'status': STATES, 'scale': SCALES}


def test_of(text: str, records: list[dict]) -> Callable[[dict], bool]:
    "The test that `FIELD=VALUE` asks for (or `!=`, `<`, `<=`, `>`, `>=`); `LabError` if it makes no sense."
    match = re.fullmatch(r'\s*([^<>=!\s]+)\s*(<=|>=|!=|=|<|>)\s*(.*?)\s*', text)
    if not match:
        raise LabError(
            f"--where '{text}': expected FIELD=VALUE, or !=, <, <=, > or >= between them"
        )
    field, sign, want = check_field(match[1], records, '--where'), match[2], match[3]
    if field in CHOICES:
        one_of(field, want, CHOICES[field], '--where')
    if field == 'stage' and want not in (stages := stages_of(records)):
        one_of('stage', want, stages, '--where')
    return lambda record: compares(field, value(record, field), sign, want)


def stages_of(records: list[dict]) -> list[str]:
    "The stages of this lab and of its runs."
    from k2lab.lab.config import stage_names

    return list(dict.fromkeys([*stage_names(), *(r['stage'] for r in records)]))


def compares(field: str, have: Any, sign: str, want: str) -> bool:
    "Whether a value passes a test; an unknown one passes none. `LabError` if the two have no order."
    if have is None:
        return False
    if isinstance(have, list) and sign in ('=', '!='):
        return (want in have) == (sign == '=')
    if field == 'started' and sign in ('=', '!='):
        return str(have).startswith(want) == (sign == '=')
    number = yaml_value(want)
    if is_number(have) and is_number(number):
        return OPERATORS[sign](have, number)
    if sign in ('=', '!='):
        return (want == str(have) or number == have) == (sign == '=')
    if field == 'started':
        return OPERATORS[sign](have, want)
    raise LabError(f"--where {field}{sign}{want}: {short(have)} and '{want}' have no order")


def is_number(v) -> bool:
    "Whether a value is a number, and no truth value."
    return isinstance(v, (int, float)) and not isinstance(v, bool)


# ---- order and columns ---------------------------------------------------------------------------


def in_order(records: list[dict], field: str) -> list[dict]:
    "Records sorted by a field, largest first if it begins with `-`; those without a value come last."
    name = field.removeprefix('-')
    known = [r for r in records if value(r, name) is not None]
    unknown = [r for r in records if value(r, name) is None]
    number = all(is_number(value(r, name)) for r in known)
    key = lambda r: value(r, name) if number else str(value(r, name))
    return sorted(known, key=key, reverse=field.startswith('-')) + unknown


def chosen(records: list[dict], options: dict) -> list[dict]:
    "The records that pass all tests of `--where`, in the order of `--sort`, as many as `--limit` allows."
    tests = [test_of(text, records) for text in options['where']]
    found = [r for r in records if all(test(r) for test in tests)]
    if field := options['sort']:
        check_field(field.removeprefix('-'), records, '--sort')
        found = in_order(found, field)
    if (limit := options['limit']) is None:
        return found
    if not limit.isdecimal() or not int(limit):
        raise LabError(f"--limit must be a whole number of at least 1, not '{limit}'")
    return found[: int(limit)] if options['sort'] else found[-int(limit) :]


def as_object(record: dict) -> dict:
    "A record as `runs --json` prints it: the fields, its measures and its configuration."
    plain = {
        name: of(record) for name, of in FIELDS.items() if name not in ('measure', 'tag', 'note')
    }
    more = {key: record.get(key, []) for key in ('tags', 'notes', 'metrics')}
    return {**plain, 'folder': record['folder'], **more, 'config': record['config']}


def cell(record: dict, field: str) -> str:
    "A field as text in a table."
    from k2lab.lab.records import campaign_of

    if field == 'status':
        return outcome(record)
    if field == 'campaign':
        return campaign_of(record)
    v = value(record, field)
    if field == 'started' and v and (at := begun({'started': v})):
        return f'{at.astimezone():%Y-%m-%d %H:%M}'
    if field == 'wall':
        return clock(wall(record))
    return ', '.join(map(str, v)) or '-' if isinstance(v, list) else short(v)


def table(records: list[dict], columns: list[str]) -> str:
    "Records as a table that fits the terminal."
    return fitting_table(columns, [[cell(r, c) for c in columns] for r in records])


def by_campaign(records: list[dict]) -> str:
    "Records in the usual columns, under the name of their campaign where there are several."
    tags = ['tag'] if any(r.get('tags') for r in records) else []
    columns = ['run', 'wall', 'measure', *tags, 'status']
    campaigns = list(dict.fromkeys(cell(r, 'campaign') for r in records))
    if len(campaigns) < 2:
        return f'{campaigns[0]}\n{table(records, columns)}'
    lines = table(records, columns).splitlines()
    head, rows, last = lines[0], lines[1:], ''
    out = [head]
    for record, row in zip(records, rows):
        if (name := cell(record, 'campaign')) != last:
            out.append(f'-- {name}')
        out, last = [*out, row], name
    return '\n'.join(out)


def show_runs(words: list, options: dict) -> int:
    "List the runs."
    if words and options['campaign']:
        raise LabError(f"runs: the campaign is given twice, as '{words[0]}' and by --campaign")
    name = words[0] if words else options['campaign']
    if name:
        check_campaign_there(name)
    records = summaries(name)
    found = chosen(records, options)
    columns = [check_field(c.strip(), records, '--columns') for c in columns_of(options)]
    if options['json']:
        rows = [{c: value(r, c) for c in columns} if columns else as_object(r) for r in found]
        print(json_text(rows))
    elif not found:
        print(f'none of {len(records)} runs matches' if records else 'no runs yet')
    elif columns or options['sort']:
        print(table(found, columns or sorted_columns(found, options['sort'].removeprefix('-'))))
    else:
        print(by_campaign(found))
    return 0


def sorted_columns(records: list[dict], by: str) -> list[str]:
    "The usual columns, with the one that a list is sorted by."
    several = ['campaign'] if len({campaign(r) for r in records}) > 1 else []
    usual = [*several, 'run', 'wall', *([] if by.startswith('measure.') else ['measure'])]
    return list(dict.fromkeys([*usual, by, 'status']))


def columns_of(options: dict) -> list[str]:
    "The columns that `--columns` names."
    text = options['columns']
    return [] if text is None else str(text).split(',')


def check_campaign_there(name: str):
    "`LabError` unless there is a campaign of that name."
    from k2lab.lab.records import visible_folders

    there = sorted(folder.name for folder in visible_folders(lab_path('runs')))
    if name not in there:
        near = did_you_mean(name, there) or f"; there are: {', '.join(there) or 'none yet'}"
        raise LabError(f"no campaign '{name}'{near}")
