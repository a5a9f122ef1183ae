"""The command as its users meet it: help, mistakes, and the whole pipeline at smoke scale."""

import os
import subprocess
import sys

import pytest

from k2lab.cli import COMMANDS, main
from k2lab.lab.config import LabError, stage_names
from k2lab.lab.records import runs


def k2lab(*words: str, **env: str) -> subprocess.CompletedProcess:
    "What `k2lab words` did."
    command = [sys.executable, '-m', 'k2lab', *words]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **env}, timeout=600
    )


def test_the_whole_pipeline_runs_at_smoke_and_then_skips_what_is_done(tmp_path, monkeypatch):
    monkeypatch.setenv('K2LAB_LAB_RUNS_PATH', str(tmp_path))
    words = 'pipeline', '--scale', 'smoke', '--campaign', 's'
    once = k2lab(*words)
    assert once.returncode == 0, once.stdout + once.stderr
    assert [record['status'] for record in runs('s')] == ['complete'] * 11
    assert (tmp_path / 's' / 'report.html').exists()
    twice = k2lab(*words)
    assert twice.returncode == 0, twice.stdout + twice.stderr
    assert twice.stderr.count('complete: already, in') == 10
    assert [record['stage'] for record in runs('s')[11:]] == ['report']  # it always runs


@pytest.mark.parametrize('name', [*COMMANDS, *stage_names()])
def test_help_fits_in_100_columns(name, capsys):
    assert main([name, '--help']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if len(line) > 100] == []


def test_help_names_every_command_and_stage(capsys):
    assert main(['--help']) == 0
    words = capsys.readouterr().out.replace(',', ' ').split()
    shown = {name for name, command in COMMANDS.items() if command.shown}
    assert set(stage_names()) | shown <= set(words) and len(COMMANDS) - len(shown) == 3


@pytest.mark.parametrize(
    'words, line',
    [
        (['promote', 'a', '--because'], '--because needs a value'),
        (['convert'], 'convert needs'),
        (['work'], 'work needs'),
        (['work', 'nowhere'], 'nowhere'),
        (['resume', 'a', 'b'], "resume does not take 'b'"),
        (['pipeline', 'x'], "pipeline does not take 'x'"),
        (['pipeline', '--seed', 'x'], "seed must be int, not 'x'"),
        (['pipeline', '--from', 'report', '--to', 'prepare_corpus'], 'no step'),
        (['evaluate', '--on', 'moon'], "--on: unknown place 'moon'"),
        (['evaluate', '=3'], "'=3': expected field=value"),
    ],
)
def test_mistakes_are_one_line(words, line, tmp_path, monkeypatch):
    monkeypatch.setenv('K2LAB_LAB_RUNS_PATH', str(tmp_path / 'runs'))
    with pytest.raises(LabError) as e:
        main(words)
    assert line in str(e.value) and '\n' not in str(e.value)


def test_a_line_that_stays_is_no_progress(capsys):
    "A long work says many things within half a minute; what its user must know is not among those left out."
    from k2lab.cli.progress import Progress

    progress = Progress('prepare_corpus', 1, 11)
    for row in (
        dict(phase='reading'),
        dict(phase='reading', step=1),
        dict(phase='no page', stays=True),
    ):
        progress(row)
    assert (
        capsys.readouterr().err
        == '[1/11] prepare_corpus  reading\n[1/11] prepare_corpus  no page\n'
    )
