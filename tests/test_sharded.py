"""Models that processes hold in slices: opened, merged and proven, against the same in one process.

Two CPU ranks with gloo open each format under ZeRO-3 and FSDP2. With K2LAB_FAULTS=full, two ranks also train a
model of half a GiB in bfloat16; `python -m k2lab.bench sharded` prints what each of them took."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip('torch')
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from test_formats import made  # noqa: F401

from k2lab.lab.config import LabError
from k2lab.models.adapters import lora, probe_logits
from k2lab.models.load import Loading, open_model, smoke_model
from k2lab.models.quantized import WEIGHT_INDEX, Checkpoint, header
from k2lab.models.sharded import (
    Planned,
    changes_by,
    kept_in,
    merge_into_files,
    merged_config,
    save_split,
    split_by,
    write_tensors,
)

FULL = os.environ.get('K2LAB_FAULTS') == 'full'
RANKS = '''
import json, os, sys
from pathlib import Path
how, folders = sys.argv[1], [Path(f) for f in sys.argv[2:]]
os.environ |= dict(ACCELERATE_USE_CPU='true', ACCELERATE_MIXED_PRECISION='no', DS_ACCELERATOR='cpu')
if how == 'zero3':
    os.environ |= dict(ACCELERATE_USE_DEEPSPEED='true', ACCELERATE_DEEPSPEED_ZERO_STAGE='3')
else:
    os.environ |= dict(ACCELERATE_USE_FSDP='true', FSDP_VERSION='2')
    os.environ['FSDP_AUTO_WRAP_POLICY'] = 'TRANSFORMER_BASED_WRAP'
    os.environ['FSDP_RESHARD_AFTER_FORWARD'] = 'true'
import torch
from k2lab.lab.config import LabError
from k2lab.models.adapters import apart, is_split, probe_logits
from k2lab.models.load import open_model
from k2lab.models.quantized import Checkpoint
from k2lab.models.sharded import base_tensors, differing, one_process, release, save_split, whole_tensor
from k2lab.models.placement import agreed, together
out = {}
for folder in folders:
    try:
        split = open_model(folder)
    except LabError as e:
        out[folder.name] = dict(refused=str(e))
        continue
    with one_process():
        alone = open_model(folder)
    logits = apart(probe_logits(alone, 8), probe_logits(split, 8))
    want = alone.state_dict()
    wrong = [
        n for n, t in base_tensors(split).items()
        if not (torch.equal(whole_tensor(t), want[n]) and t.dtype == want[n].dtype)
    ]
    held = sum(
        (t.ds_tensor if hasattr(t, 'ds_tensor') else t.to_local() if hasattr(t, 'to_local') else t).numel()
        for t in base_tensors(split).values()
    )
    saved = folder.with_name(f'{folder.name}-{how}')
    save_split(split, saved, 10**6)
    if os.environ['RANK'] == '0':
        split.config.save_pretrained(saved)
    together()
    again = differing(base_tensors(split), Checkpoint(saved))
    with one_process():
        back = open_model(saved).state_dict()
    same = all(torch.equal(back[n], t) for n, t in want.items())
    other = folder.with_name('swapped')
    found = differing(base_tensors(split), Checkpoint(other)) if folder.name == 'k2' else []
    release(split)
    out[folder.name] = dict(split=is_split(split), wrong=wrong, logits=logits, again=again, same=same, found=found,
        held=held / sum(t.numel() for t in want.values()))
together()
if os.environ['RANK'] == '0':
    print('RESULT' + json.dumps(out))
'''


def rewritten(folder: Path, to: Path, change) -> Path:
    "A copy of a checkpoint in one file, with its tensors changed by `change(tensors)`."
    shutil.copytree(folder, to)
    tensors = {n: t for f in folder.glob('*.safetensors') for n, t in load_file(f).items()}
    for file in [*to.glob('*.safetensors'), to / WEIGHT_INDEX]:
        file.unlink(missing_ok=True)
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, to / 'model.safetensors')
    return to


EXPERT = 'model.layers.1.mlp.experts.{}.gate_proj.weight'


def swap(tensors: dict):
    one, two = EXPERT.format(0), EXPERT.format(3)
    tensors[one], tensors[two] = tensors[two].clone(), tensors[one].clone()


@pytest.fixture(scope='module')
def folders(tmp_path_factory, made) -> list[Path]:  # noqa: F811
    "Checkpoints in each format, and some that must be refused."
    home = tmp_path_factory.mktemp('split')
    shutil.copytree(smoke_model('k2'), home / 'k2')
    shutil.copytree(smoke_model('qwen'), home / 'qwen')
    rewritten(home / 'k2', home / 'swapped', swap)
    lost = rewritten(home / 'qwen', home / 'lost', lambda t: t.pop('model.norm.weight'))
    more = rewritten(home / 'qwen', home / 'more', lambda t: t.update(extra=torch.ones(2)))
    wide = rewritten(
        home / 'qwen', home / 'wide', lambda t: t.update({'model.norm.weight': torch.ones(3)})
    )
    odd = rewritten(
        home / 'k2', home / 'odd', lambda t: t[EXPERT.format(2)].view(-1)[5:6].fill_(float('nan'))
    )
    formats = [
        shutil.copytree(made['home'] / name, home / name) for name in ('eight', 'four', 'seeing')
    ]
    return [home / 'k2', home / 'qwen', *formats, lost, more, wide, odd]


@pytest.mark.parametrize('how', ['zero3', 'fsdp2'])
def test_two_processes_hold_what_one_opens(how, folders, tmp_path):
    if how == 'zero3':
        pytest.importorskip(
            'deepspeed', reason='ZeRO needs deepspeed: pip install "k2lab[deepspeed]"'
        )
    (tmp_path / 'ranks.py').write_text(RANKS)
    hidden = os.environ | dict(K2LAB_TEST_WITHOUT='scipy sklearn bitsandbytes', OMP_NUM_THREADS='1')
    launch = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc_per_node',
        '2',
    ]
    told = [*launch, str(tmp_path / 'ranks.py'), how, *map(str, folders)]
    ended = subprocess.run(told, env=hidden, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stderr[-3000:]
    line = next(s for s in ended.stdout.splitlines() if s.startswith('RESULT'))
    got = json.loads(line.removeprefix('RESULT'))
    for name in ('k2', 'qwen', 'eight', 'four', 'seeing'):
        one = got[name]
        assert one['split'] and not one['wrong'] and one['logits'] < 1e-6, (name, one)
        assert not one['again'] and one['same'] and one['held'] < 0.52, (name, one)
    stack = 'model.layers.1.mlp.experts.gate_up_proj'
    assert got['k2']['found'] == [stack]  # two experts that changed places
    assert '1 missing keys (model.norm.weight' in got['lost']['refused']
    assert '1 unexpected keys (extra' in got['more']['refused']
    assert '1 mismatched keys (model.norm.weight' in got['wide']['refused']
    assert 'holds a value that is no number' in got['odd']['refused']


ALL = ['attention', 'shared', 'dense', 'routed', 'router', 'head']


@pytest.fixture(scope='module')
def tuned():
    "A K2 with an adapter on every part, none of whose weights is zero."
    load = Loading(lora_rank=4, adapt=ALL)
    model = open_model(smoke_model('k2'), load)
    model = get_peft_model(model, lora(model, load))
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if 'lora_B' in name:
            p.data.normal_(std=0.02)
    return model


def lora_weights(model) -> dict:
    return {n: p.detach().clone() for n, p in model.named_parameters() if 'lora_' in n}


def published(model, base: Checkpoint, place: Path, dtype: str = 'float32') -> dict:
    changes = changes_by(model, lora_weights(model))
    merge_into_files(base, changes, dtype, place)
    (place / 'config.json').write_text(json.dumps(merged_config(base, changes, dtype)))
    return changes


def test_a_merge_in_the_files_is_the_merge_of_peft(tuned, tmp_path):
    base = Checkpoint(smoke_model('k2'))
    changes = published(tuned, base, tmp_path / 'merged')
    trained = probe_logits(tuned)
    saved = open_model(tmp_path / 'merged')
    moved = float((trained - probe_logits(open_model(smoke_model('k2')))).norm())
    assert float((trained - probe_logits(saved)).norm()) < 1e-5 * float(trained.norm()) < moved
    want = tuned.merge_and_unload().state_dict()
    got = saved.state_dict()
    assert got.keys() == want.keys()
    assert max(float((got[n] - want[n]).abs().max()) for n in want) < 1e-6
    copied = set(base.pieces) - changes.keys()
    merged = Checkpoint(tmp_path / 'merged')
    assert copied and all(torch.equal(base.read(n), merged.read(n)) for n in copied)


@pytest.mark.parametrize('name', ['eight', 'four', 'seeing'])
def test_what_was_stored_in_8_or_4_bits_stays_so_unless_it_was_adapted(name, made, tmp_path):  # noqa: F811
    load = Loading(dtype='bfloat16', lora_rank=4, adapt=['attention', 'shared'])
    model = open_model(made['home'] / name, load)
    start = {n: t.clone() for n, t in model.state_dict().items()}
    model = get_peft_model(model, lora(model, load))
    for n, p in model.named_parameters():
        if 'lora_B' in n:
            p.data.normal_(std=0.05)
    base = Checkpoint(made['home'] / name)
    changes = published(model, base, tmp_path / 'merged', 'bfloat16')
    made['tok'].save_pretrained(tmp_path / 'merged')
    merged = Checkpoint(tmp_path / 'merged')
    kept = [w for w in base.pieces if w not in changes and base.kinds[w] != 'plain']
    assert kept
    for weight in kept:
        assert merged.kinds[weight] == base.kinds[weight]
        for piece in base.pieces[weight]:
            one, two = base.read(weight, piece), merged.read(weight, piece)
            assert torch.equal(one.view(torch.uint8), two.view(torch.uint8)), weight
    assert all(merged.kinds[weight] == 'plain' for weight in changes)
    got = open_model(tmp_path / 'merged', Loading(dtype='bfloat16')).state_dict()
    changed = {n for n, t in got.items() if not torch.equal(t, start[n])}
    assert changed == set(changes)
    quant = json.loads((tmp_path / 'merged/config.json').read_text())['quantization_config']
    plain = quant.get('ignore') or quant.get('modules_to_not_convert')
    assert 'model.layers.0.self_attn.o_proj' in plain


def test_a_change_that_bfloat16_cannot_hold_is_seen(tmp_path):
    load = Loading(dtype='bfloat16', lora_rank=4, adapt=['attention'])
    base = Checkpoint(smoke_model('k2'))
    model = get_peft_model(model := open_model(smoke_model('k2'), load), lora(model, load))
    for size, least, most in ((1e-6, 0.0, 0.7), (0.5, 0.97, 1.03)):
        torch.manual_seed(0)
        for n, p in model.named_parameters():
            if 'lora_B' in n:
                p.data.normal_(std=size)
        plain = Path(tmp_path / f'{size}')
        save_split(open_model(smoke_model('k2'), Loading(dtype='bfloat16')), plain)
        shutil.copy(smoke_model('k2') / 'config.json', plain)
        changes = changes_by(model, lora_weights(model))
        assert least <= kept_in('bfloat16', Checkpoint(plain), changes) <= most
        assert kept_in('float32', base, changes) == pytest.approx(1, abs=0.02)


def test_an_adapter_that_fits_nothing_is_refused(tuned, tmp_path):
    changes = {'model.layers.9.self_attn.o_proj.weight': None}
    with pytest.raises(LabError, match='no place for 1 of its tensors'):
        merge_into_files(Checkpoint(smoke_model('k2')), changes, 'float32', tmp_path / 'merged')


def test_a_tensor_that_was_not_planned_is_refused(tmp_path):
    plan = [Planned('a', 'F32', (2, 3))]
    for name, tensor in (
        ('b', torch.ones(2, 3)),
        ('a', torch.ones(3, 2)),
        ('a', torch.ones(2, 3).half()),
    ):
        with pytest.raises(LabError, match='came where'):
            write_tensors(tmp_path / 'file', plan, iter([(name, tensor)]))
    write_tensors(tmp_path / 'file', plan, iter([('a', torch.ones(2, 3))]))
    assert header(tmp_path / 'file')['a']['shape'] == [2, 3]


def test_one_process_splits_nothing(monkeypatch):
    assert split_by() == ''
    monkeypatch.setenv('ACCELERATE_USE_FSDP', 'true')
    monkeypatch.setenv('FSDP_VERSION', '2')
    assert split_by() == ''  # one process
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert split_by() == 'fsdp2'
    monkeypatch.setenv('FSDP_VERSION', '1')
    assert split_by() == ''


@pytest.mark.skipif(not FULL, reason='minutes: K2LAB_FAULTS=full')
@pytest.mark.parametrize('way', ['zero3', 'fsdp2'])
def test_a_split_model_in_bfloat16_is_trained_and_published(way, tmp_path):
    pytest.importorskip('deepspeed', reason='ZeRO needs deepspeed: pip install "k2lab[deepspeed]"')
    from k2lab.bench.sharded import prepare, train

    one = train(tmp_path, way, prepare(tmp_path, 500))
    assert len(one.peaks) == 2 and one.record['export']['differing'] == 0
    assert 0.5 < one.record['export']['way'] < 1.5
