"""The command: its words, the list of runs, tags and notes, completion; and a lab made from the wheel."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from k2lab.cli import COMMANDS, main
from k2lab.cli.completion import SCRIPTS
from k2lab.cli.index import INDEX
from k2lab.cli.running import page_of
from k2lab.cli.tables import cut, cut_name, fitting_table, wide
from k2lab.lab.config import LabError
from k2lab.lab.records import check_campaign, read_record, runs

ROOT = Path(__file__).resolve().parents[1]
DAY = '2026-11-26'


def kept(lab, name: str, campaign: str = 'c', **more) -> Path:
    "A run of an earlier version in the toy lab, with what `more` says."
    stage = name.partition('-')[2] if name.count('-') < 3 else name.split('-')[3]
    record = {
        'stage': stage,
        'scale': 'smoke',
        'campaign': campaign,
        'seed': 0,
        'status': 'complete',
        'reason': '',
        'started': f'{DAY}T10:00:00.000000+00:00',
        'owner': {'pid': 1, 'born': 0.0, 'host': 'elsewhere'},
        'config': {'steps': 3, 'trainer': {'lr': 0.1}},
        'parents': [],
        'saves': {},
        'metrics': [],
        'checks': [],
        'closed': f'{DAY}T10:00:05+00:00',
        'wall_s': 65.2,
    }
    folder = lab.runs / campaign / name
    folder.mkdir(parents=True)
    (folder / 'run.json').write_text(json.dumps(record | more))
    return folder


def measure(name: str, before, after) -> dict:
    return {'measure': name, 'before': before, 'after': after, 'low': None, 'high': None, 'n': 4}


@pytest.fixture
def three(lab):
    "A campaign of three runs, of which the second failed."
    reason = 'ValueError: the loss is not a number at step 12, the last good value was 2.31'
    kept(lab, f'{DAY}.1-train_toy', metrics=[measure('value', 0, 2)], tags=['best'])
    kept(lab, f'{DAY}.2-train_toy', status='failed', reason=reason, seed=1, wall_s=5)
    kept(lab, f'{DAY}.3-train_toy', metrics=[measure('value', 0, 10)], config={'steps': 10})
    return lab


def said(capsys, *words: str) -> str:
    "What `k2lab words` prints, where it exits with 0."
    assert main(list(words)) == 0
    return capsys.readouterr().out


def listed(capsys, *words: str) -> list[int]:
    "The numbers of the runs that `k2lab runs words` lists."
    return [
        int(r['run'].split('-')[2][3:]) for r in json.loads(said(capsys, 'runs', '--json', *words))
    ]


def refused(*words: str) -> str:
    "The one line with which `k2lab words` is refused."
    with pytest.raises(LabError) as e:
        main(list(words))
    assert '\n' not in str(e.value)
    return str(e.value)


# ---- words ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'words, says',
    [
        ('runs --camapign x', "did you mean '--campaign'"),
        ('runs a b c', "runs does not take 'b'"),
        ('runs --campaign nothere', "no campaign 'nothere'; there are: c"),
        ('runs cc', "no campaign 'cc' (did you mean 'c'?)"),
        ('runs c --campaign c', 'given twice'),
        ('runs --json=yes', '--json takes no value'),
        ('runs --limit', '--limit needs a value'),
        ('runs --limit --json', '--limit needs a value'),
        ('runs --limit 0', 'at least 1'),
        ('runs --limit 1 --limit 2', 'given twice'),
        ('runs --sort wal', "did you mean 'wall'"),
        ('runs --columns run,seeed', "did you mean 'seed'"),
        ('runs --where wall', 'expected FIELD=VALUE'),
        ('runs --where status=complte', "did you mean 'complete'"),
        ('runs --where stage=train_tyo', "did you mean 'train_toy'"),
        ('runs --where measure.vlaue>1', "did you mean 'value'"),
        ('runs --where config.stesp=1', "did you mean 'steps'"),
        ('runs --where campaign<3', 'have no order'),
        ('show', 'show needs RUN'),
        ('show a --jsn', "did you mean '--json'"),
        ('diff a', 'diff needs RUN RUN'),
        ('tag a', 'tag needs RUN TAG'),
        ('new', 'new needs FOLDER'),
        ('completion fsh', "did you mean 'fish'"),
        ('train_toy --sclae smoke', "did you mean '--scale'"),
        ('train_toy --stesp 3', "did you mean '--steps'"),
        ('pipeline --form train_toy', "did you mean '--from'"),
        ('rnus', "did you mean 'runs'"),
        ('--verison', "did you mean '--version'"),
        ('--version x', "does not take 'x'"),
        ('--help rnus', "did you mean 'runs'"),
    ],
)
def test_a_word_that_a_command_does_not_take_is_refused(words, says, three):
    assert says in refused(*words.split())


def test_each_command_has_a_help_of_its_own(lab, capsys):
    for name, command in COMMANDS.items():
        if name == 'complete':
            continue
        text = said(capsys, name, '--help')
        assert text.startswith(f'usage: k2lab {name}') and 'exit codes: 0 done, 1 ' in text
        assert all(f'--{o.name}' in text for o in command.options) and command.example in text
    assert 'exit codes: 0 done, 1 ' in said(capsys, '--help')
    assert '--campaign NAME' in said(capsys, 'train_toy', '--help')
    assert said(capsys, 'help', 'runs') == said(capsys, 'runs', '--help')


# ---- the list of runs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    'words, numbers',
    [
        ('', [1, 2, 3]),
        ('--where status=complete', [1, 3]),
        ('--where status!=complete', [2]),
        ('--where measure.value>2', [3]),
        ('--where measure.value>=2', [1, 3]),
        ('--where measure.value!=2', [3]),  # the second was not measured
        ('--where config.steps=10', [3]),
        ('--where config.trainer.lr=1e-1', [1, 2]),
        ('--where seed=1', [2]),
        ('--where tag=best', [1]),
        ('--where tag!=best', [2, 3]),
        ('--where promoted=true', [1, 3]),
        ('--where stage=train_toy --where wall<60', [2]),
        (f'--where started={DAY}', [1, 2, 3]),
        ('--where started>2026-11-27', []),
        ('--sort wall', [2, 1, 3]),
        ('--sort -measure.value', [3, 1, 2]),
        ('--sort=-seed --limit 1', [2]),
        ('--limit 2', [2, 3]),
        ('c --limit 1', [3]),
    ],
)
def test_runs_are_chosen_and_sorted(words, numbers, three, capsys):
    assert listed(capsys, *words.split()) == numbers


def test_runs_as_json_are_strict_and_whole(three, capsys):
    kept(three, f'{DAY}.4-train_toy', metrics=[measure('value', float('nan'), 1e999)])
    (three.runs / 'c' / f'{DAY}.5-train_toy').mkdir()
    (three.runs / 'c' / f'{DAY}.5-train_toy' / 'run.json').write_text('{')

    def strict(word):
        raise AssertionError(f'{word} is no JSON')

    rows = json.loads(said(capsys, 'runs', '--json'), parse_constant=strict)
    by_name = {row['run']: row for row in rows}
    second = by_name[f'{DAY}.2-train_toy']
    assert (second['status'], second['seed'], second['wall'], second['campaign']) == (
        'failed',
        1,
        5,
        'c',
    )
    assert second['reason'].endswith('2.31') and second['config']['trainer'] == {'lr': 0.1}
    assert by_name[f'{DAY}.1-train_toy']['metrics'] == [measure('value', 0, 2)]
    assert by_name[f'{DAY}.5-train_toy']['status'] == 'unreadable'
    some = json.loads(
        said(capsys, 'runs', '--json', '--columns', 'run,measure.value', '--limit', '2')
    )
    show = said(capsys, 'show', f'{DAY}.4-train_toy', '--json')
    assert json.loads(show, parse_constant=strict)['metrics'][0]['before'] is None
    assert some[0] == {'run': f'{DAY}.4-train_toy', 'measure.value': None} or len(some) == 2


def test_the_list_fits_80_columns(three, capsys, monkeypatch):
    kept(
        three,
        f'{DAY}.4-train_continual_pretrain',
        '実験',
        metrics=[measure('domain_bits_per_byte', 4.086, 4.012)],
    )
    kept(
        three,
        f'{DAY}.5-train_continual_pretrain',
        'another-campaign',
        status='failed',
        reason='r' * 300,
    )
    for columns in ('80', '60', '200'):
        monkeypatch.setenv('COLUMNS', columns)
        for words in ('', '--sort wall', '--columns campaign,run,reason,status,measure'):
            lines = said(capsys, 'runs', *words.split()).splitlines()
            assert max(map(wide, lines)) <= int(columns), (columns, words)
    monkeypatch.setenv('COLUMNS', '80')
    text = said(capsys, 'runs')
    assert f'{DAY}.5-train_continual_pretrain' in text and '…' in text  # the name stays whole
    assert '4.086 -> 4.012' in text and '-- 実験' in text
    assert 'r' * 300 in said(capsys, 'show', f'{DAY}.5-train_continual_pretrain')


def test_cells_are_cut_by_the_width_on_a_terminal():
    assert wide('実験') == 4 and wide('प्र') == 2 and wide('abc') == 3
    assert cut('abcdef', 4) == 'abc…' and cut('実験実験', 5) == '実験…' and cut('abc', 3) == 'abc'
    assert cut_name('domain_bits 4.1 -> 4.0', 18) == 'domain… 4.1 -> 4.0'
    assert cut_name('domain_bits 4.1 -> 4.0', 12) == '4.1 -> 4.0'
    table = fitting_table(['a', 'reason'], [['x', 'one\ntwo\x1b[31m' + 'y' * 90]], 40)
    assert max(map(len, table.splitlines())) <= 40 and len(table.splitlines()) == 2
    assert '\x1b' not in table


def test_a_running_run_shows_its_start_and_its_time_so_far(lab, capsys, monkeypatch):
    from datetime import datetime, timedelta, timezone

    from k2lab.lab.locks import owning

    began = datetime.now(timezone.utc) - timedelta(seconds=125)
    folder = kept(
        lab, f'{DAY}.1-train_toy', status='running', started=began.isoformat(), wall_s=None
    )
    with owning(folder):
        record = read_record(folder)
        text = said(capsys, 'runs')
        assert re.search(r'\b2:\d\d\b', text)
        assert f'running since {began.astimezone():%H:%M}' in text or 'running since 20' in text
        assert record['status'] == 'running'
        assert 'so far' in said(capsys, 'show', folder.name)
        assert '`k2lab watch ' in refused('reproduce', folder.name)


def test_hidden_folders_are_no_campaigns(three, capsys):
    kept(three, f'{DAY}.9-train_toy', '.smoke')
    assert listed(capsys) == [1, 2, 3] and 'no campaign' in refused('runs', '.smoke')


def test_many_runs_are_read_from_an_index_that_follows_them(lab, capsys, monkeypatch):
    monkeypatch.setattr('k2lab.cli.index.MANY', 2)
    folders = [
        kept(lab, f'{DAY}.{i}-train_toy', started=f'{DAY}T10:00:0{i}+00:00') for i in range(1, 5)
    ]
    read = []
    from k2lab.lab.records import read_or_mark

    monkeypatch.setattr('k2lab.cli.index.read_or_mark', lambda f: read.append(f) or read_or_mark(f))
    first = said(capsys, 'runs', '--json')
    assert len(read) == 4 and (lab.runs / INDEX).exists()
    assert said(capsys, 'runs', '--json') == first and len(read) == 4
    record = json.loads((folders[1] / 'run.json').read_text()) | {'seed': 7}
    (folders[1] / 'run.json').write_text(json.dumps(record))
    shutil.rmtree(folders[0])
    assert listed(capsys, '--where', 'seed=7') == [2] and len(read) == 5
    assert listed(capsys) == [2, 3, 4]
    (lab.runs / INDEX).write_text('{"damaged')
    assert listed(capsys) == [2, 3, 4]


def test_few_runs_leave_no_index(three, capsys):
    before = sorted(p.name for p in three.runs.iterdir())
    assert listed(capsys) == [1, 2, 3]
    assert sorted(p.name for p in three.runs.iterdir()) == before


# ---- show, diff, tags, notes ---------------------------------------------------------------------


def test_show_names_the_files_and_what_was_said_about_a_run(three, capsys):
    folder = three.runs / 'c' / f'{DAY}.1-train_toy'
    for name in ('notebook.ipynb', 'report.html', 'log.txt'):
        (folder / name).write_text('x')
    said(capsys, 'note', folder.name, 'half the rows')
    text = said(capsys, 'show', folder.name)
    for name in ('notebook.ipynb', 'report.html', 'log.txt'):
        assert str(folder / name) in text
    assert 'tags: best' in text and ': half the rows' in text and 'wall     1:05' in text
    record = json.loads(said(capsys, 'show', folder.name, '--json'))
    assert record['status'] == 'complete' and record['notes'][0]['text'] == 'half the rows'


def test_tags_come_and_go(three, capsys):
    run = f'{DAY}.3-train_toy'
    assert said(capsys, 'tag', run, 'final') == f'c/{run}: final\n'
    assert said(capsys, 'tag', run, 'final') == f'c/{run}: final\n'  # once is enough
    assert listed(capsys, '--where', 'tag=final') == [3]
    assert said(capsys, 'tag', run, '最良') == f'c/{run}: final, 最良\n'
    assert said(capsys, 'tag', run, 'final', '--remove') == f'c/{run}: 最良\n'
    assert read_record(three.runs / 'c' / run)['tags'] == ['最良']
    assert "unknown tag 'final'" in refused('tag', run, 'final', '--remove')
    assert 'letters' in refused('tag', run, 'two words')
    assert 'say what' in refused('note', run, ' ')


def test_runs_are_printed_and_compared_as_json(lab, capsys):
    from k2lab.lab.runner import execute

    assert main(['train_toy', '--json', '--campaign', 'c']) == 0
    record = json.loads(capsys.readouterr().out)
    assert record['metrics'][0]['after'] == 2
    a, b = Path(record['folder']), execute('train_toy', campaign='c', changes={'steps': 3})
    assert main(['diff', a.name, a.name]) == 0
    assert capsys.readouterr().out == 'inputs: nothing differs\nresults: nothing differs\n'
    assert main(['diff', a.name, b.name, '--json']) == 1
    found = json.loads(capsys.readouterr().out)
    steps = [d for d in found['inputs'] if 'steps' in d['name']]
    assert [(d['a'], d['b']) for d in steps] == [(2, 3)] and found['a'] == f'c/{a.name}'
    assert any(d['kind'] == 'measure' for d in found['results'])


def test_a_report_as_json_brings_what_it_wrote(tmp_path):
    (tmp_path / 'report.json').write_text('{"goals": []}')
    record = {'stage': 'report', 'status': 'complete', 'folder': str(tmp_path / '1')}
    assert page_of(record) == {'report': {'goals': []}}
    assert page_of(record | {'status': 'failed'}) == {}  # the page is of an earlier run
    assert page_of(record | {'stage': 'evaluate'}) == {}


# ---- completion ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'words, found',
    [
        (['sho'], ['show']),
        (['trai'], ['train_toy']),
        (['show', f'{DAY}.2'], [f'{DAY}.2-train_toy']),
        (['show', f'{DAY}.2-train_toy', '--'], ['--json']),
        (['train_toy', 'ste'], ['steps=']),
        (['train_toy', '--sc'], ['--scale']),
        (['train_toy', '--scale', 'n'], ['nano']),
        (['runs', '--campaign', ''], ['c']),
        (['runs', '--wh'], ['--where']),
        (['pipeline', '--from', ''], ['train_toy']),
        (['completion', 'b'], ['bash']),
        (['nothing', 'x'], []),
    ],
)
def test_completion(words, found, three, capsys):
    assert said(capsys, 'complete', *words).split() == found


def test_bash_completes(three, tmp_path):
    "The script in a real bash, with the words as readline would hand them over."
    command = tmp_path / 'bin' / 'k2lab'
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m k2lab "$@"\n')
    command.chmod(0o755)
    ask = f'{SCRIPTS["bash"]}\nCOMP_WORDS=(k2lab show {DAY}.3); COMP_CWORD=2; _k2lab; echo "${{COMPREPLY[@]}}"'
    env = {**os.environ, 'PATH': f'{command.parent}:{os.environ["PATH"]}'}
    done = subprocess.run(['bash', '-c', ask], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == f'{DAY}.3-train_toy', done.stderr


# ---- names of campaigns --------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['実験', 'प्रयोग', 'опыт-2', 'café', 'a.b_c-1'])
def test_campaigns_may_have_any_script(name, lab, capsys):
    assert check_campaign(name) == name
    kept(lab, f'{DAY}.1-train_toy', name)
    assert listed(capsys, name) == [1] and [r['status'] for r in runs(name)] == ['complete']


@pytest.mark.parametrize(
    'name', ['', '.hidden', '-x', 'a/b', '..', 'a b', 'a\nb', '験' * 100, '\udcff']
)
def test_names_that_no_folder_should_have_are_refused(name):
    with pytest.raises(LabError):
        check_campaign(name)


# ---- from a wheel --------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def installed(tmp_path_factory) -> dict:
    "The environment of a process that sees the package as it lies in a wheel, and no checkout."
    home = tmp_path_factory.mktemp('wheel')
    for name in ('k2lab', 'nbs', 'configs'):
        hidden = shutil.ignore_patterns('.*', '__pycache__', '_proc')
        shutil.copytree(ROOT / name, home / 'source' / name, ignore=hidden)
    for name in ('settings.ini', 'pyproject.toml', 'setup.py', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, home / 'source')
    build = f'from setuptools.build_meta import build_wheel; build_wheel({str(home)!r})'
    made = subprocess.run(
        [sys.executable, '-c', build], cwd=home / 'source', capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    (wheel,) = home.glob('k2lab-*.whl')
    zipfile.ZipFile(wheel).extractall(home / 'site-packages')
    shutil.rmtree(home / 'source')
    left_out = ('K2LAB_ROOT', 'K2LAB_LAB_RUNS_PATH')
    env = {k: v for k, v in os.environ.items() if k not in left_out}
    paths = [str(home / 'site-packages'), str(ROOT / 'tests' / 'lean')]
    return {**env, 'PYTHONPATH': os.pathsep.join(paths)}


def k2lab(installed: dict, folder: Path, *words: str) -> subprocess.CompletedProcess:
    "What `k2lab words` does in a folder."
    command = [sys.executable, '-m', 'k2lab', *words]
    return subprocess.run(command, cwd=folder, env=installed, capture_output=True, text=True)


def test_the_wheel_answers_anywhere(installed, tmp_path):
    where = [sys.executable, '-c', 'import k2lab; print(k2lab.__file__)']
    found = subprocess.run(where, cwd=tmp_path, env=installed, capture_output=True, text=True)
    assert found.stdout.startswith(installed['PYTHONPATH'].partition(os.pathsep)[0])
    text = k2lab(installed, tmp_path, '--help').stdout
    assert 'k2lab new FOLDER' in text and 'no lab at' in text
    assert k2lab(installed, tmp_path, '--version').stdout.strip()
    for words in (['runs'], ['runs', '--json'], ['show', 'x'], ['train_sft_domain'], ['pipeline']):
        done = k2lab(installed, tmp_path, *words)
        assert done.returncode == 2 and done.stdout == '' and done.stderr.count('\n') == 1
        assert '`k2lab new FOLDER` makes one' in done.stderr, words
    offline = installed | {'HF_HUB_OFFLINE': '1'}
    done = k2lab(offline, tmp_path, 'convert', 'nothing', 'out')
    assert done.returncode == 2 and 'nothing: no such folder' in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_two_commands_lead_from_a_wheel_to_a_complete_run(installed, tmp_path):
    assert k2lab(installed, tmp_path, 'new', 'lab').returncode == 0
    lab = tmp_path / 'lab'
    done = k2lab(installed, lab, 'train_sft_domain')
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(k2lab(installed, lab, 'runs', '--json').stdout)
    assert (row['stage'], row['scale'], row['status']) == ('train_sft_domain', 'smoke', 'complete')
    assert row['folder'].startswith(str(lab / 'runs'))
    code = json.loads((Path(row['folder']) / 'run.json').read_text())['inputs']['code']
    assert 'training/trainer.py' in code and 'train_sft_domain.py' in code


def test_a_lab_is_made_in_an_empty_folder_only(tmp_path, capsys):
    home = tmp_path / 'lab'
    home.mkdir()
    said(capsys, 'new', str(home))
    made = {p.name for p in home.iterdir()}
    assert made == {'.gitignore', 'README.md', 'configs', 'nbs', 'runs', 'settings.ini'}
    assert (home / 'nbs' / '30_train_sft_domain.ipynb').exists() and not list(
        (home / 'runs').iterdir()
    )
    assert 'scale = smoke' in (home / 'settings.ini').read_text()
    assert 'is not empty' in refused('new', str(home))
    (tmp_path / 'file').write_text('')
    assert 'is a file' in refused('new', str(tmp_path / 'file'))


def test_nothing_is_left_of_a_lab_that_could_not_be_made(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, 'No space left on device', 'x')

    monkeypatch.setattr('k2lab.cli.making.shutil.copytree', full)
    with pytest.raises(OSError):
        main(['new', str(tmp_path / 'lab')])
    assert list(tmp_path.iterdir()) == []
