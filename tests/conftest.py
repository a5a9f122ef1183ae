"""A toy lab in a temporary folder, with settings, names and stages of a few lines.

The machinery is tested on it, apart from this repository's own stages."""

import json
import os
import sys
from pathlib import Path
from textwrap import dedent

import pytest

# files whose tests train, kill or wait, the longest first; slurm only waits, while faults uses both cores
SLOW = [
    'faults',
    'slurm',
    'guard',
    'distributed',
    'cli',
    'selftest',
    'refine',
    'resume',
    'run',
    'traces',
    'paths',
    'stacks',
    'placement',
    'harness',
    'unsloth',
    'vllm',
    'serve',
    'contract',
    'data',
]

LEAN = Path(__file__).parent / 'lean'


def weight(item) -> int:
    "The place of a test's file in `SLOW`; files that are not there come last."
    name = item.path.stem.removeprefix('test_')
    return SLOW.index(name) if name in SLOW else len(SLOW)


def pytest_collection_modifyitems(items):
    items.sort(key=weight)
    for item in items:
        if weight(item) < len(SLOW):
            item.add_marker('slow')


@pytest.fixture(scope='session', autouse=True)
def lean():
    "Processes that tests start do without optional packages that take long to import (see lean/)."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('K2LAB_TEST_WITHOUT', 'scipy sklearn bitsandbytes deepspeed')
        patch.setenv('PYTHONPATH', str(LEAN), prepend=os.pathsep)
        yield


@pytest.fixture(autouse=True)
def forgotten(tmp_path_factory):
    "Modules that a test imported from a temporary folder are forgotten: a later test's run would record them as code."
    known, path, home = {*sys.modules}, [*sys.path], str(tmp_path_factory.getbasetemp())
    yield
    sys.path[:] = path
    for name in {*sys.modules} - known:
        file = getattr(sys.modules[name], '__dict__', {}).get('__file__')
        if isinstance(file, str) and file.startswith(home):
            del sys.modules[name]


MODULE = '''
from dataclasses import dataclass, field
@dataclass(frozen=True)
class Config:
    init_from: str = 'zero'   # number to start from
    saves: str = 'k2_toy'     # name of what is left
    steps: int = 3            # how often to add one
    seed: int = 0             # a field like any other here
    api_key: str = ''         # must never reach a record
    processes: int = 1        # how many work at once
    accelerate: str = 'cpu'   # launch file
    how: str = 'well'         # what goes wrong
    trainer: dict = field(default_factory=dict)   # options that are not ours
def train(job):
    import os; os.write(1, f"rank {os.environ.get('RANK', '0')}\\n".encode())   # one write: the log is shared
    value = int(job.find(job.cfg.init_from).read_text())
    if job.cfg.how == 'raise': raise ValueError('the loss is not a number')
    if job.cfg.how == 'sleep': job.log(step=0, steps=job.cfg.steps); import time; time.sleep(60)
    if job.cfg.how == 'die': import os; os.kill(os.getpid(), 9)
    for step in range(1, job.cfg.steps + 1):
        job.log(step=step, steps=job.cfg.steps, loss=1/(value + step), tokens_s=100., eta_s=0)
    job.measure('value', before=value, after=value + step, n=1)
    job.check('counted up', job.cfg.how != 'fail', 'as told')
    with job.publishing(job.cfg.saves, '.txt') as path:
        path.write_text(str(value + step))
        if job.cfg.how == 'full': raise OSError(28, 'No space left on device')
work = train
'''
RUN_HALF = [
    "job = start('{stage}', scale, run, changes); job.cfg",
    'launch(train, job)',
    'job.metrics()',
    'job.finish()',
]


def notebook(stage: str, cells: list) -> dict:
    "A stage notebook: a lesson that must never be executed by the runner, then the run half."
    cell = lambda i, text, **metadata: {
        'cell_type': 'code',
        'id': f'c{i}',
        'metadata': metadata,
        'source': text,
        'outputs': [],
        'execution_count': None,
    }
    title = {'cell_type': 'markdown', 'id': 'title', 'metadata': {}, 'source': f'# {stage}'}
    half = [
        f'from k2lab.lab.job import start\nfrom k2lab.lab.launch import launch\nfrom toylab.{stage} import train',
        *(c.format(stage=stage) for c in cells),
    ]
    return {
        'metadata': {},
        'nbformat': 4,
        'nbformat_minor': 5,
        'cells': [
            title,
            cell(0, 'raise Exception("a lesson")'),
            cell(1, "scale = 'smoke'\nrun = None\nchanges = {}", tags=['parameters']),
            *(cell(i, c) for i, c in enumerate(half, 2)),
        ],
    }


class ToyLab:
    "A lab with stages added at will."

    def __init__(self, root: Path):
        self.root, self.runs = root, root / 'runs'
        for d in ('nbs', 'configs/accelerate', 'toylab'):
            (root / d).mkdir(parents=True)
        self.write('settings.ini', '[lab]\nscale = smoke\npackage = toylab\n')
        self.write(
            'configs/env.yaml',
            'models: {zero: ./zero.txt}\nendpoint: {key_env: K2LAB_API_KEY}\n',
        )
        self.write('zero.txt', '0')
        self.write('toylab/__init__.py', '')

    def write(self, name: str, text: str):
        (self.root / name).write_text(dedent(text))

    def stage(
        self, number: int, name: str, config: str = '', cells: list = RUN_HALF, module: str = MODULE
    ):
        "Add a stage: notebook, module and file."
        self.write(f'nbs/{number}_{name}.ipynb', json.dumps(notebook(name, cells)))
        self.write(f'toylab/{name}.py', module)
        self.write(f'configs/{name}.yaml', config)


@pytest.fixture
def lab(tmp_path, monkeypatch):
    "A toy lab with one stage, `train_toy`, which counts from a number and leaves the sum."
    monkeypatch.setenv('K2LAB_ROOT', str(tmp_path))
    monkeypatch.setenv(
        'PYTHONPATH', os.pathsep.join([str(tmp_path), os.environ.get('PYTHONPATH', '')])
    )
    monkeypatch.setenv('K2LAB_LAB_RUNS_PATH', 'runs')
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [m for m in sys.modules if m.split('.')[0] == 'toylab']:
        del sys.modules[name]
    lab = ToyLab(tmp_path)
    lab.stage(20, 'train_toy', 'saves: k2_toy\nscales:\n  smoke: {steps: 2}\n')
    return lab
