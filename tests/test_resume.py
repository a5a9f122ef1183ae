"""A training that is killed and resumed equals the uninterrupted one: same losses, weights, batch order."""

import hashlib
import json
import random
import shutil
from pathlib import Path

import pytest

from k2lab.lab.checkpoint import finalize_checkpoint, newest_checkpoint, set_aside, step_of
from k2lab.lab.files import as_json, read_lines
from k2lab.models.load import Loading


@pytest.fixture(scope='module')
def tok():
    from k2lab.text.tokenizer import build_tokenizer

    return build_tokenizer(['the graph G has nodes and edges, the path from a to b'] * 4, 340)


class Bench:
    "What fit needs of a job, in a folder."

    def __init__(self, folder: Path):
        self.folder, self.seed, self.record, self.env, self.cfg = folder, 0, {}, {}, None
        folder.mkdir(parents=True, exist_ok=True)

    def log(self, **row):
        with open(self.folder / 'metrics.jsonl', 'a') as f:
            f.write(as_json(row) + '\n')

    def resumed(self, phase, step):
        self.record['from'] = step

    def check(self, name, ok, detail=''):
        assert ok


WORDS = 'the graph G has nodes and edges, the path from a to b'.split()


def sft_rows(tok, n: int = 26) -> list:
    "Conversations and documents of different lengths."
    from k2lab.text.masks import encode_row

    rng, row = (
        random.Random(1),
        lambda *sizes: [' '.join(rng.choices(WORDS, k=rng.randint(1, size))) for size in sizes],
    )
    talks = [
        encode_row(tok, dict(zip(('prompt', 'response'), row(6, 9))), 'S') for _ in range(n // 2)
    ]
    documents = [
        tok(text).input_ids + [tok.eos_token_id] for _ in range(n - n // 2) for text in row(20)
    ]
    return talks + [dict(input_ids=ids, completion_mask=[1] * len(ids)) for ids in documents]


def pairs(tok, n: int = 20) -> list:
    "Preference pairs of different lengths."
    from k2lab.text.masks import pair_row

    rng = random.Random(2)
    rows = [
        {
            k: ' '.join(rng.choices(WORDS, k=rng.randint(1, 6)))
            for k in ('prompt', 'chosen', 'rejected')
        }
        for _ in range(n)
    ]
    return [pair_row(tok, r, 'S') for r in rows]


def fit(folder: Path, tok, kind: str, how: str, trainer: dict):
    "Train a random model in `folder` from its newest checkpoint; `(what came out, the job)`."
    from k2lab.models.load import small_model
    from k2lab.training.trainer import balance_router, fit_dpo, fit_sft

    job, model = Bench(folder), small_model(kind, 'smoke', tok)
    parts = [
        'attention',
        'dense',
        *(['shared'] if kind == 'k2' else []),
        *(['routed'] if 'routed' in how else []),
    ]
    load = Loading(lora_rank=4, adapt=parts) if 'lora' in how else Loading()
    if 'balance' in how:
        balance_router(model, 0.01)
    told = {
        'per_device_train_batch_size': 4,
        'num_train_epochs': 1,
        'learning_rate': 3e-3,
        'save_steps': 2,
        'save_total_limit': 50,
        'logging_steps': 3,
        'bf16': False,
        **trainer,
    }
    if 'dpo' in how:
        model = fit_dpo(
            job,
            model,
            None if 'lora' in how else small_model(kind, 'smoke', tok),
            tok,
            pairs(tok),
            told,
            load,
        )
    else:
        model = fit_sft(
            job,
            model,
            tok,
            sft_rows(tok),
            told,
            'muon' if 'muon' in how else 'adamw',
            load,
            room=64 if 'packed' in how else 0,
        )
    told = job.record['training']['train']
    return dict(
        weights=fingerprint(model),
        loss=told['loss'],
        stream=told['stream_sha256'],
        batches=told['batches'],
        trained=told['trained_tokens'],
        coverage=told['coverage'],
        curve=[(r['step'], r['loss']) for r in read_lines(folder / 'metrics.jsonl')],
    ), job


def fingerprint(model) -> str:
    "SHA-256 over every tensor of a model, buffers included."
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().float().numpy().tobytes())
    return digest.hexdigest()


def cut(whole: Path, folder: Path, step: int):
    "A copy of a finished training as a kill right after the checkpoint at `step` would have left it."
    shutil.copytree(whole / 'trainer', folder / 'trainer')
    for p in (folder / 'trainer/train').glob('checkpoint-*'):
        if step_of(p) > step:
            shutil.rmtree(p)
    log = whole / 'metrics.jsonl'
    (folder / 'metrics.jsonl').write_text(
        ''.join(as_json(r) + '\n' for r in read_lines(log) if r['step'] <= step)
    )


CASES = [
    (kind, how, trainer, step)
    for kind, how, trainer, steps in [
        ('k2', 'full', {}, (2, 4)),
        (
            'k2',
            'full',
            {'num_train_epochs': 3},
            (6, 8, 14),
        ),  # 7 steps in an epoch: within one, and just after the first
        (
            'k2',
            'full',
            {'num_train_epochs': 3, 'save_steps': 7},
            (7, 14),
        ),  # on the border of an epoch
        ('k2', 'full', {'num_train_epochs': 2, 'gradient_accumulation_steps': 2}, (2, 4, 6)),
        (
            'k2',
            'full',
            {'max_steps': 9, 'save_steps': 3},
            (3, 9),
        ),  # killed after the last step, within an epoch
        ('k2', 'lora', {'max_steps': 9, 'save_steps': 3}, (9,)),
        ('k2', 'full balance', {'num_train_epochs': 2}, (6, 8)),  # the router's bias moves too
        ('k2', 'muon', {'num_train_epochs': 2}, (6, 10)),
        ('k2', 'lora', {'num_train_epochs': 2}, (6, 10)),
        ('k2', 'lora routed', {'num_train_epochs': 2}, (6,)),
        ('k2', 'packed', {'num_train_epochs': 3}, (4, 6)),
        (
            'k2',
            'packed lora routed',
            {'num_train_epochs': 2, 'gradient_accumulation_steps': 2},
            (2,),
        ),
        ('k2', 'dpo', {'num_train_epochs': 2, 'learning_rate': 1e-3}, (4, 6)),
        ('k2', 'dpo lora', {'num_train_epochs': 2, 'learning_rate': 1e-3}, (4,)),
        ('qwen', 'full', {'num_train_epochs': 2, 'train_sampling_strategy': 'random'}, (6, 10)),
        ('qwen', 'full', {'train_sampling_strategy': 'sequential'}, (4,)),
        ('qwen', 'muon', {'num_train_epochs': 2}, (6, 10)),
        ('qwen', 'lora', {}, (4,)),
        ('qwen', 'packed', {'num_train_epochs': 3}, (4,)),
        ('qwen', 'dpo', {'num_train_epochs': 2}, (6,)),
    ]
    for step in steps
]


@pytest.fixture(scope='module')
def whole(tmp_path_factory, tok):
    "The uninterrupted training of a case, made once."
    made = {}

    def get(kind, how, trainer):
        key = json.dumps([kind, how, trainer])
        if key not in made:
            folder = tmp_path_factory.mktemp('whole') / 'run'
            made[key] = folder, fit(folder, tok, kind, how, trainer)[0]
        return made[key]

    return get


@pytest.mark.parametrize(
    'kind, how, trainer, step',
    CASES,
    ids=lambda v: str(v).replace(' ', '-') if isinstance(v, (str, int)) else '',
)
def test_a_resumed_training_is_the_uninterrupted_one(
    kind, how, trainer, step, whole, tok, tmp_path
):
    folder, want = whole(kind, how, trainer)
    cut(folder, tmp_path, step)
    got, job = fit(tmp_path, tok, kind, how, trainer)
    assert job.record['from'] == step
    assert got == want


def test_there_are_25_cases():
    assert len(CASES) >= 25


# ---- damaged checkpoints -------------------------------------------------------------------------

FILES = (
    'model.safetensors',
    'optimizer.pt',
    'scheduler.pt',
    'rng_state.pth',
    'trainer_state.json',
    'MANIFEST.json',
)
DAMAGE = [(name, how) for name in FILES for how in ('missing', 'empty', 'truncated', 'changed')] + [
    (f'extra-{i}', 'extra') for i in range(6)
]


def damage(path: Path, how: str):
    "Spoil one file of a checkpoint."
    body = path.read_bytes() if path.exists() else b''
    if how == 'missing':
        path.unlink()
    else:
        path.write_bytes(
            {
                'empty': b'',
                'truncated': body[: len(body) // 2],
                'changed': body[:-9] + bytes([body[-9] ^ 1]) + body[-8:] if body else b'',
                'extra': b'left over',
            }[how]
        )


@pytest.mark.parametrize('name, how', DAMAGE)
def test_a_damaged_checkpoint_is_set_aside(name, how, tmp_path):
    home = tmp_path / 'train'
    for step in (2, 4):
        place = home / f'checkpoint-{step}'
        place.mkdir(parents=True)
        for file in FILES[:-1]:
            (place / file).write_text(f'{file} at {step}, some text\n' * 3)
        finalize_checkpoint(place, {'step': step})
    path = home / 'checkpoint-4' / name
    if how == 'changed' and name == 'MANIFEST.json':
        path.write_text(
            path.read_text().replace('"step": 4', '"step": 5').replace('"bytes": ', '"bytes": 1')
        )
    else:
        damage(path, how)
    told = set_aside(tmp_path)
    assert len(told) == 1 and told[0].startswith('train/checkpoint-4: ')
    assert step_of(newest_checkpoint(home)[0]) == 2


def test_experts_are_restored_where_the_trainer_alone_drops_them(tok, tmp_path):
    "The gap that `restore_weights` closes: loaded with strict=False, no expert of a saved model finds its place."
    from safetensors.torch import load_file

    from k2lab.models.load import small_model
    from k2lab.training.callbacks import restore_weights

    trained, fresh = (
        small_model('k2', 'smoke', tok, seed=1),
        small_model('k2', 'smoke', tok, seed=2),
    )
    trained.save_pretrained(tmp_path)
    lost = fresh.load_state_dict(load_file(tmp_path / 'model.safetensors'), strict=False)
    assert (
        {n for n in lost.missing_keys if 'experts' in n}
        == {n for n in fresh.state_dict() if '.mlp.experts.' in n}
        != set()
    )
    assert fingerprint(fresh) != fingerprint(trained)
    restore_weights(fresh, tmp_path)
    assert fingerprint(fresh) == fingerprint(trained)
