"""The same rows in one batch or in many make the same update, whatever the loss; a loss that is no number stops."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from k2lab.models.load import DEFAULT_LOADING, Loading

CUTS = [(4, 2), (2, 4), (1, 8)]  # rows in a batch, batches in an update
WORDS = 'the graph G has nodes and edges, the path from a to b'.split()
# prompt, chosen and rejected reply in words
SIZES = [
    (1, 11, 14),
    (1, 6, 24),
    (6, 24, 40),
    (3, 1, 2),
    (9, 17, 3),
    (2, 33, 1),
    (5, 2, 19),
    (4, 9, 9),
]
SIZES += [(2, 3, 5), (7, 28, 4), (1, 1, 30)]  # three rows are left for a last update


@dataclass
class Bench:
    "What a training needs of a job, in a folder."

    folder: Path
    seed: int = 0
    record: dict = field(default_factory=dict)
    lines: list = field(default_factory=list)

    def log(self, **row):
        self.lines.append(row)

    def check(self, name, ok, detail=''):
        assert ok


def words(n: int, at: int) -> str:
    "`n` words, other ones at each place."
    return ' '.join(WORDS[(at + 5 * i) % len(WORDS)] for i in range(n))


@pytest.fixture(scope='module')
def tok():
    from k2lab.text.tokenizer import build_tokenizer

    return build_tokenizer(['the graph G has nodes and edges, the path from a to b'] * 4, 340)


@pytest.fixture(scope='module')
def pairs(tok) -> list:
    "Preference pairs of very different lengths, as ids."
    from k2lab.training.metrics import pair_ids

    keys = ('prompt', 'chosen', 'rejected')
    rows = [
        dict(zip(keys, (words(n, i + j) for j, n in enumerate(s)))) for i, s in enumerate(SIZES)
    ]
    return pair_ids(tok, rows, 'S')


def options(batch: int, accumulate: int, **more) -> dict:
    "Trainer options for a comparison: rows in order, a constant rate, every loss logged."
    return dict(
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        train_sampling_strategy='sequential',
        lr_scheduler_type='constant',
        num_train_epochs=1,
        learning_rate=1e-3,
        logging_steps=1,
        bf16=False,
        **more,
    )


@dataclass
class Moved:
    "A trained model's weights, where they started, and the losses on the way."

    start: object
    end: object
    losses: list


def weights_of(model):
    import torch

    return torch.cat([p.detach().float().flatten() for p in model.parameters()])


def apart(one: Moved, two: Moved) -> float:
    "The distance of two results over the way that the first moved."
    return float((one.end - two.end).norm() / (one.end - one.start).norm())


def prefer(folder: Path, tok, pairs: list, trainer: dict, load: Loading = DEFAULT_LOADING) -> Moved:
    "DPO of a small random K2 on pairs."
    from k2lab.models.load import small_model
    from k2lab.training.trainer import fit_dpo

    job, model = Bench(folder), small_model('k2', 'smoke', tok)
    start = weights_of(model)
    reference = None if load.lora_rank else small_model('k2', 'smoke', tok)
    model = fit_dpo(job, model, reference, tok, pairs, trainer, load)
    model = model.merge_and_unload() if load.lora_rank else model
    return Moved(start, weights_of(model), [row['loss'] for row in job.lines])


# every loss of TRL 1.14 that does not sort the pairs of a batch
OTHERS = [
    'sigmoid',
    'hinge',
    'ipo',
    'exo_pair',
    'nca_pair',
    'robust',
    'bco_pair',
    'sppo_hard',
    'apo_zero',
]
OTHERS += ['apo_down', 'discopop', 'sigmoid_norm', 'sft']
LOSSES = {
    'shipped': dict(loss_type=['sigmoid_norm', 'sft'], loss_weights=[1.0, 1.0], beta=2.0),
    'sft': dict(loss_type=['sft']),
    'all': dict(loss_type=OTHERS, beta=1.0, label_smoothing=0.1),
}


@pytest.mark.parametrize('loss', LOSSES)
def test_a_preference_update_is_the_same_however_its_batch_is_cut(loss, tok, pairs, tmp_path):
    more = LOSSES[loss]
    whole = prefer(tmp_path / 'whole', tok, pairs, options(8, 1, **more))
    for batch, accumulate in CUTS:
        cut = prefer(tmp_path / f'{batch}', tok, pairs, options(batch, accumulate, **more))
        assert apart(whole, cut) < 1e-4
        assert cut.losses == pytest.approx(whole.losses, rel=1e-6)


def test_an_adapter_too(tok, pairs, tmp_path):
    load = Loading(lora_rank=4, adapt=('attention',))
    whole, cut = (
        prefer(tmp_path / f'{b}', tok, pairs, options(b, 8 // b, **LOSSES['shipped']), load)
        for b in (8, 1)
    )
    assert apart(whole, cut) < 1e-4


def examples(tok) -> list:
    "Conversations of very different lengths."
    from k2lab.text.masks import encode_row

    rows = [dict(prompt=words(p, i), response=words(c, i)) for i, (p, c, _) in enumerate(SIZES)]
    return [encode_row(tok, row, 'S') for row in rows]


def supervise(folder: Path, tok, trainer: dict, room: int) -> Moved:
    "SFT of a small random K2."
    from k2lab.models.load import small_model
    from k2lab.training.trainer import fit_sft

    job, model = Bench(folder), small_model('k2', 'smoke', tok)
    start = weights_of(model)
    model = fit_sft(job, model, tok, examples(tok), trainer, room=room)
    return Moved(start, weights_of(model), [row['loss'] for row in job.lines])


@pytest.mark.parametrize(
    'loss, room', [('chunked_nll', 0), ('chunked_nll', 80), ('nll', 0), ('dft', 80)]
)
def test_a_supervised_update_is_the_same_too(loss, room, tok, tmp_path):
    whole, cut = (
        supervise(tmp_path / f'{b}', tok, options(b, 4 // b, loss_type=loss), room) for b in (4, 1)
    )
    assert len(whole.losses) > 1
    assert apart(whole, cut) < 1e-4
    assert cut.losses == pytest.approx(whole.losses, rel=1e-6)
