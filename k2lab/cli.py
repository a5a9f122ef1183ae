"""The `k2lab` command: stages by name, the pipeline, and their runs. Nothing heavy is imported until a stage runs."""

import argparse
import dataclasses
import inspect
import itertools
import os
import re
import shutil
import sys
import textwrap
import time
from pathlib import Path

from k2lab.lab.config import (
    SCALES,
    LabError,
    did_you_mean,
    lab_path,
    load_env,
    one_of,
    read_yaml,
    resolve,
    setting,
    stage_names,
)
from k2lab.lab.display import clock, describe, short

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


def parse(words: list, *options) -> tuple:
    "`(the options by name, the remaining words)`; every option takes a value."
    parser = argparse.ArgumentParser(
        'k2lab', add_help=False, allow_abbrev=False, exit_on_error=False
    )
    for option in options:
        parser.add_argument(f'--{option}')
    try:
        known, rest = parser.parse_known_args(words)
    except argparse.ArgumentError as e:
        raise LabError(str(e)) from None
    return vars(known), rest


# ---- progress ------------------------------------------------------------------------------------


class Progress:
    "One line about the stage at work: rewritten in place on a terminal, a plain line every half minute elsewhere."

    def __init__(self, stage: str, i: int = 1, n: int = 1):
        self.head = f'[{i}/{n}] {stage}' if n > 1 else stage
        self.began, self.printed, self.tty = time.monotonic(), 0, sys.stderr.isatty()

    def __call__(self, row: dict):
        "Show one line of metrics.jsonl."
        self.say(f'{self.head}  {describe(row)}')

    def say(self, text: str):
        "Put `text` on the line, or print it when enough time has passed."
        if self.tty:
            sys.stderr.write('\r\x1b[K' + text[: shutil.get_terminal_size().columns - 1])
            sys.stderr.flush()
        elif time.monotonic() - self.printed > 30 or not self.printed:
            print(text, file=sys.stderr, flush=True)
            self.printed = time.monotonic()

    def end(self, record: dict):
        "Leave one final line about the run."
        sys.stderr.write(
            ('\r\x1b[K' if self.tty else '')
            + f"{self.head}  {outcome(record)}  {clock(record.get('wall_s', 0))}\n"
        )


def outcome(record: dict) -> str:
    "The status of a run, with the reason when it has one, or where it stands in the queue of a cluster."
    if record['status'] == 'prepared' and 'slurm' in record and shutil.which('squeue'):
        from k2lab.lab.slurm import waiting

        return waiting(record['folder']) or 'prepared: Slurm does not have it any more'
    from k2lab.lab.records import standing

    return standing(record)


# ---- commands ------------------------------------------------------------------------------------


def run_stage(stage: str, words: list) -> int:
    "Run one stage; 1 when it did not complete, or failed its gate."
    from k2lab.lab.records import promoted, read_run
    from k2lab.lab.runner import execute

    options, rest = parse(words, 'scale', 'campaign', 'on')
    if place := options.pop('on'):
        return submit_stage_here(place, stage, options, changes_of(rest))
    if stage == 'agentic_demo' and sys.stdin.isatty():
        return agent_command(options, changes_of(rest))
    progress = Progress(one_of('command', stage, stage_names()))
    folder = execute(stage, changes=changes_of(rest), on_progress=progress, **options)
    record = read_run(folder)
    progress.end(record)
    print(run_text(record))
    return int(not promoted(record))


def submit_stage_here(place: str, stage: str, options: dict, changes: dict) -> int:
    "Submit one stage to a cluster instead of running it here; 0 once it is in the queue."
    from k2lab.lab.slurm import submit_stage

    one_of('place', place, ('slurm',), '--on')
    folder, job = submit_stage(stage, changes=changes, **options)
    print(f'{folder.parent.name}/{folder.name}: Slurm job {job}\n  in {folder}')
    return 0


def resubmit(place: str, folder: Path) -> int:
    "Submit an unfinished run to a cluster; 0 once it is in the queue."
    from k2lab.lab.slurm import submit

    one_of('place', place, ('slurm',), '--on')
    print(f'{folder.parent.name}/{folder.name}: Slurm job {submit(folder)}')
    return 0


def agent_command(options: dict, changes: dict) -> int:
    "Talk to the agent in this terminal; papermill's kernel would have no keyboard."
    from k2lab.agentic_demo import talk

    print(f"transcript in {talk(options['scale'], options['campaign'], changes)}")
    return 0


def steps_of(first: str | None, last: str | None) -> list:
    "The steps of configs/pipeline.yaml between two stages: dictionaries of stage, changes and always."
    path = lab_path('configs') / 'pipeline.yaml'
    steps = [{'changes': {}, 'always': False} | step for step in read_yaml(path).get('steps') or []]
    for step in steps:
        for key in step:
            one_of('key', key, ('stage', 'changes', 'always', 'saves'), str(path))
    names = [one_of('stage', step.get('stage'), stage_names(), str(path)) for step in steps]
    lo = names.index(one_of('stage', first, dict.fromkeys(names), 'pipeline')) if first else 0
    hi = (
        len(names) - names[::-1].index(one_of('stage', last, dict.fromkeys(names), 'pipeline'))
        if last
        else len(names)
    )
    if steps and lo >= hi:
        raise LabError(f"pipeline: no step from '{first}' to '{last}': {last} comes before {first}")
    return steps[lo:hi]


def pipeline(words: list) -> int:
    """Run or resume the steps of configs/pipeline.yaml that are not complete.

    After one that failed, or failed its gate, only the `always` ones."""
    from k2lab.lab.records import promoted, read_run
    from k2lab.lab.reproduce import resume
    from k2lab.lab.runner import execute

    options, rest = parse(words, 'scale', 'campaign', 'from', 'to', 'seed')
    if rest:
        raise LabError(
            f"pipeline does not take '{rest[0]}'; it takes --scale, --campaign, --from, --to and --seed"
        )
    scale = one_of('scale', options['scale'] or setting('lab', 'scale'), SCALES)
    campaign = options['campaign'] or (
        f"{scale}-seed{options['seed']}" if options['seed'] else scale
    )
    steps, records = steps_of(options['from'], options['to']), []
    for step in steps:  # a mistake in the last step is refused before the first one runs
        step['changes'] = step['changes'] | seed_for(step['stage'], options['seed'])
        resolved_config(step['stage'], scale, step['changes'])
    for i, step in enumerate(steps, 1):
        if not all(map(promoted, records)) and not step['always']:
            continue
        ask = step['stage'], scale, campaign, step['changes']
        done, progress = (
            None if step['always'] else newest_same_run(*ask),
            Progress(step['stage'], i, len(steps)),
        )
        begun = None if done or step['always'] else newest_same_run(*ask, 'interrupted')
        records.append(
            done
            or read_run(resume(begun['folder'], progress) if begun else execute(*ask, progress))
        )
        already = f'already, in {Path(done["folder"]).name}' if done else ''
        as_done = {'reason': already, 'gate': None, 'promoted': None}
        progress.end(records[-1] | (as_done if done and promoted(done) else {}))
    print(summary(records))
    gates = [gate_text(r) for r in records if r['status'] == 'complete']
    print(''.join(f'\n{text}' for text in gates if text), end='')
    report = lab_path('runs') / campaign / 'report.html'
    if report.exists():
        print(f'\nreport: {report}')
    return int(not all(map(promoted, records)))


def seed_for(stage: str, seed: str | None) -> dict:
    "The change that gives a stage its seed, if one was named and the stage has a field for it."
    from k2lab.lab.job import stage_module

    return (
        {'seed': seed}
        if seed and 'seed' in {f.name for f in dataclasses.fields(stage_module(stage).Config)}
        else {}
    )


def resolved_config(stage: str, scale: str, changes: dict) -> dict:
    "The config a stage would get, as a record keeps it."
    from k2lab.lab.job import config_of, stage_module

    return config_of(resolve(stage_module(stage).Config, stage, scale, changes))


def newest_same_run(
    stage: str, scale: str, campaign: str, changes: dict, status: str = 'complete'
) -> dict | None:
    "The newest run of this status with the same changes whose parents are still the newest of their names."
    from k2lab.lab.files import check_published
    from k2lab.lab.records import runs, saved_by

    want, home = resolved_config(stage, scale, changes), lab_path('runs') / campaign
    for record in reversed(runs(campaign)):
        same = (record['stage'], record['scale'], record['status'], record['config']) == (
            stage,
            scale,
            status,
            want,
        )
        if same and not any(
            check_published(Path(record['folder']), name) for name in record['saves']
        ):
            break
    else:
        return None
    newest = lambda p: (
        '@' in p['name'] or getattr(saved_by(home, p['name'], scale), 'name', None) == p['run']
    )
    return record if all(newest(p) for p in record['parents']) else None


def show_runs(words: list) -> int:
    "List the runs."
    from k2lab.lab.records import runs

    options, rest = parse(words, 'campaign')
    extra = rest[1:] if rest and not rest[0].startswith('-') and not options['campaign'] else rest
    if extra:
        raise LabError(f"runs does not take '{extra[0]}'; it takes one campaign")
    found = runs(options['campaign'] or (rest[0] if rest else None))
    rows = [
        [
            r['campaign'],
            Path(r['folder']).name,
            r['scale'],
            r['seed'],
            clock(r.get('wall_s') or 0),
            key_metric(r),
            parents(r),
            outcome(r),
        ]
        for r in found
    ]
    print(
        text_table(
            ['campaign', 'run', 'scale', 'seed', 'wall', 'measure', 'parents', 'status'], rows
        )
        if rows
        else 'no runs yet'
    )
    return 0


def key_metric(record: dict) -> str:
    "A run's first measure, before and after."
    m = next(iter(record['metrics']), None)
    return f"{m['measure']} {short(m['before'])} -> {short(m['after'])}" if m else '-'


def parents(record: dict) -> str:
    "The runs a run read from, by day and number."
    found = dict.fromkeys('-'.join(p['run'].split('-')[:3]) for p in record['parents'] if p['run'])
    return ', '.join(found) or '-'


def show_run(words: list) -> int:
    "Tell what a run did."
    from k2lab.lab.records import find_run, read_run

    if len(words) != 1:
        raise LabError('show needs one run; `k2lab runs` lists them')
    record = read_run(find_run(words[0]))
    print(attempts(record) + run_text(record))
    for title, rows in (
        ('config', record['config'].items()),
        ('parents', [(p['name'], p['run'] or p['place']) for p in record['parents']]),
        ('code', record['code'].items()),
        ('hardware', record['hardware'].items()),
        ('versions', record['versions'].items()),
    ):
        print(f'\n{title}')
        print(text_table([], [[f'  {k}', v] for k, v in rows]))
    return 0


def the_run(words: list, command: str) -> str:
    "The one run that a command names."
    if len(words) == 1:
        return words[0]
    raise LabError(f'{command} needs one run; `k2lab runs` lists them')


def resume_run(words: list) -> int:
    "Go on with an unfinished run; 1 when it did not complete, or failed its gate."
    from k2lab.lab.records import find_run, promoted, read_run
    from k2lab.lab.reproduce import resume

    options, rest = parse(words, 'on')
    folder = find_run(the_run(rest, 'resume'))
    if place := options['on']:
        return resubmit(place, folder)
    progress = Progress(read_run(folder)['stage'])
    record = read_run(resume(str(folder), progress))
    progress.end(record)
    print(attempts(record) + run_text(record))
    return int(not promoted(record))


def promote_run(words: list) -> int:
    "Let a run that failed its gate take over the names of what it saved."
    from k2lab.lab.records import promote, saved_by

    options, rest = parse(words, 'because')
    record = promote(the_run(rest, 'promote'), options['because'] or '')
    folder = Path(record['folder'])
    print(f'{folder.parent.name}/{folder.name}: {outcome(record)}')
    for name in record['saves']:
        now = saved_by(folder.parent, name, record['scale'])
        print(f'  {name} means {now.name if now else "nothing"}')
    return 0


def attempts(record: dict) -> str:
    "What became of the earlier attempts of a run, as lines of text."
    lines = []
    for a in record.get('attempts', []):
        lines.append(
            f"  {a['ended']} ({a['reason']}), resumed "
            + (
                ' and '.join(
                    f'{phase} from step {step}' for phase, step in a.get('from', {}).items()
                )
                or 'from the start'
            )
        )
        lines += [f'    not taken: {reason}' for reason in a['set_aside']] + [
            f'    changed since: {what}' for what in a['differs']
        ]
    return ''.join(f'{line}\n' for line in lines)


def reproduce_run(words: list) -> int:
    "Do a complete run again and compare; 1 when the results differ."
    from k2lab.lab.records import find_run, read_run
    from k2lab.lab.reproduce import reproduce

    name = find_run(the_run(words, 'reproduce'))
    progress = Progress(read_run(name)['stage'])
    folder, results, inputs = reproduce(str(name), progress)
    progress.end(read_run(folder))
    print(f'  in {folder}\n' + reproduction_text(results, inputs))
    return int(bool(results))


def reproduction_text(results: list, inputs: list) -> str:
    "Whether two runs came out the same, and if not, which input is the first suspect."
    if not results:
        return 'every measure, every weight and the token stream are the same' + (
            f' although {difference_text(inputs[0])}' if inputs else ''
        )
    first = (
        f'the first input that differs: {difference_text(inputs[0])}'
        if inputs
        else 'no recorded input differs: the stage is not deterministic here'
    )
    return f'{len(results)} results differ, the first: {difference_text(results[0])}\n{first}'


def difference_text(difference: tuple) -> str:
    "One difference in words."
    kind, name, a, b = difference
    cut = lambda v: short(v) if not isinstance(v, str) or len(v) < 20 else v[:12] + '…'
    return f'{kind} {name}: {cut(a)} -> {cut(b)}'


def diff(words: list) -> int:
    "Say what differs between two runs."
    from k2lab.lab.records import find_run
    from k2lab.lab.reproduce import differences, inputs, results, with_env

    if len(words) != 2:
        raise LabError('diff needs two runs; `k2lab runs` lists them')
    a, b = (with_env(find_run(w)) for w in words)
    for title, of in (('inputs', inputs), ('results', results)):
        found = differences(of(a), of(b))
        print(
            f'{title}: {len(found) or "nothing"} differs'
            if len(found) < 2
            else f'{title}: {len(found)} differ'
        )
        for one in found:
            print('  ' + difference_text(one))
    return 0


def watch_run(words: list) -> int:
    "Show the progress of a run until it ends; 1 when it did not complete, or failed its gate."
    from k2lab.lab.files import following
    from k2lab.lab.records import find_run, promoted, read_run

    folder = find_run(the_run(words, 'watch'))
    record = read_run(folder)
    progress = Progress(record['stage'])
    with following(folder / 'metrics.jsonl', progress):
        while record['status'] in ('prepared', 'running'):
            time.sleep(0.5)
            record = read_run(folder)
    progress.end(record)
    return int(not promoted(record))


def convert(words: list) -> int:
    "Write a published checkpoint again as bfloat16."
    from k2lab.models.quantized import fetched, to_bf16

    if len(words) != 2:
        raise LabError(
            'convert needs a name, folder or hub id, and the new folder: `k2lab convert Kimi-K2-Base OUT`'
        )
    progress = Progress(f'convert {words[0]}')
    place = load_env('full')['models'].get(words[0], words[0])
    counts = to_bf16(
        fetched(place),
        Path(words[1]),
        on_shard=lambda n, of, size: progress.say(
            f'{progress.head}  {n}/{of} weights · {size / 2**30:.1f} GiB written'
        ),
    )
    if progress.tty:
        print(file=sys.stderr)
    print(f"{words[1]}: {counts['weights']} weights, {counts['dequantised']} of them dequantised")
    for kind, count in counts['left_out'].items():
        print(f'  left out: {count} tensors ({kind})')
    if counts['files_left_out']:
        print(f"  left out: {', '.join(counts['files_left_out'])}")
    return 0


def work(words: list) -> int:
    "Do a stage's work on a prepared run folder: what `accelerate launch` starts in every process."
    from k2lab.lab.job import open_job, stage_module

    if len(words) != 1:
        raise LabError('work needs one run folder')
    job = open_job(Path(words[0]))
    stage_module(job.stage).work(job)
    leave_together()
    return 0


def leave_together():
    "Wait for the other training processes: one that leaves earlier aborts (seen under ZeRO-3) and takes them along."
    dist = sys.modules.get('torch.distributed')
    if not (dist and dist.is_available() and dist.is_initialized()):
        return
    dist.barrier()
    dist.destroy_process_group()


# ---- text ----------------------------------------------------------------------------------------


def text_table(header: list, rows: list) -> str:
    "Rows as aligned text, under a header unless it is empty."
    cells = [[short(c) for c in row] for row in ([header] if header else []) + rows]
    wide = [max(map(len, column)) for column in zip(*cells)]
    return '\n'.join('  '.join(c.ljust(w) for c, w in zip(row, wide)).rstrip() for row in cells)


def run_text(record: dict) -> str:
    "A run's outcome, its measures, failed checks and what it saved, as text."
    lines = [
        f"{record['campaign']}/{Path(record['folder']).name}: {outcome(record)}",
        f"  in {record['folder']}",
    ]
    lines += [
        f"  {name}: {save['bytes'] / 2**20:.2f} MiB in {save['files']} files"
        for name, save in record['saves'].items()
    ]
    if record['metrics']:
        lines += [
            '',
            text_table(
                ['measure', 'before', 'after', 'n', 'cut'],
                [
                    [m.get(k) for k in ('measure', 'before', 'after', 'n', 'cut')]
                    for m in record['metrics']
                ],
            ),
        ]
    failed = [f"  check failed: {c['name']} {c['detail']}" for c in record['checks'] if not c['ok']]
    gate = gate_text(record)
    return '\n'.join(lines + failed + (['', gate.rstrip()] if gate else []))


def gate_text(record: dict) -> str:
    "The gate of a run as lines of text, and how to promote it where it failed; empty without a gate."
    from k2lab.lab.records import promoted
    from k2lab.lab.show import gate_shown

    gate = record.get('gate')
    if not (gate and gate['lines']):
        return ''
    run, table = Path(record['folder']).name, gate_shown(gate['lines'])
    text = f"gate of {run}: {'passed' if gate['passed'] else 'failed'}\n"
    text += text_table(table.header, table.rows) + '\n'
    way = f'`k2lab promote {run} --because "..."` lets it take over {", ".join(record["saves"])}\n'
    return text + ('' if promoted(record) else way)


def summary(records: list) -> str:
    "The pipeline's table: stage, status, first measure before and after, wall seconds, peak GiB."
    rows = []
    for r in records:
        m = next(iter(r['metrics']), {'measure': '-', 'before': None, 'after': None})
        rows.append(
            [
                r['stage'],
                outcome(r),
                m['measure'],
                m['before'],
                m['after'],
                r.get('wall_s'),
                r.get('peak_gib'),
            ]
        )
    rows.append(
        [
            'all',
            '',
            '',
            '',
            '',
            sum(r.get('wall_s', 0) for r in records),
            max(r.get('peak_gib', 0) for r in records),
        ]
    )
    return '\n' + text_table(
        ['stage', 'status', 'measure', 'before', 'after', 'wall s', 'peak GiB'], rows
    )


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
