"""What `--help` prints."""

import dataclasses
import inspect
import re
import textwrap

from k2lab.cli.running import resolved_config, stage_command
from k2lab.cli.tables import text_width, wrapped_table
from k2lab.cli.words import Command, Option
from k2lab.lab.config import SCALES, LabError, setting, stage_names

EXIT_CODES = (
    'exit codes: 0 done, 1 a run did not complete, failed its gate or differs, 2 a mistake in the '
    'request, 130 Ctrl-C'
)


def usage(commands: dict[str, Command]) -> str:
    "What `k2lab --help` prints."
    rows = [(f'  k2lab {n} {c.takes}'.rstrip(), c.meaning) for n, c in commands.items() if c.shown]
    rows.insert(1, ('  k2lab STAGE [field=value ...]', 'run one stage'))
    return (
        'usage: k2lab COMMAND [words and options]; `k2lab COMMAND --help` tells more\n\n'
        f'{two_columns(rows)}\n\n'
        'Every stage is a notebook. A run is an executed notebook in a folder of its own.\n\n'
        f'{lab_here()}\n'
        '--debug shows the traceback of an error.\n'
        f'{textwrap.fill(EXIT_CODES, text_width())}'
    )


def lab_here() -> str:
    "The stages and scales of the lab around here, or how to make one."
    try:
        names, scale = f'stages: {", ".join(stage_names()) or "none here"}', setting('lab', 'scale')
    except LabError as e:
        return textwrap.fill(str(e), text_width(), break_long_words=False)
    stages = textwrap.fill(names, text_width(), subsequent_indent='        ')
    return f'{stages}\nscales: {", ".join(SCALES)} (default here: {scale})'


def two_columns(rows: list[tuple[str, str]]) -> str:
    "Two columns as text that fits the terminal."
    return wrapped_table([(*row, '') for row in rows])


def in_usage(option: Option) -> str:
    "How an option stands in a usage line."
    value = f' {option.value}' if option.value else ''
    return f'[--{option.name}{value}]' + (' ...' if option.many else '')


def command_help(name: str, command: Command) -> str:
    "What `k2lab COMMAND --help` prints: usage, meaning, options, an example."
    after = f'[-- {command.after}]' if command.after else ''
    words = ' '.join(filter(None, [name, command.takes, *map(in_usage, command.options), after]))
    head = textwrap.fill(f'usage: k2lab {words}', text_width(), subsequent_indent=' ' * 8)
    rows = [(f'  --{o.name} {o.value}'.rstrip(), o.meaning) for o in command.options]
    parts = [
        head,
        textwrap.fill(command.meaning[0].upper() + command.meaning[1:] + '.', text_width()),
    ]
    parts += ['options\n' + two_columns(rows)] if rows else []
    parts += [f'example: {command.example}'] if command.example else []
    return '\n\n'.join([*parts, textwrap.fill(EXIT_CODES, text_width())])


def stage_help(stage: str) -> str:
    "What `k2lab STAGE --help` prints: options, then each field's name, meaning and value at this lab's scale."
    from k2lab.lab.job import stage_module

    config, scale = stage_module(stage).Config, setting('lab', 'scale')
    values, meanings = resolved_config(stage, scale, {}), comments(config)
    value = lambda name: textwrap.shorten(str(values[name]), 90, placeholder=' ...')
    fields = [field.name for field in dataclasses.fields(config)]
    rows = [(f'  {name}', meanings.get(name, ''), value(name)) for name in fields]
    command = stage_command(stage, config.__doc__ or stage)
    table = wrapped_table([('fields', 'meaning', f'at {scale}'), *rows])
    trl = '`trainer.KEY=VALUE` sets an option of TRL.\n\n' if 'trainer' in values else ''
    return f'{command_help(stage, command)}\n\n{trl}{table}'


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
