"""Stacked experts in 4 bits: read packed, trained over, published as they were in training, and opened so again.

`make test` runs one training of each kind; the peak of loading is measured in child processes."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('bitsandbytes', reason='4 bits need bitsandbytes: pip install "k2lab[gpu]"')
import test_formats as formats
from safetensors.torch import load_file, save_file
from test_certificate import SETTINGS, Run

from k2lab.lab.checkpoint import newest_checkpoint
from k2lab.lab.config import LabError
from k2lab.models.adapters import (
    bits_of_config,
    check_bits,
    export_report,
    probe_logits,
    weight_bits,
)
from k2lab.models.load import (
    Loading,
    open_model,
    open_tokenizer,
    register_kimi_k2,
    save_checkpoint,
    shipped,
    small_model,
    smoke_model,
)
from k2lab.models.stacks import kind_of_stacks, pack_nf4, stacks
from k2lab.train_sft_domain import Config

FULL = os.environ.get('K2LAB_FAULTS') == 'full'
EXPERTS = [Loading(four_bit='experts', dtype=d) for d in ('float32', 'bfloat16')]


@pytest.fixture(scope='module', autouse=True)
def runs(tmp_path_factory):
    "Runs and smoke models of this file lie in a folder of their own."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('K2LAB_LAB_RUNS_PATH', str(tmp_path_factory.mktemp('runs')))
        yield


def stack(model, name: str):
    "A stack as a model computes with it."
    path, _, leaf = name.rpartition('.')
    return getattr(model.get_submodule(path), leaf)


def tensors(folder: Path) -> dict:
    return {n: t for f in folder.glob('*.safetensors') for n, t in load_file(f).items()}


def experts(folder: Path) -> dict:
    return {n: t for n, t in tensors(folder).items() if '.experts.' in n}


def equal(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(
        one[n].dtype == two[n].dtype and torch.equal(one[n], two[n]) for n in one
    )


def int4_of(folder: Path, out: Path) -> Path:
    "A copy of a small K2 whose experts are stored in INT4, as K2-Thinking's are."
    shutil.copytree(folder, out)
    config, plain = formats.read(out)
    stored, _ = formats.stored_as('four', plain)
    for file in out.glob('*.safetensors'):
        file.unlink()
    formats.write(out, config | {'quantization_config': formats.FOUR}, stored)
    return out


@pytest.fixture(scope='module')
def four(tmp_path_factory) -> Path:
    return int4_of(shipped('k2'), tmp_path_factory.mktemp('int4') / 'four')


# ---- opened ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('load', EXPERTS, ids=lambda load: load.dtype)
def test_logits_are_those_of_the_weights_that_the_codes_stand_for(load):
    "bitsandbytes' own rounding of the plain weights, put into a plain model, gives the same logits to the bit."
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, plain = (
        open_model(shipped('k2'), load),
        open_model(shipped('k2'), Loading(dtype=load.dtype)),
    )
    with torch.no_grad():
        for name in stacks(packed):
            weight = dict(plain.named_parameters())[name]
            codes = quantize_4bit(weight.bfloat16(), quant_type='nf4', compress_statistics=False)
            weight.copy_(dequantize_4bit(*codes))
            assert torch.equal(stack(packed, name), weight)
    assert len(stacks(packed)) == 6 and torch.equal(probe_logits(packed), probe_logits(plain))
    assert packed(torch.arange(9)[None]).logits.dtype == getattr(torch, load.dtype)


@pytest.mark.parametrize('columns', [96, 104, 33, 64])
def test_columns_that_64_does_not_divide_are_not_garbled(columns):
    "bitsandbytes 0.50 on a CPU garbles a stack of 96 columns (error .24); NF4's own error is .09."
    torch.manual_seed(0)
    weight = torch.randn(4, 32, columns).bfloat16()
    module = torch.nn.Module()
    pack_nf4(module, 'weight', weight, torch.float32)
    assert module.weight.shape == weight.shape and module.weight.dtype == torch.float32
    assert 0.085 < float((module.weight - weight).norm() / weight.norm()) < 0.1
    again = torch.nn.Module()
    pack_nf4(again, 'weight', module.weight.bfloat16(), torch.float32, exact=True)
    assert torch.equal(again.weight, module.weight)
    with pytest.raises(LabError, match='does not hold values of 4 bits'):
        pack_nf4(torch.nn.Module(), 'weight', weight, torch.float32, exact=True)


def test_int4_is_kept_as_it_is_stored(four):
    "The same logits to the bit as the model whose experts are unpacked when it is opened; 4.5 bits a weight."
    for load in EXPERTS:
        packed, plain = open_model(four, load), open_model(four, Loading(dtype=load.dtype))
        assert kind_of_stacks(packed) == 'int4' and torch.equal(
            probe_logits(packed), probe_logits(plain)
        )
    assert weight_bits(packed)['routed']['bits'] == 4.5
    assert weight_bits(packed)['routed']['weights'] == weight_bits(plain)['routed']['weights']
    path = next(
        f for f in four.glob('*.safetensors') if any('weight_scale' in n for n in load_file(f))
    )
    ruined = four.with_name('ruined')
    shutil.copytree(four, ruined, dirs_exist_ok=True)
    bad = load_file(path)
    next(t for n, t in bad.items() if 'weight_scale' in n).fill_(float('nan'))
    save_file(bad, ruined / path.name)
    with pytest.raises(LabError, match='experts.* has factors that are negative or no numbers'):
        open_model(ruined, EXPERTS[0])


def mixtures() -> list:
    "Configs of small mixtures of other families, with widths that 64 does not divide."
    from transformers import GptOssConfig, MixtralConfig, Qwen3MoeConfig

    small: dict[str, Any] = dict(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=96,
        vocab_size=340,
    )
    kinds: list[tuple[Any, dict]] = [
        (MixtralConfig, dict(num_local_experts=4)),
        (GptOssConfig, dict(num_local_experts=4, head_dim=32)),
        (Qwen3MoeConfig, dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48)),
    ]
    return [kind(**small, **more) for kind, more in kinds]


def test_mixtures_of_other_families_are_packed_and_saved(tmp_path):
    "Their stacks have other names, or lie in the files as stacks already."
    from transformers import AutoModelForCausalLM

    tok, load = open_tokenizer(shipped('qwen')), Loading(four_bit='experts', dtype='bfloat16')
    for config in mixtures():
        torch.manual_seed(0)
        place = tmp_path / config.model_type
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(place)
        model = open_model(place, load)
        save_checkpoint(model, tok, place / 'saved')
        again = [open_model(place / 'saved', how) for how in (load, Loading(dtype='bfloat16'))]
        assert len(stacks(model)) == 4 and weight_bits(model)['routed']['bits'] < 4.7
        assert all(torch.equal(probe_logits(model), probe_logits(one)) for one in again)


def test_fp8_experts_are_dequantised_one_at_a_time_and_packed(tmp_path):
    config, plain = formats.read(smoke_model('k2'))
    stored, want = formats.stored_as('eight', plain)
    stored['model.layers.1.mlp.gate.e_score_correction_bias'] += 0.1
    formats.write(tmp_path / 'eight', config | {'quantization_config': formats.EIGHT}, stored)
    packed = open_model(tmp_path / 'eight', Loading(four_bit='experts', dtype='bfloat16'))
    whole = open_model(tmp_path / 'eight', Loading(dtype='bfloat16'))
    assert kind_of_stacks(packed) == 'nf4'
    for name in stacks(packed):
        now, then = stack(packed, name), whole.get_parameter(name)
        assert 0.05 < float((now - then).norm() / then.norm()) < 0.12


@pytest.mark.parametrize('four_bit', [True, 'experts'])
def test_bits_are_counted_on_the_codes_and_known_from_the_config(four_bit):
    load = Loading(four_bit=four_bit, lora_rank=4, dtype='bfloat16')
    model = open_model(shipped('k2'), load)
    counted = weight_bits(model)
    assert counted['routed']['bits'] == 4.5 and counted == bits_of_config(model.config, load)
    check_bits(counted, load)
    wide = weight_bits(open_model(shipped('k2'), Loading(dtype='bfloat16')))
    with pytest.raises(LabError, match='four_bit was asked for, but .*routed has 16.0 bits'):
        check_bits(counted | {'routed': wide['routed']}, load)


def test_a_stack_that_stayed_wide_is_refused(monkeypatch):
    "A transformers that hands its weights over in another way."
    monkeypatch.setattr(
        'k2lab.models.stacks.Packing.__call__',
        lambda self, model, stack, value: plain(model, stack, value),
    )

    def plain(model, name, value):
        path, _, leaf = name.rpartition('.')
        setattr(model.get_submodule(path), leaf, torch.nn.Parameter(value))

    with pytest.raises(LabError, match='2 stacks of experts are not packed'):
        open_model(smoke_model('k2'), Loading(four_bit=True))


MOONLIGHT = dict(
    hidden_size=2048,
    num_hidden_layers=27,
    n_routed_experts=64,
    num_attention_heads=16,
    num_key_value_heads=16,
    moe_intermediate_size=1408,
    intermediate_size=11264,
    q_lora_rank=None,
    kv_lora_rank=512,
    num_experts_per_tok=6,
    n_shared_experts=2,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
    vocab_size=163840,
    tie_word_embeddings=False,
    max_position_embeddings=8192,
)
K2 = MOONLIGHT | dict(
    hidden_size=7168,
    num_hidden_layers=61,
    n_routed_experts=384,
    num_attention_heads=64,
    num_key_value_heads=64,
    moe_intermediate_size=2048,
    intermediate_size=18432,
    q_lora_rank=1536,
    num_experts_per_tok=8,
    n_shared_experts=1,
)


@pytest.mark.parametrize(
    'shape, four_bit, most',
    [(MOONLIGHT, True, 10.0), (MOONLIGHT, 'experts', 11.3), (K2, True, 581)],
)
def test_moonlight_and_k2_in_four_bits(shape, four_bit, most):
    "From their shapes alone: at most so many GB, at most 4.6 bits for each weight of an expert."
    load = Loading(four_bit=four_bit, lora_rank=8, dtype='bfloat16')
    sizes = bits_of_config(register_kimi_k2()(**shape), load)
    assert sizes['routed']['bits'] <= 4.6 and check_bits(sizes, load)
    assert 0.9 * most < sum(c['bytes'] for c in sizes.values()) / 1e9 <= most


PEAK = """
import sys, torch
torch.set_num_threads(1)
from k2lab.models.load import Loading, open_model
def kept(key):
    lines = open('/proc/self/status').read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])
load = Loading(dtype='bfloat16', four_bit=eval(sys.argv[3]))
open_model(sys.argv[2], load)  # what is imported on the way does not count
open('/proc/self/clear_refs', 'w').write('5')
before = kept('VmRSS')
model = open_model(sys.argv[1], load)
print(kept('VmHWM') - before)
"""


def peak(folder: Path, four_bit) -> int:
    "Bytes by which the peak of a process grows when it opens a model."
    words = [sys.executable, '-c', PEAK, str(folder), str(smoke_model('k2')), repr(four_bit)]
    # what is freed goes back at once, and bitsandbytes is not hidden (conftest.lean)
    env = os.environ | {'MALLOC_MMAP_THRESHOLD_': '65536', 'K2LAB_TEST_WITHOUT': ''}
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-500:]
    return int(done.stdout.split()[-1])


def large(folder: Path, layers: int) -> Path:
    "A K2 of some 16 MB a layer in bfloat16, a file for each layer; weights repeat."
    tok = open_tokenizer(smoke_model('k2'))
    shape = small_model('k2', 'smoke', tok).config.to_dict() | dict(
        num_hidden_layers=layers,
        hidden_size=256,
        moe_intermediate_size=256,
        n_routed_experts=40,
    )
    from transformers import AutoModelForCausalLM

    shape.pop('layer_types', None)
    model = AutoModelForCausalLM.from_config(register_kimi_k2()(**shape), dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size='20MB')
    return folder


def test_the_whole_is_never_held_in_16_bits(tmp_path):
    "The peak of opening is that of what is kept and of two stacks; in 16 bits it is all of it, and the files."
    folder = large(tmp_path / 'large', 32 if FULL else 8)
    whole = sum(f.stat().st_size for f in folder.glob('*.safetensors'))
    plain, packed = peak(folder, False), peak(folder, True)
    mb = [f'{n / 1e6:.0f} MB' for n in (whole, plain, packed)]
    print('\n{} in 16 bits: peak {} plain, {} packed'.format(*mb))
    assert plain > whole and packed < (0.5 if FULL else 0.9) * whole


# ---- refused -----------------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused_in_one_line(tmp_path):
    with pytest.raises(
        LabError,
        match='adapt names routed, and four_bit .*; leave routed out, or set load.four_bit=false',
    ):
        Config(load=dict(four_bit=True, lora_rank=4, adapt=['attention', 'routed']))
    with pytest.raises(LabError, match="four_bit 'linear'"):
        Loading(four_bit='linear')  # type: ignore[arg-type]
    with pytest.raises(
        LabError,
        match='a dense model, and load.four_bit=experts is for stacked experts; write true',
    ):
        open_model(shipped('qwen'), Loading(four_bit='experts'))
    shutil.copytree(smoke_model('k2'), tmp_path / 'odd')
    held = load_file(tmp_path / 'odd/model.safetensors')
    name = next(n for n in held if '.experts.2.up_proj' in n)
    save_file(
        held | {name: held[name] * float('nan')},
        tmp_path / 'odd/model.safetensors',
        {'format': 'pt'},
    )
    with pytest.raises(LabError, match='experts.gate_up_proj holds values that are no numbers'):
        open_model(tmp_path / 'odd', Loading(four_bit=True))


def test_a_config_of_another_shape_is_refused(tmp_path):
    shutil.copytree(smoke_model('k2'), tmp_path / 'small')
    path = tmp_path / 'small/config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'moe_intermediate_size': 32}))
    with pytest.raises(LabError, match=r'experts.\w+ is \[4, .*and config.json says \[4, '):
        open_model(tmp_path / 'small', Loading(four_bit='experts'))


def test_training_over_packed_experts_needs_recomputing():
    setting = dict(SETTINGS['4-bit LoRA'])
    del setting['trainer.gradient_checkpointing']
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SETTINGS, 'not recomputed', setting)
        with pytest.raises(LabError, match='set trainer.gradient_checkpointing=true'):
            Run('not recomputed', 1e-4)
        Run('not recomputed', 1e-4, place=shipped('qwen'), adapt=['attention'])


# ---- trained, published, opened again ----------------------------------------------------------------------


@pytest.fixture(scope='module')
def first():
    "A training over 4-bit experts, published."
    run = Run('4-bit LoRA', 1e-3)
    run.publish()
    return run


def test_an_adapter_that_is_dropped_in_merging_is_refused(first, monkeypatch):
    monkeypatch.setattr('k2lab.training.stage.merge_adapter', lambda model: model.unload())
    with pytest.raises(LabError, match='it lacks 100% of the way that training moved'):
        first.publish()


@pytest.mark.parametrize('fault', ['plain', 'float32', 'float16'])
def test_experts_that_are_not_those_of_the_training_are_refused(first, fault, monkeypatch):
    "Published are the plain ones, on which nobody trained, or the right ones in a dtype they were not packed from."
    from transformers.core_model_loading import revert_weight_conversion

    plain = open_model(shipped('k2'), Loading(dtype='bfloat16'))

    def wrong(model, name, form):
        weight = form[0](form.original).view(form[1].shape)
        kept = plain.get_parameter(name).detach() if fault == 'plain' else weight
        return revert_weight_conversion(
            model, {name: kept if fault == 'plain' else kept.to(getattr(torch, fault))}
        )

    monkeypatch.setattr('k2lab.models.stacks._plain_experts', wrong)
    with pytest.raises(LabError, match='does not hold values of 4 bits'):
        first.publish()


def test_published_experts_are_those_of_the_training_and_pack_to_the_same_bits(first):
    packed = open_model(shipped('k2'), Loading(four_bit='experts', dtype='bfloat16'))
    published = open_model(first.folder, Loading(dtype='bfloat16'))
    for name in stacks(packed):
        assert torch.equal(stack(packed, name), published.get_parameter(name).bfloat16())
    again = open_model(first.folder, Loading(four_bit=True))
    assert kind_of_stacks(again) == 'nf4' and not getattr(again, 'is_loaded_in_4bit', False)
    assert torch.equal(probe_logits(again), probe_logits(open_model(first.folder)))
    assert all(t.dtype == torch.bfloat16 for t in experts(first.folder).values())
    known = json.loads((first.folder / 'certificate.json').read_text())
    assert known['four_bit'] is True and known['stacks'] == 'nf4' and first.export['lost'] <= 0.1


def test_a_chain_of_stages_in_four_bits_keeps_what_the_first_one_learned(first):
    "The second starts where the first one ended, not where its weights lie when they are rounded once more."
    second = Run('4-bit LoRA', 1e-3, place=first.folder)
    published, base = (
        probe_logits(open_model(first.folder)),
        probe_logits(open_model(shipped('k2'))),
    )
    began = probe_logits(
        open_model(first.folder, dataclasses.replace(second.load, dtype='float32'))
    )
    held = {
        n.replace('.base_layer', ''): p for n, p in second.model.get_base_model().named_parameters()
    }
    stored = {n: t for n, t in tensors(first.folder).items() if n in held}
    assert len(stored) > 40 and all(
        torch.equal(held[n].float(), t.float()) for n, t in stored.items()
    )
    report = export_report(base, published, began)
    print('\nof the first stage the second one lacks', report['lost'])
    assert report['lost'] < 0.02
    second.publish()
    assert second.export['lost'] <= 0.1
    assert equal(experts(first.folder), experts(second.folder))


def test_rounding_the_whole_again_loses_the_first_stage(first):
    "What the certificate guards against: without it all linear layers are rounded a second time."
    bare = first.folder.with_name('bare')
    shutil.copytree(first.folder, bare, dirs_exist_ok=True)
    (bare / 'certificate.json').unlink()
    published, base = (
        probe_logits(open_model(first.folder)),
        probe_logits(open_model(shipped('k2'))),
    )
    again = probe_logits(open_model(bare, Loading(four_bit=True)))
    assert export_report(base, published, again)['lost'] > 0.3


def test_experts_that_were_changed_after_training_are_refused(first):
    changed = first.folder.with_name('changed')
    shutil.copytree(first.folder, changed, dirs_exist_ok=True)
    file = next(
        f
        for f in sorted(changed.glob('*.safetensors'))
        if any('.experts.' in n for n in load_file(f))
    )
    held = load_file(file)
    name = next(n for n in held if '.experts.' in n)
    save_file(held | {name: held[name] * 1.01}, file, {'format': 'pt'})
    with pytest.raises(
        LabError, match='was published from 4 bits, and does not hold values of 4 bits'
    ):
        open_model(changed, Loading(four_bit=True))
    open_model(changed)


def test_int4_goes_in_and_out(four):
    "Codes, factors and shapes of all experts are the stored ones, byte for byte; the next stage opens them so."
    run = Run('4-bit LoRA', 1e-3, place=four)
    run.publish()
    assert equal(experts(four), experts(run.folder)) and len(experts(four)) == 3 * 3 * 3 * 8
    config = json.loads((run.folder / 'config.json').read_text())
    assert config['quantization_config'] == formats.FOUR and config['architectures'] == [
        'DeepseekV3ForCausalLM'
    ]
    changed = {
        n
        for n, t in tensors(run.folder).items()
        if not torch.equal(t, tensors(four)[n].to(t.dtype))
    }
    assert {'self_attn', 'shared_experts'} <= {
        n.split('.')[3] if 'self_attn' in n else n.split('.')[4] for n in changed
    }
    second = Run('4-bit LoRA', 1e-3, place=run.folder)
    assert kind_of_stacks(second.model) == 'int4'
    second.publish()
    assert equal(experts(four), experts(second.folder)) and second.export['lost'] <= 0.1
    assert torch.equal(
        probe_logits(open_model(second.folder)), probe_logits(open_model(second.folder, EXPERTS[0]))
    )


def test_resumed_it_is_the_same_to_the_bit(monkeypatch, tmp_path):
    "From the middle of a training: the same adapter as without a stop, and the same checkpoint."
    monkeypatch.setitem(SETTINGS, 'saved', SETTINGS['4-bit LoRA'] | {'trainer.save_steps': 4})
    whole = Run('saved', 1e-3)
    place, _ = newest_checkpoint(whole.job.folder / 'trainer' / 'train')
    assert place and place.name.endswith('-8')
    shutil.copytree(place.with_name('checkpoint-4'), tmp_path / 'checkpoint-4')
    whole.publish()

    def stopped(job):
        shutil.copytree(tmp_path / 'checkpoint-4', job.folder / 'trainer/train/checkpoint-4')

    resumed = Run('saved', 1e-3, before=stopped)
    resumed.publish()
    log = (resumed.job.folder / 'metrics.jsonl').read_text()
    assert resumed.job.record['training']['train']['steps'] == 8 and '"step": 1,' not in log
    one, two = (
        {n: p for n, p in run.model.named_parameters() if 'lora_' in n} for run in (whole, resumed)
    )
    assert one and equal(one, two) and equal(tensors(whole.folder), tensors(resumed.folder))
