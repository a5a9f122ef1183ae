"""What `--help` prints."""

import dataclasses
import inspect
import itertools
import re
import textwrap

from k2lab.cli.running import resolved_config
from k2lab.lab.config import SCALES, setting, stage_names

USAGE = """usage: k2lab pipeline [--scale S] [--campaign C] [--from STAGE] [--to STAGE] [--seed N]
       k2lab STAGE [--scale S] [--campaign C] [--on slurm] [field=value ...]
       k2lab STAGE --help       list the fields of a stage
       k2lab runs [CAMPAIGN]    list the runs
       k2lab show RUN           show what a run did and what it read
       k2lab watch RUN          follow the progress of a run, wherever it runs
       k2lab resume RUN         continue a run that was killed or failed (also --on slurm)
       k2lab reproduce RUN      repeat a complete run and compare the results
       k2lab promote RUN --because "..."   let a run that failed its gate take over its names
       k2lab diff RUN RUN       show how the inputs and results of two runs differ
       k2lab convert NAME OUT   write a published checkpoint (name, folder or hub id) as bfloat16

Every stage is a notebook. A run is an executed notebook in a folder of its own.
"""


def usage() -> str:
    "What `k2lab --help` prints."
    names = f'stages: {", ".join(stage_names()) or "none here"}'
    stages = textwrap.fill(names, 100, subsequent_indent='        ')
    return (
        f'{USAGE}\n{stages}\nscales: {", ".join(SCALES)} (default here: {setting("lab", "scale")})\n'
        "A field is any key of the stage's file; `trainer.KEY=VALUE` sets an option of TRL.\n"
        '--debug shows the traceback of an error.'
    )


def stage_help(stage: str) -> str:
    "The fields of a stage: name, meaning, value at this lab's scale; at most 100 columns wide."
    from k2lab.lab.job import stage_module

    config, scale = stage_module(stage).Config, setting('lab', 'scale')
    values, meanings = resolved_config(stage, scale, {}), comments(config)
    names = [field.name for field in dataclasses.fields(config)]
    rows = [
        (
            f'  {name}',
            meanings.get(name, ''),
            textwrap.shorten(str(values[name]), 90, placeholder=' ...'),
        )
        for name in names
    ]
    head = f'usage: k2lab {stage} [--scale S] [--campaign C] [--on slurm] [field=value ...]'
    text = textwrap.fill(config.__doc__ or '', 100)
    return f'{head}\n\n{text}\n\n{wrapped_table([("field", "meaning", f"at {scale}"), *rows])}'


def comments(cls) -> dict:
    "`{field: the comment behind it, or above it}` of a dataclass and those it inherits from."
    meanings, above, name = {}, [], ''
    for line in '\n'.join(inspect.getsource(c) for c in reversed(cls.__mro__[:-1])).splitlines():
        field = re.match(r' {4}(\w+) *:[^#]*(?:# (.*))?$', line)
        closing = re.match(r' {4}\)  # (.*)$', line)
        if field:
            name, comment = field[1], field[2] or ' '.join(above)
            meanings[name] = comment or meanings.get(name, '')
        elif closing:
            meanings[name] = closing[1]
        alone = re.match(r' {4}# (.*)', line)
        above = [*above, alone[1]] if alone else []
    return meanings


def wrapped_table(rows: list[tuple[str, str, str]]) -> str:
    "Three columns as text of at most 100 columns; long meanings and values are wrapped."
    first = max(len(row[0]) for row in rows) + 2
    last = min(max(len(row[2]) for row in rows), 30)
    middle = min(max(len(row[1]) for row in rows) + 2, 100 - first - last)
    lines = []
    for name, meaning, value in rows:
        columns = textwrap.wrap(meaning, middle - 2), textwrap.wrap(value, 100 - first - middle)
        for head, left, right in itertools.zip_longest([name], *columns, fillvalue=''):
            lines.append(f'{head:{first}}{left:{middle}}{right}'.rstrip())
    return '\n'.join(lines)
