"""Honest run records: what is refused before a kernel starts, what makes a run complete, what a crash leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from k2lab.lab.config import LabError, resolve
from k2lab.lab.files import check_published, mask
from k2lab.lab.job import open_job, start
from k2lab.lab.records import find_run, read_run, runs
from k2lab.lab.runner import execute


def k2lab(*words, **env) -> subprocess.CompletedProcess:
    "What `k2lab words` did."
    return subprocess.run(
        [sys.executable, '-m', 'k2lab', *words],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        timeout=120,
    )


def wait_for(found, seconds: float = 60):
    "The first true value of `found()`."
    for _ in range(int(seconds * 20)):
        if value := found():
            return value
        time.sleep(0.05)
    raise AssertionError('nothing came')


# ---- refused before anything starts --------------------------------------------------------------


@pytest.mark.parametrize(
    'words, line',
    [
        (
            ['train_toi'],
            "unknown command 'train_toi' (did you mean 'train_toy'?); valid: "
            'pipeline, plan, runs, show, watch, resume, reproduce, diff, tag, note, promote, agent, '
            'doctor, selftest, serve, new, convert, export, completion, train_toy',
        ),
        (
            ['train_toy', '--scale', 'nan'],
            "unknown scale 'nan' (did you mean 'nano'?); valid: smoke, nano, qlora, full",
        ),
        (
            ['train_toy', 'stepz=3'],
            "changes: unknown key 'stepz' (did you mean 'steps'?); valid: init_from, saves, steps",
        ),
        (['train_toy', 'steps=many'], "changes: steps must be int, not 'many'"),
        (['train_toy', 'steps'], "'steps': expected field=value"),
        (['train_toy', '--campaign', '../up'], "campaign '../up': use letters"),
        (['show', 'nothing'], "no run 'nothing'; `k2lab runs` lists them"),
        (
            ['pipeline', '--from', 'train_toi'],
            "pipeline: unknown stage 'train_toi' (did you mean 'train_toy'?)",
        ),
    ],
)
def test_mistakes_are_one_line(lab, words, line):
    lab.write('configs/pipeline.yaml', 'steps: [{stage: train_toy}]')
    done = k2lab(*words)
    assert done.returncode == 2 and done.stdout == ''
    assert (
        line in done.stderr and done.stderr.startswith('k2lab: ') and done.stderr.count('\n') == 1
    )
    assert not lab.runs.exists()  # a refusal leaves no folder


@pytest.mark.parametrize(
    'text, line',
    [
        ('stepz: 3', "configs/train_toy.yaml:1: unknown key 'stepz' (did you mean 'steps'?)"),
        ('steps: 3\nsteps: 4', "configs/train_toy.yaml:2: key 'steps' is written twice"),
        (
            'steps: 3\nscales:\n  nanoo: {}',
            "configs/train_toy.yaml:3: unknown scale 'nanoo' (did you mean 'nano'?)",
        ),
        ('steps: [', 'configs/train_toy.yaml:'),
        ('steps: 2.5', 'steps must be int, not 2.5'),
    ],
)
def test_mistakes_in_a_stage_file_name_the_line(lab, text, line):
    lab.write('configs/train_toy.yaml', text)
    with pytest.raises(LabError) as e:
        execute('train_toy')
    assert line in str(e.value)


def test_layers_of_a_config(lab):
    import toylab.train_toy as toy

    lab.write(
        'configs/train_toy.yaml',
        'steps: 7\ntrainer: {a: 3e-4, b: 1}\nscales:\n  smoke: {seed: 5, trainer: {b: 2}}\n',
    )
    cfg = resolve(toy.Config, 'train_toy', 'smoke', {'trainer.c': 'true', 'steps': '1e1'})
    assert (cfg.steps, cfg.seed, cfg.trainer) == (10, 5, {'a': 3e-4, 'b': 2, 'c': True})
    assert resolve(toy.Config, 'train_toy', 'nano').seed == 0


def test_a_missing_parent_names_the_stage_that_makes_it(lab):
    lab.stage(30, 'train_more', 'init_from: k2_toy\nsaves: k2_more\n')
    record = read_run(execute('train_more', 'nano', 'c'))
    assert record['status'] == 'failed'
    assert (
        record['reason']
        == "'k2_toy' is not there yet at nano: run `k2lab train_toy --scale nano --campaign c` first"
    )
    lab.write(
        'configs/pipeline.yaml', 'steps: [{stage: train_toy, changes: {how: well}, saves: [pairs]}]'
    )
    with pytest.raises(LabError, match='run `k2lab train_toy how=well --scale smoke'):
        start('train_toy').find('pairs')


def test_a_parameter_the_notebook_lacks_is_refused(lab):
    path = lab.root / 'nbs/20_train_toy.ipynb'
    path.write_text(path.read_text().replace('run = None', 'rnu = None'))
    with pytest.raises(LabError, match="unknown parameter 'run'"):
        execute('train_toy')
    assert not lab.runs.exists()


# ---- complete on evidence ------------------------------------------------------------------------


def test_a_complete_run(lab):
    seen = []
    path = lab.root / 'nbs/20_train_toy.ipynb'
    both = r'display(job.curve())\njob.metrics()'
    path.write_text(path.read_text().replace('job.metrics()', both))
    folder = execute('train_toy', campaign='c', changes={'steps': '4'}, on_progress=seen.append)
    r = read_run(folder)
    assert (
        r['status'] == 'complete' and r['config']['steps'] == 4 and r['changes'] == {'steps': '4'}
    )
    assert [row.get('step') for row in seen] == [
        None,
        1,
        2,
        3,
        4,
    ]  # the first one says that the kernel starts
    assert r['metrics'] == [
        {
            'stage': 'train_toy',
            'measure': 'value',
            'before': 0,
            'after': 4,
            'low': None,
            'high': None,
            'n': 1,
            'seed': 0,
        }
    ]
    assert (folder / 'k2_toy.txt').read_text() == '4' and not check_published(
        folder, 'k2_toy', deep=True
    )
    assert [(p['name'], p['run'], p['place'], len(p['sha256'])) for p in r['parents']] == [
        ('zero', None, './zero.txt', 64)
    ]
    assert (
        r['peak_gib'] > 0
        and r['wall_s'] > 0
        and r['inputs']['host']['cores'] >= 1
        and r['inputs']['package']['papermill']
        and r['inputs_changed'] == []
    )
    cells = json.loads((folder / 'notebook.ipynb').read_text())['cells']
    assert not any(
        'a lesson' in ''.join(c['source']) for c in cells
    )  # only the run half was executed
    assert 'image/svg+xml' in (folder / 'report.html').read_text()
    assert [p.name for p in folder.iterdir() if p.name.startswith('.')] == ['.owner']


@pytest.mark.parametrize(
    'how, reason',
    [
        ('raise', 'ValueError: the loss is not a number'),
        ('fail', 'failed checks: counted up (as told)'),
        ('full', 'disk full while writing k2_toy; nothing was published under that name'),
        ('die', 'the kernel died'),
    ],
)
def test_a_run_that_goes_wrong_says_why(lab, how, reason):
    folder = execute('train_toy', campaign='c', changes={'how': how})
    r = read_run(folder)
    assert (r['status'], r['reason']) == ('failed', reason)
    assert (how == 'fail') == ('k2_toy' in r['saves']) == (folder / 'k2_toy.txt').exists()
    assert not list(folder.glob('.*.part'))
    cells = [
        c
        for c in json.loads((folder / 'notebook.ipynb').read_text())['cells']
        if c['metadata'].get('papermill', {}).get('exception')
    ]
    assert len(cells) == 1 and any(
        o['output_type'] == 'error' for o in cells[0]['outputs']
    )  # the cell that was at work is marked, a killed one too


def test_a_notebook_without_finish_is_not_complete(lab):
    lab.stage(
        20, 'train_toy', cells=["job = start('{stage}', scale, run, changes)", 'launch(train, job)']
    )
    r = read_run(execute('train_toy'))
    assert (r['status'], r['reason']) == ('failed', 'job.finish() was never reached')


def test_an_error_after_finish_still_fails_the_run(lab):
    lab.stage(
        20,
        'train_toy',
        cells=[
            "job = start('{stage}', scale, run, changes)",
            'launch(train, job)',
            'job.finish()',
            '1/0',
        ],
    )
    r = read_run(execute('train_toy'))
    assert (r['status'], r['reason']) == ('failed', 'ZeroDivisionError: division by zero')


def test_a_save_that_changed_after_its_manifest_fails_the_run(lab):
    spoil = "(job.folder/'k2_toy.txt').write_text('9')"
    lab.stage(
        20,
        'train_toy',
        cells=[
            "job = start('{stage}', scale, run, changes)",
            'launch(train, job)',
            'job.finish()',
            spoil,
        ],
    )
    r = read_run(execute('train_toy'))
    assert (r['status'], r['reason']) == (
        'failed',
        'k2_toy: k2_toy.txt was changed after it was published',
    )


def test_ctrl_c_stops_the_kernel_and_says_interrupted(lab):
    proc = subprocess.Popen(
        [sys.executable, '-m', 'k2lab', 'train_toy', 'how=sleep', '--campaign', 'c'],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    record = lambda: next(iter(runs('c')), None)
    wait_for(lambda: record() and (Path(record()['folder']) / 'metrics.jsonl').exists())
    kernel = record()['owner']['pid']
    assert kernel != proc.pid
    os.killpg(proc.pid, signal.SIGINT)
    _, said = proc.communicate(timeout=30)
    assert proc.returncode == 130 and 'Traceback' not in said
    assert (record()['status'], record()['reason']) == ('interrupted', 'Ctrl-C')
    wait_for(lambda: not Path(f'/proc/{kernel}').exists() if sys.platform == 'linux' else True, 10)


def test_a_run_whose_process_is_gone_shows_as_interrupted(lab):
    job = start('train_toy')
    assert read_run(job.folder)['status'] == 'running'
    written = {p: p.stat() for p in job.folder.iterdir()}
    job.held.close()  # as the system does when a process dies
    assert read_run(job.folder)['status'] == 'interrupted'
    assert json.loads((job.folder / 'run.json').read_text())['status'] == 'running'
    assert written == {p: p.stat() for p in job.folder.iterdir()}  # reading never writes


# ---- folders and files ---------------------------------------------------------------------------


def test_no_two_runs_share_a_folder_or_a_number(lab):
    script = "from k2lab.lab.records import new_folder\nfor _ in range(10): print(new_folder('train_toy', 'race').name)"
    with ThreadPoolExecutor(4) as pool:
        done = list(
            pool.map(
                lambda _: subprocess.run(
                    [sys.executable, '-c', script], capture_output=True, text=True
                ),
                range(4),
            )
        )
    names = [n for d in done for n in d.stdout.split()]
    assert sorted(int(n.split('.')[1].split('-')[0]) for n in names) == list(range(1, 41))


def test_runs_started_together_have_kernels_of_their_own(lab):
    with ThreadPoolExecutor(3) as pool:
        done = list(
            pool.map(lambda i: k2lab('train_toy', f'steps={i}', '--campaign', 'c'), (1, 2, 3))
        )
    assert [d.returncode for d in done] == [0, 0, 0], [d.stdout + d.stderr for d in done]
    assert {(r['config']['steps'], r['metrics'][0]['after'], r['status']) for r in runs('c')} == {
        (i, i, 'complete') for i in (1, 2, 3)
    }


def test_a_folder_is_never_used_twice(lab):
    folder = execute('train_toy')
    with pytest.raises(LabError, match='a run folder is never used twice'):
        start('train_toy', run=str(folder))


def test_a_crash_while_publishing_leaves_nothing_that_looks_complete(lab):
    script = (
        "import os\nfrom k2lab.lab.job import start\njob = start('train_toy')\n"
        "with job.publishing('k2_toy') as path:\n    path.mkdir(); "
        "(path/'model.safetensors').write_text('half'); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, '-c', script]).returncode == -9
    r = runs()[0]
    folder = Path(r['folder'])
    assert r['status'] == 'interrupted' and r['saves'] == {} and not (folder / 'k2_toy').exists()
    assert check_published(folder, 'k2_toy') == 'k2_toy has no manifest'


def test_side_files_travel_with_what_is_published(lab):
    job = start('train_toy')
    with job.publishing('table', '.jsonl') as path:
        path.write_text('{}\n')
        path.with_name(path.name + '.manifest.json').write_text('{"rows": 1}')
    assert (job.folder / 'table.jsonl.manifest.json').exists() and job.record['saves']['table'][
        'files'
    ] == 2
    with pytest.raises(LabError, match='already published'), job.publishing('table', '.jsonl'):
        pass


def test_a_process_that_comes_late_finds_the_first_ones_file_and_keeps_it(lab, monkeypatch):
    job = start('train_toy')
    with job.publishing('table', '.jsonl') as path:
        path.write_text('{"by": 0}\n')
    monkeypatch.setenv('RANK', '1')
    with open_job(job.folder).publishing('table', '.jsonl') as path:
        path.write_text('{"by": 1}\n')
    assert (job.folder / 'table.jsonl').read_text() == '{"by": 0}\n'


# ---- names and lineage ---------------------------------------------------------------------------


def test_parents_are_the_newest_complete_runs_of_the_campaign(lab):
    first, second = (execute('train_toy', campaign='c', changes={'steps': n}) for n in ('2', '5'))
    execute('train_toy', campaign='c', changes={'how': 'raise'})
    execute('train_toy', campaign='other', changes={'steps': '9'})
    job = start('train_toy', campaign='c')
    assert job.find('k2_toy') == second / 'k2_toy.txt'
    assert [(p['name'], p['campaign'], p['run'], p['place']) for p in job.record['parents']] == [
        ('k2_toy', 'c', second.name, None)
    ]
    (second / 'k2_toy.txt').write_text('cut')
    assert (
        start('train_toy', campaign='c').find('k2_toy') == first / 'k2_toy.txt'
    )  # a damaged one is passed over
    with pytest.raises(LabError, match="run `k2lab train_toy --scale nano"):
        start('train_toy', 'nano', campaign='c').find('k2_toy')


def test_a_place_with_nothing_there(lab):
    lab.write(
        'configs/env.yaml',
        'models: {gone: ./gone, hub: moonshotai/Kimi-K2-Base, odd: builtin:gone}',
    )
    job = start('train_toy')
    assert job.find('hub') == 'moonshotai/Kimi-K2-Base'
    for name in ('gone', 'odd'):
        with pytest.raises(LabError, match=f"'{name}' leads to"):
            job.find(name)


def test_a_worker_opens_the_same_job_from_its_folder(lab):
    job = start('train_toy', changes={'steps': '6', 'trainer.lr': '3e-4'})
    again = open_job(job.folder)
    assert (again.cfg, again.env, again.seed) == (
        job.cfg,
        job.env,
        job.seed,
    )
    assert k2lab('work', str(job.folder)).returncode == 0
    job.reload()
    assert job.record['metrics'][0]['after'] == 6 and not check_published(
        job.folder, 'k2_toy', deep=True
    )


def test_several_processes_share_one_run(lab):
    accelerate = Path(__file__).parents[1] / 'configs/accelerate/cpu.yaml'
    lab.write('configs/accelerate/cpu.yaml', accelerate.read_text())
    r = read_run(execute('train_toy', changes={'processes': '2'}))
    assert r['status'] == 'complete', (Path(r['folder']) / 'log.txt').read_text()
    assert all(f'rank {i}' in (Path(r['folder']) / 'log.txt').read_text() for i in (0, 1))
    assert (
        len(r['metrics']) == 1
        and r['metrics'][0]['after'] == 2
        and r['saves']['k2_toy']['files'] == 1
    )
    assert len((Path(r['folder']) / 'metrics.jsonl').read_text().splitlines()) == 2
    wrong = read_run(execute('train_toy', changes={'processes': '2', 'accelerate': 'zero9'}))
    assert 'there are: cpu' in wrong['reason']


# ---- no secrets ----------------------------------------------------------------------------------


def test_no_secret_reaches_a_record(lab, monkeypatch):
    monkeypatch.setenv('TOY_SECRET', 'plain-text-key')
    folder = execute('train_toy', changes={'api_key': 'env:TOY_SECRET'})
    record = read_run(folder)
    assert (record['status'], record['config']['api_key']) == ('complete', 'env:TOY_SECRET')
    for path in folder.iterdir():
        assert 'plain-text-key' not in path.read_text(), path.name
    for changes in (
        {'api_key': 'plain-text-key'},
        {'trainer.note': 'sk-aB3dE5fG7hJ9kL1mN3pQ5rS7tU9'},
        {'trainer.hub_token': 'planted-key-nine'},
        {'api_key': 'env:NO_SUCH_SECRET'},
        {'trainer.url': 'http://me:my-word@127.0.0.1'},
    ):
        with pytest.raises(LabError, match='holds a secret in plain text|no variable NO_SUCH'):
            execute('train_toy', campaign='refused', changes=changes)
    assert not (lab.runs / 'refused').exists()


@pytest.mark.parametrize(
    'key, hidden',
    [
        ('api_key', True),
        ('hf_token', True),
        ('password', True),
        ('client-secret', True),
        ('key', True),
        ('eos_token', False),
        ('key_env', False),
        ('max_tokens', False),
        ('tokens_s', False),
        ('monkey', False),
    ],
)
def test_which_keys_are_secret(key, hidden):
    assert (mask({key: 'a-value-of-8'})[key] == '***') is hidden


# ---- the pipeline --------------------------------------------------------------------------------


def test_a_pipeline_runs_in_order_and_skips_what_is_done(lab):
    lab.stage(30, 'train_more', 'init_from: k2_toy\nsaves: k2_more\n')
    lab.write(
        'configs/pipeline.yaml',
        'steps: [{stage: train_toy, changes: {steps: 4}}, {stage: train_more}]',
    )
    once = k2lab('pipeline', '--campaign', 'c')
    assert once.returncode == 0, once.stderr
    assert [r['metrics'][0]['after'] for r in runs('c')] == [4, 7]
    assert [r['parents'][0]['run'] for r in runs('c')][1] == Path(runs('c')[0]['folder']).name
    twice = k2lab('pipeline', '--campaign', 'c')
    assert twice.returncode == 0 and twice.stderr.count('already, in') == 2 and len(runs('c')) == 2
    assert k2lab('train_toy', '--campaign', 'c', 'steps=9').returncode == 0
    k2lab('pipeline', '--campaign', 'c', '--from', 'train_more')
    assert (
        runs('c')[-1]['metrics'][0]['after'] == 12
    )  # its parent is newer than the run that was there


def test_a_pipeline_stops_at_the_first_failure(lab):
    lab.stage(30, 'train_more')
    lab.write(
        'configs/pipeline.yaml',
        'steps: [{stage: train_toy, changes: {how: raise}}, {stage: train_more}]',
    )
    done = k2lab('pipeline', '--campaign', 'c', '--seed', '3')
    assert (
        done.returncode == 1
        and [r['stage'] for r in runs('c')] == ['train_toy']
        and runs('c')[0]['seed'] == 3
    )
    assert 'failed: ValueError: the loss is not a number' in done.stdout
    assert (
        'train_toy' in k2lab('runs').stdout
        and 'steps' in k2lab('show', Path(runs('c')[0]['folder']).name).stdout
    )
    assert find_run(Path(runs('c')[0]['folder']).name).parent.name == 'c'
