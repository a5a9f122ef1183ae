"""Commands that run stages: one, the pipeline, again, elsewhere."""

import sys
import time
from pathlib import Path

from k2lab.cli.looking import attempts, run_text, the_run
from k2lab.cli.progress import Progress, outcome
from k2lab.cli.words import changes_of, parse
from k2lab.lab.config import (
    LabError,
    load_env,
    one_of,
    resolve,
    stage_names,
)


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


def resolved_config(stage: str, scale: str, changes: dict) -> dict:
    "The config a stage would get, as a record keeps it."
    from k2lab.lab.job import config_of, stage_module

    return config_of(resolve(stage_module(stage).Config, stage, scale, changes))


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


def reproduce_run(words: list) -> int:
    "Do a complete run again and compare; 1 when the results differ."
    from k2lab.lab.records import find_run, read_run
    from k2lab.lab.reproduce import reproduce

    name = find_run(the_run(words, 'reproduce'))
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
    job.add_code()
    leave_together()
    return 0


def leave_together():
    "Wait for the other training processes: one that leaves earlier aborts (seen under ZeRO-3) and takes them along."
    dist = sys.modules.get('torch.distributed')
    if not (dist and dist.is_available() and dist.is_initialized()):
        return
    dist.barrier()
    dist.destroy_process_group()
