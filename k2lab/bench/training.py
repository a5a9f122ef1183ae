"""Training stages against plain TRL scripts: `python -m k2lab.bench train`."""

import math
import random
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from k2lab.bench.harness import in_new_process, median_and_range
from k2lab.bench.runner import STAGE

CAMPAIGN = 'bench-train'
WORDS = (
    'the graph has nodes and edges so 12 + 30 = 42 and neighbors of a are b c path sum '
    'first then answer'
).split()
TRAINER_OPTIONS: dict[str, Any] = dict(
    per_device_train_batch_size=8,
    learning_rate=1e-4,
    num_train_epochs=1,
    logging_steps=1000,
    save_strategy='no',
    gradient_checkpointing=False,
)


class Training(NamedTuple):
    "Seconds and tokens of one training."

    seconds: float
    tokens: int


def texts(n: int, shape: str) -> list[dict]:
    "n seeded question-and-answer rows: of `even` length, or `mixed` (log-normal), as instruction sets are."
    rng = random.Random(0)

    def length() -> int:
        if shape == 'even':
            return 60
        return min(700, 1 + int(rng.lognormvariate(math.log(40), 1.1)))

    sentence = lambda k: ' '.join(rng.choices(WORDS, k=k))
    return [dict(prompt=sentence(8), response=sentence(length())) for _ in range(n)]


def opened() -> tuple[Any, Any]:
    "`(model, tokenizer)` of the nano K2."
    from k2lab.models.load import open_model, open_tokenizer, shipped

    return open_model(shipped('k2')), open_tokenizer(shipped('k2'))


def timed(work: Callable) -> float:
    "Seconds that a call takes."
    began = time.monotonic()
    work()
    return time.monotonic() - began


def on_gpu() -> bool:
    "Whether models are on a GPU."
    from k2lab.models.placement import device_for

    return device_for() != 'cpu'


def trl_options() -> dict[str, Any]:
    "The options of a plain TRL script."
    here = dict(use_cpu=not on_gpu(), bf16=on_gpu(), report_to='none', disable_tqdm=True)
    return {**TRAINER_OPTIONS, **here, 'max_length': None}


def plain_sft(rows: list[dict]) -> Training:
    "SFT as a plain TRL script does it: its trainer, its collator, its order."
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from k2lab.text.masks import encode_rows

    model, tok = opened()
    examples = []
    for example in encode_rows(tok, rows)[0]:
        labels = [i if trained else -100 for i, trained in zip(*example.values())]
        examples.append(dict(input_ids=example['input_ids'], labels=labels))
    data = Dataset.from_list(examples)
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(folder, **trl_options())
        trainer = SFTTrainer(model, config, train_dataset=data, processing_class=tok)
        seconds = timed(trainer.train)
    return Training(seconds, sum(map(len, data['input_ids'])))


def recorded(job) -> Training:
    "The training that a job of the lab recorded."
    done = job.record['training']['train']
    return Training(done['seconds'], done['tokens'])


def ours_sft(rows: list[dict], room: int = 0, **options) -> Training:
    "SFT as a stage of the lab does it; packed into rows of `room` tokens if that is not 0."
    from k2lab.lab.job import start
    from k2lab.text.masks import encode_rows
    from k2lab.training.trainer import fit_sft

    model, tok = opened()
    job = start(STAGE, 'smoke', campaign=CAMPAIGN)
    examples = encode_rows(tok, rows)[0]
    fit_sft(job, model, tok, examples, {**TRAINER_OPTIONS, **options}, room=room)
    return recorded(job)


def pairs_of(rows: list[dict]) -> list[dict]:
    "Preference pairs of the rows: half of the answer is better than all of it."
    return [
        dict(
            prompt=row['prompt'],
            chosen=row['response'][: len(row['response']) // 2],
            rejected=row['response'],
        )
        for row in rows
    ]


def plain_pair(tok, pair: dict) -> dict:
    "A preference pair as text for TRL, which adds the end of turn to the answers itself."
    from k2lab.text.masks import pair_row

    prompt, chosen, rejected = map(tok.decode, pair_row(tok, pair).values())
    end = '<|im_end|>'
    return dict(prompt=prompt, chosen=chosen.removesuffix(end), rejected=rejected.removesuffix(end))


def plain_dpo(rows: list[dict]) -> Training:
    "DPO as a plain TRL script does it, on the same text with the same end of turn."
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    (model, tok), (reference, _) = opened(), opened()
    tok.eos_token = '<|im_end|>'
    data = Dataset.from_list([plain_pair(tok, pair) for pair in pairs_of(rows)])
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(folder, **trl_options())
        trainer = DPOTrainer(model, reference, config, train_dataset=data, processing_class=tok)
        examples: Any = trainer.train_dataset
        tokens = sum(
            2 * len(row['prompt_ids']) + len(row['chosen_ids']) + len(row['rejected_ids'])
            for row in examples
        )
        seconds = timed(trainer.train)
    return Training(seconds, tokens)


def ours_dpo(rows: list[dict]) -> Training:
    "DPO as the lab's stage does it."
    from k2lab.lab.job import start
    from k2lab.text.masks import pair_row
    from k2lab.training.trainer import fit_dpo

    (model, tok), (reference, _) = opened(), opened()
    data = [pair_row(tok, pair) for pair in pairs_of(rows)]
    job = start(STAGE, 'smoke', campaign=CAMPAIGN)
    fit_dpo(job, model, reference, tok, data, TRAINER_OPTIONS)
    return recorded(job)


class Comparison(NamedTuple):
    "The rows of a training, and the two ways to train on them."

    shape: str
    rows: int
    plain: Callable[[list[dict]], Training]
    ours: Callable[[list[dict]], Training]


COMPARISONS = {
    'SFT, rows of one length, equal settings': Comparison(
        'even', 240, plain_sft, lambda rows: ours_sft(rows, train_sampling_strategy='random')
    ),
    'SFT, rows of mixed length, as the lab packs them': Comparison(
        'mixed',
        240,
        plain_sft,
        lambda rows: ours_sft(rows, room=1024, per_device_train_batch_size=1),
    ),
    'DPO, equal settings': Comparison('even', 80, plain_dpo, ours_dpo),
}


def one_training(name: str, ours: bool) -> tuple[Training, float]:
    "One side of a comparison and its peak memory in GiB; run it in a process of its own."
    from k2lab.lab.provenance import peak_gib

    case = COMPARISONS[name]
    training = (case.ours if ours else case.plain)(texts(case.rows, case.shape))
    return training, peak_gib()


def print_comparison(name: str, ours: list[tuple[Training, float]], plain: list):
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
