"The Unsloth backend: one clear error if it cannot be used; if installed, the same rows, stream and record."

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from k2lab.lab.config import LabError
from k2lab.lab.job import start
from k2lab.models.fast_lora import check_collator

LOAD = {'load.backend': 'unsloth', 'load.lora_rank': 4}
here = bool(find_spec('unsloth'))


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv('K2LAB_LAB_RUNS_PATH', str(tmp_path / 'runs'))


@pytest.mark.parametrize(
    'changes, line',
    [
        ({**LOAD, 'load.backend': 'unslot'}, 'unslot'),
        ({**LOAD, 'load.lora_rank': 0}, 'unsloth'),
        ({**LOAD, 'pack': True}, 'pack'),
        ({**LOAD, 'processes': 2}, 'process'),
    ],
)
def test_what_it_cannot_do_is_refused_before_there_is_a_run(changes, line):
    with pytest.raises(LabError, match=line):
        start('distill_to_student', 'smoke', changes=changes)


def test_a_collator_that_bypasses_the_ledger_is_refused():
    class Fit:
        data_collator = dict

    check_collator(Fit, dict)
    with pytest.raises(LabError, match='replaced the collator by type, so what is trained'):
        check_collator(Fit, list)


@pytest.mark.skipif(here, reason='unsloth is installed')
def test_its_absence_is_one_clear_line():
    from k2lab.distill_to_student import work

    with pytest.raises(LabError, match="backend unsloth is not installed; pip install 'k2lab"):
        work(start('distill_to_student', 'smoke', changes=LOAD))


@pytest.mark.skipif(
    not here,
    reason='unsloth is not installed: a GPU machine, or its CPU fallback in an environment of its own',
)
def test_the_same_rows_give_the_same_stream_and_a_certified_model(tmp_path):
    found = {}
    for backend in ('unsloth', 'transformers'):
        job = start(
            'distill_to_student',
            'smoke',
            campaign=backend,
            changes={**LOAD, 'load.backend': backend, 'measures': '[domain_bits_per_byte]'},
        )
        subprocess.run(
            [sys.executable, '-m', 'k2lab', 'work', str(job.folder)],
            check=True,
            cwd=Path(__file__).parent.parent,
            env=dict(os.environ, OMP_NUM_THREADS='1'),
        )
        found[backend] = json.loads((job.folder / 'run.json').read_text())
    a, b = (found[k]['training']['train'] for k in ('unsloth', 'transformers'))
    assert (
        a['stream_sha256'] == b['stream_sha256']
        and a['trained_parameters'] == b['trained_parameters']
    )
    assert (
        a['loss'] == pytest.approx(b['loss'], rel=1e-3)
        and found['unsloth']['export']['saved'] < 1e-5
    )
