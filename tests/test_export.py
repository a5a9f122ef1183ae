"What is exported for larger stacks: the same tensors, the same tokens, the same mask, and refusals in one line."

import json
from pathlib import Path

import pytest

torch = pytest.importorskip('torch')
import pyarrow.parquet as pq
from test_formats import made  # noqa: F401

from k2lab.cli import main
from k2lab.lab.checkpoint import flaw
from k2lab.lab.config import LabError
from k2lab.models.load import open_model, open_tokenizer, shipped, smoke_model
from k2lab.models.quantized import Checkpoint, model_names
from k2lab.scale.export import Source, export, packed_row, source_of
from k2lab.text.rows import read_rows

ROWS = Path(__file__).parent.parent / 'k2lab/data/smoke/domain_sft.jsonl'


def parts(row: dict) -> list[tuple]:
    "(ids, mask) of each sample in a packed row."
    ends = [*row['seq_start_id'][1:], len(row['input_ids'])]
    return [
        (row['input_ids'][a:b], row['loss_mask'][a:b]) for a, b in zip(row['seq_start_id'], ends)
    ]


@pytest.mark.parametrize('to', ['nemo', 'megatron'])
def test_the_exported_tokens_and_tensors_are_the_labs(to, tmp_path, capsys):
    out = tmp_path / 'out'
    command = ['export', str(smoke_model('k2')), str(out), '--to', to, '--data', str(ROWS)]
    assert main([*command, '--length', '512']) == 0
    assert 'packed rows' in capsys.readouterr().out and not flaw(out)
    tok = open_tokenizer(out / 'model')
    samples = [
        s for row in pq.read_table(out / 'data/train.idx.parquet').to_pylist() for s in parts(row)
    ]
    assert len(samples) == len(read_rows(ROWS))
    answers = {row['output'] for row in read_rows(ROWS)}
    for ids, mask in samples:
        predicted = mask if to == 'nemo' else [0, *mask[:-1]]
        learned = tok.decode([i for i, m in zip(ids, predicted) if m])
        answer = learned.removeprefix('<think></think>').removesuffix('<|im_end|>')
        assert learned.endswith('<|im_end|>') and answer in answers
    exported, base = (
        open_model(out / 'model').state_dict(),
        open_model(smoke_model('k2')).state_dict(),
    )
    assert all(torch.equal(t, exported[n]) for n, t in base.items())
    checkpoint = Checkpoint(out / 'model')
    assert set(checkpoint.pieces) == set(model_names(checkpoint.config))  # as on the hub
    assert tok.chat_template == open_tokenizer(shipped('k2')).chat_template
    assert 'data/train.idx.parquet' in (out / 'recipe.yaml').read_text()


def test_8_bits_leave_as_bfloat16(made, tmp_path):  # noqa: F811
    export(Source(made['home'] / 'eight', {'rows': ROWS}, 512), 'nemo', tmp_path / 'out')
    got = Checkpoint(tmp_path / 'out/model')
    assert set(got.kinds.values()) == {'plain'}
    assert all(torch.equal(got[n], made['eight'][n]) for n in got)


def test_an_export_that_cannot_be_is_refused_and_leaves_nothing(tmp_path):
    source = source_of(str(smoke_model('k2')))
    bad = [
        (lambda out: export(source, 'nemo', out), 'no rows'),
        (lambda out: export(source, 'megatron-lm', out), 'megatron'),
        (lambda out: export(Source(source.checkpoint, {'r': ROWS}, 8), 'nemo', out), 'fits into 8'),
        (lambda out: main(['export', str(source.checkpoint), str(out)]), 'which stack'),
        (lambda out: main(['export', 'no-such-run', str(out), '--to', 'nemo']), 'no-such-run'),
        (
            lambda out: main(
                ['export', str(source.checkpoint), str(out), '--to', 'nemo', '--data', 'x']
            ),
            'no x',
        ),
    ]
    for do, reason in bad:
        with pytest.raises(LabError, match=reason):
            do(tmp_path / 'out')
        assert not list(tmp_path.iterdir())


def test_a_mask_belongs_to_its_own_sample():
    row = dict(input_ids=[1, 2, 3, 4], completion_mask=[0, 1, 1, 1], seq_lengths=[2, 2])
    assert packed_row(row, 'megatron')['loss_mask'] == [1, 0, 1, 0]
    assert packed_row(row, 'nemo')['loss_mask'] == [0, 1, 1, 1]
    assert json.dumps(packed_row(row, 'nemo')['seq_start_id']) == '[0, 2]'
