"""The command that plans a stage: what it takes, whether it fits, what would make it fit."""

import logging
import textwrap

from k2lab.cli.running import check_fields
from k2lab.cli.tables import aligned, text_width, wide
from k2lab.cli.words import changes_of
from k2lab.lab.config import LabError, one_of, resolve, setting, stage_names
from k2lab.lab.files import as_json


def plan_stage(words: list, options: dict) -> int:
    "Print the plan of a stage; 1 where it does not fit."
    from k2lab.scale.plan import Question, machine_named, this_machine

    # bitsandbytes, imported by the trace, tells of a kernel that no plan needs
    logging.getLogger('bitsandbytes.backends.cpu.ops').setLevel(logging.ERROR)
    stage, rest = one_of('stage', words[0], stage_names(), 'plan'), words[1:]
    check_fields(stage, rest)
    asked = Question(*question(stage, changes_of(rest), options))
    machine = machine_named(options['gpus']) if options['gpus'] else this_machine()
    found = answer(asked, machine)
    print(as_json(found) if options['json'] else '\n'.join(page(found)))
    return int(not found['fits'])


def question(stage: str, changes: dict, options: dict) -> tuple:
    "What is asked: stage, scale, changes, names and campaign."
    from k2lab.lab.config import load_env
    from k2lab.lab.records import check_campaign

    scale = options['scale'] or setting('lab', 'scale')
    campaign = check_campaign(options['campaign']) if options['campaign'] else ''
    return stage, scale, changes, load_env(scale), campaign


def answer(asked, machine) -> dict:
    "The plan as JSON values: its parts in GiB by phase, whether it fits and why not, what would help, hours."
    from k2lab.lab.job import stage_module
    from k2lab.scale.plan import as_words, described, hours, in_gib, lacking, remedy, traced_plan

    work = asked.work()
    if work is None:
        raise LabError(
            f'{asked.stage}: no model is opened at {asked.scale}, so there is nothing to plan'
        )
    plan = traced_plan(work, machine)
    why = lacking(plan, machine)
    change = remedy(asked, machine, traced_plan) if why else {}
    cfg = resolve(stage_module(asked.stage).Config, asked.stage, asked.scale, asked.changes)
    return {
        'stage': asked.stage,
        'scale': asked.scale,
        'model': described(work),
        'machine': machine.name,
        'device': 'gpu' if plan.on_gpu else 'cpu',
        'processes': work.processes,
        'gib': in_gib(plan.device),
        'host_gib': in_gib(plan.host),
        'disk_gib': in_gib({'disk': plan.disk})['disk'],
        'fits': not why,
        'why': why,
        'change': None if change is None else as_words(change),
        'hours': hours(work, cfg, machine),
    }


SMALL = 0.005  # GiB: parts below it share a row


def figure(size: float) -> str:
    "A size in GiB in at most seven columns; a dot for none."
    if not size:
        return '.'
    if size < SMALL:
        return '0.00'
    return f'{size:,.0f}' if size >= 1000 else f'{size:.1f}' if size >= 10 else f'{size:.2f}'


def table(phases: dict[str, dict]) -> list[str]:
    "Parts in rows, phases in columns, the largest part first, sums last."
    parts = dict.fromkeys(part for one in phases.values() for part in one)
    most = {part: max(one.get(part, 0) for one in phases.values()) for part in parts}
    small = [part for part in parts if most[part] < SMALL]
    rows = [
        (part, [part]) for part in sorted(parts, key=lambda part: -most[part]) if part not in small
    ]
    rows += [('smaller ones', small)] if small else []
    total = lambda one, names: figure(sum(one.get(name, 0) for name in names))
    cells = [
        [name, *(total(one, names) for one in phases.values())]
        for name, names in [*rows, ('all', parts)]
    ]
    return right_aligned([['GiB', *phases], *cells])


def right_aligned(cells: list[list[str]]) -> list[str]:
    "Rows of text with all columns but the first to the right."
    width = [max(map(wide, column)) for column in zip(*cells)]
    right = lambda row: [row[0], *(cell.rjust(w) for cell, w in zip(row[1:], width[1:]))]
    return [aligned(right(row), width) for row in cells]


def page(found: dict) -> list[str]:
    "The plan as lines of text."
    each = f', each of {found["processes"]:,} processes' if found['processes'] > 1 else ''
    where = 'on the GPU' if found['device'] == 'gpu' else 'in main memory'
    lines = [f'{found["stage"]} at {found["scale"]}, {where}{each}', found['model'], '']
    lines += table(found['gib'])
    if found['device'] == 'gpu':
        sums = {phase: sum(parts.values()) for phase, parts in found['host_gib'].items()}
        lines += ['', 'main memory: ' + ', '.join(f'{figure(v)} to {k}' for k, v in sums.items())]
    if found['disk_gib']:
        lines += ['disk: ' + ', '.join(f'{figure(v)} {k}' for k, v in found['disk_gib'].items())]
    lines += ['', *verdict(found), f'hours: {found["hours"]}']
    return [piece for line in lines for piece in wrapped(line)]


def wrapped(line: str) -> list[str]:
    "A line of text that fits the terminal."
    return (
        textwrap.wrap(line, text_width(), subsequent_indent='  ')
        if len(line) > text_width()
        else [line]
    )


def verdict(found: dict) -> list[str]:
    "Whether it fits, why not, and the first change that makes it fit."
    if found['fits']:
        return [f'fits {found["machine"]}']
    lines = [f'does not fit {found["machine"]}: {"; ".join(found["why"])}']
    if found['change'] is None:
        return [*lines, 'no change of its fields that the plan knows makes it fit']
    return [*lines, f'fits with {found["change"]}']
