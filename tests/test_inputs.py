"""What a run read is what its record says: changes of inputs are named or refused, and code.diff brings code back."""

import dataclasses
import hashlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from k2lab.lab import files, provenance, reproduce as again
from k2lab.lab.config import LabError
from k2lab.lab.files import check_published, read_sha256, sha256
from k2lab.lab.inputs import KINDS, WITNESS, compare, executed_cells, inputs_of, run_half_sha256
from k2lab.lab.job import config_of, prepare, start
from k2lab.lab.provenance import code_state
from k2lab.lab.records import read_run
from k2lab.lab.reproduce import input_differences, verdict
from k2lab.lab.runner import execute

LESSON_CELL, PARAMETERS, WORK = 1, 2, 5  # places in the notebook of the toy lab


def notebook_of(lab) -> Path:
    return lab.root / 'nbs/20_train_toy.ipynb'


def edit_notebook(lab, edit):
    "Apply `edit` to the list of the stage notebook's cells."
    nb = json.loads(notebook_of(lab).read_text())
    edit(nb['cells'])
    notebook_of(lab).write_text(json.dumps(nb))


def edit_text(path: Path, old: str, new: str):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def edit_stage(lab, old: str = 'as told', new: str = 'as told once'):
    edit_text(lab.root / 'toylab/train_toy.py', old, new)


def edit_yaml(path: Path, **values):
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | values))


def install(lab, *names):
    "Let these distributions, such as `numpy-0.0.1`, be the first on the path."
    for name in names:
        (lab.root / 'site' / f'{name}.dist-info').mkdir(parents=True, exist_ok=True)


def nvidia(lab, driver: str = '570.1'):
    "A machine with a GPU, as far as nvidia-smi tells."
    tool = lab.root / 'bin/nvidia-smi'
    tool.parent.mkdir(exist_ok=True)
    tool.write_text(f'#!/bin/sh\necho "NVIDIA H100 80GB HBM3, {driver}"\n')
    tool.chmod(0o755)


@pytest.fixture
def toy(lab, monkeypatch):
    "The toy lab with a module beside the package, a folder for packages and one for programs."
    monkeypatch.chdir(lab.root)
    monkeypatch.setattr(WITNESS, 'tops', {*WITNESS.tops, 'toylab', 'beside'})
    for name in ('site', 'bin'):
        (lab.root / name).mkdir()
    monkeypatch.syspath_prepend(str(lab.root / 'site'))
    monkeypatch.setenv('PATH', f"{lab.root / 'bin'}{os.pathsep}{os.environ['PATH']}")
    lab.write('toylab/part.py', 'word = 1\n')
    lab.write('beside.py', 'word = 1\n')
    edit_stage(lab, 'def train(job):', 'import toylab.part, beside\ndef train(job):')
    yield lab
    forget()


def forget():
    "Forget what was imported, as a new kernel does."
    for name in [m for m in sys.modules if m.split('.')[0] in ('toylab', 'beside')]:
        del sys.modules[name]


def run(during=None, changes=None, prepared=None) -> dict:
    "The record of a run by hand; `during` gets the job after the work and before the end."
    forget()
    job = start('train_toy', 'smoke', prepared, changes, campaign=None if prepared else 'c')
    from toylab.train_toy import train

    train(job)
    if during:
        during(job)
    job.finish()
    return read_run(job.folder)


def same_size(path: Path):
    "Change a file so that neither its size nor its time of change tells."
    s = path.stat()
    path.write_bytes(bytes(255 - b for b in path.read_bytes()))
    os.utime(path, ns=(s.st_atime_ns, s.st_mtime_ns))


def cell(lab, at: int, **values):
    edit_notebook(lab, lambda cells: cells[at].update(values))


COPY = dict(cell_type='code', id='x', metadata={}, outputs=[], execution_count=None, source='1')
ENV = 'configs/env.yaml'
IMPORT = 'import toylab.part'
BETWEEN = {  # between two runs: what is done, and the kind and name that must be told
    'a cell inserted': (lambda t: edit_notebook(t, lambda c: c.insert(WORK, COPY)), 'notebook'),
    'a cell changed': (lambda t: cell(t, WORK, source='launch(train, job); 1'), 'notebook'),
    'a cell removed': (lambda t: edit_notebook(t, lambda c: c.pop()), 'notebook'),
    'cells in another order': (lambda t: edit_notebook(t, lambda c: c.reverse()), 'notebook'),
    'a cell tagged': (lambda t: cell(t, WORK, metadata={'tags': ['skip']}), 'notebook'),
    'the stage': (edit_stage, 'code train_toy.py'),
    'a module of the package': (lambda t: t.write('toylab/part.py', 'word = 2'), 'code part.py'),
    'the package itself': (lambda t: t.write('toylab/__init__.py', 'x = 1'), 'code __init__.py'),
    'a module beside the lab': (lambda t: t.write('beside.py', 'word = 2'), 'code beside.py'),
    'a new import': (
        lambda t: (t.write('toylab/more.py', ''), edit_stage(t, IMPORT, IMPORT + ', toylab.more')),
        'code more.py',
    ),
    'the data': (lambda t: t.write('zero.txt', '5'), 'data zero'),
    'the place of the data': (
        lambda t: (t.write('five.txt', '5'), edit_yaml(t.root / ENV, models={'zero': './five.txt'})),
        'env models.zero',
    ),
    'the system prompt': (lambda t: edit_yaml(t.root / ENV, system='You.'), 'env system'),
    'the threads': (lambda t: edit_yaml(t.root / ENV, threads=2), 'env threads'),
    'the endpoint': (lambda t: edit_yaml(t.root / ENV, endpoint={'url': 'x'}), 'env endpoint.url'),
    'a new name': (lambda t: edit_yaml(t.root / ENV, data={'d': './zero.txt'}), 'env data.d'),
    'the stage file': (
        lambda t: t.write('configs/train_toy.yaml', 'saves: k2_toy\nscales: {smoke: {steps: 3}}'),
        'config steps',
    ),
    'a version': (lambda t: install(t, 'numpy-0.0.1'), 'package numpy'),
    'a new package': (lambda t: install(t, 'brand_new-1.0'), 'package brand-new'),
    'an egg': (lambda t: (t.root / 'site/old_one-2.0-py3.11.egg-info').mkdir(), 'package old-one'),
    'a GPU': (nvidia, 'accelerator devices'),
}  # fmt: skip
PATCHED = {
    'the interpreter': ('interpreter', 'version', ('platform.python_version', lambda: '3.99')),
    'the host': ('host', 'name', ('socket.gethostname', lambda: 'node-7')),
    'the cores': ('host', 'cores', ('os.sched_getaffinity', lambda pid: set(range(99)))),
    'the processor': ('host', 'cpu', ('k2lab.lab.provenance.cpu_name', lambda: 'another')),
}
VARIABLES = ('TZ', 'MKL_NUM_THREADS', 'CUDA_VISIBLE_DEVICES', 'PYTHONHASHSEED', 'LC_ALL')
WHILE = {  # while it runs, after the work and before the end
    'the notebook': (lambda t, job: cell(t, WORK, source='2'), 'notebook run half'),
    'the stage': (lambda t, job: edit_stage(t), 'code train_toy.py'),
    'a module beside the lab': (lambda t, job: t.write('beside.py', ''), 'code beside.py'),
    'the data': (lambda t, job: same_size(t.root / 'zero.txt'), 'data zero'),
    'the data removed': (lambda t, job: (t.root / 'zero.txt').unlink(), 'data zero'),
    'a package': (lambda t, job: install(t, 'numpy-0.0.1'), 'package numpy'),
    'the config in memory': (
        lambda t, job: setattr(job, 'cfg', dataclasses.replace(job.cfg, steps=50)),
        'config steps',
    ),
    'the config in the folder': (lambda t, job: edit_yaml(job.folder / 'stage.yaml', steps=9), 'config steps'),
    'the names in the folder': (lambda t, job: edit_yaml(job.folder / 'env.yaml', threads=9), 'env threads'),
}  # fmt: skip
BEFORE = {  # after it was submitted and before it starts
    'the notebook': (lambda t, folder: cell(t, WORK, source='2'), 'notebook run half'),
    'the stage': (lambda t, folder: edit_stage(t), 'code train_toy.py'),
    'the config in the folder': (lambda t, folder: edit_yaml(folder / 'stage.yaml', steps=9), 'config steps'),
    'the names in the folder': (lambda t, folder: edit_yaml(folder / 'env.yaml', threads=9), 'env threads'),
    'a package': (lambda t, folder: install(t, 'numpy-0.0.1'), 'package numpy'),
}  # fmt: skip


def named(found: list[tuple]) -> list[str]:
    return [f'{kind} {name}' for kind, name, *_ in found]


def test_nothing_changed_is_nothing_named(toy):
    first, second = run(), run()
    assert input_differences(first, second) == [] == first['inputs_changed']
    assert list(first['inputs']) == list(KINDS)
    assert set(first['inputs']['code']) >= {'train_toy.py', 'part.py', 'beside.py', 'k2lab/lab/job.py'}  # fmt: skip
    assert None not in first['inputs']['code'].values()
    assert first['python'] == sys.executable and first['git']['dirty'] is None


@pytest.mark.parametrize('what', BETWEEN)
def test_a_change_between_two_runs_is_named(toy, what):
    change, name = BETWEEN[what]
    first = run()
    change(toy)
    found = named(input_differences(first, run()))
    assert any(one.startswith(name) for one in found), found
    assert found[0].split()[0] == name.split()[0] or what == 'the place of the data'


@pytest.mark.parametrize('what', PATCHED)
def test_another_machine_is_named(toy, monkeypatch, what):
    kind, name, patch = PATCHED[what]
    first = run()
    monkeypatch.setattr(*patch)
    assert f'{kind} {name}' in named(input_differences(first, run()))


@pytest.mark.parametrize('name', VARIABLES)
def test_a_variable_is_named(toy, monkeypatch, name):
    first = run()
    monkeypatch.setenv(name, '7')
    assert named(input_differences(first, run())) == [f'environment {name}']


def test_another_driver_is_named(toy):
    nvidia(toy)
    first = run()
    nvidia(toy, '580.2')
    assert input_differences(first, run()) == [('accelerator', 'driver', '570.1', '580.2')]


@pytest.mark.parametrize('what', WHILE)
def test_a_change_while_it_runs_is_named(toy, what):
    change, name = WHILE[what]
    record = run(during=lambda job: change(toy, job))
    found = [(f"{c['kind']} {c['name']}", c['when']) for c in record['inputs_changed']]
    assert found == [(name, 'while it ran')]
    assert name in named(input_differences(record, record))  # two such runs are never the same


def test_files_that_a_stage_opens_in_its_own_way_are_inputs(toy):
    from k2lab.lab.reproduce import stale
    from k2lab.prepare_corpus import Config, content_of

    toy.write('own.jsonl', '{"text": "a"}')
    (toy.root / 'texts').mkdir()
    toy.write('texts/a.txt', 'a')
    config = config_of(Config(sources=[{'files': 'texts/*.txt'}], own_rows=['own.jsonl']))
    own = 'from k2lab.prepare_corpus import reads as reads_of\n'
    own += f'def reads(config):\n    return reads_of({config!r})\n\n\n'
    edit_stage(toy, 'def train(job):', f'{own}def train(job):')
    record = run()
    read = {n: content_of(n) for n in ('texts/*.txt', 'own.jsonl')}
    assert read.items() <= record['inputs']['data'].items()
    data = lambda: [why for why in stale(record) if why.startswith('data')]
    assert not data()
    toy.write('texts/b.txt', 'b')
    assert data() == ['data texts/*.txt']
    changed = run(during=lambda job: toy.write('texts/c.txt', 'c'))
    assert [c['name'] for c in changed['inputs_changed']] == ['texts/*.txt']


@pytest.mark.parametrize('what', BEFORE)
def test_a_change_before_the_start_is_named_and_what_ran_is_recorded(toy, what):
    change, name = BEFORE[what]
    forget()
    folder = prepare('train_toy', 'smoke', 'c').folder
    change(toy, folder)
    record = run(prepared=str(folder))
    assert [(f"{c['kind']} {c['name']}", c['when']) for c in record['inputs_changed']] == [
        (name, 'before start')
    ]
    kind, _, key = name.partition(' ')
    assert record['inputs'][kind][key] == record['inputs_changed'][0]['now']
    assert 'submitted' not in record


@pytest.mark.parametrize(
    'edit',
    [
        lambda cells: cells[LESSON_CELL].update(source='another lesson'),
        lambda cells: cells.insert(WORK, dict(cell_type='markdown', metadata={}, source='why')),
        lambda cells: cells[WORK].update(outputs=['3'], execution_count=4, id='new'),
        lambda cells: cells[WORK].update(source=list(cells[WORK]['source'])),
        lambda cells: cells.insert(3, COPY | dict(metadata={'tags': ['injected-parameters']})),
    ],
)
def test_what_is_not_executed_is_no_input(toy, edit):
    before = run_half_sha256(notebook_of(toy))
    edit_notebook(toy, edit)
    assert run_half_sha256(notebook_of(toy)) == before


@pytest.mark.parametrize('text', ['', '<<<<<<< HEAD\n{}', '[]', '{"cells": []}', '{"cells": [{}]}'])
def test_a_notebook_that_cannot_be_read_is_unknown(toy, text):
    notebook_of(toy).write_text(text)
    assert run_half_sha256(notebook_of(toy)) is None


@pytest.mark.parametrize(
    'ran, same',
    [
        (lambda cells: cells[-4:], True),
        (lambda cells: cells[-4:-1], True),  # stopped before the last one
        (lambda cells: [*cells[-4:-1], 'job.cfg', cells[-1]], False),
        (lambda cells: [cells[-4] + '  # not saved', *cells[-3:]], False),
        (lambda cells: [cells[-4], cells[-2]], False),
    ],
)
def test_cells_that_jupyter_ran_and_did_not_save_are_named(toy, ran, same):
    texts = [text for text, _ in executed_cells(notebook_of(toy))]
    cells = [{'source': text} for text in ran(texts)]
    listening = SimpleNamespace(recorder=SimpleNamespace(cells=cells), begun=0, close=str)
    record = run(during=lambda job: setattr(job, 'cells', listening))
    assert [c['kind'] for c in record['inputs_changed']] == ([] if same else ['notebook'])


def test_code_that_was_edited_after_its_import_is_the_code_that_ran(toy):
    first = run()
    job = start('train_toy', 'smoke', campaign='c')  # in the same kernel, nothing imported anew
    edit_stage(toy)
    job.finish()
    again_here = start('train_toy', 'smoke', campaign='c')
    code = again_here.record['inputs']['code']['train_toy.py']
    assert code == first['inputs']['code']['train_toy.py']
    again_here.finish()
    (change,) = again_here.record['inputs_changed']
    assert (change['when'], change['name'], change['now']) == ('before start', 'train_toy.py', code)


# ---- parents -------------------------------------------------------------------------------------


def flip(path: Path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def add(path: Path):
    (path.parent / 'adapter_model.bin').write_text('more')


def forge(path: Path):
    "Change a file and its manifest together."
    flip(path)
    manifest = path.parents[1] / 'model.MANIFEST.json'
    kept = json.loads(manifest.read_text())
    kept['files']['model/weights']['sha256'] = read_sha256(path)
    manifest.write_text(json.dumps(kept))


PUBLISH = 'with job.publishing(job.cfg.saves'


@pytest.mark.parametrize(
    'damage, why',
    [
        (flip, 'was changed after it was published'),
        (lambda p: (flip(p), os.utime(p, (0, 0))), 'was changed after it was published'),
        (add, 'adapter_model.bin was added after it was published'),
        (forge, 'its manifest was changed after it was published'),
        (lambda p: p.unlink(), 'model/weights is missing'),
    ],
)
def test_a_parent_that_changed_is_refused(toy, damage, why):
    edit_stage(
        toy,
        PUBLISH,
        "with job.publishing('model') as path: path.mkdir(); (path/'weights').write_text('7')\n    "
        + PUBLISH,
    )
    parent = run()
    name = f"model@{Path(parent['folder']).name}"
    job = start('train_toy', 'smoke', campaign='c')
    assert (job.find(name) / 'weights').read_text() == '7'
    assert job.record['inputs']['data'][name] == parent['saves']['model']['sha256']
    damage(Path(parent['folder']) / 'model/weights')
    with pytest.raises(LabError, match=why):
        job.find(name)


@pytest.mark.parametrize('file', ['config.json', 'model.safetensors'])
def test_a_damaged_file_of_the_hub_is_refused(toy, monkeypatch, file):
    repo = toy.root / 'hub/models--org--name'
    folder = repo / 'snapshots' / (40 * 'a')
    folder.mkdir(parents=True)
    (repo / 'blobs').mkdir()
    (repo / 'refs').mkdir()
    (repo / 'refs/main').write_text(40 * 'a')
    small, large = b'{}', b'weights'
    names = {
        'config.json': hashlib.sha1(b'blob 2\0' + small).hexdigest(),
        'model.safetensors': hashlib.sha256(large).hexdigest(),
    }
    for content, (name, blob) in zip((small, large), names.items()):
        (repo / 'blobs' / blob).write_bytes(content)
        (folder / name).symlink_to(repo / 'blobs' / blob)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(toy.root / 'hub'))
    job = start('train_toy', 'smoke', campaign='c')
    assert (
        job.find('org/name') == f"org/name@{40 * 'a'}" == job.record['inputs']['data']['org/name']
    )
    flip(repo / 'blobs' / names[file])
    with pytest.raises(LabError, match=f'{file} was changed after it was fetched'):
        job.find('org/name')


def test_the_hash_of_a_large_file_is_kept_until_the_file_changes(toy, monkeypatch):
    monkeypatch.setattr(files, 'LARGE', 4)
    monkeypatch.setattr(files, 'SETTLED', 0)
    (toy.runs).mkdir(exist_ok=True)
    path, reads = toy.root / 'weights.bin', []
    path.write_text('weights')
    monkeypatch.setattr(files, 'read_sha256', lambda p: reads.append(p) or read_sha256(p))
    want = read_sha256(path)
    assert [sha256(path), sha256(path)] == [want, want] and len(reads) == 1
    time.sleep(0.02)
    same_size(path)
    assert sha256(path) == read_sha256(path) != want
    other = toy.root / 'other.bin'
    path.rename(other)
    path.write_text('weights')
    assert (sha256(path), sha256(other)) == (want, read_sha256(other))


def test_a_file_that_was_just_written_is_read_again(toy, monkeypatch):
    monkeypatch.setattr(files, 'LARGE', 4)
    (toy.runs).mkdir(exist_ok=True)
    (toy.root / 'new.bin').write_text('weights')
    sha256(toy.root / 'new.bin')
    assert not (toy.runs / '.hashes').exists()


def test_many_processes_keep_hashes_at_once(toy):
    (toy.runs).mkdir(exist_ok=True)
    code = (
        'import sys; from pathlib import Path; from k2lab.lab.files import keep_hash\n'
        'for i in range(200): keep_hash(Path("runs/.hashes"), f"[{sys.argv[1]}{i}] ".encode(), sys.argv[1] * 64)'
    )
    workers = [subprocess.Popen([sys.executable, '-c', code, c]) for c in 'abcd']
    assert [w.wait() for w in workers] == [0] * 4
    kept = toy.runs / '.hashes'
    found = [files.look_up(kept, f'[{c}{i}] '.encode()) for c in 'abcd' for i in range(200)]
    assert found == [c * 64 for c in 'abcd' for _ in range(200)]


# ---- the code comes back -------------------------------------------------------------------------


def git(folder: Path, *words) -> str:
    command = ['git', '-C', str(folder), '-c', 'user.name=a', '-c', 'user.email=a@b.c', *words]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, errors='replace'
    ).stdout


@pytest.fixture
def repository(toy):
    "The toy lab as a repository with one commit and an edited stage."
    toy.write('.gitignore', 'runs/\n__pycache__/\nclone/\n')
    git(toy.root, 'init', '-q')
    git(toy.root, 'add', '-A')
    git(toy.root, 'commit', '-qm', 'first')
    edit_stage(toy)
    return toy


def comes_back(lab, *paths, config=()) -> bool:
    "Whether a clone with `code.diff` applied holds the lab's stage and `paths`."
    state, patch = code_state()
    assert state['dirty'] and state['commit'] == git(lab.root, 'rev-parse', 'HEAD').strip()
    clone = lab.root / 'clone'
    git(lab.root, *(w for c in config for w in ('-c', c)), 'clone', '-q', str(lab.root), str(clone))
    for c in config:
        git(clone, 'config', *c.split('='))
    (clone / 'code.diff').write_bytes(patch)
    git(clone, 'apply', 'code.diff')
    names = ('toylab/train_toy.py', *paths)
    return all((clone / n).read_bytes() == (lab.root / n).read_bytes() for n in names)


@pytest.mark.parametrize(
    'setting',
    [
        'color.ui=always',
        'color.diff=always',
        'diff.noprefix=true',
        'diff.mnemonicPrefix=true',
        'diff.external=/bin/true',
        'diff.context=0',
        'diff.interHunkContext=9',
        'diff.renames=copies',
        'diff.relative=true',
        'diff.submodule=log',
        'diff.algorithm=patience',
        'core.quotePath=false',
        'core.safecrlf=true',
        'diff.suppressBlankEmpty=true',
        'diff.wordRegex=.',
    ],
)
def test_code_comes_back_whatever_git_is_told(repository, setting):
    git(repository.root, 'config', *setting.split('=', 1))
    assert comes_back(repository)


@pytest.mark.parametrize('autocrlf', ['true', 'input', 'false'])
def test_code_with_other_line_ends_comes_back(repository, autocrlf):
    git(repository.root, 'config', 'core.autocrlf', autocrlf)
    if autocrlf == 'true':  # what such a checkout holds
        path = repository.root / 'toylab/train_toy.py'
        path.write_bytes(path.read_bytes().replace(b'\n', b'\r\n'))
    assert comes_back(repository, config=[f'core.autocrlf={autocrlf}'])


def test_binary_new_odd_and_removed_files_come_back(repository):
    root = repository.root
    (root / 'toylab/x.bin').write_bytes(b'\0\1\2')
    git(root, 'add', 'toylab/x.bin')
    (root / 'toylab/new mod é.py').write_text('x = 1\n')
    (root / 'toylab/latin.py').write_bytes(b'# caf\xe9\r\nx = 1')
    (root / 'configs/new.yaml').write_text('a: 1')
    (root / 'toylab/part.py').rename(root / 'toylab/moved.py')
    before = (root / '.git/index').read_bytes()
    new = ['toylab/x.bin', 'toylab/new mod é.py', 'toylab/latin.py', 'configs/new.yaml', 'toylab/moved.py']  # fmt: skip
    assert comes_back(repository, *new)
    assert not (root / 'clone/toylab/part.py').exists()
    assert (root / '.git/index').read_bytes() == before  # the user's index is as it was
    assert set(code_state()[0]['new']) == {*new[1:]}


def test_a_file_that_is_too_large_is_named(repository):
    (repository.root / 'toylab/big.bin').write_bytes(bytes(2**20 + 1))
    state, patch = code_state()
    assert state['left_out'] == ['toylab/big.bin'] and len(patch) < 2000 and state['dirty']


def test_a_repository_without_a_commit(toy):
    git(toy.root, 'init', '-q')
    state, patch = code_state()
    assert state['commit'] is None and state['dirty'] and b'train_toy.py' in patch


def test_secrets_are_masked_in_lines_of_code_only(repository):
    secret = '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'
    repository.write('toylab/part.py', f'key = "{secret}"\n')
    state, patch = code_state()
    assert secret.encode() not in patch and state['masked'] == 1


@pytest.mark.parametrize('kind', ['foreign', 'absent', 'no git', 'ignored', 'broken'])
def test_code_that_git_does_not_know_is_unknown_and_never_clean(repository, monkeypatch, kind):
    root = repository.root
    if kind == 'foreign':
        monkeypatch.setenv('GIT_TEST_ASSUME_DIFFERENT_OWNER', '1')
        monkeypatch.setattr(provenance, 'USERS', provenance.re.compile('GIT_TEST.*'))
    if kind == 'absent':
        (root / '.git').rename(root / 'gone')
    if kind == 'no git':
        monkeypatch.setattr(provenance.shutil, 'which', lambda name: None)
    if kind == 'ignored':
        git(root, 'rm', '-rq', '--cached', '.')
        repository.write('.gitignore', '*\n')
    if kind == 'broken':
        (root / '.git/HEAD').write_text('x')
    state, patch = code_state()
    assert (state['commit'], state['dirty'], patch) == (None, None, b'') and state['unknown']


def test_another_repository_in_the_environment_is_not_believed(repository, monkeypatch, tmp_path_factory):  # fmt: skip
    other = tmp_path_factory.mktemp('other')
    git(other, 'init', '-q')
    git(other, 'commit', '-q', '--allow-empty', '-m', 'x')
    for name, value in {'GIT_DIR': '.git', 'GIT_WORK_TREE': '', 'GIT_INDEX_FILE': '.git/index'}.items():  # fmt: skip
        monkeypatch.setenv(name, str(other / value))
    monkeypatch.setenv('GIT_EXTERNAL_DIFF', '/bin/true')
    state, patch = code_state()
    for name in ('GIT_DIR', 'GIT_WORK_TREE', 'GIT_INDEX_FILE', 'GIT_EXTERNAL_DIFF'):
        monkeypatch.delenv(name)
    assert state['commit'] == git(repository.root, 'rev-parse', 'HEAD').strip()
    assert b'as told once' in patch


def test_a_run_leaves_its_code(repository):
    record = run()
    assert record['git']['dirty'] and (Path(record['folder']) / 'code.diff').exists()


# ---- done again ----------------------------------------------------------------------------------


def fake(value, inputs=None, status='complete', changed=()) -> dict:
    known = {kind: {} for kind in KINDS} | {'code': {'a.py': '1'}} | (inputs or {})
    return dict(
        status=status, reason='disk full', folder='runs/c/1', inputs=known, saves={},
        inputs_changed=list(changed), metrics=[dict(measure='value', after=value)],
    )  # fmt: skip


MOVED = [dict(when='while it ran', kind='code', name='a.py', was='1', now='2')]
STORIES = {  # the first run and the repetitions, and whether the stage may be called not deterministic
    'the same': ([fake(1), fake(1)], False),
    'another notebook': ([fake(1), fake(2, {'notebook': {'run half': 'x'}})], False),
    'another package': ([fake(1), fake(2, {'package': {'torch': '3'}})], False),
    'changed while it ran': ([fake(1, changed=MOVED), fake(2)], False),
    'changed while it ran again': ([fake(1), fake(2, changed=MOVED)], False),
    'an earlier version': ([{**fake(1), 'inputs': {'data': {}}}, fake(2)], False),
    'unknown code': ([fake(1, {'code': {'a.py': None}}), fake(2, {'code': {'a.py': None}})], False),
    'the repetition failed': ([fake(1), fake(2, status='failed')], False),
    'the second repetition failed': ([fake(1), fake(2), fake(3, status='failed')], False),
    'something nobody records': ([fake(1), fake(2), fake(2)], False),
    'changed in between': ([fake(1), fake(2), fake(3, {'data': {'d': 'x'}})], False),
    'chance': ([fake(1), fake(2), fake(3)], True),
}


def test_not_deterministic_is_never_said_wrongly(monkeypatch):
    rng, wrong, said = random.Random(3), 0, 0
    for _ in range(100):
        records, chance = STORIES[rng.choice(list(STORIES))]
        first, *rest = records
        monkeypatch.setattr(again, 'find_run', Path)
        monkeypatch.setattr(again, 'read_run', lambda folder, first=first: first)
        monkeypatch.setattr(again, 'repeat', lambda folder, on_progress, r=rest[::-1]: r.pop())
        text = verdict(again.reproduce('runs/c/1'))
        said += 'is not deterministic' in text
        wrong += ('is not deterministic' in text) != chance
    assert said and not wrong


def test_unknown_is_never_equal():
    old = {'stage': 'x', 'config': {'steps': 3}, 'parents': [], 'versions': {'torch': '2.9'}}
    found = compare(inputs_of(old), inputs_of(old))
    assert {'notebook', 'code', 'package', 'host'} <= {kind for kind, *_ in found}


def test_a_kernel_says_itself_what_it_is_and_a_chance_is_found(toy, monkeypatch, tmp_path_factory):
    home = tmp_path_factory.mktemp('kernel')
    install(toy, 'numpy-0.0.1')
    spec = home / 'kernels/other'
    spec.mkdir(parents=True)
    argv = [sys.executable, '-m', 'ipykernel_launcher', '-f', '{connection_file}']
    env = {'PYTHONPATH': f"{toy.root / 'site'}{os.pathsep}{os.environ['PYTHONPATH']}"}
    kernel = dict(argv=argv, display_name='other', language='python', env=env)
    (spec / 'kernel.json').write_text(json.dumps(kernel))
    monkeypatch.setenv('JUPYTER_PATH', str(home))
    monkeypatch.setenv('K2LAB_RUN_KERNEL_NAME', 'other')
    edit_stage(
        toy, 'after=value + step', 'after=int.from_bytes(__import__("os").urandom(4), "big") + step'
    )
    time.sleep(1.5)  # the start of a process is known to the second: what is older is known
    folder = execute('train_toy', campaign='c')
    record = read_run(folder)
    assert record['status'] == 'complete', record['reason']
    assert record['inputs']['package']['numpy'] == '0.0.1'
    assert record['inputs']['notebook']['run half'] == run_half_sha256(notebook_of(toy))
    assert not check_published(folder, 'k2_toy', deep=True)
    found = again.reproduce(folder)
    assert 'the stage is not deterministic here' in verdict(found)
    edit_notebook(toy, lambda cells: cells.insert(WORK, COPY))
    found = again.reproduce(folder)
    assert verdict(found).startswith('the first input that differs: notebook run half')
