"""`k2lab doctor`: every seeded defect is named with its remedy, and a sound machine raises no alarm."""

import json
import os
import platform
import re
import shutil
import stat
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import huggingface_hub.constants  # noqa: F401  its paths are read once: before a test changes HF_HOME
import pytest

from k2lab.cli import main
from k2lab.lab.config import LabError
from k2lab.scale import doctor, probes
from k2lab.scale.doctor import examine
from k2lab.scale.probes import Answer, ask

ROOT = Path(__file__).resolve().parents[1]
GPU = """<gpu id="0000000{i}:01:00.0"><product_name>{name}</product_name><uuid>GPU-{i}</uuid>
<compute_mode>{mode}</compute_mode><mig_mode><current_mig>{mig}</current_mig></mig_mode>
<ecc_errors><volatile><sram_correctable>7</sram_correctable><dram_uncorrectable>{errors}</dram_uncorrectable></volatile>
<aggregate><dram_uncorrectable>3</dram_uncorrectable></aggregate></ecc_errors>
<fb_memory_usage><total>{total} MiB</total><reserved>500 MiB</reserved><free>{free} MiB</free></fb_memory_usage>
<processes>{processes}</processes></gpu>"""
PROCESS = (
    '<process_info><pid>4711</pid><type>C</type><process_name>/opt/bin/python</process_name>'
    '<used_memory>60000 MiB</used_memory></process_info>'
)
EXTRAS = {'liger-kernel': '0.8.5', 'vllm': '0.30.0', 'unsloth': '2026.10.7'}


def card(i: int = 0, name: str = 'NVIDIA H100 80GB HBM3', **changes) -> str:
    "The XML of an idle GPU."
    idle = dict(mode='Default', mig='Disabled', errors=0, total=81559, free=81079, processes='')
    return GPU.format(i=i, name=name, **idle | changes)


def executable(path: Path, text: str):
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IEXEC)


def checkpoint(folder: Path, shards: int = 2, there: int = 2) -> Path:
    "A folder as a checkpoint lies on disk, with `there` of its `shards` weight files."
    folder.mkdir(parents=True)
    (folder / 'config.json').write_text('{"model_type": "qwen2"}')
    names = {f'w{i}': f'model-{i}.safetensors' for i in range(shards)}
    (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': names}))
    for name, file in [*names.items()][:there]:
        head = json.dumps({name: dict(dtype='F32', shape=[1], data_offsets=[0, 4])}).encode()
        (folder / file).write_bytes(len(head).to_bytes(8, 'little') + head + bytes(4))
    return folder


class Machine:
    "A machine around a copy of this lab: what the doctor asks is answered by files and fakes."

    def __init__(self, home: Path, patch: pytest.MonkeyPatch):
        self.home, self.patch, self.lab, self.bin = home, patch, home / 'lab', home / 'bin'
        self.hub = home / 'huggingface'
        for folder in (self.lab / 'runs', self.bin, self.hub / 'hub', home / 'modules'):
            folder.mkdir(parents=True)
        shutil.copytree(ROOT / 'configs', self.lab / 'configs')
        shutil.copy(ROOT / 'settings.ini', self.lab)
        (self.lab / 'nbs').symlink_to(ROOT / 'nbs')
        for name in ('CUDA_VISIBLE_DEVICES', 'HF_TOKEN', 'HF_HUB_CACHE', 'HF_HUB_OFFLINE'):
            patch.delenv(name, raising=False)
        for name, value in dict(
            K2LAB_ROOT=self.lab,
            K2LAB_LAB_RUNS_PATH='runs',
            HF_HOME=self.hub,
            PATH=self.bin,
            PYTHONPATH=f'{home / "modules"}{os.pathsep}{ROOT}',
            K2LAB_TEST_WITHOUT='',
        ).items():
            patch.setenv(name, str(value))
        self.packages = {**doctor.installed()}
        self.answers: dict[str, Answer] = {}
        self.torch = dict(version='2.13.0+cpu', cuda=None, hip=None, gpus=[], why='')
        patch.setattr(doctor, 'installed', lambda: self.packages)
        patch.setattr(probes, 'try_package', self.answer)
        patch.setattr(probes, 'memory_gib', lambda: 200.0)
        patch.setattr(probes, 'memory_limit', lambda: None)
        patch.setattr(probes, 'shared_gib', lambda: 16.0)
        patch.setattr(probes, 'process_limit', lambda: float('inf'))
        patch.setattr(probes, 'limit_of', lambda name: 65536 if name == 'NOFILE' else float('inf'))
        patch.setattr(probes, 'free_gib', lambda folder: 4000.0)

    def answer(self, name, env, limit=0.0):
        if name == 'torch' and name not in self.answers:
            return Answer(0, json.dumps(self.torch))
        return self.answers.get(name, Answer(0, '{"device": "cuda"}'))

    def gpus(self, *cards: str, driver='580.95.05', cuda='13.0', build='13.0', links='NV18'):
        "Put GPUs in: nvidia-smi lists them, and torch sees them."
        cards = cards or (card(),)
        xml = f"""<?xml version="1.0" ?><!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd"><nvidia_smi_log>
<driver_version>{driver}</driver_version><cuda_version>{cuda}</cuda_version>{''.join(cards)}</nvidia_smi_log>"""
        n = len(cards)
        rows = [[' X ' if i == j else links for j in range(n)] for i in range(n)]
        topo = ['\t'.join(['', *(f'GPU{i}' for i in range(n)), 'CPU Affinity'])]
        topo += ['\t'.join([f'GPU{i}', *row, '0-31']) for i, row in enumerate(rows)]
        self.smi(f"if [ $1 = topo ]; then echo '{chr(10).join(topo)}'; else echo '{xml}'; fi")
        names = re.findall('<product_name>(.*?)<', xml)
        self.torch |= dict(version='2.13.0', cuda=build, bf16=True, grouped='', peers=True)
        self.torch['gpus'] = [
            dict(name=name, uuid=f'{i}', capability=[9, 0], gib=79.6)
            for i, name in enumerate(names)
        ]
        self.packages |= EXTRAS
        return self

    def smi(self, script: str):
        executable(self.bin / 'nvidia-smi', f'#!/bin/sh\n{script}\n')

    def change(self, name: str, *pairs: tuple[str, str]):
        "Replace text in a file of the lab."
        path = self.lab / name
        text = path.read_text()
        for old, new in pairs:
            assert old in text, (name, old)
            text = text.replace(old, new)
        path.write_text(text)

    def sbatch(self, nodes: int, gpus: int):
        "A login node, and what a job asks for."
        executable(self.bin / 'sbatch', '#!/bin/sh\n')
        slurm = self.lab / 'configs' / 'slurm.yaml'
        text = re.sub(r'(?m)^nodes: \S+', f'nodes: {nodes}', slurm.read_text())
        slurm.write_text(re.sub(r'(?m)^gpus_per_node: \S+', f'gpus_per_node: {gpus}', text))

    def fetched(self, place: str, **parts) -> Path:
        "A model in the hub's cache."
        home = self.hub / 'hub' / f'models--{place.replace("/", "--")}'
        (home / 'refs').mkdir(parents=True)
        (home / 'refs' / 'main').write_text('c0ffee')
        return checkpoint(home / 'snapshots' / 'c0ffee', **parts)

    def with_models(self):
        "All that a scale for one GPU opens is in the cache."
        for name in ('Moonlight-16B-A3B', 'Moonlight-16B-A3B-Instruct'):
            self.fetched(f'moonshotai/{name}')
        for name in ('Qwen2.5-1.5B', 'Qwen2.5-7B'):
            self.fetched(f'Qwen/{name}')
        return self

    def module(self, name: str, text: str):
        "A package that hides the installed one, tried for real."
        folder = self.home / 'modules' / name
        folder.mkdir()
        (folder / '__init__.py').write_text(text)
        real = lambda package, env, limit=20.0: (
            ask([sys.executable, '-c', probes.PROBES[package]], limit, env)
            if package == name
            else self.answer(package, env)
        )
        self.patch.setattr(probes, 'try_package', real)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    return Machine(tmp_path, monkeypatch)


# ---- sound machines ------------------------------------------------------------------------------


def one_card(m):
    m.gpus().with_models()


def nothing_fetched_but_online(m):
    m.gpus(card(name='NVIDIA H200', total=143771, free=143156))
    m.change('settings.ini', ('offline = true', 'offline = false'))


def eight_cards(m):
    m.gpus(*(card(i) for i in range(8)))
    for gpu in m.torch['gpus']:
        gpu['gib'] = 180.0
    for path in (m.lab / 'configs').glob('*.yaml'):
        path.write_text(re.sub('processes: (256|64)', 'processes: 8', path.read_text()))
    env = m.lab / 'configs' / 'env.yaml'  # of models that eight of them can hold
    text = re.sub(r'moonshotai/Kimi-K2\S*', 'moonshotai/Moonlight-16B-A3B', env.read_text())
    env.write_text(re.sub(r'Qwen2.5-(7B|32B): Qwen/\S+', r'Qwen2.5-\1: Qwen/Qwen2.5-1.5B', text))
    m.change('settings.ini', ('offline = true', 'offline = false'))


def login_node(m):
    m.gpus()
    (m.bin / 'nvidia-smi').unlink()
    m.torch |= dict(cuda='13.0', gpus=[], why='Found no NVIDIA driver on your system.')
    m.sbatch(nodes=32, gpus=8)
    m.change('settings.ini', ('offline = true', 'offline = false'))


def slice_of_a_card(m):
    m.gpus(card(mig='Enabled', free='N/A')).with_models()


def neighbour_works_on_the_other_card(m):
    m.gpus(card(0, free=900, processes=PROCESS), card(1)).with_models()
    m.torch['gpus'] = m.torch['gpus'][1:]
    m.patch.setenv('CUDA_VISIBLE_DEVICES', '1')


def cards_of_amd(m):
    m.gpus().with_models()
    (m.bin / 'nvidia-smi').unlink()
    m.torch |= dict(cuda=None, hip='7.1')


def older_driver_of_the_same_cuda(m):
    m.gpus(driver='535.129.03', cuda='12.2', build='12.8').with_models()


SOUND = [
    ('smoke', lambda m: None),
    ('nano', lambda m: None),
    ('nano', one_card),
    ('qlora', one_card),
    ('qlora', nothing_fetched_but_online),
    ('qlora', slice_of_a_card),
    ('qlora', neighbour_works_on_the_other_card),
    ('qlora', cards_of_amd),
    ('qlora', older_driver_of_the_same_cuda),
    ('full', eight_cards),
    ('full', login_node),
]


@pytest.mark.parametrize('scale, put', SOUND, ids=lambda v: getattr(v, '__name__', v))
def test_a_sound_machine_raises_no_alarm(machine, scale, put):
    put(machine)
    if scale == 'full':
        machine.patch.setattr(probes, 'free_gib', lambda folder: 60_000.0)
    assert [str(f) for f in examine(scale) if f.status != 'ok'] == []


@pytest.mark.parametrize('scale', ['smoke', 'nano'])
def test_this_machine_raises_no_alarm(scale, capsys, monkeypatch):
    monkeypatch.setenv('K2LAB_TEST_WITHOUT', '')
    assert main(['doctor', '--scale', scale]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith(('warn', 'fail'))] == []
    assert lines[-1] == f'{scale} can run here'


# ---- seeded defects ------------------------------------------------------------------------------


def broken_file(m, place: str):
    "A local checkpoint of which a shard is missing, behind a name that a stage opens."
    checkpoint(m.home / 'mine', shards=3, there=2)
    m.change('configs/env.yaml', (place, str(m.home / 'mine')))


def locks_refused(at, how):
    raise OSError(37, 'No locks available')


def small(name: str, value: float):
    "A limit below what is needed."
    return lambda m: m.patch.setattr(
        probes, 'limit_of', lambda n: value if n == name else float('inf')
    )


def fixed(name: str, value):
    "A probe with another answer."
    return lambda m: m.patch.setattr(probes, name, lambda *a: value)


def with_card(put):
    "A defect on a machine that is sound otherwise: one GPU, every model fetched."
    return lambda m: (one_card(m), put(m))


def torch_says(**facts):
    return with_card(lambda m: m.torch.update(facts))


def package(name: str, version: str | None):
    def put(m):
        m.packages.pop(name, None)
        if version:
            m.packages[name] = version

    return put


def env(**variables):
    return lambda m: [m.patch.setenv(k, v) for k, v in variables.items()]


LOADS = 'OSError: libcudart.so.13: cannot open shared object file'
WRONG = """
from types import SimpleNamespace as S
import torch
__version__ = '0.50.2'
class Linear4bit(torch.nn.Linear):
    def __init__(self, a, b, bias, compute_dtype, quant_type): super().__init__(a, b, bias=bias)
    def forward(self, x): return (x.detach() @ self.weight.T) * x.sum() / x.sum().detach()
nn = S(Linear4bit=Linear4bit)
torch.nn.Parameter.quant_state = None
functional = S(dequantize_4bit=lambda w, state: w)
"""
DEFECTS = {
    # name: (scale, what is broken, the check that must say so, its status, its found, its remedy)
    'python too old': (
        'smoke',
        lambda m: m.patch.setattr(platform, 'python_version', lambda: '3.10.14'),
        ('python', 'fail', '3.10.14', 'python3.12'),
    ),
    'package missing': (
        'smoke',
        package('trl', None),
        ('packages', 'fail', 'trl missing', 'pip install'),
    ),
    'package out of range': (
        'smoke',
        package('transformers', '5.10.0'),
        ('packages', 'fail', 'transformers 5.10.0 (needs', 'pip install'),
    ),
    'package not as tested': (
        'smoke',
        package('peft', '0.22.0'),
        ('packages', 'warn', 'peft 0.22.0 (tested', 'constraints.txt'),
    ),
    'torch cannot be imported': (
        'smoke',
        lambda m: m.module('torch', 'raise ImportError("libcudart.so.13: cannot open")'),
        ('torch', 'fail', 'libcudart.so.13', '--force-reinstall'),
    ),
    'torch hangs': (
        'smoke',
        lambda m: m.module('torch', 'import time; time.sleep(60)'),
        ('torch', 'fail', 'no answer', 'importtime'),
    ),
    'torch without CUDA': (
        'qlora',
        torch_says(version='2.13.0+cpu', cuda=None, gpus=[]),
        ('torch', 'fail', 'built without CUDA', 'torch==2.13.0'),
    ),
    'driver too old': (
        'qlora',
        lambda m: m.gpus(driver='535.129.03', cuda='12.2').with_models(),
        ('torch', 'fail', 'driver 535.129.03 serves up to 12.2', 'driver 580'),
    ),
    'GPU hidden': (
        'qlora',
        lambda m: (torch_says(gpus=[])(m), env(CUDA_VISIBLE_DEVICES='')(m)),
        ('torch', 'fail', "CUDA_VISIBLE_DEVICES=''", 'unset CUDA_VISIBLE_DEVICES'),
    ),
    'driver not loaded': (
        'qlora',
        with_card(
            lambda m: m.smi('echo "NVIDIA-SMI has failed because it could not talk" >&2; exit 9')
        ),
        ('gpus', 'fail', 'NVIDIA-SMI has failed', 'dmesg'),
    ),
    'driver hangs': (
        'qlora',
        with_card(lambda m: m.smi('exec /bin/sleep 60')),
        ('gpus', 'fail', 'did not answer', 'dmesg'),
    ),
    'driver answers half a page': (
        'qlora',
        with_card(lambda m: m.smi('echo "<nvidia_smi_log><gpu>"')),
        ('gpus', 'fail', '<nvidia_smi_log><gpu>', 'dmesg'),
    ),
    'no GPU': ('qlora', lambda m: m.with_models(), ('gpus', 'fail', 'none here', '--on slurm')),
    'too few GPUs': (
        'full',
        lambda m: m.gpus(card(0), card(1)),
        ('gpus', 'fail', '2 x NVIDIA H100', 'lower processes'),
    ),
    'GPUs of two kinds': (
        'full',
        lambda m: (eight_cards(m), m.torch['gpus'][3].update(name='NVIDIA A100')),
        ('gpus', 'warn', '7 x NVIDIA H100 80GB HBM3, 1 x NVIDIA A100', 'CUDA_VISIBLE_DEVICES'),
    ),
    'GPU in use': (
        'qlora',
        with_card(lambda m: m.gpus(card(free=20_000, processes=PROCESS))),
        ('gpu memory', 'fail', '4711 (python)', 'wait for process 4711'),
    ),
    'first GPU in use': (
        'qlora',
        with_card(lambda m: m.gpus(card(0, free=900, processes=PROCESS), card(1))),
        ('gpu memory', 'warn', 'GPU 0: 0.9 of 79.6 GiB', 'CUDA_VISIBLE_DEVICES=1'),
    ),
    'GPU with broken memory': (
        'qlora',
        with_card(lambda m: m.gpus(card(errors=2))),
        ('gpu health', 'fail', '2 uncorrectable', 'gpu-reset'),
    ),
    'GPU closed': (
        'qlora',
        with_card(lambda m: m.gpus(card(mode='Prohibited'))),
        ('gpu health', 'fail', 'Prohibited', 'nvidia-smi -c DEFAULT'),
    ),
    'GPU without bfloat16': (
        'qlora',
        lambda m: (
            one_card(m),
            m.torch.update(bf16=False),
            m.torch['gpus'][0].update(name='Tesla V100', capability=[7, 0]),
        ),
        ('gpu arithmetic', 'fail', 'Tesla V100: no bfloat16', 'Ampere'),
    ),
    'no grouped matmul': (
        'qlora',
        torch_says(grouped='no kernel image is available'),
        ('gpu arithmetic', 'fail', 'no kernel image', 'torch'),
    ),
    'slow links': (
        'full',
        lambda m: (
            eight_cards(m),
            m.gpus(*map(card, range(8)), links='SYS'),
            m.torch.update(peers=False),
        ),
        ('gpu links', 'warn', 'two processors', 'zero2'),
    ),
    'liger missing': (
        'qlora',
        with_card(package('liger-kernel', None)),
        ('liger-kernel', 'warn', 'not installed', "'.[gpu]'"),
    ),
    'vllm missing': (
        'qlora',
        with_card(package('vllm', None)),
        ('vllm', 'warn', 'not installed', "'.[serve]'"),
    ),
    'vllm broken': (
        'qlora',
        with_card(
            lambda m: m.answers.update(vllm=Answer(1, err='ImportError: undefined symbol: _ZN3c10'))
        ),
        ('vllm', 'fail', 'undefined symbol', "pip uninstall -y vllm && pip install"),
    ),
    'deepspeed missing where all need it': (
        'full',
        lambda m: (eight_cards(m), package('deepspeed', None)(m)),
        ('deepspeed', 'fail', 'not installed', "'.[deepspeed]'"),
    ),
    'deepspeed hangs': (
        'smoke',
        lambda m: m.module('deepspeed', 'import time; time.sleep(60)'),
        ('deepspeed', 'fail', 'no answer', 'pip uninstall'),
    ),
    'bitsandbytes gives wrong gradients': (
        'smoke',
        lambda m: m.module('bitsandbytes', WRONG),
        ('bitsandbytes', 'fail', 'backward: not its gradient', 'pip uninstall'),
    ),
    'bitsandbytes crashes': (
        'smoke',
        lambda m: m.module('bitsandbytes', 'import os; os.kill(os.getpid(), 11)'),
        ('bitsandbytes', 'fail', 'SIGSEGV', 'pip uninstall'),
    ),
    'little memory': (
        'nano',
        fixed('memory_gib', 1.5),
        ('memory', 'fail', '1.5 GiB free', 'end other programs'),
    ),
    'small container': (
        'nano',
        lambda m: (fixed('memory_gib', 1.0)(m), fixed('memory_limit', 1.0)(m)),
        ('memory', 'fail', 'limited by the container', 'docker run --memory'),
    ),
    'small shared memory': (
        'full',
        lambda m: (eight_cards(m), fixed('shared_gib', 0.0625)(m)),
        ('/dev/shm', 'fail', '0.06 GiB', '--shm-size'),
    ),
    'few open files': (
        'qlora',
        with_card(small('NOFILE', 1024)),
        ('open files', 'warn', '1,024', 'ulimit -n'),
    ),
    'few processes': (
        'smoke',
        fixed('process_limit', 100),
        ('processes', 'fail', '100', '--pids-limit'),
    ),
    'small files': ('smoke', small('FSIZE', 2**30), ('file size', 'fail', '1.0 GiB', 'ulimit -f')),
    'small address space': (
        'qlora',
        with_card(small('AS', 64 * 2**30)),
        ('address space', 'fail', '64 GiB', 'ulimit -v'),
    ),
    'disk of runs full': (
        'nano',
        fixed('free_gib', 0.4),
        ('disk of runs', 'fail', '0.4 GiB free', 'runs_path'),
    ),
    'no room for a checkpoint': (
        'qlora',
        with_card(fixed('free_gib', 25.0)),
        ('disk of runs', 'warn', '25.0 GiB free', 'make room'),
    ),
    'no inodes': (
        'smoke',
        fixed('free_inodes', 3),
        ('files on disk', 'fail', 'inodes', 'delete files'),
    ),
    'a shard does not fit the disk': (
        'qlora',
        lambda m: (nothing_fetched_but_online(m), fixed('free_gib', 40.0)(m)),
        ('disk of models', 'fail', '40.0 GiB free', 'HF_HOME'),
    ),
    'runs cannot be written': (
        'smoke',
        lambda m: m.patch.setattr(probes.os, 'access', lambda path, mode: False),
        ('locks, renames', 'fail', 'no permission', 'chown'),
    ),
    'no locks': (
        'smoke',
        lambda m: m.patch.setattr(probes.fcntl, 'flock', locks_refused),
        ('locks, renames', 'fail', 'no file locks there', 'runs_path'),
    ),
    'object store': (
        'smoke',
        fixed('store_kind', 'fuse.s3fs'),
        ('locks, renames', 'fail', 'object store', 'runs_path'),
    ),
    'offline by settings.ini': (
        'qlora',
        lambda m: m.gpus(),
        (
            'model',
            'fail',
            '[hub] offline in settings.ini',
            'hf download moonshotai/Moonlight-16B-A3B',
        ),
    ),
    'offline by the environment': (
        'qlora',
        lambda m: (nothing_fetched_but_online(m), env(HF_HUB_OFFLINE='1')(m)),
        ('model', 'fail', '(HF_HUB_OFFLINE)', 'unset HF_HUB_OFFLINE'),
    ),
    'offline by the setting in the environment': (
        'qlora',
        lambda m: (nothing_fetched_but_online(m), env(K2LAB_HUB_OFFLINE='true')(m)),
        ('model', 'fail', '(K2LAB_HUB_OFFLINE)', 'unset K2LAB_HUB_OFFLINE'),
    ),
    'half a checkpoint': (
        'qlora',
        lambda m: (
            one_card(m),
            shutil.rmtree(m.hub / 'hub' / 'models--Qwen--Qwen2.5-1.5B'),
            m.fetched('Qwen/Qwen2.5-1.5B', shards=4, there=1),
        ),
        ('model', 'fail', '1 of 4 weight files', 'hf download Qwen/Qwen2.5-1.5B'),
    ),
    'local checkpoint without a shard': (
        'qlora',
        lambda m: (one_card(m), broken_file(m, 'Qwen/Qwen2.5-1.5B')),
        ('model', 'fail', '2 of 3 weight files', 'copy the folder again'),
    ),
    'model name leads nowhere': (
        'nano',
        lambda m: m.change('configs/env.yaml', ('builtin:qwen-nano-base', './models/gone')),
        ('model', 'fail', 'there is nothing there', 'models: Qwen2.5-7B in configs/env.yaml'),
    ),
    'model name unknown': (
        'nano',
        lambda m: m.change(
            'configs/train_continual_pretrain.yaml',
            ('init_from: Kimi-K2-Base', 'init_from: Kimi-K2-Bass'),
        ),
        ('model', 'fail', "'Kimi-K2-Bass' (did you mean 'Kimi-K2-Base'?)", 'env.yaml'),
    ),
    'model is no smoke model': (
        'smoke',
        lambda m: m.change(
            'configs/env.yaml', ('Qwen2.5-7B: smoke:qwen', 'Qwen2.5-7B: smoke:qven')
        ),
        ('model', 'fail', "no smoke model 'qven'", 'smoke:k2 or smoke:qwen'),
    ),
    'model without a place': (
        'nano',
        lambda m: m.change(
            'configs/env.yaml', ('Kimi-K2-Base: builtin:k2-nano-base', 'Kimi-K2-Base:')
        ),
        ('model', 'fail', 'None', 'Kimi-K2-Base in configs/env.yaml'),
    ),
    'runs that cannot even be looked at': (
        'smoke',
        lambda m: m.patch.setattr(probes, 'existing', lambda p: open('/nowhere/at/all')),
        ('disk of runs', 'fail', 'cannot be checked: FileNotFoundError', 'doctor'),
    ),
    'data leads nowhere': (
        'smoke',
        lambda m: m.change('configs/env.yaml', ('builtin:smoke/domain_sft.jsonl', './gone.jsonl')),
        ('data', 'fail', "'domain_sft' leads to ./gone.jsonl", 'domain_sft in configs/env.yaml'),
    ),
    'data unknown': (
        'nano',
        lambda m: m.change(
            'configs/distill_to_student.yaml', ('distill_corpus: 12000', 'distil_corpus: 12000')
        ),
        ('data', 'fail', "unknown name 'distil_corpus' (did you mean", 'env.yaml'),
    ),
    'a stage that does not fit': (
        'qlora',
        lambda m: (nothing_fetched_but_online(m), m.torch['gpus'][0].update(gib=15.8)),
        (
            'plan',
            'fail',
            'GiB of gpu (here 15.8)',
            'k2lab plan train_sft_domain --scale qlora',
        ),
    ),
    'token is none': (
        'smoke',
        env(HF_TOKEN='"quoted-by-mistake"'),
        ('hub token', 'warn', '$HF_TOKEN', 'unset HF_TOKEN'),
    ),
    'no sandbox': (
        'smoke',
        lambda m: m.patch.setattr('k2lab.tasks.sandbox.landlock_version', lambda libc: 0),
        ('sandbox', 'warn', 'no Landlock', 'bubblewrap'),
    ),
    'stage file with a mistake': (
        'smoke',
        lambda m: m.change('configs/train_sft_domain.yaml', ('length: 256', 'lenght: 256')),
        ('configs', 'fail', "'lenght' (did you mean 'length'?)", 'configs/train_sft_domain.yaml'),
    ),
    'slurm asks for no GPU': (
        'qlora',
        lambda m: (m.with_models(), m.sbatch(1, 0)),
        ('slurm', 'fail', '0 GPUs asked for', 'gpus_per_node: 1'),
    ),
    'slurm cannot spread': (
        'full',
        lambda m: (login_node(m), m.sbatch(30, 9)),
        ('slurm', 'fail', 'cannot be spread over nodes: 30', 'configs/slurm.yaml'),
    ),
    'slurm file with a mistake': (
        'full',
        lambda m: (login_node(m), m.change('configs/slurm.yaml', ('hours: 4', 'hourz: 4'))),
        ('slurm', 'fail', "'hourz'", 'configs/slurm.yaml'),
    ),
}


@pytest.mark.parametrize('name', DEFECTS)
def test_a_defect_is_named_with_its_remedy(machine, name):
    scale, put, (check, status, found, mend) = DEFECTS[name]
    if check == 'plan' and not find_spec('k2lab.scale.plan'):
        pytest.skip('this version has no plan')
    put(machine)
    began = time.monotonic()
    findings = examine(scale, limit=1.0 if 'hang' in name else 60.0)
    assert time.monotonic() - began < 30
    hits = [f for f in findings if f.check == check and f.status == status and found in f.found]
    assert hits, [str(f) for f in findings if f.status != 'ok']
    assert mend in hits[0].mend
    assert all('\n' not in str(f) for f in findings)


def test_a_single_defect_raises_a_single_alarm(machine):
    one_card(machine)
    machine.torch['grouped'] = 'no kernel image is available'
    assert [f.check for f in examine('qlora') if f.status != 'ok'] == ['gpu arithmetic']


# ---- the command ---------------------------------------------------------------------------------


def states(*folders: Path) -> dict:
    "The size and time of everything under some folders."
    return {
        p: (p.lstat().st_size, p.lstat().st_mtime_ns)
        for folder in folders
        for p in (folder, *folder.rglob('*'))
    }


def test_nothing_is_changed_and_no_secret_is_printed(machine, capsys, monkeypatch):
    token = 'hf_' + 'a1B2' * 9
    monkeypatch.setenv('HF_TOKEN', token)
    (machine.hub / 'token').write_text(token)
    machine.change('configs/env.yaml', ('Qwen/Qwen2.5-1.5B', f's3://user:{token}@host/model'))
    one_card(machine)
    folders = machine.lab, machine.hub
    before = states(*folders)
    assert main(['doctor', '--scale', 'qlora', '--json']) == 1
    report = json.loads(capsys.readouterr().out)
    assert main(['doctor', '--scale', 'qlora']) == 1
    text = capsys.readouterr().out
    assert states(*folders) == before
    assert token not in json.dumps(report) + text and 'in $HF_TOKEN' in text
    assert report['can_run'] is False and report['scale'] == 'qlora'
    lines = text.splitlines()
    assert len(report['checks']) == len(lines) - 1 and 'cannot run here: model' in lines[-1]


def test_runs_that_lie_on_no_folder_yet_are_judged_by_the_folder_above(machine, monkeypatch):
    monkeypatch.setenv('K2LAB_LAB_RUNS_PATH', 'not/yet/there')
    assert not [str(f) for f in examine('smoke') if f.status != 'ok']
    assert not (machine.lab / 'not').exists()


def test_a_reference_to_a_commit_that_is_gone_is_to_fetch_again(machine):
    one_card(machine)
    home = machine.hub / 'hub' / 'models--Qwen--Qwen2.5-1.5B'
    (home / 'refs' / 'main').write_text('another')
    (line,) = [f for f in examine('qlora') if f.status != 'ok']
    assert 'to fetch, 2.9 GiB' in line.found and 'hf download' in line.mend


@pytest.mark.parametrize('words', [['--scale', 'huge'], ['--deep'], ['nano']])
def test_what_is_no_request_is_refused(words, machine):
    with pytest.raises(LabError):
        main(['doctor', *words])


def test_a_child_of_a_child_is_killed_with_it():
    began = time.monotonic()
    assert ask(['/bin/sh', '-c', '/bin/sleep 30 & /bin/sleep 30'], limit=0.2).code is None
    assert time.monotonic() - began < 3


@pytest.mark.parametrize('old', [False, True], ids=['cgroup v2', 'cgroup v1'])
def test_what_a_container_may_still_take(old, tmp_path, monkeypatch):
    names = [*probes.GROUPS.values()][old]
    monkeypatch.setattr(probes, 'GROUPS', {tmp_path / 'none': names, tmp_path: names})
    for name, text in zip(names, ('8589934592', '7516192768')):
        (tmp_path / name).write_text(f'{text}\n')
    (tmp_path / 'memory.stat').write_text(f'anon 5\n{names[2]} 1073741824\n')
    assert probes.memory_limit() == 2.0  # 8 GiB, 7 taken, of which 1 is a cache of files
    (tmp_path / names[0]).write_text('9223372036854771712' if old else 'max')
    assert probes.memory_limit() is None


def test_the_slowest_link_of_each_kind_of_machine():
    table = lambda *rows: 'x\tGPU0\tGPU1\tNIC0\tCPU Affinity\n' + '\n'.join(rows)
    assert (
        probes.slowest_link(table('GPU0\t X \tNV18\tSYS\t0-31', 'GPU1\tNV18\t X \tSYS\t0-31'))
        == 'NV'
    )
    assert (
        probes.slowest_link(table('GPU0\t X \tPHB\tNODE\t0-31', 'GPU1\tPHB\t X \tNODE\t0-31'))
        == 'PHB'
    )
    assert probes.slowest_link('nvidia-smi: no such option') == ''
