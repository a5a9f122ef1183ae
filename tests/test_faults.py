"""kill -9 at seeded moments of a run.

No false `complete`, no unreadable record, no process left alive, and a resume that ends where the
uninterrupted run does.

`make test` does the quick part; `make test-faults` all of it (K2LAB_FAULTS=full)."""

import inspect
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from k2lab.lab.checkpoint import MANIFEST
from k2lab.lab.config import LabError
from k2lab.lab.files import check_published, check_storage, read_lines
from k2lab.lab.job import prepare, start
from k2lab.lab.records import read_run
from k2lab.lab.reproduce import input_differences, reproduce, results
from k2lab.lab.runner import execute

FULL = os.environ.get('K2LAB_FAULTS') == 'full'
PHASES = ('start', 'data', 'step', 'save', 'evaluate', 'write', 'finish')
VICTIMS = ('runner', 'kernel', 'trainer')

STAGE = '''
import time
from dataclasses import dataclass, field
from k2lab.lab.checkpoint import finalize_checkpoint, newest_checkpoint, step_of
@dataclass(frozen=True)
class Config:
    init_from: str = 'zero'   # number to start from
    saves: str = 'k2_toy'     # name of what is left
    steps: int = 6            # steps of training
    seed: int = 0             # a field like any other here
    processes: int = 1        # how many work at once
    accelerate: str = 'cpu'   # launch file
def save(place, value):
    place.mkdir(parents=True, exist_ok=True)
    for name in ('model.txt', 'optimizer.txt'): (place/name).write_text(str(value)); time.sleep(.02)
    finalize_checkpoint(place, {'value': value})
def train(job):
    value = first = int(job.find(job.cfg.init_from).read_text())
    time.sleep(.1)
    place, state = newest_checkpoint(job.folder/'trainer/train')
    done = step_of(place) if place else 0
    if place: value = state['value']; job.resumed('train', done)
    for step in range(done + 1, job.cfg.steps + 1):
        value = (value*31 + step) % 1_000_003
        job.log(phase='train', step=step, steps=job.cfg.steps, loss=value)
        time.sleep(.03)
        if job.first and step % 2 == 0: save(job.folder/f'trainer/train/checkpoint-{step}', value)
    job.record['training'] = {'train': {'loss': value, 'steps': job.cfg.steps}}
    time.sleep(.05)
    job.measure('value', before=first, after=value, n=1)
    time.sleep(.1)
    with job.publishing(job.cfg.saves, '.txt') as path:
        path.write_text(str(value)); time.sleep(.1)
    job.check('counted', True)
work = train
'''
CELLS = [
    "job = start('{stage}', scale, run, changes)",
    'launch(train, job)',
    *(['job.curve()'] if FULL else []),  # a second for matplotlib; test_run has it too
    'job.metrics()',
    'job.finish(); import time; time.sleep(.2)',
]


# Runs are forked from a process that has imported what each of them imports: real processes, started sooner
FORKS = multiprocessing.get_context('forkserver')
FORKS.set_forkserver_preload(
    ['k2lab.cli', 'k2lab.lab.reproduce', 'papermill', 'nbconvert.exporters', 'ipykernel.kernelspec']
)


def command(words: list, env: dict, cap: int | None):
    "Be `k2lab words`: silent, in a session and an environment of its own, no file longer than `cap` bytes."
    from k2lab.cli import app

    os.setsid()
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    os.environ.clear()
    os.environ.update(env)
    if cap:
        resource.setrlimit(resource.RLIMIT_FSIZE, (cap, cap))
    sys.argv = ['k2lab', *words]
    app()


class Run:
    "A started `k2lab words`; whatever it starts carries `tag` in its environment."

    def __init__(self, words: list, tag: str = '', cap: int | None = None):
        env = {**os.environ, 'K2LAB_FAULT_TAG': tag, 'OMP_NUM_THREADS': '1'}
        self.process = FORKS.Process(target=command, args=(words, env, cap))
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        "The exit code, None while it runs."
        return self.process.exitcode

    def wait(self, seconds: float) -> int:
        "The exit code; `TimeoutError` if it still runs after so many seconds."
        self.process.join(seconds)
        if self.poll() is None:
            raise TimeoutError(f'process {self.pid} still runs after {seconds} s')
        return self.poll()


def carrying(tag: str) -> list:
    "Living processes with this tag."
    found = []
    for p in psutil.process_iter():
        try:
            if p.status() != psutil.STATUS_ZOMBIE and p.environ().get('K2LAB_FAULT_TAG') == tag:
                found.append(p)
        except psutil.Error:
            pass
    return found


def reached(folder: Path, phase: str) -> bool:
    "Whether a run is at (or past) a phase, as its folder shows."
    if not (folder / 'run.json').exists():
        return False
    record = read_run(folder)
    if phase == 'start':
        return True
    if phase == 'data':
        return record['status'] != 'prepared'
    if phase == 'step':
        return (folder / 'metrics.jsonl').exists() and b'"step"' in (
            folder / 'metrics.jsonl'
        ).read_bytes()
    if phase == 'save':
        return any(
            not (p / MANIFEST).exists() for p in folder.glob('trainer/train/checkpoint-*')
        ) or bool(record.get('training'))
    if phase == 'evaluate':
        return bool(record['metrics'])
    if phase == 'write':
        return bool(list(folder.glob('.k2_*.part'))) or bool(record['saves'])
    return bool(record.get('closed'))


def victim_of(proc, folder: Path, victim: str):
    "The pid to kill: the runner, its kernel, or a training process (the kernel itself where it trains)."
    if victim == 'runner':
        return proc.pid
    children = psutil.Process(proc.pid).children(recursive=True)
    said = {c: ' '.join(c.cmdline()) for c in children}
    kernels = [c for c in children if 'ipykernel' in said[c]]
    workers = [c for c in children if 'k2lab work' in said[c] and 'accelerate' not in said[c]]
    chosen = workers[:1] if victim == 'trainer' and workers else kernels[:1]
    return chosen[0].pid if chosen else None


def kill_once(runs: Path, words: list, phase: str, victim: str, delay: float) -> dict:
    """Start a run in the campaign folder `runs`, kill the victim some time into a phase, and resume.

    Returns `{what was left behind: number}`."""
    tag = f'{runs}'
    proc = Run([*words, '--campaign', runs.name], tag)
    folder, pid, end = None, None, time.monotonic() + 90
    while proc.poll() is None and pid is None and time.monotonic() < end:
        folder = next(iter(runs.glob('*-*-*.*')), None) if runs.exists() else None
        try:
            pid = victim_of(proc, folder, victim) if folder and reached(folder, phase) else None
        except psutil.Error:
            pid = None
        if pid is None:
            time.sleep(0.002)
    time.sleep(delay)
    try:
        os.kill(pid, signal.SIGKILL) if pid else None
    except ProcessLookupError:
        pid = None
    struck = time.monotonic()
    proc.wait(30)
    noticed = time.monotonic() - struck if pid and victim != 'runner' else 0
    gone = struck + 10
    while (left := carrying(tag)) and time.monotonic() < max(gone, struck + noticed + 0.2):
        time.sleep(0.05)
    return dict(killed=int(pid is not None), left=len(left), noticed=noticed, **after(folder))


def after(folder: Path) -> dict:
    "The record after a kill and after the resume."
    try:
        status = read_run(folder)['status']
    except Exception:
        return dict(unreadable=1, status='unreadable')
    if status == 'complete':
        return dict(unreadable=0, status=status, result=results(read_run(folder)), resumed=0)
    code = Run(['resume', str(folder)]).wait(120)
    record = read_run(folder)
    if code:
        print(
            f"\n{folder}: {status}; its resume ended with code {code}: {record['status']}, {record['reason']}"
        )
    return dict(
        unreadable=0,
        status=status,
        result=results(record) if record['status'] == 'complete' else None,
        resumed=int(code == 0),
    )


def points(n: int, seed: int) -> list:
    "n `(phase, victim, seconds into the phase)`, every phase and victim about equally often."
    rng = random.Random(seed)
    every = [(p, v) for p in PHASES for v in VICTIMS]
    rng.shuffle(every)
    return [(*every[i % len(every)], rng.uniform(0, 0.06)) for i in range(n)]


def kill_many(home: Path, words: list, n: int, seed: int) -> list:
    "What `n` kills at seeded points found, two runs at a time."
    with ThreadPoolExecutor(2) as pool:
        return list(
            pool.map(
                lambda ip: kill_once(home / f'k{ip[0]}', words, *ip[1]), enumerate(points(n, seed))
            )
        )


def verdict(found: list, want: dict) -> Counter:
    "What the kills came to."
    count = Counter(kills=len(found))
    for f in found:
        count['landed'] += f['killed']
        count['left alive'] += f['left']
        count['unreadable'] += f['unreadable']
        count['false complete'] += f['status'] == 'complete' and f['result'] != want
        count['resumed'] += f.get('resumed', 0)
        count['same result'] += f.get('result') == want
        count[f"was {f['status']}"] += 1
    return count


def check(found: list, want: dict, name: str):
    "The promise, and the counts in sight."
    count = verdict(found, want)
    slowest = max(f['noticed'] for f in found)
    print(
        f'\n{name}: '
        + ', '.join(f'{v} {k}' for k, v in count.items())
        + f'; a dead kernel or trainer was noticed within {slowest:.1f} s'
    )
    assert slowest < 10
    assert (count['false complete'], count['unreadable'], count['left alive']) == (0, 0, 0)
    assert count['same result'] == count['kills']
    assert count['landed'] >= 0.9 * count['kills']


@pytest.mark.parametrize('processes, kills', [(1, 150 if FULL else 24), (2, 14 if FULL else 3)])
def test_killed_runs_of_a_small_stage(lab, processes, kills):
    lab.stage(20, 'train_toy', 'saves: k2_toy\n', cells=CELLS, module=STAGE)
    lab.write(
        'configs/accelerate/cpu.yaml',
        (Path(__file__).parent.parent / 'configs/accelerate/cpu.yaml').read_text(),
    )
    words = ['train_toy', f'processes={processes}']
    assert Run([*words, '--campaign', 'whole']).wait(120) == 0
    want = results(read_run(next((lab.runs / 'whole').iterdir())))
    check(kill_many(lab.runs, words, kills, processes), want, f'{processes} process(es)')


def test_killed_runs_of_real_training(tmp_path, monkeypatch):
    monkeypatch.setenv('K2LAB_LAB_RUNS_PATH', str(tmp_path))
    words = [
        'train_sft_domain',
        '--scale',
        'smoke',
        'trainer.save_steps=2',
        'trainer.max_steps=8',
        'trainer.num_train_epochs=4',
    ]
    assert Run([*words, '--campaign', 'whole']).wait(180) == 0
    want = results(read_run(next((tmp_path / 'whole').iterdir())))
    check(kill_many(tmp_path, words, 36 if FULL else 3, 7), want, 'real training')


# ---- two runs, one folder ------------------------------------------------------------------------


def race(folders: list, barrier, won):
    "Try to start each prepared folder the moment the other process does; count the wins."
    for i, folder in enumerate(folders):
        barrier.wait()
        try:
            job = start('train_toy', run=folder)
        except LabError:
            continue
        won[i] += 1
        _kept = job  # holds the lock until the next round


def test_of_two_processes_one_gets_the_folder(lab):
    n = 100 if FULL else 25
    folders = [str(prepare('train_toy', campaign=f'r{i}').folder) for i in range(n)]
    fork = multiprocessing.get_context('fork')
    barrier, won = fork.Barrier(2), fork.Array('i', n)
    both = [fork.Process(target=race, args=(folders, barrier, won)) for _ in range(2)]
    for p in both:
        p.start()
    for p in both:
        p.join(120)
    print(f'\nraces: {n}, one winner in {sum(w == 1 for w in won)}')
    assert list(won) == [1] * n


# ---- the disk is full ----------------------------------------------------------------------------

WRITER = STAGE.replace('STAGE', '').replace(
    "    job.measure('value'",
    """    for kib in (80, 120, 180, 260, 360, 480, 600):
        with job.publishing(f'part_{kib}', '.txt') as path: path.write_text('x'*kib*1024)
    job.measure('value'""",
)


def parses(folder: Path) -> bool:
    "Whether every JSON file of a run folder can be read."
    for p in folder.rglob('*'):
        if p.suffix in ('.json', '.ipynb'):
            json.loads(p.read_text())
        if p.suffix == '.jsonl':
            read_lines(p)
    return True


ROOM = inspect.signature(check_storage).parameters['room'].default


def test_a_full_disk_loses_nothing_that_was_published(lab):
    lab.stage(20, 'train_toy', 'saves: k2_toy\n', cells=CELLS, module=WRITER)
    rng, n = random.Random(3), 20 if FULL else 4
    good = 0
    for i, limit in enumerate(rng.sample(range(70, 600), n)):
        code = Run(['train_toy', '--campaign', f'd{i}'], cap=limit * 1024).wait(90)
        if limit * 1024 < ROOM:  # told before anything starts, and nothing is left
            good += (code, (lab.runs / f'd{i}').exists()) == (2, False)
            continue
        folder = next((lab.runs / f'd{i}').iterdir())
        record = read_run(folder)
        kept = [name for name in record['saves'] if not check_published(folder, name, deep=True)]
        good += (
            (code, record['status'], record['reason'].startswith('disk full'))
            == (1, 'failed', True)
            and kept == list(record['saves'])
            and parses(folder)
        )
    print(f'\nfull disks: {n}, nothing lost and said so: {good}')
    assert good == n


# ---- secrets -------------------------------------------------------------------------------------

LEAK = STAGE.replace(
    '    time.sleep(.1)\n    place',
    """    import os
    print(os.environ['HF_TOKEN'], 'and', 'sk-' + 'q7Zk'*6); os.write(1, os.environ['OPENAI_API_KEY'].encode())
    job.sample(when='before', prompt='say it', text=os.environ['WANDB_API_KEY']); job.log(note=os.environ['MY_SECRET'])
    place""",
    1,
)


def test_twelve_planted_secrets_reach_no_file(lab, monkeypatch):
    named = dict(
        HF_TOKEN='planted-token-one',
        OPENAI_API_KEY='planted-key-two',
        WANDB_API_KEY='planted-key-three',
        MY_SECRET='planted-secret-four',
        DB_PASSWORD='planted-word-five',
        SIX_SECRET='planted-key-six',
        SEVEN_SECRET='http://me:planted-word-seven@127.0.0.1/v1',
        EIGHT_API_KEY='planted-key-eight',
        HUB_TOKEN='planted-token-nine',
    )
    for k, v in named.items():
        monkeypatch.setenv(k, v)
    looks = ['hf_' + 'a' * 34, 'ghp_' + 'b' * 36, 'AKIA' + 'C' * 16]
    leaks = [
        "print(job.cfg.api_key, job.cfg.trainer, job.env['endpoint'])",
        f"print('{looks[1]}'); job.log(note='{looks[2]}')",
        f"raise ValueError('bad key {looks[0]}')",
    ]
    lab.stage(
        20,
        'train_toy',
        'saves: k2_toy\n',
        cells=[*CELLS[:-1], *leaks],
        module=LEAK.replace(
            "    accelerate: str = 'cpu'",
            "    api_key: str = ''   # a secret\n"
            "    trainer: dict = field(default_factory=dict)   # TRL's\n    accelerate: str = 'cpu'",
        ),
    )
    lab.write(
        'configs/env.yaml',
        'models: {zero: ./zero.txt}\nendpoint: {api_key: "env:SIX_SECRET", base_url: "env:SEVEN_SECRET"}\n',
    )
    changes = {'api_key': 'env:EIGHT_API_KEY', 'trainer.hub_token': 'env:HUB_TOKEN'}
    folder = execute('train_toy', changes=changes)
    planted = [*named.values(), 'planted-word-seven', *looks]
    assert len(planted) == 13 and read_run(folder)['reason'].startswith('ValueError')
    found = [
        (p.name, s)
        for p in folder.rglob('*')
        if p.is_file()
        for s in [*planted, 'sk-' + 'q7Zk' * 6]
        if s in p.read_text(errors='replace')
    ]
    assert found == []
    assert '***' in (folder / 'log.txt').read_text()


# ---- done again ----------------------------------------------------------------------------------

CHANGES = (
    [('config', f'steps={n}') for n in (4, 5, 7, 8, 9)]
    + [('config', 'saves=k2_other'), ('env', 'system')]
    + [('config', f'seed={n}') for n in (1, 2, 3, 4)]
    + [('data', text) for text in ('1', '2', '5', '77', '-3', '12 ')]
    + [('code', n) for n in (1, 2, 3, 4, 5)]
    + [('package', p) for p in ('torch', 'trl', 'numpy', 'new_one')]
    + [('environment', k) for k in ('TZ', 'MKL_NUM_THREADS', 'PYTHONHASHSEED', 'LC_ALL')]
)


def alter(lab, monkeypatch, kind: str, what):
    "Change one input of the toy stage."
    if kind == 'data':
        lab.write('zero.txt', what)
    if kind == 'code':
        lab.write('toylab/train_toy.py', STAGE.replace('value*31', f'value*{31 + what}'))
    if kind == 'package':
        site = lab.root / 'site' / f'{what}-9.9.dist-info'
        site.mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv('PYTHONPATH', f"{site.parent}{os.pathsep}{os.environ['PYTHONPATH']}")
    if kind == 'environment':
        monkeypatch.setenv(what, {'TZ': 'Asia/Tokyo', 'LC_ALL': 'C'}.get(what, '3'))
    if kind == 'env':
        lab.write('configs/env.yaml', 'models: {zero: ./zero.txt}\nsystem: You are another.\n')


def first_difference(lab, monkeypatch, kind: str, what, original: Path) -> str:
    "The kind of the first input that differs, when a run is done again (or, for what it was told, done beside it)."
    alter(lab, monkeypatch, kind, what)
    if kind in ('config', 'env'):
        told = dict([str(what).split('=')]) if kind == 'config' else {}
        other = execute('train_toy', campaign='beside', changes=told)
        found = input_differences(read_run(original), read_run(other))
    else:
        found = reproduce(original).inputs
    return found[0][0] if found else ''


def test_the_first_input_that_differs_is_named(lab, monkeypatch):
    lab.stage(20, 'train_toy', 'saves: k2_toy\n', cells=CELLS, module=STAGE)
    env = (lab.root / 'configs/env.yaml').read_text()
    original = execute('train_toy', campaign='first')
    right, chosen = 0, CHANGES if FULL else random.Random(5).sample(CHANGES, 5)
    for kind, what in chosen:
        with monkeypatch.context() as patch:
            right += first_difference(lab, patch, kind, what, original) == kind
        lab.write('zero.txt', '0')
        lab.write('toylab/train_toy.py', STAGE)
        lab.write('configs/env.yaml', env)
        shutil.rmtree(lab.root / 'site', ignore_errors=True)
    print(f'\nseeded differences: {len(chosen)}, named right {right}')
    assert right >= len(chosen) - (1 if FULL else 0)


REPEATED = [
    ('train_continual_pretrain', []),
    ('train_sft_domain', []),
    ('train_sft_reasoning', []),
    ('distill_to_student', []),
    ('prepare_corpus', ['mode=domain']),
    ('prepare_corpus', ['mode=reasoning']),
    ('train_sft_domain', ['seed=1']),
    ('train_sft_reasoning', ['seed=1']),
    ('distill_to_student', ['seed=1']),
    ('train_sft_domain', ['trainer.num_train_epochs=2']),
    ('sample_teacher', ['mode=preferences']),
    ('sample_teacher', ['mode=distill']),
    ('run_dpo_reasoning', []),
    ('evaluate', []),
    ('train_sft_domain', ['trainer.gradient_accumulation_steps=2']),
    ('train_sft_domain', ['load={lora_rank: 4, adapt: [attention, shared]}']),
    ('run_dpo_reasoning', ['seed=1']),
    ('train_continual_pretrain', ['seed=1']),
    ('prepare_corpus', ['seed=1']),
    ('distill_to_student', ['trainer.max_steps=6']),
]


def test_recorded_runs_come_out_the_same_again(tmp_path, monkeypatch):
    monkeypatch.setenv('K2LAB_LAB_RUNS_PATH', str(tmp_path))
    chosen, same = REPEATED if FULL else REPEATED[1:2], 0
    for i, (stage, words) in enumerate(chosen):
        folder = execute(stage, 'smoke', f's{i}', dict(w.split('=', 1) for w in words))
        record = read_run(folder)
        assert record['status'] == 'complete', (stage, words, record['reason'])
        new = reproduce(folder)
        same += not new.results and not new.inputs and new.record['status'] == 'complete'
        if new.results or new.inputs:
            print(stage, words, new.results[:2], new.inputs[:2])
    print(f'\ndone again: {len(chosen)}, bit-identical {same}')
    assert same == len(chosen)
