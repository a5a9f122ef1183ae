"""The words of a command line: what a command takes, and `field=value`."""

from collections.abc import Callable
from dataclasses import dataclass

from k2lab.lab.config import LabError, did_you_mean


@dataclass(frozen=True)
class Option:
    "An option, `--name VALUE`; a flag where it takes no value."

    name: str
    meaning: str
    value: str = ''  # what stands for the value in the help; a flag has none
    many: bool = False  # whether it can be given more than once
    alone: str = ''  # its value if none follows; where this is empty, one has to


@dataclass(frozen=True)
class Command:
    "A command: what it does, and the words that it takes."

    do: Callable[[list[str], dict], int]  # gets the words and the options; its exit code
    meaning: str
    takes: str = ''  # `RUN RUN`; what is in brackets may be left out
    options: tuple[Option, ...] = ()
    example: str = ''
    shown: bool = True  # whether the help lists it
    after: str = ''  # what may stand after `--`; the options have it under that name

    @property
    def needed(self) -> list[str]:
        "The words that must be given."
        return [word for word in self.takes.split() if word[0] not in '[.']

    @property
    def open(self) -> bool:
        "Whether any number of `field=value` may follow."
        return 'field=value' in self.takes


def parse(name: str, command: Command, words: list[str]) -> tuple[list[str], dict]:
    "`(the words, the options by name)` of a command line; `LabError` for what the command does not take."
    known = {option.name: option for option in command.options}
    given: dict[str, list] = {}
    cut = words.index('--') if command.after and '--' in words else len(words)
    rest, left = [], list(words[:cut])
    while left:
        word = left.pop(0)
        key, equals, value = word.removeprefix('--').partition('=')
        if not word.startswith('--') or key not in known:
            rest.append(word)
        elif known[key].value:
            given.setdefault(key, []).append(value if equals else value_of(known[key], name, left))
        elif equals:
            raise LabError(f'{name}: --{key} takes no value')
        else:
            given[key] = [True]
    check_words(name, command, rest)
    options = {key: of_option(name, known[key], given.get(key, [])) for key in known}
    return rest, options | ({'--': list(words[cut + 1 :])} if command.after else {})


def value_of(option: Option, name: str, left: list[str]) -> str:
    "The value that follows an option, taken from the words that are left."
    if left and not left[0].startswith('--'):
        return left.pop(0)
    if option.alone:
        return option.alone
    raise LabError(f'{name}: --{option.name} needs a value: --{option.name} {option.value}')


def of_option(name: str, option: Option, values: list):
    "What an option was given: a list for one that can be repeated, else its value, or None."
    if option.many:
        return values
    if len(values) > 1:
        raise LabError(f'{name}: --{option.name} is given twice; give it once')
    return values[0] if values else None


def check_words(name: str, command: Command, words: list[str]):
    "`LabError` unless a command takes these words."
    options = [f'--{option.name}' for option in command.options]
    unknown = [] if command.open else [word for word in words if word.startswith('--')]
    most = len(command.takes.replace('[', '').split())
    takes = ', '.join([*([command.takes] if command.takes else []), *options]) or 'nothing'
    for word in unknown or (words[most:] if not command.open else []):
        near = did_you_mean(word.partition('=')[0], options)
        raise LabError(f"{name} does not take '{word}'{near}; it takes {takes}")
    if len(words) < len(command.needed) or (command.needed and not all(words)):
        lists = '; `k2lab runs` lists them' if 'RUN' in command.needed else ''
        raise LabError(f'{name} needs {command.takes}: `{command.example}`{lists}')


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
