"""Hostile surroundings: file systems, settings, notebooks, secrets, output without end."""

import errno
import json
import os
import random
import shutil
import string
import subprocess
from datetime import date
from pathlib import Path

import pytest
from conftest import RUN_HALF, notebook

from k2lab.lab import files, records
from k2lab.lab.config import LabError, is_root, lab_path, setting, settings
from k2lab.lab.files import check_no_secret, mask, move, scrub, sync, trim, write_text
from k2lab.lab.job import prepare, start
from k2lab.lab.records import read_run
from k2lab.lab.runner import checked_notebook, execute
from k2lab.lab.show import bound_notebook, publish_log
from k2lab.lab.slurm import cluster

ROOT = Path(__file__).parents[1]


def one_line_of(act) -> str:
    "The one line with which `act` is refused."
    with pytest.raises(LabError) as refused:
        act()
    assert len(str(refused.value).splitlines()) == 1
    return str(refused.value)


def refusing(monkeypatch, module, name: str, number: int, when=lambda *args: True):
    "Let a function of a module fail with an error number, as a file system does that lacks it."
    real = getattr(module, name)

    def refuse(*args, **kw):
        if when(*args):
            raise OSError(number, os.strerror(number), str(args[0]))
        return real(*args, **kw)

    monkeypatch.setattr(module, name, refuse)


# ---- file systems --------------------------------------------------------------------------------

REFUSED = {
    'no locks (ENOSYS)': ((files.fcntl, 'flock', errno.ENOSYS), 'no file locks there'),
    'no locks (ENOLCK)': ((files.fcntl, 'flock', errno.ENOLCK), 'no file locks there'),
    'no locks (ENOTSUP)': ((files.fcntl, 'flock', errno.ENOTSUP), 'no file locks there'),
    '0 KiB free': ((Path, 'write_bytes', errno.ENOSPC), 'the disk is full'),
    'quota': ((Path, 'write_bytes', errno.EDQUOT), 'your quota is used up'),
    'read-only': ((Path, 'mkdir', errno.EROFS), 'cannot write there (Read-only file system)'),
    'not allowed': ((Path, 'mkdir', errno.EACCES), 'cannot write there (Permission denied)'),
    'no room for a folder': ((Path, 'mkdir', errno.ENOSPC), 'the disk is full'),
    'an input or output error': ((os, 'fsync', errno.EIO), 'cannot write there (Input/output'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_a_place_that_cannot_keep_runs_is_one_line_and_leaves_nothing(lab, monkeypatch, case):
    patch, words = REFUSED[case]
    with monkeypatch.context() as m:
        refusing(m, *patch)
        said = one_line_of(lambda: prepare('train_toy', campaign='c'))
    assert words in said and str(lab.runs / 'c') in said
    assert not lab.runs.exists()


@pytest.mark.parametrize('late', ['stage.yaml', 'env.yaml', 'run.json'])
def test_a_disk_that_fills_up_during_the_preparation_leaves_nothing(lab, monkeypatch, late):
    with monkeypatch.context() as m:
        refusing(m, Path, 'write_text', errno.ENOSPC, lambda path, *_: late in path.name)
        assert 'disk full' in one_line_of(lambda: prepare('train_toy', campaign='c'))
    assert not (lab.runs / 'c').exists()
    assert prepare('train_toy', campaign='c').folder.name.endswith('.1-train_toy')


WORKS = {
    'no fsync of folders (EINVAL)': (os, 'fsync', errno.EINVAL),
    'no fsync of folders (ENOTSUP)': (os, 'fsync', errno.ENOTSUP),
    'folders cannot be opened': (os, 'open', errno.EISDIR),
    'other mount': (os, 'replace', errno.EXDEV),
    'no rename of folders': (os, 'replace', errno.ENOSYS),
    'rename of folders not allowed': (os, 'replace', errno.EPERM),
}


@pytest.mark.parametrize('case', WORKS)
def test_a_file_system_without_this_call_works(tmp_path, monkeypatch, case):
    module, name, number = WORKS[case]
    is_dir = lambda target, *_: os.path.isdir(
        f'/proc/self/fd/{target}' if isinstance(target, int) else target
    )
    part = tmp_path / '.model.part' / 'model'
    part.mkdir(parents=True)
    (part / 'weights').write_text('12345')
    refusing(monkeypatch, module, name, number, is_dir)
    move(part, tmp_path / 'model')
    write_text(tmp_path / 'run.json', '{}')
    assert (tmp_path / 'model' / 'weights').read_text() == '12345' and not part.exists()
    assert (tmp_path / 'run.json').read_text() == '{}'


def test_a_file_on_another_mount_appears_whole(tmp_path, monkeypatch):
    (tmp_path / 'part').write_text('new')
    (tmp_path / 'file').write_text('old')
    refusing(monkeypatch, os, 'replace', errno.EXDEV, lambda a, b: Path(a).name == 'part')
    move(tmp_path / 'part', tmp_path / 'file')
    assert [p.name for p in tmp_path.iterdir()] == ['file']
    assert (tmp_path / 'file').read_text() == 'new'
    (tmp_path / 'part').write_text('newer')
    refusing(monkeypatch, shutil, 'copy2', errno.ENOSPC)
    with pytest.raises(OSError):
        move(tmp_path / 'part', tmp_path / 'file')
    assert (tmp_path / 'file').read_text() == 'new' and (tmp_path / 'part').exists()


def test_an_error_of_a_disk_is_never_taken_for_a_missing_call(tmp_path, monkeypatch):
    refusing(monkeypatch, os, 'fsync', errno.EIO)
    with pytest.raises(OSError, match='Input/output'):
        sync(tmp_path)


PATHS = {
    'a file': ('runs_path = zero.txt', 'a file, and runs_path in settings.ini must be a folder'),
    'below a file': ('runs_path = zero.txt/runs', 'a file is in the way'),
    'too long': ('runs_path = ' + 'long/' * 900, 'the path is too long'),
    'name too long': ('runs_path = ' + 'l' * 300, 'the path is too long'),
    'two lines': ('runs_path = a\n  b', 'must be one line of text'),
    'empty': ('runs_path =', 'must be one line of text'),
}


@pytest.mark.parametrize('case', PATHS)
def test_a_runs_folder_that_is_none_is_one_line(lab, monkeypatch, case):
    monkeypatch.delenv('K2LAB_LAB_RUNS_PATH')
    line, words = PATHS[case]
    lab.write('settings.ini', f'[lab]\nscale = smoke\npackage = toylab\n{line}\n')
    before = sorted(p.name for p in lab.root.iterdir())
    assert words in one_line_of(lambda: prepare('train_toy'))
    assert sorted(p.name for p in lab.root.iterdir()) == before


def test_a_full_disk_and_a_read_only_one_in_earnest(lab, tmp_path):
    disk = tmp_path / 'disk'
    disk.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=128k', 'tmpfs', str(disk)]
    if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('no mounts here')
    try:
        os.environ['K2LAB_LAB_RUNS_PATH'] = str(disk)
        assert 'the disk is full' in one_line_of(lambda: prepare('train_toy'))
        subprocess.run(['mount', '-o', 'remount,ro', str(disk)], check=True)
        assert 'Read-only' in one_line_of(lambda: prepare('train_toy'))
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(['umount', str(disk)], check=True)


def test_a_clock_before_1980_is_one_line(lab, monkeypatch):
    class Reset(date):
        @classmethod
        def today(cls):
            return cls(1970, 1, 1)

    monkeypatch.setattr(files, 'date', Reset)
    assert 'clock says 1970-01-01' in one_line_of(lambda: prepare('train_toy'))
    assert not lab.runs.exists()


def test_a_lab_whose_path_has_a_line_break_works(lab, tmp_path, monkeypatch):
    odd = tmp_path / 'a\nb %s 50%off'
    shutil.copytree(lab.root, odd, ignore=lambda folder, names: [n for n in names if n == odd.name])
    monkeypatch.setenv('K2LAB_ROOT', str(odd))
    job = prepare('train_toy', campaign='c')
    assert job.folder.parent.parent == odd / 'runs' and records.runs('c')[0]['status'] == 'prepared'


# ---- settings ------------------------------------------------------------------------------------

HEAD = '[lab]\nscale = smoke\npackage = toylab\n'
SETTINGS = {
    'cut': ('[lab\nscale=smoke\n', ":1: '[lab' stands in no [section]"),
    'twice': (f'{HEAD}scale = nano\n', ":4: 'scale' is written twice in [lab]"),
    'two sections': (f'{HEAD}[lab]\n', ':4: there are two sections [lab]'),
    'no value': (f'{HEAD}nonsense\n', ':4: neither [section] nor key = value'),
    'unknown': ('[lab]\nscael=smoke\n', ":2: unknown setting 'scael' (did you mean 'scale'?)"),
    'unknown path': ('[lab]\nrnus_path=x\n', "(did you mean 'runs_path'?)"),
    'unknown section': (f'{HEAD}[rnu]\n', ":4: unknown section 'rnu' (did you mean 'run'?)"),
    'timeout': (f'{HEAD}[run]\ncell_timeout = abc\n', ':5: cell_timeout must be 0 to'),
    'negative': (f'{HEAD}[run]\nautosave_every = -1\n', ':5: autosave_every must be 0 to'),
    'no number': (f'{HEAD}[run]\nlog_mb = 1.5\n', ':5: log_mb must be 1 to'),
    'a scale': ('[lab]\nscale = nanoo\n', ":2: scale must be one of 'smoke', 'nano'"),
    'yes': (f'{HEAD}[hub]\noffline = perhaps\n', ':5: offline must be bool'),
    'port': (f'{HEAD}[serve]\nport = 70000\n', ':5: port must be 1 to 65535'),
    'of ours under DEFAULT': (f'[DEFAULT]\nscale = nano\n{HEAD}', "'scale' under [DEFAULT]"),
    'no UTF-8': (b'[lab]\nscale = \xff\n', 'cannot be read (no UTF-8)'),
    'gone since': (f'{HEAD}log_output = true\n', "unknown setting 'log_output'"),
}


@pytest.mark.parametrize('case', SETTINGS)
def test_wrong_settings_are_one_line_and_help_works(lab, case, capsys):
    from k2lab.cli import main

    text, words = SETTINGS[case]
    (lab.root / 'settings.ini').write_bytes(text if isinstance(text, bytes) else text.encode())
    said = one_line_of(settings)
    assert said.startswith(str(lab.root / 'settings.ini')) and words in said
    assert one_line_of(lambda: main(['runs'])) == said
    assert main(['--help']) == 0 and 'usage: k2lab' in capsys.readouterr().out
    assert not lab.runs.exists()


def test_settings_that_look_odd_and_are_right(lab, monkeypatch):
    monkeypatch.delenv('K2LAB_LAB_RUNS_PATH')
    text = f'[DEFAULT]\nlib_name = mine\nuser = me\n{HEAD}runs_path = 50%off\n[run]\nlog_mb = 3\n'
    lab.write('settings.ini', text)
    assert (lab_path('runs').name, setting('run', 'log_mb')) == ('50%off', 3)
    monkeypatch.setenv('K2LAB_RUN_LOG_MB', '7')
    assert (setting('run', 'log_mb'), setting('hub', 'offline')) == (7, True)
    (lab.root / 'settings.ini').write_text('\ufeff' + text)
    assert setting('lab', 'package') == 'toylab'


def test_a_variable_that_is_no_setting_or_has_no_value_is_named(lab, monkeypatch):
    monkeypatch.setenv('K2LAB_RUN_KERNEL', 'x')
    assert "(did you mean 'K2LAB_RUN_KERNEL_NAME'?)" in one_line_of(settings)
    monkeypatch.delenv('K2LAB_RUN_KERNEL')
    monkeypatch.setenv('K2LAB_RUN_CELL_TIMEOUT', '1h')
    assert one_line_of(settings).startswith('$K2LAB_RUN_CELL_TIMEOUT must be 0 to')


def test_another_tools_settings_are_none_of_ours(tmp_path):
    for text in (b'key without section', b'[lab', b'[labels]\nx=1', b'\xff\xfe', b'# [lab]', b''):
        (tmp_path / 'settings.ini').write_bytes(text)
        assert is_root(tmp_path) is (text == b'[lab')
    (tmp_path / 'settings.ini').unlink()
    (tmp_path / 'settings.ini').mkdir()
    assert not is_root(tmp_path)


def test_a_kernel_that_is_not_there_is_named_before_the_start(lab, monkeypatch, tmp_path):
    monkeypatch.setenv('K2LAB_RUN_KERNEL_NAME', 'pyhton3')
    said = one_line_of(lambda: execute('train_toy'))
    assert "unknown kernel 'pyhton3' (did you mean 'python3'?)" in said
    home = tmp_path / 'share/kernels/other'
    home.mkdir(parents=True)
    monkeypatch.setenv('JUPYTER_PATH', str(tmp_path / 'share'))
    monkeypatch.setenv('K2LAB_RUN_KERNEL_NAME', 'other')
    for text, words in (
        ('{', 'no kernel is described'),
        ('{"argv": ["/no/such/python"], "display_name": "x", "language": "python"}', 'no program'),
    ):
        (home / 'kernel.json').write_text(text)
        assert words in one_line_of(lambda: execute('train_toy'))
    assert not lab.runs.exists()


@pytest.mark.parametrize(
    'text, words',
    [
        ('{{ steps }}: 3\n', 'a key must be text'),
        ('steps: \x07\n', 'cannot be read'),
        ('<<<<<<< HEAD\nsteps: 3\n', 'train_toy.yaml'),
    ],
)
def test_a_stage_file_that_is_no_yaml_is_one_line(lab, text, words):
    lab.write('configs/train_toy.yaml', text)
    assert words in one_line_of(lambda: prepare('train_toy'))


# ---- notebooks -----------------------------------------------------------------------------------


def toy_notebook(parameters: str | None = None, cells: list = RUN_HALF) -> dict:
    nb = notebook('train_toy', cells)
    if parameters is not None:
        nb['cells'][2]['source'] = parameters
    return nb


SET = "scale = 'smoke'\nrun = None\nchanges = {}"
two = toy_notebook()
two['cells'][3]['metadata'] = {'tags': ['parameters']}
none = toy_notebook()
none['cells'][2]['metadata'] = {}
NOTEBOOKS = {
    'conflict': ('<<<<<<< HEAD\n' + json.dumps(toy_notebook()), '.ipynb:1: a conflict of git'),
    'conflict inside': (json.dumps(toy_notebook(), indent=1).replace(' "cells"', '=======\n "cells"'),
                        'a conflict of git is not'),
    'conflict in a cell': (toy_notebook(cells=['<<<<<<< HEAD\nx = 1\n=======']), 'cell 5: a conflict'),
    'empty': ('', 'the notebook is empty'),
    'blank': (' \n', 'the notebook is empty'),
    'no JSON': ('{"cells": [],}', '.ipynb:1: no notebook'),
    'cut': (json.dumps(toy_notebook())[:200], '.ipynb:1: no notebook'),
    'no UTF-8': (b'\xff\xfe', 'no UTF-8'),
    'a list': ('[]', 'JSON, but no notebook'),
    'no cells': ('{"nbformat": 4, "metadata": {}}', 'JSON, but no notebook'),
    'no source': ('{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [{"cell_type": "code"}]}',
                  'JSON, but no notebook'),
    'no parameters': (none, 'no cell is tagged'),
    'two parameters': (two, 'cells 3, 4 are tagged'),
    'magic': (toy_notebook(f'%load_ext autoreload\n{SET}'), "line 1: '%load_ext autoreload' is no"),
    'tuple': (toy_notebook("(scale, x) = ('smoke', None)\nrun = None\nchanges = {}"), 'line 1: write one'),
    'type only': (toy_notebook('scale: str\nrun = None\nchanges = {}'), "unknown parameter 'scale'"),
    'no name': (toy_notebook("job.scale = 'smoke'\nrun = None\nchanges = {}"), "parameter 'scale'"),
    'no Python': (toy_notebook("scale = 'smoke\nrun = None"), 'cell 3, line 1'),
    'no Python later': (toy_notebook(cells=[*RUN_HALF, 'job.finish(']), 'cell 9, line 1'),
}  # fmt: skip


@pytest.mark.parametrize('case', NOTEBOOKS)
def test_an_odd_notebook_is_one_line_with_its_cell(lab, case):
    body, words = NOTEBOOKS[case]
    path = lab.root / 'nbs/20_train_toy.ipynb'
    text = json.dumps(body) if isinstance(body, dict) else body
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    said = one_line_of(lambda: execute('train_toy'))
    assert words in said and '20_train_toy.ipynb' in said
    assert not lab.runs.exists()


@pytest.mark.parametrize(
    'parameters',
    [
        "scale: str = 'smoke'\nrun: str | None = None\nchanges: dict = {}",
        f'import os  # {SET}\n{SET}',
    ],
)
def test_annotations_and_imports_may_stand_in_the_parameters_cell(lab, parameters):
    (lab.root / 'nbs/20_train_toy.ipynb').write_text(json.dumps(toy_notebook(parameters)))
    assert checked_notebook('train_toy').name == '20_train_toy.ipynb'


def test_magics_and_await_in_other_cells_and_huge_outputs_are_no_mistake(lab):
    nb = toy_notebook(cells=[*RUN_HALF, '%time 1', 'x = !ls', 'await job', 'job?'])
    nb['cells'][1]['outputs'] = [
        {'output_type': 'stream', 'name': 'stdout', 'text': 'x' * 9_000_000}
    ]
    (lab.root / 'nbs/20_train_toy.ipynb').write_text(json.dumps(nb))
    assert checked_notebook('train_toy')


def test_a_notebook_of_format_3_works_or_is_one_line(lab):
    import nbformat

    old = nbformat.convert(nbformat.from_dict(toy_notebook()), 3)
    (lab.root / 'nbs/20_train_toy.ipynb').write_text(nbformat.v3.writes_json(old))
    assert checked_notebook('train_toy')


# ---- secrets -------------------------------------------------------------------------------------

LETTERS = string.ascii_letters + string.digits


def real_looking(seed: int) -> dict[str, str]:
    "Twenty secrets as services give them out: `{what it is: the secret}`."
    draw = random.Random(seed)
    some = lambda n, letters=LETTERS: ''.join(draw.choice(letters) for _ in range(n))
    hex_ = lambda n: some(n, '0123456789abcdef')
    return {
        'OpenAI': f'sk-{some(20)}T3BlbkFJ{some(20)}',
        'OpenAI project': f'sk-proj-{some(74, LETTERS + "-_")}T3BlbkFJ{some(74, LETTERS + "-_")}',
        'Anthropic': f'sk-ant-api03-{some(93, LETTERS + "-_")}AA',
        'OpenRouter': f'sk-or-v1-{hex_(64)}',
        'DeepSeek': f'sk-{hex_(32)}',
        'Moonshot': f'sk-{some(48)}',
        'Hugging Face': f'hf_{some(34, string.ascii_letters)}',
        'GitHub': f'ghp_{some(36)}',
        'GitHub, fine-grained': f'github_pat_{some(22)}_{some(59)}',
        'AWS key id': f'AKIA{some(16, string.ascii_uppercase + "234567")}',
        'Google': f'AIza{some(35)}',
        'Slack': f'xoxb-{some(12, string.digits)}-{some(12, string.digits)}-{some(24)}',
        'Stripe': f'sk_live_{some(24)}',
        'npm': f'npm_{some(36)}',
        'Groq': f'gsk_{some(52)}',
        'JWT': f'eyJ{some(30)}.eyJ{some(60)}.{some(43)}',
        'login': f'https://me:{some(12)}@host.example/v1',
        'key block': f'-----BEGIN RSA PRIVATE KEY-----\n{some(64)}\n{some(64)}\n-----END RSA PRIVATE KEY-----',
        'assigned': f'AWS_SECRET_ACCESS_KEY={some(40, LETTERS + "/+")}',
        'header': f'Authorization: Bearer {some(43)}',
    }  # fmt: skip


def heart(secret: str) -> str:
    "The part of a secret that must not be seen."
    return secret.partition('me:')[2].partition('@')[0] or secret.rpartition('=')[2].split()[-1] if (
        'me:' in secret or '=' in secret or 'Bearer' in secret
    ) else secret.splitlines()[min(1, secret.count('\n'))]  # fmt: skip


LOOK_ALIKES = [
    'sk-wikipedia-articles-2024',
    '/data/sk-wikipedia-articles-2024.jsonl',
    'sk-en_wikipedia20240101dump',
    'sk-SciKitLearn-Benchmarks-2024-v12',
    'hf_cosmopedia_stories_2024_deduplicated_v2',
    'ghp_results_of_the_second_round_2025',
    'runs/scratch/2026-11-26.1-train_toy',
    'meta-llama/Llama-3.1-8B-Instruct',
    'moonshotai/Kimi-K2-Instruct-0905@0123456789abcdef0123456789abcdef01234567',
    '97c969521c6c68214d8a97c969521c6c68214d8a97c969521c6c68214d8a97c9',
    'http://127.0.0.1:8000/v1?model=Kimi-K2-Thinking',
    's3://bucket/corpus-2024/part-00000.parquet',
    'the key: question, the token: <|im_end|>',
    'key = getApiKeyFromEnv2Store3(name)',
    'tokens_s 1254.3, token stream e3b0c44298fc1c149afbf4c8996fb924',
    'complete',
    'AKIA is how keys of AWS begin',
    'basic training, bearer of news',
    'npm_package_names_of_the_registry.jsonl',
    'eyJ.md',
]


def test_twenty_secrets_in_ten_places_are_never_stored(lab, monkeypatch):
    for seed in range(20):
        for what, secret in real_looking(seed).items():
            hidden = heart(secret)
            assert hidden not in scrub(f'log: {secret}.'), (seed, what)
            assert hidden not in scrub(json.dumps({'a': f'x\n{secret}'})) or '\n' in secret
            assert hidden not in json.dumps(mask({'note': [secret], 'x': {'y': f'({secret})'}})), (
                what
            )
    job = start('train_toy', campaign='c')
    for secret in real_looking(0).values():
        job.log(note=secret)
        job.sample(when='before', prompt=secret, text=f'"{secret}"')
        job.show_rows([{'text': secret}])
        job.measure('value', after=1, note=secret)
        job.check('a check', True, secret)
        job.warn(secret)
        job.record['reason'] = secret
    job.write()
    (job.folder / 'log.txt').write_text('\n'.join(real_looking(0).values()))
    publish_log(job.folder / 'log.txt')
    cell = {'cell_type': 'code', 'metadata': {}, 'source': '', 'outputs': []}
    for secret in real_looking(0).values():
        out = [
            {'output_type': 'stream', 'name': 'stdout', 'text': secret.splitlines(keepends=True)},
            {'output_type': 'error', 'ename': 'E', 'evalue': secret, 'traceback': ['a', *secret.split('\n')]},
            {'output_type': 'display_data', 'metadata': {}, 'data': {'text/html': f'<b>{secret}</b>'}},
            {'output_type': 'display_data', 'metadata': {}, 'data': {'application/json': {'a': secret}}},
        ]  # fmt: skip
        nb = {'metadata': {}, 'cells': [cell | {'source': f'"{secret}"', 'outputs': out}]}
        assert heart(secret) not in json.dumps(bound_notebook(nb, 10**6, 10**6))
    stored = [(p.name, p.read_text()) for p in job.folder.rglob('*') if p.is_file()]
    for what, secret in real_looking(0).items():
        assert [name for name, text in stored if heart(secret) in text] == [], what
    assert {name for name, text in stored if '***' in text} >= {
        'run.json', 'metrics.jsonl', 'samples.jsonl', 'rows.json', 'log.txt'
    }  # fmt: skip


@pytest.mark.parametrize('text', LOOK_ALIKES)
def test_what_looks_like_a_secret_stays(text, monkeypatch):
    monkeypatch.setenv('DB_PASSWORD', 'complete')
    monkeypatch.setenv('MY_TOKEN', 'metadata')
    assert scrub(text) == text and mask({'path': text, 'status': [text]}) == {
        'path': text,
        'status': [text],
    }
    check_no_secret({'data': text, 'trainer': {'path': [text]}}, '')


def test_a_stage_gets_the_text_as_told(lab, monkeypatch):
    lab.write('configs/env.yaml', 'models: {sk-wikipedia-articles-2024: ./zero.txt}\n')
    told = {
        'init_from': 'sk-wikipedia-articles-2024',
        'trainer.path': '/data/sk-wikipedia-articles-2024.jsonl',
    }
    monkeypatch.setenv('DB_PASSWORD', 'complete')
    monkeypatch.setenv('MY_TOKEN', 'metadata')
    cells = [*RUN_HALF[:1], "print('metadata', job.cfg.trainer['path'])", *RUN_HALF[1:]]
    lab.stage(20, 'train_toy', 'saves: k2_toy\n', cells=cells)
    folder = execute('train_toy', changes=told)
    record = read_run(folder)
    assert (record['status'], record['config']['init_from']) == ('complete', told['init_from'])
    assert told['trainer.path'] in (folder / 'log.txt').read_text()
    assert 'metadata' in json.loads((folder / 'notebook.ipynb').read_text())
    for file in ('run.json', 'stage.yaml', 'env.yaml', 'notebook.ipynb', 'report.html'):
        assert '***' not in (folder / file).read_text(), file


@pytest.mark.parametrize('what', real_looking(1))
def test_a_secret_in_plain_text_is_refused_with_the_remedy(lab, what):
    said = one_line_of(
        lambda: prepare('train_toy', changes={'trainer.note': real_looking(1)[what]})
    )
    assert 'trainer.note' in said and 'env:MY_SECRET' in said
    assert heart(real_looking(1)[what]) not in said and not lab.runs.exists()


def test_a_reference_is_looked_up_where_the_work_is_done(lab, monkeypatch):
    monkeypatch.setenv('TOY_SECRET', secret := real_looking(2)['OpenAI'])
    lab.write(
        'configs/env.yaml', 'models: {zero: ./zero.txt}\nendpoint: {api_key: "env:TOY_SECRET"}\n'
    )
    job = start(
        'train_toy', changes={'api_key': 'env:TOY_SECRET', 'trainer.hub_token': 'env:TOY_SECRET'}
    )
    assert (
        job.cfg.api_key == job.cfg.trainer['hub_token'] == job.env['endpoint']['api_key'] == secret
    )
    assert job.record['config']['api_key'] == 'env:TOY_SECRET'
    assert not [p for p in job.folder.rglob('*') if p.is_file() and secret in p.read_text()]
    assert 'no variable NO_SECRET' in one_line_of(
        lambda: prepare('train_toy', campaign='d', changes={'api_key': 'env:NO_SECRET'})
    )
    assert 'name the variable like a secret' in one_line_of(
        lambda: prepare('train_toy', campaign='d', changes={'api_key': 'env:HOME'})
    )
    assert not (lab.runs / 'd').exists()


def test_no_secret_in_a_slurm_script(lab, monkeypatch):
    monkeypatch.setattr(shutil, 'which', lambda name: f'/usr/bin/{name}')
    for line in (
        f'export HF_TOKEN={real_looking(3)["Hugging Face"]}',
        'export X_API_KEY=' + 'aB3dE5' * 5,
    ):
        lab.write('configs/slurm.yaml', f'setup: ["{line}"]\n')
        assert 'a secret in plain text' in one_line_of(cluster)
    lab.write('configs/slurm.yaml', 'setup: [module load cuda/12.4, source venv/bin/activate]\n')
    assert cluster().setup[0] == 'module load cuda/12.4'


def test_a_variable_that_holds_a_path_or_a_word_is_no_secret(monkeypatch, tmp_path):
    key = tmp_path / 'id_rsa_of_2024'
    key.write_text('')
    values = dict(SSH_KEY=str(key), DB_PASSWORD='complete', MY_TOKEN='train_toy', A_KEY='12345678')
    for name, value in values.items():
        monkeypatch.setenv(name, value)
        assert scrub(f'{value} and {value}') == f'{value} and {value}'
    monkeypatch.setenv('PGPASSWORD', 'p@ss/word 9')
    assert scrub('p@ss/word 9, p%40ss%2Fword%209') == '***, ***'


# ---- output without end --------------------------------------------------------------------------


def test_a_log_keeps_its_head_and_tail_while_it_grows(tmp_path):
    log = tmp_path / 'log.txt'
    lines = [f'line {i:06}\n' for i in range(30_000)]
    for at in range(0, 30_000, 1_000):
        with open(log, 'a') as file:
            file.writelines(lines[at : at + 1_000])
        trim(log, 50_000)
    text = log.read_text()
    assert len(text) < 50_100 and text.startswith(lines[0]) and text.endswith(lines[-1])
    assert '\n[... 310,000 bytes cut here ...]\n' in text


@pytest.mark.parametrize('kind', ['lines', 'html', 'bar', 'error', 'many'])
def test_outputs_without_end_stay_bounded_and_say_so(lab, monkeypatch, kind):
    for key in ('LOG', 'OUTPUT', 'NOTEBOOK'):
        monkeypatch.setenv(f'K2LAB_RUN_{key}_MB', '1')
    cell = {
        'lines': 'for i in range(100_000): print("a line with its number", i)',
        'html': 'from IPython.display import HTML; HTML("<p>" * 2_000_000)',
        'bar': 'import sys; [sys.stdout.write("\\r%50d" % i) for i in range(100_000)];',
        'error': 'raise ValueError("long " * 600_000)',
        'many': 'for i in range(1_500): display("x" * 900)',
    }[kind]
    lab.stage(20, 'train_toy', 'saves: k2_toy\n', cells=[*RUN_HALF, cell])
    folder = execute('train_toy')
    record, size = read_run(folder), lambda name: (folder / name).stat().st_size
    assert record['status'] == ('failed' if kind == 'error' else 'complete'), record['reason']
    assert len(record['reason']) <= 300
    assert max(size('log.txt'), size('notebook.ipynb')) < 1.8e6 and size('report.html') < 2.5e6
    notes = (folder / 'notebook.ipynb').read_text()
    assert ('cut here' if kind in ('lines', 'bar', 'error') else 'left out: see') in notes
    if kind == 'lines':
        assert 'bytes cut here' in (folder / 'log.txt').read_text()


def test_nothing_enters_a_closed_run_and_silent_failures_are_noted(lab):
    cells = [
        RUN_HALF[0],
        '!false',
        '!true',
        'import threading; t = threading.Thread(target=lambda: 1/0, name="reader"); t.start(); t.join()',
        *RUN_HALF[1:],
        "job.log(step=99)",
    ]
    lab.stage(20, 'train_toy', 'saves: k2_toy\n', cells=cells)
    folder = execute('train_toy')
    record = read_run(folder)
    assert (record['status'], record['saves'].keys()) == ('failed', {'k2_toy'})
    assert 'nothing can be added' in record['reason']
    assert record['warnings'] == [
        '!false ended with code 1',
        'exception in reader: ZeroDivisionError: division by zero',
    ]
    assert 'ZeroDivisionError' in (folder / 'log.txt').read_text()
    assert '99' not in (folder / 'metrics.jsonl').read_text()
    from k2lab.cli.looking import run_text

    assert '  warning: !false ended with code 1' in run_text(record)
