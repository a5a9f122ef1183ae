"""The `k2lab` command: stages by name, the pipeline, and their runs. Nothing heavy is imported until a stage runs."""

import os
import sys

from k2lab.cli.help import stage_help, usage
from k2lab.cli.looking import diff, show_run, show_runs
from k2lab.cli.running import (
    convert,
    promote_run,
    reproduce_run,
    resume_run,
    run_stage,
    watch_run,
    work,
)
from k2lab.cli.steps import pipeline
from k2lab.lab.config import LabError, did_you_mean, stage_names

COMMANDS = {
    'pipeline': pipeline,
    'runs': show_runs,
    'show': show_run,
    'watch': watch_run,
    'resume': resume_run,
    'reproduce': reproduce_run,
    'promote': promote_run,
    'diff': diff,
    'convert': convert,
    'work': work,
}


def main(words: list) -> int:
    """Run one command line; its exit code.

    0 done, 1 a run did not complete or failed its gate, 2 a mistake in the request, 130 Ctrl-C."""
    if not words or words[0] in ('-h', '--help', 'help'):
        print(usage())
        return 0
    if words[0] == '--version':
        import k2lab

        print(k2lab.__version__)
        return 0
    name, rest = words[0], words[1:]
    if {'-h', '--help'} & set(rest):
        print(stage_help(name) if name in stage_names() else usage())
        return 0
    if name in COMMANDS:
        return COMMANDS[name](rest)
    if name not in stage_names():
        known = [*COMMANDS, *stage_names()]
        raise LabError(
            f"unknown command '{name}'{did_you_mean(name, known)}; valid: {', '.join(known)}"
        )
    return run_stage(name, rest)


def app():
    "The console script: a `LabError` is one line, never a traceback (unless --debug)."
    words = [w for w in sys.argv[1:] if w != '--debug']
    try:
        code = main(words)
    except LabError as e:
        if '--debug' in sys.argv:
            raise
        print(f'k2lab: {e}', file=sys.stderr)
        code = 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as e:
        if '--debug' in sys.argv or not e.filename:
            raise
        print(f'k2lab: {e.filename}: {e.strerror}', file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print('\nk2lab: interrupted', file=sys.stderr)
        code = 130
    sys.exit(code)
