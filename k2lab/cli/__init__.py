"""The `k2lab` command: stages by name, the pipeline, and their runs. Nothing heavy is imported until a stage runs."""

import os
import sys

from k2lab.cli.completion import candidates, completion
from k2lab.cli.help import command_help, stage_help, usage
from k2lab.cli.listing import show_runs
from k2lab.cli.looking import diff, show_run
from k2lab.cli.machine import doctor, selftest, serve
from k2lab.cli.making import convert, export, new_lab
from k2lab.cli.marking import note_run, promote_run, tag_run
from k2lab.cli.planning import plan_stage
from k2lab.cli.running import (
    ANYWAY,
    CAMPAIGN,
    JSON,
    ON,
    SCALE,
    reproduce_run,
    resume_run,
    stage_command,
    watch_run,
    work,
)
from k2lab.cli.steps import pipeline
from k2lab.cli.words import Command, Option, parse
from k2lab.lab.config import LabError, did_you_mean, root, stage_names

RUN = '2026-11-26.1-train_sft_domain'


def complete(words: list, options: dict) -> int:
    "Print what the last word of a command line can become: what the shells' scripts ask."
    print(*candidates(words, COMMANDS), sep='\n')
    return 0


def talk(words: list, options: dict) -> int:
    "Talk with a model that uses tools."
    from k2lab.cli.agent import talk_with_agent

    return talk_with_agent(words, options)


def version(words: list, options: dict) -> int:
    "Print the version of the package."
    import k2lab

    print(k2lab.__version__)
    return 0


COMMANDS = {
    'pipeline': Command(
        pipeline,
        'run the stages of configs/pipeline.yaml whose results are missing or hold no longer',
        options=(
            SCALE,
            CAMPAIGN,
            Option('from', 'the first stage', 'STAGE'),
            Option('to', 'the last stage', 'STAGE'),
            Option('seed', 'the seed of every stage that has one', 'N'),
            Option(
                'accept-stale',
                'skip these stages, or all, if they are complete, whatever has changed since',
                '[STAGE,...]',
                alone='all',
            ),
            ANYWAY,
            Option('dry-run', 'say what would run, and why'),
        ),
        example='k2lab pipeline --scale nano --campaign mine',
    ),
    'plan': Command(
        plan_stage,
        'say what a stage takes in memory and on the disk, whether it fits, and how long it runs',
        'STAGE [field=value ...]',
        (
            SCALE,
            CAMPAIGN,
            Option('gpus', 'plan for these instead of this machine: 1xH100-80', 'NxNAME-GB'),
            JSON,
        ),
        'k2lab plan train_sft_domain --scale qlora --gpus 1xH100-80',
    ),
    'runs': Command(
        show_runs,
        'list the runs',
        '[CAMPAIGN]',
        (
            CAMPAIGN,
            Option(
                'where',
                'only runs that pass a test: FIELD and =, !=, <, <=, > or >= and a value. Fields: campaign, run, '
                'stage, scale, seed, status, reason, promoted, started, wall, peak_gib, gpu_peak_gib, tag, '
                'measure.NAME, config.KEY',
                'TEST',
                many=True,
            ),
            Option('sort', 'the field to sort by; -FIELD: the largest first', 'FIELD'),
            Option('limit', 'only the newest N, or with --sort the first N', 'N'),
            Option('columns', 'the fields to show', 'A,B,C'),
            JSON,
        ),
        "k2lab runs --where status=complete --where 'measure.domain_questions>0.5' --sort -wall",
    ),
    'show': Command(
        show_run, 'show what a run did and what it read', 'RUN', (JSON,), f'k2lab show {RUN}'
    ),
    'watch': Command(
        watch_run,
        'follow the progress of a run, wherever it runs',
        'RUN',
        example=f'k2lab watch {RUN}',
    ),
    'resume': Command(
        resume_run,
        'continue a run that was killed or failed',
        'RUN',
        (ON,),
        f'k2lab resume {RUN}',
    ),
    'reproduce': Command(
        reproduce_run,
        'repeat a complete run and compare the results',
        'RUN',
        example=f'k2lab reproduce {RUN}',
    ),
    'diff': Command(
        diff,
        'show how the inputs and results of two runs differ',
        'RUN RUN',
        (JSON,),
        f'k2lab diff {RUN} 2026-11-26.2-train_sft_domain',
    ),
    'tag': Command(
        tag_run,
        'give a run a tag, or take one away',
        'RUN TAG',
        (Option('remove', 'take the tag away'),),
        f'k2lab tag {RUN} best',
    ),
    'note': Command(
        note_run, 'add a note to a run', 'RUN TEXT', example=f'k2lab note {RUN} "half the rows"'
    ),
    'promote': Command(
        promote_run,
        'let a run that failed its gate take over its names',
        'RUN',
        (Option('because', 'why; the record keeps it', 'TEXT'),),
        f'k2lab promote {RUN} --because "as intended"',
    ),
    'agent': Command(
        talk,
        'talk with a model that uses tools: a recorded one, one at an address, or a checkpoint',
        '[CHECKPOINT]',
        (
            Option(
                'endpoint',
                'the address of an OpenAI-compatible server; alone, that of configs/env.yaml',
                '[URL]',
                alone='env',
            ),
            Option('model', 'the name that the server gives the model', 'NAME'),
            Option('key-env', 'the NAME of the variable with the key (K2LAB_API_KEY)', 'NAME'),
            Option(
                'tools',
                'a Python file with functions of your own; they run as you, not in the sandbox',
                'FILE.py',
            ),
            Option('system', 'the system text', 'TEXT'),
            Option('temperature', 'of sampling', 'T'),
            Option('turns', 'most replies of the model to one question (8)', 'N'),
            Option('tokens', 'most generated tokens for one question (4096)', 'N'),
            Option('seconds', 'most seconds for one question (300)', 'N'),
            SCALE,
            CAMPAIGN,
        ),
        'k2lab agent --endpoint http://127.0.0.1:8000/v1 --model NAME',
    ),
    'doctor': Command(
        doctor,
        'check whether a scale can run on this machine, and say what mends what is wrong',
        options=(SCALE, JSON),
        example='k2lab doctor --scale qlora',
    ),
    'selftest': Command(
        selftest,
        'test and measure the GPU or the CPU of this machine with models made on the spot',
        'DEVICE',
        (Option('blocks', 'only these parts, such as exact,lora,resume', 'A,B'), JSON),
        'k2lab selftest gpu',
    ),
    'serve': Command(
        serve,
        'serve a checkpoint (name, folder or hub id) at an OpenAI-compatible address until it is stopped',
        'NAME',
        (
            Option('engine', 'vllm or embedded; else vllm where it is installed and can', 'ENGINE'),
            Option('host', 'the address to listen on: 127.0.0.1, ::1, ...', 'ADDRESS'),
            Option('port', 'the port, 8000 unless told; 0 for any free one', 'N'),
            Option('public', 'let other machines reach it, at --host 0.0.0.0 or ::, say'),
            Option('key-env', 'the variable with the key, K2LAB_API_KEY unless told', 'VARIABLE'),
            Option('python', 'the interpreter of another environment, which has vLLM', 'PATH'),
            Option('ready-s', 'how long loading may take, 3600 unless told', 'SECONDS'),
            SCALE,
            CAMPAIGN,
            ANYWAY,
            JSON,
        ),
        'k2lab serve Qwen2.5-7B --scale full -- --max-model-len 8192',
        after='OPTIONS OF VLLM',
    ),
    'new': Command(
        new_lab,
        'make a lab in a new or empty folder: settings, configs, notebooks',
        'FOLDER',
        example='k2lab new lab',
    ),
    'convert': Command(
        convert,
        'write a published checkpoint (name, folder or hub id) as bfloat16',
        'NAME FOLDER',
        example='k2lab convert Kimi-K2-Base kimi-k2-base-bf16',
    ),
    'export': Command(
        export,
        'write a model and its training rows for NeMo AutoModel or Megatron-Bridge',
        'RUN|CHECKPOINT FOLDER',
        (
            Option('to', 'the stack: nemo or megatron', 'STACK'),
            Option('data', 'files of rows, instead of those of the run', 'FILE,...'),
            Option('length', 'the longest packed row in tokens', 'N'),
        ),
        f'k2lab export {RUN} k2-for-nemo --to nemo',
    ),
    'completion': Command(
        completion,
        'print the completion script of a shell: bash, zsh or fish',
        'SHELL',
        example='eval "$(k2lab completion bash)"',
    ),
    '--version': Command(version, 'print the version', example='k2lab --version', shown=False),
    'complete': Command(complete, 'print completions', '[WORDS ...]', shown=False),
    'work': Command(
        work,
        "do a stage's work in one of several processes",
        'FOLDER',
        example='k2lab work runs/mine/RUN',
        shown=False,
    ),
}


def stage_here(name: str) -> str:
    "`name` if it is a stage of the lab around here; else a `LabError`, outside a lab with how to make one."
    try:
        root()
        stages, outside = stage_names(), ''
    except LabError as e:
        stages, outside = [], f'; {e}'
    known = [*(n for n, c in COMMANDS.items() if c.shown), *stages, '--help', '--version']
    if name in stages:
        return name
    near = did_you_mean(name, known) or outside
    raise LabError(f"unknown command '{name}'{near}; valid: {', '.join(known)}")


def main(words: list) -> int:
    """Run one command line; its exit code.

    0 done, 1 a run did not complete, failed its gate or differs, 2 a mistake in the request, 130 Ctrl-C."""
    name, rest = (words or ['--help'])[0], words[1:]
    if name in ('-h', '--help', 'help'):
        if rest:
            return main([*rest, '--help'])
        print(usage(COMMANDS))
        return 0
    if name == 'complete':  # its words are those of another command line
        return complete(rest, {})
    command = COMMANDS.get(name) or stage_command(stage_here(name), '')
    if {'-h', '--help'} & set(rest):
        print(command_help(name, command) if name in COMMANDS else stage_help(name))
        return 0
    return command.do(*parse(name, command, rest))


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
