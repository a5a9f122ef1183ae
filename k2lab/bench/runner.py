"""What the runner costs over a bare `accelerate launch`: `python -m k2lab.bench run`."""

import os
import statistics
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from k2lab.bench.harness import median_and_range
from k2lab.lab.config import LabError, lab_path, root

STAGE, CHANGES = 'train_sft_domain', {'trainer.max_steps': '150', 'trainer.num_train_epochs': '40'}


class Cost(NamedTuple):
    "Wall seconds of a whole run and of one training step."

    wall: float
    step: float


def step_seconds(folder: Path) -> float:
    "Seconds of one training step of a run, by its record."
    from k2lab.lab.records import read_record

    training = read_record(folder)['training']['train']
    return training['seconds'] / training['steps']


def by_runner(campaign: str) -> Cost:
    "The cost of the stage as the lab runs it: notebook, papermill, record."
    from k2lab.lab.runner import execute

    began = time.monotonic()
    folder = execute(STAGE, 'smoke', campaign, CHANGES)
    return Cost(time.monotonic() - began, step_seconds(folder))


def launch_command(folder: Path) -> list[str]:
    "A bare `accelerate launch` of the work of a prepared run folder."
    config = str(lab_path('configs') / 'accelerate' / 'cpu.yaml')
    launch = [
        'accelerate.commands.launch',
        '--config_file',
        config,
        '--main_process_port',
        '0',
        '--num_processes',
        '1',
    ]
    return [sys.executable, '-m', *launch, '-m', 'k2lab', 'work', str(folder)]


def by_accelerate(campaign: str) -> Cost:
    "The cost of the same work by `accelerate launch`; `LabError` if it fails."
    from k2lab.lab.job import start

    folder = start(STAGE, 'smoke', None, CHANGES, campaign=campaign).folder
    command = launch_command(folder)
    began = time.monotonic()
    done = subprocess.run(command, cwd=root(), capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1]
        raise LabError(f'accelerate launch ended with code {done.returncode}: {reason}')
    return Cost(time.monotonic() - began, step_seconds(folder))


def print_costs(pairs: list[tuple[Cost, Cost]]):
    "Print what the runner adds, from the (runner, accelerate launch) pairs of the rounds."
    wall = [ours.wall - bare.wall for ours, bare in pairs]
    share = [100 * (ours.step / bare.step - 1) for ours, bare in pairs]
    step_ms = 1000 * statistics.median(bare.step for _, bare in pairs)
    steps = CHANGES['trainer.max_steps']
    print(f'{STAGE} at smoke, {steps} steps, {len(pairs)} rounds in turns')
    print(
        f'the runner adds {median_and_range(wall)} s to a run, '
        f'and {median_and_range(share, 1)} % to a step of {step_ms:.1f} ms'
    )


def run(rounds: int = 5):
    "Print what the runner costs over a bare `accelerate launch`: seconds, and share of a step."
    os.environ['OMP_NUM_THREADS'] = '1'  # accelerate sets it for its own processes only
    campaign = f'bench-{datetime.now():%Y%m%d-%H%M%S}'
    pairs = []
    for i in range(rounds):
        ours, bare = by_runner(campaign), by_accelerate(campaign)
        pairs.append((ours, bare))
        print(
            f'round {i + 1} of {rounds}: '
            f'runner {ours.wall:.1f} s, accelerate launch {bare.wall:.1f} s',
            file=sys.stderr,
        )
    print_costs(pairs)
