"""kill -9 at seeded moments of a run: never a false `complete`, never an unreadable record, nothing left alive, and a resume that ends where the uninterrupted run does.

`make test` does the quick part; `make test-faults` all of it (K2LAB_FAULTS=full)."""
import os, random, signal, subprocess, sys, time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil, pytest

from k2lab.again import results
from k2lab.checkpoint import MANIFEST
from k2lab.job import read_run

FULL = os.environ.get('K2LAB_FAULTS') == 'full'
PHASES = ('start', 'data', 'step', 'save', 'evaluate', 'write', 'finish')
VICTIMS = ('runner', 'kernel', 'trainer')

STAGE = '''
import time
from dataclasses import dataclass, field
from k2lab.checkpoint import newest, seal, step_of
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
    seal(place, {'value': value})
def train(job):
    value = first = int(job.find(job.cfg.init_from).read_text())
    time.sleep(.1)
    place, state = newest(job.folder/'trainer/train')
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
CELLS = ["job = start('{stage}', scale, run, changes)", 'launch(train, job)', 'job.curve()', 'job.metrics()', 'job.finish(); import time; time.sleep(.2)']


def start_run(words:list, tag:str='') -> subprocess.Popen:
    "A started `k2lab words`, silent; whatever it starts carries `tag` in its environment."
    return subprocess.Popen([sys.executable, '-m', 'k2lab', *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
                            env={**os.environ, 'K2LAB_FAULT_TAG': tag, 'OMP_NUM_THREADS': '1'})


def carrying(tag:str) -> list:
    "Living processes with this tag."
    found = []
    for p in psutil.process_iter():
        try:
            if p.status() != psutil.STATUS_ZOMBIE and p.environ().get('K2LAB_FAULT_TAG') == tag: found.append(p)
        except psutil.Error: pass
    return found


def reached(folder:Path, phase:str) -> bool:
    "Whether a run is at (or past) a phase, as its folder shows."
    if not (folder/'run.json').exists(): return False
    record = read_run(folder)
    if phase == 'start': return True
    if phase == 'data': return record['status'] != 'prepared'
    if phase == 'step': return (folder/'metrics.jsonl').exists() and b'"step"' in (folder/'metrics.jsonl').read_bytes()
    if phase == 'save': return any(not (p/MANIFEST).exists() for p in folder.glob('trainer/train/checkpoint-*')) or bool(record.get('training'))
    if phase == 'evaluate': return bool(record['metrics'])
    if phase == 'write': return bool(list(folder.glob('.k2_*.part'))) or bool(record['saves'])
    return bool(record.get('closed'))


def victim_of(proc, folder:Path, victim:str):
    "The pid to kill: the runner, its kernel, or one of the kernel's training processes (the kernel itself where it trains)."
    if victim == 'runner': return proc.pid
    children = psutil.Process(proc.pid).children(recursive=True)
    said = {c: ' '.join(c.cmdline()) for c in children}
    kernels = [c for c in children if 'ipykernel' in said[c]]
    workers = [c for c in children if 'k2lab work' in said[c] and 'accelerate' not in said[c]]
    chosen = workers[:1] if victim == 'trainer' and workers else kernels[:1]
    return chosen[0].pid if chosen else None


def kill_once(runs:Path, words:list, phase:str, victim:str, delay:float) -> dict:
    "Start a run in the campaign folder `runs`, kill the victim some time into a phase, look at what is left, resume; `{what was found: number}`."
    tag = f'{runs}'
    proc = start_run([*words, '--campaign', runs.name], tag)
    folder, pid, end = None, None, time.monotonic() + 90
    while proc.poll() is None and pid is None and time.monotonic() < end:
        folder = next(iter(runs.glob('*-*-*.*')), None) if runs.exists() else None
        try: pid = victim_of(proc, folder, victim) if folder and reached(folder, phase) else None
        except psutil.Error: pid = None
        if pid is None: time.sleep(.002)
    time.sleep(delay)
    try: os.kill(pid, signal.SIGKILL) if pid else None
    except ProcessLookupError: pid = None
    gone = time.monotonic() + 10
    if victim == 'runner' and pid: proc.wait()
    else: proc.wait(30)
    while (left := carrying(tag)) and time.monotonic() < gone: time.sleep(.05)
    return dict(killed=int(pid is not None), left=len(left), **after(folder))


def after(folder:Path) -> dict:
    "The record after a kill and after the resume."
    try: status = read_run(folder)['status']
    except Exception: return dict(unreadable=1, status='unreadable')
    if status == 'complete': return dict(unreadable=0, status=status, result=results(read_run(folder)), resumed=0)
    code = start_run(['resume', str(folder)]).wait(120)
    record = read_run(folder)
    return dict(unreadable=0, status=status, result=results(record) if record['status'] == 'complete' else None, resumed=int(code == 0))


def points(n:int, seed:int) -> list:
    "n `(phase, victim, seconds into the phase)`, every phase and victim about equally often."
    rng = random.Random(seed)
    every = [(p, v) for p in PHASES for v in VICTIMS]
    rng.shuffle(every)
    return [(*every[i % len(every)], rng.uniform(0, .06)) for i in range(n)]


def kill_many(home:Path, words:list, n:int, seed:int) -> list:
    "What `n` kills at seeded points found, two runs at a time."
    with ThreadPoolExecutor(2) as pool: return list(pool.map(lambda ip: kill_once(home/f'k{ip[0]}', words, *ip[1]), enumerate(points(n, seed))))


def verdict(found:list, want:dict) -> Counter:
    "What the kills came to."
    count = Counter(kills=len(found))
    for f in found:
        count['landed'] += f['killed']; count['left alive'] += f['left']; count['unreadable'] += f['unreadable']
        count['false complete'] += f['status'] == 'complete' and f['result'] != want
        count['resumed'] += f.get('resumed', 0)
        count['same result'] += f.get('result') == want
        count[f"was {f['status']}"] += 1
    return count


def check(count:Counter, name:str):
    "The promise, and the counts in sight."
    print(f'\n{name}: ' + ', '.join(f'{v} {k}' for k, v in count.items()))
    assert (count['false complete'], count['unreadable'], count['left alive']) == (0, 0, 0)
    assert count['same result'] == count['kills']
    assert count['landed'] >= .9*count['kills']


@pytest.mark.parametrize('processes, kills', [(1, 150 if FULL else 24), (2, 14 if FULL else 3)])
def test_killed_runs_of_a_small_stage(lab, processes, kills):
    lab.stage(20, 'train_toy', 'saves: k2_toy\n', cells=CELLS, module=STAGE)
    lab.write('configs/accelerate/cpu.yaml', (Path(__file__).parent.parent/'configs/accelerate/cpu.yaml').read_text())
    words = ['train_toy', f'processes={processes}']
    assert start_run([*words, '--campaign', 'whole']).wait(120) == 0
    want = results(read_run(next((lab.runs/'whole').iterdir())))
    check(verdict(kill_many(lab.runs, words, kills, processes), want), f'{processes} process(es)')


def test_killed_runs_of_real_training(tmp_path, monkeypatch):
    monkeypatch.setenv('K2LAB_LAB_RUNS_PATH', str(tmp_path))
    words = ['train_sft_domain', '--scale', 'smoke', 'trainer.save_steps=2', 'trainer.max_steps=8', 'trainer.num_train_epochs=4']
    assert start_run([*words, '--campaign', 'whole']).wait(180) == 0
    want = results(read_run(next((tmp_path/'whole').iterdir())))
    check(verdict(kill_many(tmp_path, words, 36 if FULL else 3, 7), want), 'real training')
