"""What a pipeline does again and what it skips, which run is the newest, and one pipeline at a time."""

import os
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from k2lab.cli import main
from k2lab.cli.steps import alone
from k2lab.lab import records
from k2lab.lab.config import LabError
from k2lab.lab.job import start
from k2lab.lab.locks import lock
from k2lab.lab.records import find_run, iso_time, new_folder, read_run, runs, saved_by, start_time

PIPELINE = 'steps: [{stage: train_toy, changes: {steps: 4}}, {stage: train_more}]'


@pytest.fixture
def two(lab):
    "The toy lab with a pipeline of `train_toy` and `train_more`, which reads what the first one left."
    lab.stage(30, 'train_more', 'init_from: k2_toy\nsaves: k2_more\n')
    lab.write('configs/pipeline.yaml', PIPELINE)
    return lab


def by_hand(stage: str, **changes) -> Path:
    "The folder of a run of the campaign `c`, made in this process."
    from k2lab.lab.job import stage_module

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
    lines = capsys.readouterr().out.splitlines()
    assert [line[:9] for line in lines[1:]] == ['d (was c)', 'd (was c)']
    assert find_run('my-best') == two.runs / 'd' / 'my-best'
    assert saved_by(two.runs / 'd', 'k2_toy', 'smoke')


# ---- one pipeline at a time ----------------------------------------------------------------------

WAIT = """
import sys
from pathlib import Path
from k2lab.cli.steps import alone
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
