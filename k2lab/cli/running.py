"""Commands that run stages: one, again, elsewhere."""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from k2lab.cli.looking import attempts, run_text
from k2lab.cli.progress import Progress
from k2lab.cli.words import Command, Option, changes_of
from k2lab.lab.config import LabError, did_you_mean, one_of, resolve
from k2lab.lab.files import as_json

SCALE = Option('scale', 'smoke, nano, qlora or full', 'SCALE')
CAMPAIGN = Option(
    'campaign', "the folder of the runs; a stage reads what its campaign's runs left", 'NAME'
)
ON = Option('on', 'where to run: slurm submits it to a cluster', 'slurm')
JSON = Option('json', 'print strict JSON, and nothing else')
ANYWAY = Option('anyway', 'start what does not fit this machine by its plan')


def stage_command(stage: str, meaning: str) -> Command:
    "The command that runs a stage."
    return Command(
        lambda words, options: run_stage(stage, words, options),
        ' '.join(meaning.split()).rstrip('.'),
        '[field=value ...]',
        (SCALE, CAMPAIGN, ON, ANYWAY, JSON),
        f'k2lab {stage} --scale smoke --campaign mine',
    )


def run_stage(stage: str, words: list, options: dict) -> int:
    "Run one stage; 1 when it did not complete, or failed its gate."
    from k2lab.lab.records import promoted, read_run
    from k2lab.lab.runner import execute

    check_fields(stage, words)
    changes, place, as_text = changes_of(words), options['on'], not options['json']
    anyway = bool(options['anyway'])
    options = {key: options[key] for key in ('scale', 'campaign')}
    if place:
        return submit_stage_here(place, stage, options, changes)
    if stage == 'agentic_demo' and sys.stdin.isatty():
        return agent_command(options, changes)
    progress = Progress(stage)
    made = execute(stage, changes=changes, on_progress=progress, anyway=anyway, **options)
    record = read_run(made)
    progress.end(record)
    print(run_text(record) if as_text else as_json(record | page_of(record)))
    return int(not promoted(record))


def check_fields(stage: str, words: list):
    "`LabError` for a `--word` that is neither an option of the command nor a field of the stage."
    import dataclasses

    from k2lab.lab.job import stage_module

    Config = stage_module(stage).Config
    fields = [field.name for field in dataclasses.fields(Config)]
    options = [f'--{option.name}' for option in stage_command(stage, '').options]
    for word in words:
        name = word.removeprefix('--').partition('=')[0].partition('.')[0].replace('-', '_')
        known = name in fields or name in getattr(Config, 'renamed', {})
        near = did_you_mean(word.partition('=')[0], [*options, *(f'--{f}' for f in fields)])
        if word.startswith('--') and not known and near:
            raise LabError(f"{stage} does not take '{word}'{near}")


def page_of(record: dict) -> dict:
    "What the report stage wrote for its campaign as `{'report': ...}`; nothing for another run."
    page = Path(record['folder']).parent / 'report.json'
    if record['stage'] != 'report' or record['status'] != 'complete':
        return {}
    return {'report': json.loads(page.read_text(encoding='utf-8'))}


def submit_stage_here(place: str, stage: str, options: dict, changes: dict) -> int:
    "Submit one stage to a cluster instead of running it here; 0 once it is in the queue."
    from k2lab.lab.slurm import submit_stage

    one_of('place', place, ('slurm',), '--on')
    needs = needs_by_plan(options['campaign'] or '')
    folder, job = submit_stage(stage, changes=changes, needs=needs, **options)
    print(f'{folder.parent.name}/{folder.name}: Slurm job {job}\n  in {folder}')
    return 0


def resubmit(place: str, folder: Path) -> int:
    "Submit an unfinished run to a cluster; 0 once it is in the queue."
    from k2lab.lab.slurm import submit

    one_of('place', place, ('slurm',), '--on')
    job = submit(folder, needs_by_plan(folder.parent.name))
    print(f'{folder.parent.name}/{folder.name}: Slurm job {job}')
    return 0


def needs_by_plan(campaign: str) -> Callable:
    "What a stage needs by its plan; by its own file where it has none, or nobody knows its model's shape."
    from k2lab.lab.job import stage_module
    from k2lab.lab.slurm import needed
    from k2lab.scale.plan import needs

    def found(stage: str, cfg, env: dict):
        own = needed(stage, cfg, env)
        if not getattr(stage_module(stage), 'plan', None):
            return own  # a stage that plans nothing
        try:
            plan = needs(stage, cfg, env, campaign)
        except LabError:
            return own
        host = plan.host_gib * getattr(cfg, 'processes', 1) * 2**30 / 1e9
        return dataclasses.replace(own, gpus=max(own.gpus, plan.gpus), mem_gb=host)

    return found


def agent_command(options: dict, changes: dict) -> int:
    "Talk to the agent in this terminal; papermill's kernel would have no keyboard."
    from k2lab.agentic_demo import talk

    print(f"transcript in {talk(options['scale'], options['campaign'], changes)}")
    return 0


def resolved_config(stage: str, scale: str, changes: dict) -> dict:
    "The config a stage would get, as a record keeps it."
    from k2lab.lab.job import config_of, stage_module

    return config_of(resolve(stage_module(stage).Config, stage, scale, changes))


def resume_run(words: list, options: dict) -> int:
    "Go on with an unfinished run; 1 when it did not complete, or failed its gate."
    from k2lab.lab.records import find_run, promoted, read_run
    from k2lab.lab.reproduce import resume

    folder = find_run(words[0])
    if place := options['on']:
        return resubmit(place, folder)
    progress = Progress(read_run(folder)['stage'])
    record = read_run(resume(str(folder), progress))
    progress.end(record)
    print(attempts(record) + run_text(record))
    return int(not promoted(record))


def reproduce_run(words: list, options: dict) -> int:
    "Do a complete run again and compare; 1 when the results differ."
    from k2lab.lab.records import find_run, read_run
    from k2lab.lab.reproduce import reproduce

    name = find_run(words[0])
    progress = Progress(read_run(name)['stage'])
    found = reproduce(str(name), progress)
    progress.end(found.record)
    print(f'  in {found.folder}\n' + reproduction_text(found))
    return int(found.record['status'] != 'complete' or bool(found.results))


def reproduction_text(found) -> str:
    "Whether a repetition came out the same, and if not, which input is the first suspect."
    from k2lab.lab.inputs import difference_text
    from k2lab.lab.reproduce import verdict

    if found.record['status'] != 'complete':
        return verdict(found)
    if not found.results:
        although = f' although {difference_text(found.inputs[0])}' if found.inputs else ''
        return 'every measure, every weight and the token stream are the same' + although
    first = difference_text(found.results[0])
    return f'{len(found.results)} results differ, the first: {first}\n{verdict(found)}'


def watch_run(words: list, options: dict) -> int:
    "Show the progress of a run until it ends; 1 when it did not complete, or failed its gate."
    from k2lab.lab.files import following
    from k2lab.lab.records import find_run, promoted, read_run

    folder = find_run(words[0])
    record = read_run(folder)
    progress = Progress(record['stage'])
    with following(folder / 'metrics.jsonl', progress):
        while record['status'] in ('prepared', 'running'):
            time.sleep(0.5)
            record = read_run(folder)
    progress.end(record)
    return int(not promoted(record))


def work(words: list, options: dict) -> int:
    "Do a stage's work on a prepared run folder: what `accelerate launch` starts in every process."
    from k2lab.lab.job import open_job, stage_module

    job = open_job(Path(words[0]))
    stage_module(job.stage).work(job)
    job.add_code()
    leave_together()
    return 0


def leave_together():
    "Wait for the other training processes: one that leaves earlier aborts (seen under ZeRO-3) and takes them along."
    dist = sys.modules.get('torch.distributed')
    if not (dist and dist.is_available() and dist.is_initialized()):
        return
    from k2lab.models.placement import together

    together()
    dist.destroy_process_group()
