"""What the runner costs over a bare `accelerate launch`: `python -m k2lab.bench run`."""

import os, statistics, subprocess, sys, time
from datetime import datetime
from k2lab.lab.config import LabError, lab_path, root
from k2lab.bench.harness import median_and_range


STAGE, WORDS = 'train_sft_domain', {'trainer.max_steps': '150', 'trainer.num_train_epochs': '40'}


def step_seconds(folder) -> float:
    "Seconds of one training step of a run, by its record."
    from k2lab.lab.records import read_record

    told = read_record(folder)['training']['train']
    return told['seconds'] / told['steps']


def by_runner(campaign: str) -> tuple:
    "`(wall seconds, seconds of a step)` of the stage as the lab runs it: notebook, papermill, record."
    from k2lab.lab.runner import execute

    began = time.monotonic()
    folder = execute(STAGE, 'smoke', campaign, WORDS)
    return time.monotonic() - began, step_seconds(folder)


def by_accelerate(campaign: str) -> tuple:
    "The same for a bare `accelerate launch` of the same work."
    from k2lab.lab.job import prepare

    job = prepare(STAGE, 'smoke', campaign, WORDS)
    command = [
        sys.executable,
        '-m',
        'accelerate.commands.launch',
        '--config_file',
        str(lab_path('configs') / 'accelerate' / 'cpu.yaml'),
        '--num_processes',
        '1',
        '-m',
        'k2lab',
        'work',
        str(job.folder),
    ]
    began = time.monotonic()
    done = subprocess.run(command, cwd=root(), capture_output=True, text=True)
    if done.returncode:
        raise LabError(
            f'accelerate launch ended with code {done.returncode}: {done.stderr.strip().splitlines()[-1]}'
        )
    return time.monotonic() - began, step_seconds(job.folder)


def run(rounds: int = 5):
    "What the runner costs over a bare `accelerate launch` of the same training: seconds in all, and share of a step."
    os.environ['OMP_NUM_THREADS'] = (
        '1'  # accelerate would set it for its own processes, and only there
    )
    campaign = f'bench-{datetime.now():%Y%m%d-%H%M%S}'
    pairs = []
    for i in range(rounds):
        pairs.append((by_runner(campaign), by_accelerate(campaign)))
        print(
            f'round {i + 1} of {rounds}: runner {pairs[-1][0][0]:.1f} s, accelerate launch {pairs[-1][1][0]:.1f} s',
            file=sys.stderr,
        )
    wall, step = [a[0] - b[0] for a, b in pairs], [100 * (a[1] / b[1] - 1) for a, b in pairs]
    print(f'{STAGE} at smoke, {WORDS["trainer.max_steps"]} steps, {rounds} rounds in turns')
    print(
        f'the runner adds {median_and_range(wall)} s to a run, and {median_and_range(step, 1)} % to a step of {1000 * statistics.median(b[1] for _, b in pairs):.1f} ms'
    )
