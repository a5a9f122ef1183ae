"""The steps of configs/pipeline.yaml: which have to run, in what order, and one pipeline at a time in a campaign."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from k2lab.cli.looking import gate_text
from k2lab.cli.progress import Progress, outcome
from k2lab.cli.running import resolved_config
from k2lab.cli.tables import text_table
from k2lab.lab.config import SCALES, LabError, lab_path, one_of, read_yaml, setting, stage_names


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


def seed_for(stage: str, seed: str | None) -> dict:
    "The change that gives a stage its seed, if one was named and the stage has a field for it."
    from k2lab.lab.job import stage_module

    return (
        {'seed': seed}
        if seed and 'seed' in {f.name for f in dataclasses.fields(stage_module(stage).Config)}
        else {}
    )


@contextlib.contextmanager
def alone(home: Path) -> Iterator[None]:
    "Own a campaign's folder while the block runs; waits for the pipeline that owns it, and says for whom."
    from k2lab.lab.locks import holder, lock

    home.mkdir(parents=True, exist_ok=True)
    if not (held := lock(home)):
        text = f'campaign {home.name}: waiting for the pipeline of {holder(home)}; Ctrl-C gives up'
        print(text, file=sys.stderr, flush=True)
    while not held:
        time.sleep(0.5)
        held = lock(home)
    with held:
        yield


def pipeline(words: list, options: dict) -> int:
    """Run or resume the steps of configs/pipeline.yaml that are not complete.

    After one that failed, or failed its gate, only the `always` ones."""
    from k2lab.lab.records import check_campaign, promoted

    scale = one_of('scale', options['scale'] or setting('lab', 'scale'), SCALES)
    seed = options['seed']
    campaign = check_campaign(options['campaign'] or (f'{scale}-seed{seed}' if seed else scale))
    steps = steps_of(options['from'], options['to'])
    for step in steps:  # a mistake in the last step is refused before the first one runs
        step['changes'] = step['changes'] | seed_for(step['stage'], seed)
        resolved_config(step['stage'], scale, step['changes'])
    with alone(lab_path('runs') / campaign):
        records = run_steps(steps, scale, campaign)
    print(summary(records) + closing(records, campaign), end='')
    return int(not all(map(promoted, records)))


def run_steps(steps: list, scale: str, campaign: str) -> list[dict]:
    "The records of the steps: those that were there, and those of the runs that were made now."
    from k2lab.lab.records import promoted

    records = []
    for i, step in enumerate(steps, 1):
        if step['always'] or all(map(promoted, records)):
            progress = Progress(step['stage'], i, len(steps))
            records.append(run_step(step, scale, campaign, progress))
    return records


def run_step(step: dict, scale: str, campaign: str, progress: Progress) -> dict:
    "The record of a step that is done already, or of the run that was made or resumed for it now."
    from k2lab.lab.records import promoted, read_run
    from k2lab.lab.reproduce import resume
    from k2lab.lab.runner import execute

    ask = step['stage'], scale, campaign, step['changes']
    done = None if step['always'] else newest_same_run(*ask)
    begun = None if done or step['always'] else newest_same_run(*ask, 'interrupted')
    record = done or read_run(
        resume(begun['folder'], progress) if begun else execute(*ask, progress)
    )
    already = f'already, in {Path(record["folder"]).name}'
    as_done = {'reason': already, 'gate': None, 'promoted': None}
    progress.end(record | (as_done if done and promoted(done) else {}))
    return record


def closing(records: list, campaign: str) -> str:
    "What stands below the summary: the gates of the runs, and where the report is."
    gates = [gate_text(r) for r in records if r['status'] == 'complete']
    report = lab_path('runs') / campaign / 'report.html'
    found = f'\nreport: {report}\n' if report.exists() else ''
    return '\n' + ''.join(f'\n{text}' for text in gates if text) + found


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
        if (
            same
            and not record.get('edited')
            and not any(check_published(Path(record['folder']), name) for name in record['saves'])
        ):
            break
    else:
        return None
    newest = lambda p: (
        '@' in p['name'] or getattr(saved_by(home, p['name'], scale), 'name', None) == p['run']
    )
    return record if all(newest(p) for p in record['parents']) else None
