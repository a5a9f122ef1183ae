"""Training stages against plain TRL scripts: `python -m k2lab.bench train`."""

from collections.abc import Callable
from typing import Any, NamedTuple

from k2lab.bench.harness import in_new_process, median_and_range
from k2lab.bench.runner import STAGE
from k2lab.scale.blocks import OPTIONS, Turn, pairs_of, plain_dpo, plain_sft, recorded, texts

CAMPAIGN = 'bench-train'


def opened() -> tuple[Any, Any]:
    "`(model, tokenizer)` of the nano K2."
    from k2lab.models.load import open_model, open_tokenizer, shipped

    return open_model(shipped('k2')), open_tokenizer(shipped('k2'))


def trl_sft(rows: list[dict]) -> Turn:
    "SFT as a plain TRL script does it."
    from k2lab.text.masks import encode_rows

    model, tok = opened()
    return plain_sft(model, tok, encode_rows(tok, rows)[0])


def ours_sft(rows: list[dict], room: int = 0, **options) -> Turn:
    "SFT as a stage of the lab does it; packed into rows of `room` tokens if that is not 0."
    from k2lab.lab.job import start
    from k2lab.text.masks import encode_rows
    from k2lab.training.trainer import fit_sft

    model, tok = opened()
    job = start(STAGE, 'smoke', campaign=CAMPAIGN)
    examples = encode_rows(tok, rows)[0]
    fit_sft(job, model, tok, examples, {**OPTIONS, **options}, room=room)
    return recorded(job)


def trl_dpo(rows: list[dict]) -> Turn:
    "DPO as a plain TRL script does it."
    (model, tok), (reference, _) = opened(), opened()
    return plain_dpo(model, reference, tok, rows)


def ours_dpo(rows: list[dict]) -> Turn:
    "DPO as the lab's stage does it."
    from k2lab.lab.job import start
    from k2lab.text.masks import pair_row
    from k2lab.training.trainer import fit_dpo

    (model, tok), (reference, _) = opened(), opened()
    data = [pair_row(tok, pair) for pair in pairs_of(rows)]
    job = start(STAGE, 'smoke', campaign=CAMPAIGN)
    fit_dpo(job, model, reference, tok, data, OPTIONS)
    return recorded(job)


class Comparison(NamedTuple):
    "The rows of a training, and the two ways to train on them."

    mixed: bool  # whether rows differ in length
    rows: int
    plain: Callable[[list[dict]], Turn]
    ours: Callable[[list[dict]], Turn]


COMPARISONS = {
    'SFT, rows of one length, equal settings': Comparison(
        False, 240, trl_sft, lambda rows: ours_sft(rows, train_sampling_strategy='random')
    ),
    'SFT, rows of mixed length, as the lab packs them': Comparison(
        True,
        240,
        trl_sft,
        lambda rows: ours_sft(rows, room=1024, per_device_train_batch_size=1),
    ),
    'DPO, equal settings': Comparison(False, 80, trl_dpo, ours_dpo),
}


def one_training(name: str, ours: bool) -> tuple[Turn, float]:
    "One side of a comparison and its peak memory in GiB; run it in a process of its own."
    from k2lab.lab.provenance import peak_gib

    case = COMPARISONS[name]
    training = (case.ours if ours else case.plain)(texts(case.rows, mixed=case.mixed))
    return training, peak_gib()


def print_comparison(name: str, ours: list[tuple[Turn, float]], plain: list):
    "Print tokens per second, peak memory and tokens of both sides."
    rates = [[training.tokens / training.seconds for training, _ in side] for side in (ours, plain)]
    ratios = [a / b for a, b in zip(*rates)]
    fast, slow = (median_and_range(rate, 0) for rate in rates)
    (ours_first, ours_gib), (plain_first, plain_gib) = ours[0], plain[0]
    print(
        f'{name}: {fast} tokens/s against {slow}: {median_and_range(ratios)} times as fast; '
        f'peak {ours_gib:.2f} against {plain_gib:.2f} GiB; '
        f'{ours_first.tokens} and {plain_first.tokens} tokens',
        flush=True,
    )


def train(rounds: int = 5):
    "Print tokens per second and peak memory against plain TRL scripts: same model, rows and tokens."
    for name in COMPARISONS:
        ours, plain = [], []
        for _ in range(rounds):
            ours.append(in_new_process(one_training, name, True))
            plain.append(in_new_process(one_training, name, False))
        print_comparison(name, ours, plain)
