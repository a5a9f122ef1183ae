"""The plan's figures against the memory that processes take: `python -m k2lab.bench plan`."""

import contextlib
import gc
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from k2lab.bench.harness import in_new_process
from k2lab.bench.runner import STAGE
from k2lab.lab.config import LabError, lab_path, root

SMOL: dict[str, Any] = dict(
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
    what: str = 'SFT'  # SFT | DPO | measure | export | ranks
    options: dict = field(default_factory=dict)  # further fields of Step


LORA = dict(lora_rank=16)
HALF = dict(lora_rank=16, dtype='bfloat16')
FOUR = dict(lora_rank=16, dtype='bfloat16', four_bit=True)
CHECK = dict(checkpointing=True)

# the plan was chosen on the first eight, and is judged on the others
CASES = {
    'K2, all weights': Case('k2', 8, 512),
    'K2, LoRA': Case('k2', 8, 512, LORA),
    'Qwen, all weights': Case('qwen', 16, 512),
    'Qwen, 4 bits': Case('qwen', 16, 512, FOUR),
    'SmolLM2, all weights': Case('smol', 2, 128),
    'K2, pairs': Case('k2', 4, 384, {}, 'DPO', dict(answer=256)),
    'K2, measured': Case('k2', 16, 512, {}, 'measure'),
    'K2, exported': Case('k2', 12, 256, {}, 'export'),
    'K2, all weights, short rows': Case('k2', 32, 128),
    'K2, all weights, long rows': Case('k2', 2, 1024),
    'K2, Muon': Case('k2', 8, 512, {}, 'SFT', dict(optimizer='muon')),
    'K2, packed': Case('k2', 4, 1024, {}, 'SFT', dict(packed=True)),
    'K2, checkpointing': Case('k2', 16, 512, {}, 'SFT', CHECK),
    'K2, whole logits': Case('k2', 6, 512, {}, 'SFT', dict(whole_logits=True)),
    'K2, two batches an update': Case('k2', 6, 512, {}, 'SFT', dict(accumulate=True)),
    'K2, LoRA in 16 bits': Case('k2', 8, 512, HALF),
    'K2, LoRA on routed experts': Case('k2', 8, 512, LORA | dict(adapt=['attention', 'routed'])),
    'K2, LoRA, pairs': Case('k2', 4, 384, LORA, 'DPO', dict(answer=256)),
    'Qwen, LoRA': Case('qwen', 16, 512, LORA),
    'Qwen, packed': Case('qwen', 8, 1024, {}, 'SFT', dict(packed=True)),
    'Qwen, pairs': Case('qwen', 8, 384, {}, 'DPO', dict(answer=256)),
    'Qwen, 4 bits, checkpointing': Case('qwen', 32, 512, FOUR, 'SFT', CHECK),
    'SmolLM2, LoRA': Case('smol', 2, 256, LORA),
    'SmolLM2, LoRA in 16 bits': Case('smol', 2, 256, HALF),
    'Qwen, measured': Case('qwen', 16, 512, {}, 'measure'),
    'Qwen, LoRA, exported': Case('qwen', 12, 512, LORA, 'export'),
    'SmolLM2, measured': Case('smol', 4, 256, {}, 'measure'),
    'K2, all weights, two ranks': Case('k2', 8, 512, {}, 'ranks'),
    'Qwen, LoRA, two ranks': Case('qwen', 16, 512, LORA, 'ranks'),
}
CHOSEN = list(CASES)[:8]


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
        **{'method': 'DPO' if case.what == 'DPO' else 'SFT', 'padded': False, **case.options},
    )


def planned_bytes(name: str) -> int:
    "The growth that the plan expects."
    from k2lab.scale.plan import Work, plan_for
    from k2lab.scale.trace import traced, traced_measure

    case, step = CASES[name], step_of(CASES[name])
    ranks: dict[str, Any] = dict(processes=2, split='ddp') if case.what == 'ranks' else {}
    measured = traced_measure(step) if case.what == 'measure' else 0
    work = Work(STAGE, step.config, step.load, step, **ranks)
    plan = plan_for(work, False, traced(step), measured)
    phases = {'measure': ['measure'], 'export': ['train', 'export']}.get(case.what, ['train'])
    sums = [sum(plan.device[phase].values()) - plan.device[phase]['libraries'] for phase in phases]
    return max(sums)


# ---- what a process really takes -----------------------------------------------------------------


def status(key: str) -> int:
    "A memory figure of this process in bytes, from /proc: RssAnon, RssFile, RssShmem, VmHWM."
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


def pairs_of(case: Case, tok, n: int) -> list[dict]:
    "`n` pairs of random ids: a question and two answers, each with its turn."
    import random

    from k2lab.text.chat import prompt_ids

    rng, answer = random.Random(0), case.options['answer']
    ids = lambda k: [rng.randrange(300, 1500) for _ in range(k)]
    lead, letter = prompt_ids(tok, [dict(role='user', content='a')]), tok('a')['input_ids'][0]
    at, room = lead.index(letter), case.length - answer - len(lead)
    end = tok.convert_tokens_to_ids('<|im_end|>')
    said = lambda: [*ids(answer - 1), end]
    asked = lambda: lead[:at] + ids(room) + lead[at:]
    return [dict(prompt_ids=asked(), chosen_ids=said(), rejected_ids=said()) for _ in range(n)]


def warm():
    "Train a little, so that what a training imports and sets up once does not count as its memory."
    import torch

    torch.set_num_threads(1)
    train(Case('k2', 1, 32, LORA))
    train(Case('qwen', 1, 32, FOUR))
    train(Case('k2', 1, 64, {}, 'DPO', dict(answer=16)))
    gc.collect()


def trainer_options(case: Case) -> dict[str, Any]:
    "TRL's options for two updates."
    opts = case.options
    found: dict[str, Any] = dict(
        per_device_train_batch_size=case.rows,
        max_steps=2,
        learning_rate=1e-4,
        logging_steps=1,
        gradient_checkpointing=opts.get('checkpointing', False),
        gradient_accumulation_steps=2 if opts.get('accumulate') else 1,
    )
    if case.what == 'DPO':
        found['loss_type'] = ['sigmoid_norm', 'sft']
    elif opts.get('whole_logits'):
        found['loss_type'] = 'nll'
    return found


def train(case: Case):
    "Two updates of a case; `(job, model, tokenizer)`."
    from k2lab.lab.job import start
    from k2lab.models.load import Loading
    from k2lab.training.trainer import fit_dpo, fit_sft

    load, opts, options = Loading(**case.load), case.options, trainer_options(case)
    told = {
        'init_from': {'k2': 'Kimi-K2-Base', 'qwen': 'Qwen2.5-7B'}.get(case.model, 'Kimi-K2-Base')
    }
    job = start(
        STAGE,
        'nano',
        campaign='bench-plan',
        changes=told | {'load': case.load, 'optimizer': 'adamw'},
    )
    (model, tok), kind = opened(case), opts.get('optimizer', 'adamw')
    n = case.rows * 2 * options['gradient_accumulation_steps']
    if case.what == 'DPO':
        reference = None if load.lora_rank else opened(case)[0]
        return (
            job,
            fit_dpo(job, model, reference, tok, pairs_of(case, tok, n), options, load, kind),
            tok,
        )
    room = case.length if opts.get('packed') else 0
    return job, fit_sft(job, model, tok, examples_of(case, n), options, kind, load, room=room), tok


def measure(case: Case):
    "The log-probabilities of some rows."
    from k2lab.training.metrics import row_logps

    model, tok = opened(case)
    row_logps(model, [e['input_ids'] for e in examples_of(case, case.rows)], 0)


def export(case: Case):
    "A training whose model is published with its certificate."
    from k2lab.training.stage import publish_model

    publish_model(*train(case))


WORK = {'SFT': train, 'DPO': train, 'ranks': train, 'measure': measure, 'export': export}


def work(case: Case):
    "What a case does."
    WORK[case.what](case)


def grown(name: str) -> int:
    """The bytes by which this process grows at most while it does the work of a case.

    Only its own memory counts: pages of libraries are mapped anew in a fork, whenever they are read."""
    Path('/proc/self/clear_refs').write_text('5')
    before = status('RssAnon')
    work(CASES[name])
    return status('VmHWM') - status('RssFile') - status('RssShmem') - before


def in_fork(function: Callable[[str], int], name: str) -> int:
    "What `function` says of a name in a fork of this process, which has imported what it needs."
    with ProcessPoolExecutor(1, mp_context=get_context('fork')) as pool:
        return pool.submit(function, name).result()


def in_ranks(name: str) -> int:
    "The growth of the larger of two processes that `accelerate launch` starts on this machine."
    config = str(lab_path('configs') / 'accelerate' / 'cpu.yaml')
    launch = [
        'accelerate.commands.launch',
        '--config_file',
        config,
        '--main_process_port',
        '0',
        '--num_processes',
        '2',
    ]
    command = [sys.executable, '-m', *launch, '-m', 'k2lab.bench.plan', name]
    done = subprocess.run(command, cwd=root(), capture_output=True, text=True)
    found = [int(said.split()[1]) for said in done.stdout.splitlines() if said.startswith('grown ')]
    if done.returncode or len(found) != 2:
        raise LabError(f'{name}: {(done.stderr.strip().splitlines() or ["no figures"])[-1]}')
    return max(found)


def figures(names: list[str]) -> dict[str, float]:
    "Print the planned and the measured growth of each case; `{name: error}`."
    warm()
    offs = {}
    for name in names:
        planned = in_fork(planned_bytes, name)
        ranks = CASES[name].what == 'ranks'
        measured = in_ranks(name) if ranks else in_fork(grown, name)
        offs[name] = planned / measured - 1
        print(line(name, planned, measured), flush=True)
    return offs


@contextlib.contextmanager
def plain_malloc() -> Iterator[None]:
    "New processes give freed blocks back at once, and so hold what is alive; their runs lie in a folder that goes."
    kept = dict(os.environ)
    with tempfile.TemporaryDirectory() as runs:
        os.environ |= {
            'TOKENIZERS_PARALLELISM': 'false',
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
    kind = 'chosen on' if name in CHOSEN else 'judged on'
    return f'{name:44} {planned / 2**20:9.0f} {measured / 2**20:9.0f} {100 * off:+7.1f} %  {kind}'


def plan(cases: str = ''):
    "Print planned and measured growth in MiB of a process for each case, and the errors' median, worst and most under."
    names = [name for name in CASES if cases in name]
    print(f'{"":36} {"planned":>9} {"measured":>9}    error', flush=True)
    with plain_malloc():
        offs = in_new_process(figures, names)
    for kind, chosen in (('chosen on', True), ('judged on', False)):
        if some := [off for name, off in offs.items() if (name in CHOSEN) == chosen]:
            print(summary(kind, some))


def summary(kind: str, offs: list[float]) -> str:
    "The errors of some cases in a line."
    size = [100 * abs(off) for off in offs]
    return (
        f'{kind}: {len(offs)} cases, median error {statistics.median(size):.1f} %, '
        f'worst {max(size):.1f} %, most under {100 * max(0, -min(offs)):.1f} %'
    )


if __name__ == '__main__':
    warm()
    print('grown', grown(sys.argv[1]), flush=True)
