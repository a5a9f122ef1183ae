"""Names that collide are refused before the start, numbers that are none end a run, and records are strict JSON."""

import math
import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from k2lab.lab.config import LabError

# ---- numbers that are none: training -------------------------------------------------------------


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


TEXT = 'the graph G has nodes and edges, the path from a to b'.split()


@pytest.fixture(scope='module')
def tok():
    from k2lab.text.tokenizer import build_tokenizer

    return build_tokenizer([' '.join(TEXT)] * 4, 340)


def texts(n: int, *lengths: int) -> list[list[str]]:
    "n rows of random words, as many texts of these lengths in each."
    rng = random.Random(0)
    return [[' '.join(rng.choices(TEXT, k=k)) for k in lengths] for _ in range(n)]


def fit(method: str, tok, trainer: dict, job: Bench, model, load=None):
    "Train a model by one of the ways that the lab's stages train."
    from k2lab.models.load import DEFAULT_LOADING, small_model
    from k2lab.text.masks import encode_row
    from k2lab.training.metrics import pair_ids
    from k2lab.training.trainer import fit_dpo, fit_sft

    load = load or DEFAULT_LOADING
    if method.startswith('dpo'):
        keys = ('prompt', 'chosen', 'rejected')
        pairs = pair_ids(tok, [dict(zip(keys, t)) for t in texts(24, 3, 5, 9)], 'S')
        reference = None if load.lora_rank else small_model('k2', 'smoke', tok)
        return fit_dpo(job, model, reference, tok, pairs, trainer, load)
    rows = [dict(prompt=p, response=r) for p, r in texts(24, 3, 9)]
    examples = [encode_row(tok, row, 'S') for row in rows]
    optimizer, room = 'muon' if method == 'muon' else 'adamw', 80 if method == 'packed' else 0
    return fit_sft(job, model, tok, examples, trainer, optimizer, load, room=room)


class Poison:
    "Makes a weight or a gradient of a model no number in its training step `k`; counts the steps."

    def __init__(self, model, what: str, k: int):
        self.what, self.k, self.steps = what, k, 0
        layer = model.model.layers[0]
        layer.register_forward_pre_hook(self.before)
        layer.register_forward_hook(self.after)

    def now(self, layer) -> bool:
        "Whether this is a pass of training, in the step that is poisoned."
        import torch

        return layer.training and torch.is_grad_enabled() and self.steps == self.k

    def before(self, layer, inputs):
        import torch

        self.steps += layer.training and torch.is_grad_enabled()
        if self.what == 'weight' and self.now(layer):
            with torch.no_grad():
                layer.self_attn.o_proj.weight[0, 0] = math.nan

    def after(self, layer, inputs, output):
        if self.what == 'gradient' and self.now(layer):
            output.register_hook(lambda g: g * math.nan)
        return output * math.inf if self.what == 'activation' and self.now(layer) else output


METHODS = ('sft', 'packed', 'lora', 'muon', 'dpo', 'dpo lora')


def seeded(seed: int) -> SimpleNamespace:
    "A way to train, what is poisoned, at which step, and how often is logged."
    rng = random.Random(seed)
    return SimpleNamespace(
        method=METHODS[seed % len(METHODS)],
        what=('weight', 'gradient', 'activation')[seed % 3 if seed < 12 else rng.randrange(3)],
        k=rng.randint(1, 6),
        every=rng.choice([1, 2, 3]),
    )


@pytest.mark.parametrize('seed', range(20))
def test_a_number_that_is_none_stops_a_training_within_one_logging_step(seed, tok, tmp_path):
    from k2lab.models.load import Loading, small_model

    case = seeded(seed)
    load = Loading(lora_rank=2, adapt=('attention',)) if 'lora' in case.method else Loading()
    job, model = Bench(tmp_path), small_model('k2', 'smoke', tok)
    poison = Poison(model, case.what, case.k)
    trainer = dict(
        per_device_train_batch_size=2,
        max_steps=12,
        logging_steps=case.every,
        max_grad_norm=seed % 2,
        bf16=False,
        save_steps=1 if seed % 5 == 0 else 500,
    )
    with pytest.raises(LabError, match='so the weights are ruined; ') as stopped:
        fit(case.method, tok, trainer, job, model, load)
    assert case.k <= poison.steps <= case.k + case.every
    assert all(math.isfinite(row['loss']) for row in job.lines)
    said = re.search(r'the last good loss was [\d.]+ at step (\d+)', str(stopped.value))
    first = case.every if seed % 5 else 1  # each checkpoint has a line, too
    assert int(said[1]) <= case.k if said else case.k <= first
    assert not job.lines or int(said[1]) >= job.lines[-1]['step']
    for sealed in tmp_path.rglob('checkpoint-*/MANIFEST.json'):  # none after the poison
        assert int(sealed.parent.name.rpartition('-')[2]) < case.k
