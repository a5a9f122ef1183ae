"""Training stages against plain TRL scripts: `python -m k2lab.bench train`."""

import tempfile, time
from k2lab.bench.harness import TRAINER_OPTIONS, median_and_range, texts
from k2lab.bench.runner import STAGE


def opened():
    "`(model, tokenizer)` of the nano K2, threads as the machine has them."
    from k2lab.models.load import open_model, open_tokenizer, shipped

    return open_model(shipped('k2')), open_tokenizer(shipped('k2'))


def timed(work) -> float:
    "Seconds that a call takes."
    began = time.monotonic()
    work()
    return time.monotonic() - began


def plain_sft(rows: list) -> dict:
    "SFT as a script on TRL does it: its trainer, its collator, its order."
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    from k2lab.text.masks import encode_rows

    model, tok = opened()
    data = Dataset.from_list(
        [
            dict(input_ids=e['input_ids'], labels=[i if m else -100 for i, m in zip(*e.values())])
            for e in encode_rows(tok, rows)[0]
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model,
            SFTConfig(
                folder,
                **TRAINER_OPTIONS,
                max_length=None,
                use_cpu=not on_gpu(),
                bf16=on_gpu(),
                report_to='none',
                disable_tqdm=True,
            ),
            train_dataset=data,
            processing_class=tok,
        )
        seconds = timed(trainer.train)
    return dict(seconds=seconds, tokens=sum(map(len, data['input_ids'])))


def ours_sft(rows: list, room: int = 0, **told) -> dict:
    "SFT as a stage of the lab does it; packed into rows of `room` tokens if that is not 0."
    from k2lab.training.trainer import fit_sft
    from k2lab.lab.job import start
    from k2lab.text.masks import encode_rows

    model, tok = opened()
    job = start(STAGE, 'smoke', campaign=CAMPAIGN)
    fit_sft(job, model, tok, encode_rows(tok, rows)[0], {**TRAINER_OPTIONS, **told}, room=room)
    done = job.record['training']['train']
    return dict(seconds=done['seconds'], tokens=done['tokens'])


def pairs_of(rows: list) -> list:
    "Preference pairs of the rows: half of the answer is better than all of it."
    return [
        dict(
            prompt=r['prompt'],
            chosen=r['response'][: len(r['response']) // 2],
            rejected=r['response'],
        )
        for r in rows
    ]


def plain_dpo(rows: list) -> dict:
    "DPO as a script on TRL does it, on the same text with the same end of turn."
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    from k2lab.text.chat import pair_spans, text_of

    (model, tok), (reference, _) = opened(), opened()
    tok.eos_token = '<|im_end|>'
    data = [
        dict(
            zip(
                ('prompt', 'chosen', 'rejected'),
                (text_of(s).removesuffix('<|im_end|>') for s in pair_spans(r)),
            )
        )
        for r in pairs_of(rows)
    ]
    for d, r in zip(data, pairs_of(rows)):
        d['prompt'] = text_of(pair_spans(r)[0])
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model,
            reference,
            DPOConfig(
                folder,
                **TRAINER_OPTIONS,
                max_length=None,
                use_cpu=not on_gpu(),
                bf16=on_gpu(),
                report_to='none',
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(data),
            processing_class=tok,
        )
        tokens = sum(
            2 * len(r['prompt_ids']) + len(r['chosen_ids']) + len(r['rejected_ids'])
            for r in trainer.train_dataset
        )
        seconds = timed(trainer.train)
    return dict(seconds=seconds, tokens=tokens)


def ours_dpo(rows: list) -> dict:
    "DPO as the lab's stage does it."
    from k2lab.text.chat import encode, pair_spans
    from k2lab.training.trainer import fit_dpo
    from k2lab.lab.job import start

    (model, tok), (reference, _) = opened(), opened()
    data = [
        dict(
            zip(
                ('prompt_ids', 'chosen_ids', 'rejected_ids'),
                (encode(tok, s)[0] for s in pair_spans(r)),
            )
        )
        for r in pairs_of(rows)
    ]
    job = start(STAGE, 'smoke', campaign=CAMPAIGN)
    fit_dpo(job, model, reference, tok, data, TRAINER_OPTIONS)
    done = job.record['training']['train']
    return dict(seconds=done['seconds'], tokens=done['tokens'])


CAMPAIGN = 'bench-train'


SAME = dict(train_sampling_strategy='random')


TRAIN = {
    'SFT, rows of one length, equal settings': (
        'even',
        240,
        plain_sft,
        lambda rows: ours_sft(rows, **SAME),
    ),
    'SFT, rows of mixed length, as the lab packs them': (
        'mixed',
        240,
        plain_sft,
        lambda rows: ours_sft(rows, room=1024, per_device_train_batch_size=1),
    ),
    'DPO, equal settings': ('even', 80, plain_dpo, ours_dpo),
}


def on_gpu() -> bool:
    "Whether there is a GPU."
    import torch

    return torch.cuda.is_available()


def one_training(name: str, ours: bool) -> dict:
    "Tokens, seconds and peak memory of one side of a comparison; meant for a process of its own."
    from k2lab.lab.provenance import peak_gib

    shape, n, plain, lab = TRAIN[name]
    return dict((lab if ours else plain)(texts(n, shape)), peak_gib=peak_gib())


def train(rounds: int = 5):
    "Tokens per second and peak memory of the lab's training against plain TRL scripts, same model, rows and tokens."
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    alone = lambda *call: (
        ProcessPoolExecutor(1, mp_context=get_context('spawn')).submit(one_training, *call).result()
    )
    for name in TRAIN:
        pairs = [(alone(name, True), alone(name, False)) for _ in range(rounds)]
        speed = lambda side: [p[side]['tokens'] / p[side]['seconds'] for p in pairs]
        print(
            f'{name}: {median_and_range(speed(0), 0)} tokens/s against {median_and_range(speed(1), 0)}: {median_and_range([a / b for a, b in zip(speed(0), speed(1))])} times as fast; '
            f'peak {pairs[0][0]["peak_gib"]:.2f} against {pairs[0][1]["peak_gib"]:.2f} GiB; {pairs[0][0]["tokens"]} and {pairs[0][1]["tokens"]} tokens',
            flush=True,
        )
