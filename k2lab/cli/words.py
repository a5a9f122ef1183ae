"""The words of a command line: options, and `field=value`."""

import argparse

from k2lab.lab.config import LabError


def parse(words: list, *options, **alone) -> tuple:
    "`(the options by name, the remaining words)`; all take a value, those in `alone` have one if none is given."
    parser = argparse.ArgumentParser(
        'k2lab', add_help=False, allow_abbrev=False, exit_on_error=False
    )
    for option in options:
        parser.add_argument(f'--{option}')
    for option, value in alone.items():
        parser.add_argument(f'--{option}', nargs='?', const=value)
    try:
        known, rest = parser.parse_known_args(words)
    except argparse.ArgumentError as e:
        raise LabError(str(e)) from None
    return vars(known), rest


def changes_of(words: list) -> dict:
    "`field=value`, `--field value` and `--field=value` as a dictionary of text."
    out, rest = {}, list(words)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.removeprefix('--').partition('=')
        if not equals and word.startswith('--') and rest:
            value, equals = rest.pop(0), '='
        if not equals or not key:
            raise LabError(f"'{word}': expected field=value")
        name, dot, inner = key.partition('.')  # the keys of a block may have dashes
        key = name.replace('-', '_') + dot + inner
        if key in out:
            raise LabError(f'{key} is given twice; give it once')
        out[key] = value
    return out
