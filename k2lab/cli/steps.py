"""The steps of configs/pipeline.yaml: which have to run, and why; one pipeline at a time in a campaign."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from k2lab.cli.listing import first_measure
from k2lab.cli.looking import gate_text
from k2lab.cli.progress import Progress, outcome
from k2lab.cli.running import resolved_config
from k2lab.cli.tables import fitting_table
from k2lab.lab.config import SCALES, LabError, lab_path, one_of, read_yaml, setting, stage_names
from k2lab.lab.display import clock, short


@dataclass(frozen=True)
class Step:
    "A stage, what it is told beyond its own file, and how the pipeline treats it."

    stage: str
    changes: dict = field(default_factory=dict)
    always: bool = False  # runs whatever happened before
    saves: list | None = None  # what a stage of several modes leaves in this one
    only: bool = True  # whether it is the pipeline's only step with this stage
    accepted: bool = False  # its run is skipped whatever has changed
    anyway: bool = False  # it runs even where it does not fit by its plan


@dataclass(frozen=True)
class Plan:
    "What a step needs and why: nothing if its `run` is complete, else that it is resumed; a new run if there is none."

    run: dict | None = None
    why: list[str] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return bool(self.run and self.run['status'] == 'complete')


def steps_of(first: str | None, last: str | None) -> list[Step]:
    "The steps of configs/pipeline.yaml between two stages."
    path = lab_path('configs') / 'pipeline.yaml'
    steps = read_yaml(path).get('steps') or []
    for step in steps:
        for key in step:
            one_of('key', key, ('stage', 'changes', 'always', 'saves'), str(path))
    names = [one_of('stage', step.get('stage'), stage_names(), str(path)) for step in steps]
    known = dict.fromkeys(names)
    lo = names.index(one_of('stage', first, known, 'pipeline')) if first else 0
    back = names[::-1].index(one_of('stage', last, known, 'pipeline')) if last else 0
    hi = len(names) - back
    if steps and lo >= hi:
        raise LabError(f"pipeline: no step from '{first}' to '{last}': {last} comes before {first}")
    told = [{k: v for k, v in step.items() if v is not None} for step in steps[lo:hi]]
    return [Step(**step, only=names.count(step['stage']) == 1) for step in told]


def seeded(step: Step, seed: str | None) -> Step:
    "A step with a seed, if one was named and its stage has a field for it."
    from k2lab.lab.job import stage_module

    fields = {f.name for f in dataclasses.fields(stage_module(step.stage).Config)}
    told = {'seed': seed} if seed and 'seed' in fields else {}
    return dataclasses.replace(step, changes=step.changes | told)


def accepting(steps: list[Step], stages: str | None) -> list[Step]:
    "The steps, with those accepted that `stages` names, in words separated by commas; all of them for `all`."
    known = dict.fromkeys(step.stage for step in steps)
    names = known if stages == 'all' else (stages or '').split(',') if stages else ()
    for name in names:
        one_of('step', name, known, '--accept-stale')
    return [dataclasses.replace(step, accepted=step.stage in names) for step in steps]


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
    """Run or resume the steps of configs/pipeline.yaml, but for those that a run proves to be done.

    After one that failed, or failed its gate, only the `always` ones."""
    from k2lab.lab.records import check_campaign, promoted

    scale = one_of('scale', options['scale'] or setting('lab', 'scale'), SCALES)
    seed = options['seed']
    campaign = check_campaign(options['campaign'] or (f'{scale}-seed{seed}' if seed else scale))
    steps = [seeded(step, seed) for step in steps_of(options['from'], options['to'])]
    steps = accepting(steps, options['accept-stale'])
    steps = [dataclasses.replace(step, anyway=bool(options['anyway'])) for step in steps]
    for step in steps:  # a mistake in the last step is refused before the first one runs
        resolved_config(step.stage, scale, step.changes)
    if options['dry-run']:
        print('\n'.join(listing(steps, scale, campaign)))
        return 0
    with alone(lab_path('runs') / campaign):
        done = run_steps(steps, scale, campaign)
    records = [record for record, _ in done]
    print(summary(done) + closing(records, campaign), end='')
    return int(not all(map(promoted, records)))


def run_steps(steps: list[Step], scale: str, campaign: str) -> list[tuple[dict, str]]:
    "The record of each step, of a run that was there or of one that was made now, and why."
    from k2lab.lab.records import promoted

    done = []
    for i, step in enumerate(steps, 1):
        if step.always or all(promoted(record) for record, _ in done):
            progress = Progress(step.stage, i, len(steps))
            done.append(run_step(step, scale, campaign, progress))
    return done


def run_step(step: Step, scale: str, campaign: str, progress: Progress) -> tuple[dict, str]:
    "The record of a step and why it ran, or why not; the run is made or resumed unless one is there."
    from k2lab.lab.records import promoted, read_run
    from k2lab.lab.reproduce import kernel_here, resume
    from k2lab.lab.runner import execute

    plan = plan_of(step, scale, campaign)
    why = reason(plan)
    if plan.done and plan.run:
        as_done = {'reason': why, 'gate': None, 'promoted': None}
        progress.end(plan.run | (as_done if promoted(plan.run) else {}))
        return plan.run, why
    if why:
        progress.note(why)
    made = (
        resume(plan.run['folder'], progress)
        if plan.run
        else execute(step.stage, scale, campaign, step.changes, progress, step.anyway)
    )
    kernel_here.cache_clear()  # it took long enough for another one to be installed
    progress.end(read_run(made))
    return read_run(made), why


def plan_of(step: Step, scale: str, campaign: str) -> Plan:
    "What a step needs in a campaign: see `Plan`."
    from k2lab.lab.inputs import differing
    from k2lab.lab.reproduce import stale

    if step.always:
        return Plan()
    want = resolved_config(step.stage, scale, step.changes)
    known = runs_for(step, scale, campaign)
    same = [r for r in known if r['config'] == want]
    for record in sorted(same, key=lambda r: r['status'] != 'complete'):
        if not stale(record, want):
            return Plan(record)
    if not known:
        return Plan()
    closest = min(known, key=lambda r: len(differing('config', r['config'], want)))
    kept = closest if step.accepted and closest['status'] == 'complete' else None
    return Plan(kept, stale(closest, want))


def runs_for(step: Step, scale: str, campaign: str) -> list[dict]:
    "The complete and interrupted runs of a campaign that were made for a step, newest first."
    from k2lab.lab.records import runs

    return [
        r
        for r in reversed(runs(campaign))
        if (r['stage'], r['scale']) == (step.stage, scale)
        and r['status'] in ('complete', 'interrupted')
        and (step.only or r.get('changes') == step.changes)
    ]


def few(words: list[str], most: int = 3) -> str:
    "The first of some words, and how many more there are."
    more = f' and {len(words) - most} more' if len(words) > most else ''
    return ', '.join(words[:most]) + more


def reason(plan: Plan) -> str:
    "Why a step runs, or why not, in a few words; empty if there is no run of it yet."
    from k2lab.lab.reproduce import elsewhere

    if not plan.run:
        return f'runs again: {few(plan.why)}' if plan.why else ''
    name = Path(plan.run['folder']).name
    if not plan.done:
        return f'resumes {name}'
    if plan.why:
        return f'accepted as it is, in {name}: {few(plan.why)}'
    other = elsewhere(plan.run)
    return f'already, in {name}' + (f', made with another {few(other)}' if other else '')


def needed(plan: Plan) -> str:
    "What would be done for a step that is not done, and why."
    if plan.run:
        return f"would resume {Path(plan.run['folder']).name}"
    return f'would run again: {few(plan.why)}' if plan.why else 'would run'


def listing(steps: list[Step], scale: str, campaign: str) -> list[str]:
    "A line for each step: what the pipeline would do, and why."
    lines, before = [], False
    for i, step in enumerate(steps, 1):
        plan = plan_of(step, scale, campaign)
        text = f'[{i}/{len(steps)}] {step.stage}  {reason(plan) if plan.done else needed(plan)}'
        unless = ', unless a step before it leaves something else' if plan.done and before else ''
        lines.append(text + unless)
        before |= not plan.done
    return lines


def closing(records: list, campaign: str) -> str:
    "What stands below the summary: the gates of the runs, and where the report is."
    gates = [gate_text(r) for r in records if r['status'] == 'complete']
    report = lab_path('runs') / campaign / 'report.html'
    found = f'\nreport: {report}\n' if report.exists() else ''
    return '\n' + ''.join(f'\n{text}' for text in gates if text) + found


def summary(done: list[tuple[dict, str]]) -> str:
    "The pipeline's table: stage, status, first measure before and after, wall time, peak GiB, why it ran or not."
    rows = [
        [
            r['stage'],
            outcome(r),
            first_measure(r),
            clock(r.get('wall_s', 0)),
            short(r.get('peak_gib')),
            why,
        ]
        for r, why in done
    ]
    wall = clock(sum(r.get('wall_s', 0) for r, _ in done))
    peak = short(max(r.get('peak_gib', 0) for r, _ in done))
    head = ['stage', 'status', 'measure', 'wall', 'GiB', '']
    return '\n' + fitting_table(head, [*rows, ['all', '', '', wall, peak, '']])
