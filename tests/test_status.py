"""The status of a run is its state: runs by hand, records that were edited, readers that never write."""

import json
import os
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from k2lab.cli import main
from k2lab.lab.config import LabError
from k2lab.lab.display import served_paths
from k2lab.lab.files import sha256
from k2lab.lab.job import start
from k2lab.lab.launch import launch
from k2lab.lab.locks import held, lock
from k2lab.lab.records import amend, find_run, promote, read_run, runs, state_now
from k2lab.lab.reproduce import reproduce, resume


def by_hand(how: str = 'well', stage: str = 'train_toy', work=None, **changes):
    "The job of a run by hand, as the cells of a stage notebook make it."
    from importlib import import_module

    job = start(stage, 'smoke', None, {'how': how, **changes}, 'c')
    launch(work or import_module(f'toylab.{stage}').train, job)
    return job.finish()


def statuses() -> list:
    return [(r['status'], r['reason']) for r in runs('c')]


def stopped(job):
    raise KeyboardInterrupt


# ---- by hand -------------------------------------------------------------------------------------


def test_a_run_by_hand_that_failed_or_was_stopped_says_so_at_once(lab):
    with pytest.raises(ValueError):
        by_hand('raise')
    with pytest.raises(KeyboardInterrupt):
        by_hand(work=stopped)
    with pytest.raises(LabError):
        by_hand('fail')
    by_hand()
    assert statuses() == [
        ('failed', 'ValueError: the loss is not a number'),
        ('interrupted', 'Ctrl-C'),
        ('failed', 'failed checks: counted up (as told)'),
        ('complete', ''),
    ]
    assert [held(Path(r['folder'])) for r in runs('c')] == [False] * 4
    assert not any(r.get('edited') for r in runs('c'))
    assert {r['notebook'] for r in runs('c')} == {'none: no Jupyter kernel ran it'}


def test_a_start_in_place_of_another_settles_it(lab):
    lab.stage(30, 'train_more', 'init_from: k2_toy\nsaves: k2_more\n')
    first = start('train_toy', 'smoke', campaign='c')
    other = start('train_more', 'smoke', campaign='c')
    second = start('train_toy', 'smoke', campaign='c')
    why = f'{second.folder.name} was started in its place'
    assert statuses() == [('interrupted', why), ('running', ''), ('running', '')]
    with pytest.raises(LabError, match='closed .interrupted: .*; run the cell with start'):
        launch(stopped, first)
    second.held.close(), other.held.close()  # as when the kernel is restarted or dies
    assert statuses()[1:] == [('interrupted', 'its process is gone')] * 2


def test_a_closed_run_takes_nothing_more(lab):
    job = by_hand()
    written = (job.folder / 'run.json').read_bytes(), (job.folder / 'metrics.jsonl').read_bytes()
    for late in (
        partial(job.measure, 'value', after=9),
        partial(job.check, 'late', True),
        partial(job.log, step=9, loss=0.0),
        partial(launch, stopped, job),
        job.finish,
    ):
        with pytest.raises(LabError, match='closed .complete., so nothing can be added'):
            late()
    assert len(job.record['metrics']) == 1
    assert written == (
        (job.folder / 'run.json').read_bytes(),
        (job.folder / 'metrics.jsonl').read_bytes(),
    )


# ---- edited records ------------------------------------------------------------------------------


def change(record: dict, *path, to):
    for key in path[:-1]:
        record = record[key]
    record[path[-1]] = to


EDITS = {
    'a measure': lambda r: change(r, 'metrics', 0, 'after', to=3),
    'the seed': lambda r: change(r, 'seed', to=1),
    'a number as another type': lambda r: change(r, 'seed', to=False),
    'a parent': lambda r: change(r, 'parents', 0, 'sha256', to='0' * 64),
    'a hash of what was saved': lambda r: change(r, 'saves', 'k2_toy', 'sha256', to='0' * 64),
    'a failed check': lambda r: change(r, 'checks', to=[]),
    'a key more': lambda r: change(r, 'gate', to={'passed': True, 'lines': []}),
    'a key less': lambda r: r.pop('timings'),
    'the status': lambda r: change(r, 'status', to='running'),
    'promoted': lambda r: change(r, 'promoted', to={'because': 'so', 'at': 'now'}),
    'the day': lambda r: change(r, 'started', to='2020-01-01T00:00:00+00:00'),
    'the seal': lambda r: change(r, 'seals', 0, 'why', to='promoted'),
    'the hash of the seal': lambda r: change(r, 'seals', 0, 'sha256', to='0' * 64),
    'no seals': lambda r: (r.pop('seals'), r.setdefault('inputs', {})),
    'seals of nothing': lambda r: change(r, 'seals', to=[None]),
    'edited: no': lambda r: change(r, 'edited', to=False),
}


def test_every_edit_of_a_closed_record_is_noticed(lab, capsys):
    lab.stage(30, 'train_more', 'init_from: k2_toy\nsaves: k2_more\n')
    folder = by_hand().folder
    path, more = folder / 'run.json', start('train_more', 'smoke', campaign='c')
    whole = path.read_text()
    for name, edit in EDITS.items():
        record = json.loads(whole)
        edit(record)
        path.write_text(json.dumps(record))
        assert read_run(folder).get('edited'), name
        assert main(['runs', 'c']) == 0
        assert 'edited by hand' in capsys.readouterr().out, name
        refused = (
            lambda: more.find('k2_toy'),
            lambda: more.find(f'k2_toy@{folder.name}'),
            lambda: amend(folder, tags=['best']),
            lambda: resume(folder),
            lambda: reproduce(folder),
        )
        for use in refused:
            with pytest.raises(LabError, match='edited by hand'):
                use()
    path.write_text(whole)
    assert not read_run(folder).get('edited') and more.find('k2_toy').read_text() == '2'


SHAPES = '[]', '{}', 'null', '{"status": 1}', '{"status": "complete", "metrics": 0.9}', '{"st'


def test_a_record_of_another_shape_is_unreadable_not_a_crash(lab, capsys):
    path = by_hand().folder / 'run.json'
    for text in SHAPES:
        path.write_text(text)
        assert [(r['status'], 'damaged' in r['reason']) for r in runs('c')] == [
            ('unreadable', True)
        ]
        assert main(['runs', 'c']) == 0 and 'unreadable' in capsys.readouterr().out


def test_a_newer_run_that_was_edited_is_passed_over_by_name(lab):
    lab.stage(30, 'train_more', 'init_from: k2_toy\nsaves: k2_more\n')
    good, edited = by_hand().folder, by_hand().folder
    text = (edited / 'run.json').read_text()
    (edited / 'run.json').write_text(text.replace('"after": 2', '"after": 9'))
    more = by_hand(stage='train_more')
    assert more.record['parents'][0]['run'] == good.name
    check = next(c for c in more.record['checks'] if 'passed over' in c['name'])
    assert f'{edited.name}: its record was edited by hand' in check['detail']


def test_a_pipeline_does_not_skip_a_step_whose_record_was_edited(lab):
    lab.write('configs/pipeline.yaml', 'steps: [{stage: train_toy}]')
    run = ['pipeline', '--campaign', 'c']
    assert main(run) == 0 == main(run) and len(runs('c')) == 1
    path = Path(runs('c')[0]['folder']) / 'run.json'
    path.write_text(path.read_text().replace('"after": 2', '"after": 9'))
    assert main(run) == 0 == main(run) and len(runs('c')) == 2


def test_a_record_of_an_earlier_version_has_no_seal_and_is_believed(lab):
    folder = by_hand().folder
    record = json.loads((folder / 'run.json').read_text())
    old = {k: v for k, v in record.items() if k not in ('seals', 'inputs')}
    (folder / 'run.json').write_text(json.dumps(old))
    assert not read_run(folder).get('edited')
    assert amend(folder, notes=[{'text': 'old', 'at': 'now'}])['seals'][0]['why'] == 'noted'
    text = (folder / 'run.json').read_text()
    (folder / 'run.json').write_text(text.replace('"old"', '"new"'))
    assert read_run(folder)['edited']


def test_a_campaign_of_honest_changes_raises_no_alarm(lab):
    gate = {'passed': False, 'lines': []}

    def gated(job):
        from toylab.train_toy import train

        train(job)
        job.record['gate'] = gate

    with pytest.raises(ValueError):
        by_hand('raise')
    refused, good = by_hand(work=gated), by_hand()
    amend(good.folder, tags=['best'])
    amend(good.folder, tags=['best', 'again'], notes=[{'text': 'ok', 'at': 'now'}])
    promote(refused.folder, 'a test')
    killed = start('train_toy', 'smoke', None, {'how': 'well'}, 'c')
    killed.held.close()
    amend(killed.folder, tags=['cut'])
    done = resume(killed.folder)
    again = reproduce(good.folder).folder
    assert read_run(done)['status'] == 'complete' == read_run(again)['status']
    assert (read_run(done)['tags'], 'tags' in read_run(again)) == (['cut'], False)
    assert read_run(done)['attempts'][0]['seal']
    assert not any(r.get('edited') for r in runs())
    whys = [[seal['why'] for seal in read_run(find_run(r['folder']))['seals']] for r in runs('c')]
    assert whys == [
        ['closed'],
        ['closed', 'promoted'],
        ['closed', 'tagged', 'tagged, noted'],
        ['closed'],
    ]


# ---- reading -------------------------------------------------------------------------------------


def listing(home: Path) -> dict:
    "Every file and folder with what a reader could change: size, times, owner, content."
    stat = lambda p: (p.stat().st_mode, p.stat().st_mtime_ns, p.stat().st_ctime_ns)
    return {p: (stat(p), sha256(p) if p.is_file() else '') for p in sorted(home.rglob('*'))}


def test_reading_changes_nothing(lab, capsys):
    lab.stage(30, 'train_more', 'init_from: k2_toy\nsaves: k2_more\n')
    done = by_hand()
    by_hand(stage='train_more')
    running = start('train_toy', 'smoke', campaign='c')
    dead = start('train_more', 'smoke', campaign='d')
    dead.held.close()
    before = listing(lab.root)
    main(['runs'])
    main(['runs', 'c', '--json'])
    main(['show', f'c/{done.folder.name}'])
    main(['show', f'd/{dead.folder.name}'])
    main(['diff', f'c/{done.folder.name}', f'c/{running.folder.name}'])
    assert read_run(running.folder)['status'] == 'running'
    assert read_run(dead.folder)['status'] == 'interrupted'
    capsys.readouterr()
    after = listing(lab.root)
    assert {p.name for p in before.keys() ^ after.keys()} == set()
    assert [p for p in before if before[p] != after[p]] == []


def test_a_reader_does_not_stand_in_the_way_of_an_owner(lab):
    folder = by_hand().folder
    stop = threading.Event()

    def look():
        while not stop.is_set():
            held(folder)

    readers = [threading.Thread(target=look) for _ in range(4)]
    for reader in readers:
        reader.start()
    got = 0
    for _ in range(50):
        if file := lock(folder):
            file.close()
            got += 1
    stop.set()
    for reader in readers:
        reader.join()
    assert got == 50


# ---- liveness ------------------------------------------------------------------------------------


def test_the_lock_says_whether_a_run_lives_and_nothing_else_does(lab):
    job = start('train_toy', 'smoke', campaign='c')
    for odd in ({'pid': 1}, {'host': 'another'}, {'boot': 'another'}, {'born': 0.0}, {}):
        record = job.record | {'owner': odd and job.record['owner'] | odd}
        assert state_now(job.folder, record) == {}, odd
    job.held.close()
    assert state_now(job.folder, job.record)['status'] == 'interrupted'


def test_a_lock_that_cannot_be_asked_reads_as_unknown(lab, capsys):
    job = start('train_toy', 'smoke', campaign='c')
    job.held.close()
    (job.folder / '.owner').unlink()
    (job.folder / '.owner').mkdir()  # what is there cannot be opened
    host = job.record['owner']['host']
    assert statuses() == [('unknown', f'its lock cannot be read from here; ask on {host}')]
    assert main(['runs', 'c']) == 0 and 'unknown' in capsys.readouterr().out
    for use in (lambda: resume(job.folder), lambda: amend(job.folder, tags=['x'])):
        with pytest.raises(LabError, match='ask on .*; go on there, or delete .owner'):
            use()
    (job.folder / '.owner').rmdir()
    assert statuses() == [('interrupted', 'its process is gone')]


@pytest.mark.skipif(os.geteuid() != 0, reason='only root can become another user')
def test_another_user_reads_the_state_or_that_it_is_unknown(lab):
    job = start('train_toy', 'smoke', campaign='c')
    closed = {p: p.stat().st_mode for p in lab.root.parents if not p.stat().st_mode & 1}
    for folder in (*closed, lab.root, *lab.root.rglob('*')):
        folder.chmod(folder.stat().st_mode | 0o055)
    os.seteuid(65534)
    try:
        assert statuses() == [('running', '')]
        with pytest.raises(LabError, match='cannot write there .Permission denied'):
            resume(job.folder)
        os.seteuid(0)
        (job.folder / '.owner').chmod(0o600)
        os.seteuid(65534)
        assert [status for status, _ in statuses()] == ['unknown']
        os.seteuid(0)
        (job.folder / 'run.json').chmod(0o600)
        os.seteuid(65534)
        [(status, reason)] = statuses()
        assert status == 'unreadable' and 'cannot be read (Permission denied)' in reason
    finally:
        os.seteuid(0)
        for folder, mode in closed.items():
            folder.chmod(mode)


# ---- the notebook of a run by hand ---------------------------------------------------------------


def test_a_run_by_hand_leaves_its_notebook_and_page(lab):
    "In a real kernel: once where nobody knows the file, once where the editor names it."
    import nbformat
    from nbclient import NotebookClient

    path = lab.root / 'nbs/20_train_toy.ipynb'
    book = nbformat.read(path, 4)
    half = [c for c in book.cells if c.cell_type == 'code' and 'a lesson' not in c.source]
    broken = [nbformat.from_dict(c | {'id': f'{c.id}x'}) for c in half]
    broken[2].source = "job = start('train_toy', changes={'how': 'raise'})"
    broken[4].source = 'print("after the failure")'
    named = nbformat.v4.new_code_cell(f'__vsc_ipynb_file__ = {str(path)!r}')
    half[3].source = 'print("not saved yet")\n' + half[3].source
    nb = nbformat.v4.new_notebook(cells=[*broken[:5], named, *half])
    NotebookClient(nb, timeout=120, allow_errors=True).execute(cwd=str(lab.root))
    failed, done = runs('scratch')
    assert (failed['status'], done['status']) == ('failed', 'complete')
    assert 'was not found' in failed['notebook']
    assert done['notebook'] == '20_train_toy.ipynb, as executed by hand'
    first, second = (
        json.loads((Path(r['folder']) / 'notebook.ipynb').read_text())['cells']
        for r in (failed, done)
    )
    assert [c['source'] for c in first] == [c['source'] for c in broken[:4]]
    assert first[3]['outputs'][-1]['evalue'] == 'the loss is not a number'
    assert second[0]['source'] == '# train_toy' and 'not saved yet' in second[4]['source']
    assert second[5]['source'] == 'launch(train, job)' and not second[5]['outputs']
    shown = [o.get('text') or o['data']['text/plain'] for o in second[4]['outputs']]
    assert shown[0] == 'not saved yet\n'
    assert 'train_toy · complete, loss 1.000 -> 0.500, 100 tokens/s' in shown
    assert 'complete)' in second[-1]['outputs'][0]['data']['text/plain']
    for run in (failed, done):
        assert 'train_toy' in (Path(run['folder']) / 'report.html').read_text()
        assert not list(Path(run['folder']).glob('.notebook*'))


class Sessions(BaseHTTPRequestHandler):
    "A Jupyter server's answer to who asks for its sessions with the token."

    def do_GET(self):
        right = self.headers['Authorization'] == 'token right' and self.path == '/lab/api/sessions'
        self.send_response(200 if right else 403)
        self.end_headers()
        if right:
            kernel = lambda k, path: {'kernel': {'id': k}, 'path': path}
            self.wfile.write(json.dumps([kernel('a', 'x.ipynb'), kernel('b', 'y.ipynb')]).encode())

    def log_message(self, *args):
        pass


def test_a_server_is_asked_for_the_notebook_of_a_kernel(tmp_path, monkeypatch):
    server = HTTPServer(('127.0.0.1', 0), Sessions)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv('JUPYTER_RUNTIME_DIR', str(tmp_path))
    monkeypatch.setenv('http_proxy', 'http://nowhere.invalid:1')
    port = server.server_address[1]
    here = {'url': f'http://127.0.0.1:{port}/lab/', 'root_dir': '/w', 'token': 'right'}
    tell = lambda name, entry: (tmp_path / name).write_text(json.dumps(entry))
    try:
        tell('jpserver-1.json', here | {'token': 'wrong'})
        tell('jpserver-2.json', here | {'url': f'http://example.invalid:{port}/lab/'})
        tell('jpserver-3.json', {'pid': 1})
        tell('jpserver-4.json', here | {'url': 'http://127.0.0.1:1/'})
        (tmp_path / 'jpserver-5.json').write_text('{"url')
        assert list(served_paths('b')) == []
        tell('jpserver-6.json', here)
        assert list(served_paths('b')) == [Path('/w/y.ipynb')]
        assert list(served_paths('c')) == []
    finally:
        server.shutdown()
        server.server_close()
