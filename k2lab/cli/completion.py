"""Completion of commands, runs, stages, fields and options in bash, zsh and fish."""

import dataclasses

from k2lab.cli.words import Command
from k2lab.lab.config import SCALES, LabError, lab_path, one_of, stage_names

SCRIPTS = {
    'bash': """_k2lab() {
    local IFS=$'\\n'
    COMPREPLY=($(k2lab complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
    [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace
}
complete -o default -F _k2lab k2lab""",
    'zsh': """#compdef k2lab
_k2lab() {
    local -a found=(${(f)"$(k2lab complete "${(@)words[2,CURRENT]}" 2>/dev/null)"})
    compadd -S ' ' -- ${found:#*=}
    compadd -S '' -- ${(M)found:#*=}
}
compdef _k2lab k2lab""",
    'fish': """function __k2lab
    set -l words (commandline -opc)
    set -l last (commandline -ct)
    set -e words[1]
    k2lab complete $words "$last" 2>/dev/null
end
complete -c k2lab -a '(__k2lab)'""",
}


def completion(words: list, options: dict) -> int:
    "Print the script that completes `k2lab` in a shell."
    print(SCRIPTS[one_of('shell', words[0], SCRIPTS)])
    return 0


def candidates(words: list[str], commands: dict[str, Command]) -> list[str]:
    "What the last of `words`, which may be empty, can become."
    *before, last = words or ['']
    try:
        found = after(before, commands)
    except LabError:  # no lab here
        found = []
    return [word for word in found if word.startswith(last)]


def after(before: list[str], commands: dict[str, Command]) -> list[str]:
    "The words that can follow."
    if not before:
        return [
            *(name for name, c in commands.items() if c.shown),
            *stages(),
            '--help',
            '--version',
        ]
    name, previous = before[0], before[-1]
    if name not in commands:
        return values(previous) or [*fields(name), *stage_options(name)]
    command = commands[name]
    if previous.startswith('--') and (found := values(previous)):
        return found
    options = [f'--{option.name}' for option in command.options]
    given = [word for word in before[1:] if not word.startswith('-')]
    expected = command.takes.replace('[', '').replace(']', '').split()
    kind = expected[len(given)] if len(given) < len(expected) else ''
    if given and 'field=value' in expected:
        return [*fields(given[0]), *options]
    return [*kinds(kind), *options]


def kinds(kind: str) -> list[str]:
    "The words of a kind: runs, stages, campaigns, shells, devices."
    if kind == 'RUN':
        return runs()
    if kind == 'STAGE':
        return stages()
    if kind == 'CAMPAIGN':
        return campaigns()
    return {'SHELL': list(SCRIPTS), 'DEVICE': ['gpu', 'cpu']}.get(kind, [])


def values(option: str) -> list[str]:
    "What can follow an option."
    known = {
        '--scale': lambda: list(SCALES),
        '--campaign': campaigns,
        '--from': stages,
        '--to': stages,
        '--on': lambda: ['slurm'],
    }
    return known[option]() if option in known else []


def stages() -> list[str]:
    "The stages of the lab around here; none outside a lab."
    try:
        return stage_names()
    except LabError:
        return []


def campaigns() -> list[str]:
    "The campaigns of this lab."
    from k2lab.lab.records import visible_folders

    return sorted(folder.name for folder in visible_folders(lab_path('runs')))


def runs() -> list[str]:
    "The names of all runs, with their campaign where two have the same."
    from k2lab.lab.records import run_folders

    folders = sorted(run_folders(), key=lambda f: f.name)
    names = [f.name for f in folders]
    twice = {name for name in names if names.count(name) > 1} if len(names) < 2000 else set(names)
    return [f'{f.parent.name}/{f.name}' if f.name in twice else f.name for f in folders]


def fields(stage: str) -> list[str]:
    "The fields of a stage as `name=`."
    from k2lab.lab.job import stage_module

    if stage not in stages():
        return []
    return [f'{field.name}=' for field in dataclasses.fields(stage_module(stage).Config)]


def stage_options(stage: str) -> list[str]:
    "The options of a stage's command."
    from k2lab.cli.running import stage_command

    return [f'--{o.name}' for o in stage_command(stage, '').options] if stage in stages() else []
