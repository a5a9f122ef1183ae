"""What a pipeline does again and what it skips, which run is the newest, and one pipeline at a time."""

import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from k2lab.cli import main
from k2lab.cli.steps import alone, plan_of, steps_of
from k2lab.lab import records
from k2lab.lab.config import LabError
from k2lab.lab.inputs import WITNESS
from k2lab.lab.job import start
from k2lab.lab.locks import lock
from k2lab.lab.records import (
    amend,
    find_run,
    iso_time,
    new_folder,
    read_record,
    read_run,
    runs,
    saved_by,
    start_time,
)
from k2lab.lab.reproduce import kernel_here, prepare_again

PIPELINE = 'steps: [{stage: train_toy, changes: {steps: 4}}, {stage: train_more}]'


@pytest.fixture
def two(lab):
    "The toy lab with a pipeline of `train_toy` and `train_more`, which reads what the first one left."
    lab.stage(30, 'train_more', 'init_from: k2_toy\nsaves: k2_more\n')
    lab.write('configs/pipeline.yaml', PIPELINE)
    return lab


FINISHED = {}  # the lab of `done`, made once and copied


@pytest.fixture
def done(two, tmp_path_factory):
    "The same lab after its pipeline; `train_toy` imports a module, and there are files that nobody reads."
    if 'lab' not in FINISHED:
        finish(two)
        FINISHED['lab'] = tmp_path_factory.mktemp('finished')
        shutil.copytree(two.root, FINISHED['lab'], dirs_exist_ok=True)
    shutil.copytree(FINISHED['lab'], two.root, dirs_exist_ok=True)
    kernel_here.cache_clear()
    yield two
    kernel_here.cache_clear()


def finish(lab):
    "Give a lab more files, and run its two stages."
    edit(lab.root / 'toylab/train_toy.py', '\n', '\nimport toylab.adding\n')
    edit(lab.root / 'configs/env.yaml', 'zero.txt', 'zero.txt, two: ./two.txt')
    edit(lab.root / 'configs/train_toy.yaml', 'scales', 'trainer: {rows: ./rows.*}\nscales')
    lab.write('rows.txt', 'a row')
    lab.write('toylab/adding.py', 'one = 1\n')
    lab.write('toylab/other.py', 'two = 2\n')
    for name in ('two', 'six'):
        lab.write(f'{name}.txt', '2')
    by_hand('train_toy', steps=4)
    by_hand('train_more')


def by_hand(stage: str, **changes) -> Path:
    "The folder of a run of the campaign `c`, made in this process with the code as it is now."
    from k2lab.lab.job import stage_module

    for name in [m for m in sys.modules if m.split('.')[0] == 'toylab']:
        del sys.modules[name]
    importlib.invalidate_caches()
    WITNESS.tops.add('toylab')  # this process began before there was a lab
    job = start(stage, 'smoke', None, changes, 'c')
    stage_module(stage).train(job)
    job.finish()
    return job.folder


# ---- the newest run ------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    "A function that sets the clock of the records."

    def set_to(now: datetime):
        frozen = type('Frozen', (datetime,), {'now': classmethod(lambda cls, zone=None: now)})
        monkeypatch.setattr(records, 'datetime', frozen)

    return set_to


def test_the_newest_run_is_told_by_utc_and_not_by_the_day_in_its_name(lab):
    first, second = by_hand('train_toy', steps=2), by_hand('train_toy', steps=7)
    first.rename(first.with_name('2026-11-27.9-train_toy'))  # as under TZ=Pacific/Kiritimati
    second.rename(second.with_name('2026-11-25.1-train_toy'))  # as under TZ=Pacific/Pago_Pago
    assert [r['config']['steps'] for r in runs('c')] == [2, 7]
    assert saved_by(lab.runs / 'c', 'k2_toy', 'smoke').name == '2026-11-25.1-train_toy'


def test_folders_are_named_by_the_day_in_utc(lab, monkeypatch):
    for zone in ('Pacific/Kiritimati', 'Pacific/Pago_Pago'):
        monkeypatch.setenv('TZ', zone)
        time.tzset()
        before = datetime.now(timezone.utc)
        day = new_folder('train_toy', 'c').name[:10]
        assert day in {f'{t:%Y-%m-%d}' for t in (before, datetime.now(timezone.utc))}
    monkeypatch.undo()
    time.tzset()


def test_a_clock_that_was_set_back_does_not_make_a_run_older(two, clock):
    first = by_hand('train_toy', steps=2)
    began = records.started_at(read_run(first))
    clock(began - timedelta(days=400))
    second = by_hand('train_toy', steps=7)
    third = by_hand('train_more')
    assert [r['config']['steps'] for r in runs('c')] == [2, 7, 3]
    assert read_run(third)['parents'][0]['run'] == second.name
    assert 'clock' not in read_run(first)
    told = read_run(second)['clock']
    assert first.name in told and str(began.year - 2 if began.month < 2 else began.year - 1) in told


@pytest.mark.parametrize(
    ('started', 'later'),
    [
        ('2026-11-26T10:00:00+00:00', True),  # whole seconds, as earlier versions wrote
        ('2026-11-26T10:00:00', True),  # no zone: UTC
        ('2026-11-26T23:59:59.999999+14:00', True),
        ('2026-11-26T01:30:00.5-11:00', False),
        ('yesterday', True),  # then the folder's day counts
        (None, True),
    ],
)
def test_any_time_that_a_record_may_hold_is_compared_in_utc(started, later):
    old = {'folder': 'runs/c/2026-11-26.1-train_toy', 'started': started}
    noon = datetime(2026, 11, 26, 12, tzinfo=timezone.utc)
    made = start_time([old], noon)
    assert ('clock' not in made) is later
    assert (made['started'] == iso_time(noon)) is later
    assert records.started_at(old | made) > records.started_at(old)


def test_a_record_that_cannot_be_read_is_no_reason_to_read_an_older_run(lab):
    by_hand('train_toy')
    damaged = by_hand('train_toy', steps=7)
    (damaged / 'run.json').write_text('{"status": "comp')
    with pytest.raises(LabError, match='damaged'):
        saved_by(lab.runs / 'c', 'k2_toy', 'smoke')


def test_a_run_that_was_renamed_keeps_its_place_and_a_campaign_its_runs(two, capsys):
    first = by_hand('train_toy', steps=2)
    by_hand('train_toy', steps=7)
    first.rename(first.with_name('my-best'))
    assert [Path(r['folder']).name[:7] for r in runs('c')] == ['my-best', f'{datetime.now():%Y-%m}']
    (two.runs / 'c').rename(two.runs / 'd')
    assert main(['runs', 'd']) == 0
    assert 'd (was c)' in capsys.readouterr().out
    assert find_run('my-best') == two.runs / 'd' / 'my-best'
    assert saved_by(two.runs / 'd', 'k2_toy', 'smoke')


def test_a_run_whose_parent_and_campaign_were_renamed_can_be_done_again(two):
    parent, child = by_hand('train_toy'), by_hand('train_more')
    parent.rename(parent.with_name('my-best'))
    (two.runs / 'c').rename(two.runs / 'd')
    again = prepare_again(two.runs / 'd' / child.name)
    job = start('train_more', run=str(again.folder.relative_to(two.root)))
    assert job.find('k2_toy') == two.runs / 'd/my-best/k2_toy.txt'
    job.held.close()


# ---- one pipeline at a time ----------------------------------------------------------------------

WAIT = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
from k2lab.cli.steps import alone, plan_of, reason, steps_of
with alone(Path(sys.argv[1])):
    print('mine', flush=True)
    sys.stdin.read()
"""


def waiting(home: Path) -> subprocess.Popen:
    "A process that owns the campaign folder `home` until its standard input ends, and says when."
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen([sys.executable, '-c', WAIT, str(home)], text=True, **pipes)


def test_the_second_pipeline_waits_says_for_whom_and_goes_on_when_the_first_is_killed(lab):
    first = waiting(lab.runs / 'c')
    assert first.stdout.readline() == 'mine\n'
    second = waiting(lab.runs / 'c')
    host = os.uname().nodename
    line = second.stderr.readline()
    assert line == (
        f'campaign c: waiting for the pipeline of process {first.pid} on {host}; Ctrl-C gives up\n'
    )
    first.kill()
    first.wait()
    assert second.stdout.readline() == 'mine\n'
    second.communicate('')
    assert second.returncode == 0 and lock(lab.runs / 'c')


def test_ctrl_c_ends_the_waiting(lab):
    with alone(lab.runs / 'c'):
        second = waiting(lab.runs / 'c')
        assert 'waiting for the pipeline' in second.stderr.readline()
        second.send_signal(signal.SIGINT)
        second.communicate(timeout=20)
        assert second.returncode != 0


def test_pipelines_in_two_campaigns_do_not_wait(lab):
    with alone(lab.runs / 'c'), alone(lab.runs / 'd'):
        assert not lock(lab.runs / 'c') and not lock(lab.runs / 'd')


def test_a_mistake_is_refused_before_the_campaign_is_owned(two, capsys):
    with pytest.raises(LabError, match="campaign '../x'"):
        main(['pipeline', '--campaign', '../x'])
    with pytest.raises(LabError, match='unknown scale'):
        main(['pipeline', '--campaign', 'c', '--scale', 'small'])
    assert not two.runs.exists()


# ---- what runs again -----------------------------------------------------------------------------


def planned(lab) -> list[str]:
    "What the pipeline would say about its two steps in the campaign `c`: the reasons to run, or nothing."
    return [', '.join(plan_of(step, 'smoke', 'c').why) for step in steps_of(None, None)]


def edit(path: Path, old: str, new: str):
    "Replace some text in a file, once and for certain."
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def flip(path: Path, rng):
    "Flip one bit of a file; its size stays."
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def run_of(lab, stage: str) -> Path:
    return next(Path(r['folder']) for r in reversed(runs('c')) if r['stage'] == stage)


def edit_notebook(lab, rng, where: str):
    "Change a cell of the run half, put one in, take one out, or swap two."
    path = lab.root / 'nbs/20_train_toy.ipynb'
    book = json.loads(path.read_text())
    at = rng.randrange(3, len(book['cells']))
    cell = book['cells'][at]
    if where == 'text':
        cell['source'] += rng.choice(['\n', ' # again', '\nx = 1'])
    elif where == 'put':
        book['cells'].insert(at, cell | {'id': 'new', 'source': 'x = 1'})
    elif where == 'take':
        del book['cells'][at]
    else:
        book['cells'][at - 1], book['cells'][at] = cell, book['cells'][at - 1]
    path.write_text(json.dumps(book))


def edit_code(lab, rng, name: str):
    "Change a random line of a module by a comment."
    path = lab.root / 'toylab' / name
    lines = path.read_text().splitlines()
    at = rng.randrange(len(lines) + 1)
    lines.insert(at, f'# {rng.random()}')
    path.write_text('\n'.join(lines))


def other_package(lab, rng):
    "A package of another version, a new one, or one less, as the kernel sees them."
    packages = kernel_here()['package']
    name = rng.choice(sorted(packages))
    packages |= {name: '0.0.1'} if rng.random() < 0.5 else {f'new-{name}': '1.0'}


def earlier_version(lab, rng):
    "A record of an earlier version, which knows nothing of inputs."
    folder = run_of(lab, 'train_toy')
    record = {k: v for k, v in read_record(folder).items() if k not in ('inputs', 'seals')}
    (folder / 'run.json').write_text(json.dumps(record))


ENV = 'configs/env.yaml'
TOY = 'configs/train_toy.yaml'
# what is done, and what the first and the second step say then; the second one reads what the first one left
CHANGES = {
    'a cell': (lambda lab, rng: edit_notebook(lab, rng, 'text'), 'notebook', ''),
    'a new cell': (lambda lab, rng: edit_notebook(lab, rng, 'put'), 'notebook', ''),
    'a cell less': (lambda lab, rng: edit_notebook(lab, rng, 'take'), 'notebook', ''),
    'cells swapped': (lambda lab, rng: edit_notebook(lab, rng, 'swap'), 'notebook', ''),
    'the stage': (lambda lab, rng: edit_code(lab, rng, 'train_toy.py'), 'code train_toy.py', ''),
    'the second': (lambda lab, rng: edit_code(lab, rng, 'train_more.py'), '', 'code train_more.py'),
    'a helper': (lambda lab, rng: edit_code(lab, rng, 'adding.py'), 'code adding.py', ''),
    'package': (lambda lab, rng: edit_code(lab, rng, '__init__.py'), *2 * ('code __init__.py',)),
    'a module less': (
        lambda lab, rng: (lab.root / 'toylab/adding.py').unlink(),
        'code adding.py',
        '',
    ),
    'data': (lambda lab, rng: lab.write('zero.txt', str(rng.randrange(1, 10))), 'data zero', ''),
    'a file that the configuration names': (
        lambda lab, rng: lab.write(rng.choice(['rows.txt', 'rows.jsonl']), 'b row'),
        'data ./rows.*',
        '',
    ),
    'data gone': (lambda lab, rng: (lab.root / 'zero.txt').unlink(), 'data zero', ''),
    'other data': (
        lambda lab, rng: edit(lab.root / ENV, './zero.txt', f'./{rng.choice(["two", "six"])}.txt'),
        'data zero, env.yaml: models.zero',
        '',
    ),
    'system': (
        lambda lab, rng: edit(lab.root / ENV, 'models:', f'system: {rng.random()}\nmodels:'),
        *2 * ('env.yaml: system',),
    ),
    'the address': (
        lambda lab, rng: edit(lab.root / ENV, 'K2LAB', f'K{rng.randrange(9)}'),
        *2 * ('env.yaml: endpoint.key_env',),
    ),
    'config': (
        lambda lab, rng: edit(lab.root / TOY, 'k2_toy', 'k2_toy\nhow: fine'),
        'config how',
        '',
    ),
    'scale': (
        lambda lab, rng: edit(lab.root / TOY, 'steps: 2', 'steps: 2, seed: 7'),
        'config seed',
        '',
    ),
    'the pipeline': (
        lambda lab, rng: edit(lab.root / 'configs/pipeline.yaml', '4', str(rng.randrange(5, 99))),
        'config steps',
        '',
    ),
    'packages': (other_package, *2 * ('package',)),
    'python': (
        lambda lab, rng: kernel_here()['interpreter'].update(version='3.99'),
        *2 * ('interpreter version',),
    ),
    'a bit': (
        lambda lab, rng: flip(run_of(lab, 'train_toy') / 'k2_toy.txt', rng),
        'k2_toy: k2_toy.txt was changed',
        'data k2_toy',
    ),
    'a longer file': (
        lambda lab, rng: (run_of(lab, 'train_more') / 'k2_more.txt').write_text('700'),
        '',
        'k2_more: k2_more.txt has 3 bytes',
    ),
    'a manifest less': (
        lambda lab, rng: (run_of(lab, 'train_more') / 'k2_more.MANIFEST.json').unlink(),
        '',
        'k2_more has no manifest',
    ),
    'a file less': (
        lambda lab, rng: (run_of(lab, 'train_more') / 'k2_more.txt').unlink(),
        '',
        'k2_more: k2_more.txt is missing',
    ),
    'another parent': (
        lambda lab, rng: by_hand('train_toy', steps=rng.randrange(5, 99)),
        '',
        'data k2_toy',
    ),
    'by hand': (
        lambda lab, rng: edit(
            run_of(lab, 'train_toy') / 'run.json', '"seed": 0', f'"seed": {rng.randrange(1, 9)}'
        ),
        'record edited by hand',
        'data k2_toy',
    ),
    'earlier': (earlier_version, 'inputs: not recorded', ''),
}


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('change', CHANGES)
def test_what_changed_runs_again_and_says_why(done, change, seed):
    assert planned(done) == ['', '']
    do, *expected = CHANGES[change]
    do(done, random.Random(seed))
    for said, start_of in zip(planned(done), expected):
        assert said.startswith(start_of) and bool(said) is bool(start_of), (said, start_of)


def rewrite(lab):
    "Every file of the lab again, with the same bytes, a new inode and another time."
    for path in [p for p in lab.root.rglob('*') if p.is_file()]:
        copy = path.with_name(f'{path.name}.copy')
        copy.write_bytes(path.read_bytes())
        os.utime(copy, (1e9, 1e9))
        copy.replace(path)


def tell_more(lab):
    "Other words, cells and outputs in the half of the notebook that is not executed, or is not code."
    path = lab.root / 'nbs/20_train_toy.ipynb'
    book = json.loads(path.read_text())
    book['cells'][0]['source'] = '# Another title'
    book['cells'][1]['source'] = '1 / 0'
    book['cells'][3] |= {
        'id': 'other',
        'execution_count': 7,
        'outputs': [{'output_type': 'stream', 'name': 'stdout', 'text': 'x'}],
    }
    book['cells'].append(
        {'cell_type': 'markdown', 'id': 'm', 'metadata': {}, 'source': 'That was it.'}
    )
    path.write_text(json.dumps(book, indent=3))


def failed(lab):
    with pytest.raises(LabError):
        by_hand('train_toy', steps=4, how='fail')


SAME = {
    'nothing': lambda lab: None,
    'the same bytes': rewrite,
    'words': tell_more,
    'another name': lambda lab: edit(lab.root / ENV, 'zero: ', 'one: ./one.txt, zero: '),
    'the place of another name': lambda lab: edit(lab.root / ENV, './two.txt', './six.txt'),
    'a comment': lambda lab: edit(lab.root / ENV, 'models:', '# models by name\nmodels:'),
    'the order of keys': lambda lab: (
        edit(lab.root / TOY, 'saves: k2_toy\n', '')
        or edit(lab.root / TOY, 'scales', 'saves: "k2_toy"\nscales')
    ),
    'a module that nobody imports': lambda lab: lab.write('toylab/other.py', 'two = 3'),
    'a new module': lambda lab: lab.write('toylab/more.py', 'two = 3'),
    'a file that nobody reads': lambda lab: lab.write('two.txt', '3'),
    'a new stage': lambda lab: lab.stage(40, 'train_most'),
    'no bytecode': lambda lab: shutil.rmtree(lab.root / 'toylab/__pycache__', ignore_errors=True),
    'another host': lambda lab: kernel_here()['host'].update(name='elsewhere', cores=99),
    'an accelerator': lambda lab: kernel_here()['accelerator'].update(devices=['H100']),
    'threads': lambda lab: kernel_here()['environment'].update(OMP_NUM_THREADS='99'),
    'a run with another name': lambda lab: run_of(lab, 'train_toy').rename(lab.runs / 'c/my-best'),
    'both with another name': lambda lab: [
        run_of(lab, s).rename(lab.runs / 'c' / s) for s in ('train_toy', 'train_more')
    ],
    'a run that saves something else': lambda lab: by_hand('train_toy', steps=9, saves='k2_other'),
    'a run that failed': failed,
    'a run of another campaign': lambda lab: start('train_toy', 'smoke', None, {}, 'd').finish(),
    'the same run again': lambda lab: by_hand('train_toy', steps=4),
    'a tag': lambda lab: amend(run_of(lab, 'train_toy'), tags=['best']),
}


@pytest.mark.parametrize('same', SAME)
def test_what_did_not_change_is_skipped(done, same):
    SAME[same](done)
    assert planned(done) == ['', '']
    assert [plan_of(step, 'smoke', 'c').done for step in steps_of(None, None)] == [True, True]


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture
def pipeline(two, capfd):
    "A function that runs `k2lab pipeline` in the campaign `c`: what was said of each step, how many runs were made."

    def run(*words: str) -> tuple[list[str], int]:
        before = len(runs('c'))
        assert main(['pipeline', '--campaign', 'c', *words]) == 0
        said = capfd.readouterr()
        lines = [x for x in (said.err + said.out).splitlines() if x[:5] in ('[1/2]', '[2/2]')]
        told = ('runs again', 'already', 'accepted', 'would', 'resumes')
        return [x for x in lines if any(word in x for word in told)], len(runs('c')) - before

    return run


@pytest.mark.slow
def test_a_dozen_changes_through_the_command(two, pipeline):
    def changed(do, *expected: str, words: tuple = ()):
        "After a change the steps say this; a step that runs again makes one run, and then all are skipped."
        do()
        said, made = pipeline(*words)
        assert len(said) == 2 and all(a in b for a, b in zip(expected, said)), (expected, said)
        assert made == sum('runs again' in line for line in said)

    code, root, again = two.root / 'toylab', two.root, 'runs again: '
    assert pipeline() == ([], 2)
    changed(lambda: None, 'already, in', 'already, in')
    changed(
        lambda: edit(code / 'train_toy.py', 'value =', 'value  ='),
        again + 'code train_toy.py',
        'already',
    )
    changed(
        lambda: edit(code / 'train_more.py', 'value =', 'value  ='),
        'already',
        again + 'code train_more.py',
    )
    changed(lambda: edit_notebook(two, random.Random(0), 'put'), again + 'notebook', 'already')
    changed(lambda: two.write('zero.txt', '5'), again + 'data zero', again + 'data k2_toy')
    changed(
        lambda: two.write('five.txt', '5') or edit(root / ENV, 'zero.txt', 'five.txt'),
        again + 'data zero, env.yaml: models.zero',
        'already',
    )
    changed(
        lambda: edit(root / ENV, 'models', 'system: Be brief.\nmodels'),
        again + 'env.yaml: system',
        again + 'env.yaml: system',
    )
    changed(
        lambda: two.write(
            'configs/train_more.yaml', 'init_from: k2_toy\nsaves: k2_more\nsteps: 6\n'
        ),
        'already',
        again + 'config steps',
    )
    changed(
        lambda: flip(run_of(two, 'train_toy') / 'k2_toy.txt', random.Random(1)),
        again + 'k2_toy: k2_toy.txt was changed',
        'already',
    )
    changed(
        lambda: (run_of(two, 'train_more') / 'k2_more.txt').unlink(),
        'already',
        again + 'k2_more: k2_more.txt is missing',
    )
    changed(lambda: earlier_version(two, None), again + 'inputs: not recorded', 'already')
    stale = lambda: edit(code / 'train_toy.py', 'value  =', 'value =')
    changed(stale, 'accepted as it is, in', 'already', words=('--accept-stale', 'train_toy'))
    changed(lambda: None, 'would run again: code train_toy.py', 'unless', words=('--dry-run',))
    changed(lambda: None, again + 'code train_toy.py', 'already')
    changed(
        lambda: run_of(two, 'train_toy').rename(two.runs / 'c/my-best'),
        'already, in my-best',
        'already',
    )
    changed(lambda: None, 'already', 'already')
