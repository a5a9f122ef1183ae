"""The plan's figures against the memory that processes take: `python -m k2lab.bench plan`."""

import contextlib
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from k2lab.bench.harness import in_new_process
from k2lab.bench.runner import STAGE

SMOL = dict(
    model_type='llama',
    vocab_size=49152,
    hidden_size=576,
    num_hidden_layers=30,
    intermediate_size=1536,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
    max_position_embeddings=8192,
)


@dataclass(frozen=True)
class Case:
    "What one process does."

    model: str  # k2 | qwen: the nano models; smol: the shape of SmolLM2-135M, random weights
    rows: int  # in a batch
    length: int  # tokens of a row
    load: dict = field(default_factory=dict)  # fields of Loading
    what: str = 'SFT'  # SFT | DPO
    options: dict = field(default_factory=dict)  # further fields of Step
    fitted: bool = False  # whether the plan was chosen on it


CASES = {
    'K2 nano, full': Case('k2', 32, 512, fitted=True),
    'K2 nano, LoRA': Case('k2', 32, 512, dict(lora_rank=16), fitted=True),
    'Qwen nano, full': Case('qwen', 32, 512, fitted=True),
    'SmolLM2-135M, full': Case('smol', 4, 256, fitted=True),
    'K2 nano, DPO': Case('k2', 12, 384, what='DPO', options=dict(answer=256), fitted=True),
    'Qwen nano, 4 bits': Case('qwen', 32, 512, dict(lora_rank=16, four_bit=True, dtype='bfloat16'), fitted=True),
}


def config_of(case: Case) -> dict:
    "The config.json of a case's model."
    from k2lab.models.load import shipped
    from k2lab.scale.parts import config_at

    return SMOL if case.model == 'smol' else config_at(shipped(case.model))


def step_of(case: Case):
    "The step of training that a case takes."
    from k2lab.models.load import Loading
    from k2lab.scale.trace import Step

    return Step(
        config_of(case),
        Loading(**case.load),
        case.rows,
        case.length,
        **{'method': case.what, 'padded': False, **case.options},
    )


def planned_bytes(name: str) -> int:
    "The growth that the plan expects."
    from k2lab.scale.trace import traced

    return traced(step_of(CASES[name])).peak


# ---- what a process really takes -----------------------------------------------------------------


def status(key: str) -> int:
    "A memory figure of this process in bytes, from /proc: VmRSS, VmHWM."
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f'{key}:'))


def opened(case: Case):
    "`(model, tokenizer)` of a case."
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from k2lab.models.load import Loading, open_model, open_tokenizer, shipped

    tok = open_tokenizer(shipped('qwen' if case.model == 'qwen' else 'k2'))
    if case.model != 'smol':
        return open_model(shipped(case.model), Loading(**case.load)), tok
    torch.manual_seed(0)
    config = LlamaConfig(**{k: v for k, v in SMOL.items() if k != 'model_type'})
    dtype = getattr(torch, Loading(**case.load).dtype)
    return AutoModelForCausalLM.from_config(config, dtype=dtype), tok


def examples_of(case: Case, n: int) -> list[dict]:
    "`n` rows of random ids."
    import random

    rng, size = random.Random(0), 2000
    ids = lambda: [rng.randrange(size) for _ in range(case.length)]
    return [dict(input_ids=ids(), completion_mask=[0] + [1] * (case.length - 1)) for _ in range(n)]


def pairs_of(case: Case, n: int) -> list[dict]:
    "`n` pairs of random ids."
    import random

    rng, answer = random.Random(0), case.options['answer']
    ids = lambda k: [rng.randrange(2000) for _ in range(k)]
    one = lambda: dict(prompt_ids=ids(case.length - answer), chosen_ids=ids(answer), rejected_ids=ids(answer))
    return [one() for _ in range(n)]


def warm():
    "Import what a training imports, so that it does not count as its memory."
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.deepseek_v3.modeling_deepseek_v3  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401
    import trl.trainer.dpo_trainer  # noqa: F401
    import trl.trainer.sft_trainer  # noqa: F401


def work(case: Case):
    "What a case does."
    from k2lab.lab.job import start
    from k2lab.models.load import Loading
    from k2lab.training.trainer import fit_dpo, fit_sft

    job = start(STAGE, 'smoke', campaign='bench-plan')
    load, opts = Loading(**case.load), case.options
    model, tok = opened(case)
    trainer: dict[str, Any] = dict(
        per_device_train_batch_size=case.rows,
        max_steps=2,
        learning_rate=1e-4,
        logging_steps=1,
        gradient_checkpointing=opts.get('checkpointing', False),
        gradient_accumulation_steps=2 if opts.get('accumulate') else 1,
    )
    n = case.rows * 2 * trainer['gradient_accumulation_steps']
    kind = opts.get('optimizer', 'adamw')
    if case.what == 'DPO':
        reference = None if load.lora_rank else opened(case)[0]
        trainer |= dict(loss_type=['sigmoid_norm', 'sft'])
        return fit_dpo(job, model, reference, tok, pairs_of(case, n), trainer, load, kind)
    if opts.get('whole_logits'):
        trainer['loss_type'] = 'nll'
    room = case.length if opts.get('packed') else 0
    fit_sft(job, model, tok, examples_of(case, n), trainer, kind, load, room=room)


def measured_bytes(name: str) -> int:
    "The growth of this process while it does the work of a case; run it in a process of its own."
    import torch

    torch.set_num_threads(1)
    warm()
    Path('/proc/self/clear_refs').write_text('5')
    before = status('VmRSS')
    work(CASES[name])
    return status('VmHWM') - before


@contextlib.contextmanager
def plain_malloc() -> Iterator[None]:
    "New processes give freed blocks back at once, so that what they hold is what is alive; runs lie in a folder that goes."
    kept = dict(os.environ)
    with tempfile.TemporaryDirectory() as runs:
        os.environ |= {
            'MALLOC_MMAP_THRESHOLD_': '65536',
            'MALLOC_TRIM_THRESHOLD_': '65536',
            'OMP_NUM_THREADS': '1',
            'K2LAB_LAB_RUNS_PATH': runs,
        }
        try:
            yield
        finally:
            os.environ.clear()
            os.environ |= kept


def line(name: str, planned: int, measured: int) -> str:
    "A line of the table."
    off = planned / measured - 1
    kind = 'chosen on' if CASES[name].fitted else 'judged on'
    return f'{name:44} {planned / 2**20:9.0f} {measured / 2**20:9.0f} {100 * off:+7.1f} %  {kind}'


def plan(cases: str = ''):
    "Print planned and measured growth in MiB of a process for each case, and the errors' median, worst and most under."
    offs = []
    print(f'{"":44} {"planned":>9} {"measured":>9}   error', flush=True)
    with plain_malloc():
        for name in CASES:
            if cases in name:
                figures = planned, measured = planned_bytes(name), in_new_process(measured_bytes, name)
                offs.append(planned / measured - 1)
                print(line(name, *figures), flush=True)
    print(
        f'{len(offs)} cases: median error {100 * statistics.median(map(abs, offs)):.1f} %, worst '
        f'{100 * max(map(abs, offs)):.1f} %, most under {100 * max(0, -min(offs)):.1f} %'
    )


if __name__ == '__main__':
    print(measured_bytes(sys.argv[1]))
