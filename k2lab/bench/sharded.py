"""The memory of processes that open, train and publish a model together: `python -m k2lab.bench sharded`."""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from k2lab.lab.config import LabError, lab_path

WAYS = ('zero3', 'fsdp2')
# On a CPU accelerate runs FSDP as plain data parallelism, without a word; under another label it is real
SHIM = '''
import atexit, os, sys
from pathlib import Path
if os.environ.get('ACCELERATE_USE_FSDP'):
    import accelerate.state as s
    real = s.PartialState.__init__
    def init(self, *a, **k):
        real(self, *a, **k)
        if self.distributed_type == s.DistributedType.MULTI_CPU:
            self._shared_state['distributed_type'] = s.DistributedType.MULTI_XPU
    s.PartialState.__init__ = init
def leave():
    status = Path('/proc/self/status').read_text().split()
    peak = int(status[status.index('VmHWM:') + 1]) / 2**20
    Path(os.environ['K2LAB_BENCH_PEAKS'], os.environ['RANK']).write_text(str(peak))
if 'RANK' in os.environ:
    atexit.register(leave)
'''


@dataclass(frozen=True)
class Outcome:
    "What one way of splitting took."

    way: str
    model_gib: float
    peaks: list  # of each process, GiB
    record: dict  # of its run

    @property
    def limit(self) -> float:
        "What a process of two may take, in GiB: its half, a tenth more, and the libraries."
        return 0.6 * self.model_gib + 0.6


def k2_config(layers: int, tok):
    "The config of a K2 of about 43 M weights a layer."
    from k2lab.models.load import small_config

    config = small_config('k2', 'smoke', tok)
    shape = dict(
        hidden_size=1024, n_routed_experts=24, moe_intermediate_size=512, num_attention_heads=8
    )
    more = dict(num_key_value_heads=8, intermediate_size=2048, q_lora_rank=256, kv_lora_rank=128)
    for key, value in (shape | more | dict(num_hidden_layers=layers)).items():
        setattr(config, key, value)
    return config


def _random(planned) -> Iterator[tuple]:
    "Made-up values for planned tensors, the same every time."
    import torch

    rng = torch.Generator().manual_seed(0)
    block = torch.randn(2**20, generator=rng)
    for one in planned:
        size, start = math.prod(one.shape), int(torch.randint(2**20, (1,), generator=rng))
        values = block.roll(-start).repeat(-(-size // 2**20))[:size] * 0.02
        values = torch.ones(size) if 'norm' in one.name else values
        yield (
            one.name,
            values.view(one.shape).to(torch.float32 if one.code == 'F32' else torch.bfloat16),
        )


def write_model(folder: Path, megabytes: float):
    "A K2-shaped checkpoint in bfloat16 with made-up weights, written a tensor at a time; its GiB."
    import torch
    from transformers import AutoModelForCausalLM

    from k2lab.models.load import open_tokenizer, readable_config, shipped
    from k2lab.models.sharded import Planned, shards_of, stored_names, stored_shape, write_shards

    tok = open_tokenizer(shipped('k2'))
    layers = max(2, round(megabytes / 82))
    config = k2_config(layers, tok)
    with torch.device('meta'):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    planned = [
        Planned(stored, 'F32' if 'correction' in name else 'BF16', stored_shape(name, t.shape))
        for name, t in model.state_dict().items()
        for stored in stored_names(name, t.shape)
    ]
    write_shards(folder, shards_of(planned, 100 * 2**20), _random(planned))
    config.dtype = 'bfloat16'
    config.save_pretrained(folder)
    readable_config(folder / 'config.json')
    tok.save_pretrained(folder)
    return sum(one.bytes for one in planned) / 2**30


ZERO3 = {
    'bf16': {'enabled': True},
    'train_micro_batch_size_per_gpu': 'auto',
    'gradient_accumulation_steps': 'auto',
    'gradient_clipping': 'auto',
    'zero_optimization': {
        'stage': 3,
        # with the defaults, a model of under a billion weights stays whole once it is gathered
        'stage3_max_live_parameters': 1_000_000,
        'stage3_max_reuse_distance': 0,
        'stage3_prefetch_bucket_size': 0,
        'reduce_bucket_size': 1_000_000,
        'stage3_gather_16bit_weights_on_model_save': False,
    },
}


def write_launch_files(folder: Path):
    "The lab's launch files for two CPU processes."
    import yaml

    for way in WAYS:
        path = folder / 'accelerate' / f'{way}.yaml'
        options = yaml.safe_load(path.read_text()) | dict(num_processes=2, use_cpu=True)
        if way == 'zero3':
            (folder / 'zero3.json').write_text(json.dumps(ZERO3))
            options['deepspeed_config'] = dict(deepspeed_config_file=str(folder / 'zero3.json'))
            options.pop('mixed_precision')
        path.write_text(yaml.safe_dump(options))


def prepare(home: Path, megabytes: float) -> float:
    "A lab in a folder with launch files and a model; the model's GiB."
    shutil.copytree(lab_path('configs'), home / 'configs')
    write_launch_files(home / 'configs')
    (home / 'shim').mkdir()
    (home / 'shim' / 'sitecustomize.py').write_text(SHIM)
    return write_model(home / 'model', megabytes)


def train(home: Path, way: str, model_gib: float, *words: str) -> Outcome:
    "Open, train and publish the model in two processes; `LabError` if they do not end well."
    from k2lab.lab.records import read_run

    peaks = home / f'peaks-{way}'
    peaks.mkdir()
    lab = dict(K2LAB_LAB_RUNS_PATH=home / 'runs', K2LAB_LAB_CONFIGS_PATH=home / 'configs')
    path = os.pathsep.join(filter(None, [str(home / 'shim'), os.environ.get('PYTHONPATH')]))
    env = os.environ | {k: str(v) for k, v in lab.items()}
    env |= dict(PYTHONPATH=path, K2LAB_BENCH_PEAKS=str(peaks), OMP_NUM_THREADS='1')
    fields = dict(
        init_from=home / 'model',
        measures='[]',
        mix='{domain_sft: 8}',
        processes=2,
        accelerate=way,
        load='{dtype: bfloat16, lora_rank: 8, adapt: [attention, shared, dense]}',
    )
    options = dict(max_steps=1, per_device_train_batch_size=1, learning_rate='1e-2')
    options |= dict(gradient_checkpointing='true', save_steps=1, bf16='true')
    told = [f'{k}={v}' for k, v in fields.items()] + [
        f'trainer.{k}={v}' for k, v in options.items()
    ]
    command = [sys.executable, '-m', 'k2lab', 'train_sft_domain', '--scale', 'smoke']
    subprocess.run(
        [*command, '--campaign', way, *told, *words],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    run = next((home / 'runs' / way).iterdir())
    record = read_run(run)
    if record['status'] != 'complete':
        raise LabError(f'{way}: {record["reason"]}; {(run / "log.txt").read_text()[-2000:]}')
    return Outcome(way, model_gib, [float(p.read_text()) for p in sorted(peaks.iterdir())], record)


def sharded(megabytes: float = 2400):
    "Print the peak memory of each of two processes that open, train with LoRA and publish a K2-shaped model."
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        model_gib = prepare(home, megabytes)
        print(f'a K2-shaped model of {model_gib:.2f} GiB in bfloat16, two processes on this CPU')
        for way in WAYS:
            one = train(home, way, model_gib)
            peaks = ' and '.join(f'{peak:.2f}' for peak in one.peaks)
            print(f'{way}: at most {peaks} GiB each; the goal is {one.limit:.2f}')
