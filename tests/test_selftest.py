"""`k2lab selftest`: every block on a CPU with tiny models, and blocks that fail, hang or crash."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from k2lab.cli import main
from k2lab.lab.config import LabError
from k2lab.lab.records import find_run, read_run
from k2lab.scale import blocks, probes, selftest as s
from k2lab.scale.blocks import Bench, Config, Row
from k2lab.scale.probes import Answer, Driver, Gpu


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv('K2LAB_LAB_RUNS_PATH', str(tmp_path))
    return tmp_path


def test_every_block_on_a_cpu_is_a_run(runs, capsys, monkeypatch):
    monkeypatch.setenv('K2LAB_TEST_WITHOUT', 'scipy sklearn deepspeed')  # with 4 bits
    record = s.selftest('cpu', 'tiny')
    said = record['selftest']
    assert {name: one['reason'] for name, one in said.items() if one['status'] == s.FAILED} == {}
    assert (record['status'], list(said)) == ('complete', list(s.BLOCKS))
    rows = {name: {row['what']: row for row in one['rows']} for name, one in said.items()}
    assert all(row['ok'] for one in rows.values() for row in one.values())
    assert 'equal bit for bit; went on from checkpoint-2' in rows['resume']['qwen']['note']
    for name, what in [('full', 'qwen'), ('lora', 'k2'), ('packed', 'qwen'), ('dpo', 'qwen')]:
        assert rows[name][what]['tokens_s'] > 0 and 'plain TRL' in rows[name][what]['against']
    assert said['unsloth']['status'] in (s.OK, s.LEFT_OUT)
    assert record['inputs']['package']['torch'] and record['seals']
    folder = Path(record['folder'])
    assert not (folder / 'models').exists() and not list(folder.rglob('checkpoint-*'))
    measured = {m['measure'] for m in record['metrics']}
    assert {'full qwen, tokens/s', 'generate k2, tokens/s'} <= measured
    capsys.readouterr()
    for words in (['runs', 'selftest'], ['show', folder.name], ['show', folder.name, '--json']):
        assert main(words) == 0  # the table of the runs takes it as any other
    assert 'selftest' in capsys.readouterr().out


def crashes(bench):
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(bench):
    time.sleep(60)


def refuses(bench):
    raise LabError('there is no such model')


def runs_out(bench):
    raise RuntimeError('CUDA out of memory. Tried to allocate 20.00 GiB\nlong advice')


def is_wrong(bench):
    return [Row('logits', note='0.7 apart, at most 0.0001', ok=False), Row('speed', 100.0)]


def is_right(bench):
    return [Row('speed', 100.0, 0.5)]


def needs_more(bench):
    raise blocks.Absent('not available: no stacks in this version')


FAULTS = {
    'crashes': (s.Block(crashes, 30), s.FAILED, 'killed by SIGSEGV'),
    'hangs': (s.Block(hangs, 1), s.FAILED, 'not done within 1 s'),
    'refuses': (s.Block(refuses, 30), s.FAILED, 'there is no such model'),
    'runs_out': (s.Block(runs_out, 30), s.FAILED, 'RuntimeError: CUDA out of memory. Tried'),
    'is_wrong': (s.Block(is_wrong, 30), s.FAILED, 'not right: logits'),
    'needs': (s.Block(is_right, 30, 'no_such_package'), s.LEFT_OUT, 'no_such_package is not inst'),
    'needs_more': (s.Block(needs_more, 30), s.LEFT_OUT, 'not available: no stacks'),
    'fresh': (s.Block(is_right, 30, fresh=True), s.OK, ''),
    'is_right': (s.Block(is_right, 30), s.OK, ''),
}


def test_a_block_that_fails_is_a_line_and_the_others_go_on(monkeypatch, capsys):
    monkeypatch.setattr(s, 'PRELOADED', [])
    monkeypatch.setattr(s, 'BLOCKS', {name: block for name, (block, _, _) in FAULTS.items()})
    assert main(['selftest', 'cpu']) == 1
    out = capsys.readouterr().out
    name = out.strip().splitlines()[-1].partition(':')[0]
    record = read_run(find_run(name))
    for name, (_, status, reason) in FAULTS.items():
        one = record['selftest'][name]
        assert (one['status'], reason in one['reason']) == (status, True), (name, one)
        assert reason in out
    assert record['status'] == 'failed' and 'crashes (killed by SIGSEGV)' in record['reason']
    assert 'is_right speed' in out and 'MFU 50.0 %' in out


def test_no_gpu_is_one_line_with_the_remedy(runs, monkeypatch):
    facts = '{"version": "2.13.0", "cuda": "13.0", "gpus": [], "why": "Found no NVIDIA driver"}'
    monkeypatch.setattr(probes, 'try_package', lambda *a: Answer(0, facts))
    with pytest.raises(LabError) as e:
        main(['selftest', 'gpu'])
    assert 'Found no NVIDIA driver' in str(e.value) and 'k2lab doctor --scale qlora' in str(e.value)
    assert '\n' not in str(e.value) and not list(runs.iterdir())


def test_a_gpu_in_use_is_one_line_with_the_remedy(runs, monkeypatch):
    facts = '{"gpus": [{"uuid": "1", "name": "H100"}]}'
    taken = Gpu('H100', 'GPU-1', 79.6, 12.0, ('4711 (python)',))
    monkeypatch.setattr(probes, 'try_package', lambda *a: Answer(0, facts))
    monkeypatch.setattr(probes, 'driver', lambda: Driver('580.95', '13.0', (taken,), there=True))
    with pytest.raises(LabError) as e:
        main(['selftest', 'gpu'])
    assert '4711 (python)' in str(e.value) and 'wait for process 4711' in str(e.value)
    assert '\n' not in str(e.value) and not list(runs.iterdir())


@pytest.mark.parametrize(
    'words, line',
    [
        (['selftest'], 'selftest needs DEVICE'),
        (['selftest', 'tpu'], "unknown device 'tpu'"),
        (['selftest', 'cpu', '--blocks', 'lorra'], "unknown block 'lorra' (did you mean 'lora'?)"),
        (['selftest', 'cpu', '--blocks', ','], 'names no block'),
    ],
)
def test_what_is_no_request_is_refused(words, line, runs):
    with pytest.raises(LabError, match=r'^(?!.*\n)') as e:
        main(words)
    assert line in str(e.value) and not list(runs.iterdir())


def test_logits_that_differ_are_not_right():
    import torch

    one = torch.randn(4, 100)
    assert blocks.gap('same', one, one.clone(), 'float32').ok
    assert not blocks.gap('swapped', one, one.flip(0), 'bfloat16').ok
    assert not blocks.gap('no number', one, one * float('nan'), 'bfloat16').ok


def test_a_training_that_was_not_killed_is_no_resume(runs, monkeypatch):
    bench = Bench(runs, 'resume', Config('cpu', 'tiny'))
    with pytest.raises(LabError, match='should be killed ended with code 1'):
        blocks.killed(bench, 'killed', 3)  # no model was made


def test_a_lab_that_was_told_of_a_card_says_its_clocks(runs, monkeypatch):
    line = 'NVIDIA H100 80GB HBM3, 580.95.05, 700.00 W, 700.00 W, 345 MHz, 1980 MHz, 2619 MHz, 31'
    smi = runs / 'nvidia-smi'
    smi.write_text(f'#!/bin/sh\necho "{line}"\n')
    smi.chmod(0o755)
    monkeypatch.setenv('PATH', str(runs))
    (card,) = s.card_facts()
    assert card['power.limit'] == '700.00 W' and card['clocks.max.sm'] == '1980 MHz'
    assert json.dumps(card)


def test_ctrl_c_is_an_interrupted_run(runs, monkeypatch):
    def stopped(block, bench):
        raise KeyboardInterrupt

    monkeypatch.setattr(s, 'run_block', stopped)
    with pytest.raises(KeyboardInterrupt):
        s.selftest('cpu', 'tiny', tell=lambda line: None)
    (record,) = [read_run(p.parent) for p in runs.glob('selftest/*/run.json')]
    assert (record['status'], record['reason']) == ('interrupted', 'Ctrl-C')


def waits(bench):
    (bench.home / 'pid').write_text(str(os.getpid()))
    time.sleep(60)


ALONE = """
import test_selftest as t
if __name__ == '__main__':
    t.s.PRELOADED, t.s.BLOCKS = [], {'waits': t.s.Block(t.waits, 60)}
    t.s.selftest('cpu', 'tiny')
"""


def until(found, seconds: float = 30):
    "What `found` returns once it is something."
    end = time.monotonic() + seconds
    while not (it := found()) and time.monotonic() < end:
        time.sleep(0.05)
    return it


def test_a_block_does_not_outlive_a_killed_self_test(runs, tmp_path, monkeypatch):
    here = Path(__file__).parent
    monkeypatch.setenv('PYTHONPATH', f'{here}{os.pathsep}{here.parent}')
    (tmp_path / 'alone.py').write_text(ALONE)
    parent = subprocess.Popen([sys.executable, tmp_path / 'alone.py'], stdout=subprocess.DEVNULL)
    written = lambda: [p for p in runs.glob('selftest/*/pid') if p.read_text()]
    (path,) = until(written)
    child = int(path.read_text())
    parent.kill()
    parent.wait()
    assert until(lambda: not Path(f'/proc/{child}').exists(), 10)
