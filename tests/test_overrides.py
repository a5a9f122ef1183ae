"A change of one value changes that value and nothing else, or is refused in one line."

import copy
import dataclasses
import functools
import itertools
import typing
from dataclasses import field

import pytest

from k2lab.cli.words import changes_of
from k2lab.lab import config
from k2lab.lab.config import SCALES, LabError, fill, resolve, stage_names
from k2lab.lab.job import config_of, stage_module

# values that are valid where one more or another letter is not
OTHER = {
    'dtype': {'bfloat16': 'float32', 'float32': 'bfloat16'},
    'lr_scheduler_type': {'cosine': 'linear', 'warmup_stable_decay': 'cosine'},
    'save_strategy': {'steps': 'epoch'},
    'four_bit': {'experts': True, True: False, False: True},
}


parsed = functools.cache(config.read_yaml)


@pytest.fixture(autouse=True)
def files_read_once(monkeypatch):
    "Thousands of configurations are resolved here; each file is parsed once."
    monkeypatch.setattr(config, 'read_yaml', lambda path: copy.deepcopy(parsed(path)))


def resolved(stage: str, scale: str, changes: dict | None = None) -> dict:
    return config_of(resolve(stage_module(stage).Config, stage, scale, changes))


def leaves(block: dict, path: tuple = ()):
    "`(path, value)` of every value in a block that is no block itself."
    for key, value in block.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def another(key: str, value):
    "A valid value that is not `value`."
    if key in OTHER:
        return OTHER[key].get(value, 'cosine')
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value * 2 + 1
    if value == []:
        return ['k2_domain_pretrain']  # the only empty lists are of checkpoints to compare with
    if isinstance(value, list) and isinstance(value[0], float):
        return [v + 1 for v in value]
    return value[::-1] if isinstance(value, list) else f'{value}2'


def changed_to(block: dict, path: tuple, value) -> dict:
    "The block with one value replaced."
    key, *deeper = path
    inner = changed_to(block[key], tuple(deeper), value) if deeper else value
    return {**block, key: inner}


def blocks():
    "`(stage, scale, field, path, value)` of every value in every block of every stage file at every scale."
    for stage, scale in itertools.product(stage_names(), SCALES):
        for name, value in resolved(stage, scale).items():
            if isinstance(value, dict):
                for path, leaf in leaves(value):
                    yield stage, scale, name, path, leaf


ALL = list(blocks())


def test_there_are_blocks_at_every_depth():
    fields = {(stage, name) for stage, _, name, _, _ in ALL}
    assert len(ALL) > 200 and len(fields) >= 16
    assert {len(path) for *_, path, _ in ALL} == {1, 2}


NAMES = ('mix', 'checkpoints', 'measures', 'eval_sets', 'gym', 'family_weights', 'question_weights')


def test_every_dotted_change_changes_one_key():
    "100 %: the whole configuration with one leaf replaced, worked out without the code under test."
    for stage, scale, name, path, value in ALL:
        new = another(path[-1], value)
        key = '.'.join((name, *path))
        before = resolved(stage, scale)
        want = changed_to(before, (name, *path), new)
        assert resolved(stage, scale, {key: new}) == want, (stage, scale, key)
        text = str(new).lower() if isinstance(new, bool) else str(new)
        assert resolved(stage, scale, {key: text}) == want, (stage, scale, key, 'as text')
        nested = new
        for part in reversed(path):
            nested = {part: nested}
        if name in ('checkpoints', 'measures'):
            continue  # each of the two names what the other has; one alone is refused
        if name in NAMES:  # a mixture that is given whole is the whole mixture
            want = {**before, name: nested}
        assert resolved(stage, scale, {name: nested}) == want, (stage, scale, key, 'as a block')


def test_null_takes_one_key_out():
    for stage, scale, name, path, _ in ALL:
        key, before = '.'.join((name, *path)), resolved(stage, scale)
        try:
            after = resolved(stage, scale, {key: 'null'})
        except LabError:  # a mode that is asked for, or four_bit without a rank
            continue
        block, left = before[name], after[name]
        for part in path[:-1]:
            block, left = block[part], left[part]
        assert path[-1] in block and path[-1] not in left, (stage, scale, key)
        assert {**left, path[-1]: block[path[-1]]} == block
        assert {k: v for k, v in after.items() if k != name} == {
            k: v for k, v in before.items() if k != name
        }


# inputs of a trial of the lab: stage, scale, change, and the block that should come out
TRIAL = [
    (
        'train_sft_domain',
        'qlora',
        'load.lora_rank=64',
        {'dtype': 'bfloat16', 'lora_rank': 64},
    ),
    (
        'train_sft_domain',
        'qlora',
        'load.four_bit=false',
        {'dtype': 'bfloat16', 'four_bit': False, 'lora_rank': 32},
    ),
    (
        'train_sft_domain',
        'nano',
        'mix.domain_sft=10',
        {'domain_sft': 10, 'domain': 120, 'general': 630},
    ),
    ('sample_teacher', 'nano', 'samples.preferences=2', {'preferences': 2, 'distill': 1}),
    (
        'launch_teacher_vllm',
        'full',
        'vllm.max_model_len=32768',
        {'tensor_parallel_size': 8, 'max_model_len': 32768},
    ),
    (
        'sample_teacher',
        'nano',
        'ask.preferences.reasoning_prompts=10',
        {
            'preferences': {'reasoning_prompts': 10},
            'distill': {'reasoning_prompts': 5000, 'domain_sft': 8000},
        },
    ),
    (
        'distill_to_student',
        'qlora',
        'load.backend=unsloth',
        {'dtype': 'bfloat16', 'four_bit': True, 'lora_rank': 32, 'backend': 'unsloth'},
    ),
]


@pytest.mark.parametrize('stage, scale, word, want', TRIAL, ids=[t[2] for t in TRIAL])
def test_changes_of_the_trial(stage, scale, word, want):
    got = resolved(stage, scale, changes_of([word]))[word.partition('.')[0]]
    assert {key: got[key] for key in want} == want


@dataclasses.dataclass(frozen=True)
class Inner:
    rank: int = 0
    near: float | None = 0.7
    names: typing.Literal['auto'] | list[str] = 'auto'

    renamed = {'size': 'rank'}


@dataclasses.dataclass(frozen=True)
class Toy:
    steps: int = 1
    free: dict = field(default_factory=dict)
    mix: dict[str, int] = field(default_factory=dict)
    modes: dict[typing.Literal['one', 'two'], dict[str, float]] = field(default_factory=dict)
    load: typing.Annotated[dict, Inner] = field(default_factory=dict)


def toy(*layers: dict) -> Toy:
    return fill(Toy, [(f'layer {i}', layer) for i, layer in enumerate(layers)])


def test_layers_are_laid_over_each_other_key_by_key():
    layers = (
        {'free': {'a': {'b': 1, 'c': 2}}, 'mix': {'x.v2': 3, 'y': 4}},
        {'free': {'a': {'c': 5}}, 'modes': {'one': {'p': 1}}},
        {'free.a.d': '6', 'mix.x.v2': '7', 'modes.one.p.v2': '0.5', 'load.rank': '1e1'},
    )
    assert toy(*layers) == Toy(
        free={'a': {'b': 1, 'c': 5, 'd': 6}},
        mix={'x.v2': 7, 'y': 4},
        modes={'one': {'p': 1.0, 'p.v2': 0.5}},
        load={'rank': 10},
    )


def test_null_takes_out_a_key_or_a_block_unless_it_is_a_value():
    below = {'mix': {'x': 1, 'y': 2}, 'load': {'rank': 3, 'near': 0.5}, 'free': {'a': {'b': 1}}}
    assert toy(below, {'mix.x': 'null'}).mix == {'y': 2}
    assert toy(below, {'mix': 'null'}).mix == {}
    assert toy(below, {'mix': None}, {'mix.z': 3}).mix == {'z': 3}
    assert toy(below, {'load.near': None}).load == {'rank': 3, 'near': None}
    assert toy(below, {'load.rank': None}).load == {'near': 0.5}
    assert toy(below, {'free.a.b': 'null'}).free == {'a': {}}
    assert toy(below, {'free': {'a': None}}).free == {}


REFUSED = [
    ({'mix': {'x': 1}, 'mix.x': '2'}, 'layer 1: mix.x is given twice'),
    ({'mix': '{x: 1}', 'mix.x': 2}, 'layer 1: mix.x is given twice'),
    ({'free.a': 1, 'free.a.b': 2}, 'layer 1: free.a.b is given twice'),
    ({'free': {'a': {'b': 1}}, 'free.a.b': 2}, 'layer 1: free.a.b is given twice'),
    ({'mix': {}}, 'layer 1: mix: {} changes none of its keys (x)'),
    ({'mix': '{}'}, 'null takes out a key, or all of them'),
    ({'mix.y': 'many'}, "layer 1: mix.y must be int, not 'many'"),
    ({'mix.y': '2.5'}, "mix.y must be int, not '2.5'"),
    ({'mix': '[x]'}, "layer 1: mix must be a block of keys and values, not '[x]'"),
    ({'mixx.y': '1'}, "unknown key 'mixx' (did you mean 'mix'?); valid: steps, free, mix"),
    ({'modes.three': '{}'}, "layer 1: modes: unknown key 'three'; valid: one, two"),
    ({'modes.one': '3'}, 'layer 1: modes.one must be a block'),
    ({'load.rnk': '3'}, "layer 1: load: unknown key 'rnk' (did you mean 'rank'?); valid: rank"),
    ({'load.size': '3'}, "layer 1: load: 'size' is now called 'rank'"),
    ({'load.rank.x': '3'}, "layer 1: load.rank is no block, so it has no key 'x'"),
    ({'steps.x': '3'}, "layer 1: steps is no block, so it has no key 'x'"),
    ({'mix.': '3'}, "layer 1: 'mix.' ends without a key"),
]


@pytest.mark.parametrize('changes, message', REFUSED, ids=[str(c) for c, _ in REFUSED])
def test_refused_changes(changes, message):
    with pytest.raises(LabError) as e:
        toy({'mix': {'x': 1}}, changes)
    assert message in str(e.value) and '\n' not in str(e.value)


def test_a_command_line_gives_each_key_once_and_keeps_the_names_in_a_block():
    assert changes_of(['--answer-tokens', '5', 'checkpoints.my-model.v2=base']) == {
        'answer_tokens': '5',
        'checkpoints.my-model.v2': 'base',
    }
    with pytest.raises(LabError, match='seed is given twice'):
        changes_of(['seed=1', '--seed=2'])


def adapted(kind: str, **more):
    "A smoke model with the adapter that a `load` block asks for, and its coverage."
    from peft import get_peft_model

    from k2lab.models.adapters import certified, coverage, lora
    from k2lab.models.load import Loading, open_model

    load = Loading(lora_rank=4, **more)
    model = open_model(f'smoke:{kind}')
    asked = lora(model, load)
    assert asked
    tuned = get_peft_model(model, asked)
    return tuned, certified(coverage(tuned), load)


def test_auto_adapts_the_linear_layers_that_a_model_has():
    for kind, want in (('qwen', {'attention', 'dense'}), ('k2', {'attention', 'dense', 'shared'})):
        _, parts = adapted(kind)
        assert {part for part, c in parts.items() if c['adapted']} == want


def test_options_of_an_adapter_reach_peft():
    tuned, parts = adapted('k2', lora_alpha=6, lora_dropout=0.25)
    layer: typing.Any = next(m for m in tuned.modules() if hasattr(m, 'lora_dropout'))
    assert layer.lora_dropout['default'].p == 0.25 and layer.scaling['default'] == 6 / 4
    assert parts['attention']['scales'] == [1.5]
    assert adapted('k2', rslora=True)[1]['dense']['scales'] == [4.0]  # 8 / sqrt(4)


def test_a_certificate_refuses_another_scale():
    from k2lab.models.adapters import certified
    from k2lab.models.load import Loading

    _, parts = adapted('k2', lora_alpha=6)
    with pytest.raises(LabError, match=r'at scales \[1.5\] instead of 4 at 2'):
        certified(parts, Loading(lora_rank=4))


LOADS = [
    (
        {'load.dtype': 'bf16'},
        "load: unknown dtype 'bf16' (did you mean 'bfloat16'?); valid: float32, bfloat16",
    ),
    ({'load.dtype': 'float16'}, "load: unknown dtype 'float16'"),
    ({'load.four_bit': 'maybe'}, "load.four_bit must be bool or one of 'experts', not 'maybe'"),
    ({'load.lora_rank': '-4'}, 'lora_rank from 0 on'),
    ({'load.lora_rank': '4', 'load.lora_alpha': '0'}, 'lora_alpha above 0'),
    ({'load.lora_rank': '4', 'load.lora_dropout': '1'}, 'lora_dropout from 0 to below 1'),
    ({'load.lora_alpha': '8'}, 'load: lora_alpha without an adapter; give lora_rank'),
    ({'load.rslora': 'true'}, 'load: rslora without an adapter; give lora_rank'),
    ({'load.lora_rank': '4', 'load.adapt': 'attention'}, "load.adapt must be one of 'auto'"),
    ({'load.lora_rank': '4', 'load.adapt': '[]'}, 'load: adapt names no part'),
]


@pytest.mark.parametrize('changes, message', LOADS, ids=[str(c) for c, _ in LOADS])
def test_refused_loads(changes, message):
    for stage in ('train_sft_domain', 'sample_teacher'):
        with pytest.raises(LabError) as e:
            resolved(stage, 'smoke', changes)
        assert message in str(e.value) and '\n' not in str(e.value)


PARTS = [
    ('qwen', {'adapt': ['attention', 'shared', 'dense']}, 'write load.adapt=[attention, dense] or'),
    ('qwen', {'adapt': ['head']}, 'the head of this model is its embedding too'),
    ('k2', {'adapt': ['embedding']}, 'this model has no embedding'),
    ('k2', {'adapt': ['routed'], 'lora_dropout': 0.1}, 'lora_dropout is for linear layers; routed'),
]


@pytest.mark.parametrize('kind, load, message', PARTS)
def test_an_adapter_that_cannot_be_is_refused_by_the_config_alone(kind, load, message, tmp_path):
    from k2lab.models.adapters import check_parts
    from k2lab.models.load import Loading, smoke_model

    (tmp_path / 'config.json').write_bytes((smoke_model(kind) / 'config.json').read_bytes())
    with pytest.raises(LabError) as e:
        check_parts(tmp_path, Loading(lora_rank=4, **load))
    assert message in str(e.value)
    check_parts(tmp_path, Loading(lora_rank=4))


def test_every_option_of_trl_is_used_or_refused_with_a_reason():
    "The tables are plain text; this keeps them equal to TRL's own classes."
    from trl import DPOConfig, SFTConfig

    from k2lab.training.trainer import REFUSED_OPTIONS, TRL_OPTIONS

    refused = [name for names in REFUSED_OPTIONS.values() for name in names.split()]
    known = [*refused, *(name for names in TRL_OPTIONS.values() for name in names)]
    assert sorted(name for name in known if known.count(name) > 1) == ['loss_type'] * 2
    for kind, method in ((SFTConfig, 'SFT'), (DPOConfig, 'DPO')):
        fields = {f.name for f in dataclasses.fields(kind) if f.init}
        used = {*TRL_OPTIONS[method], *TRL_OPTIONS['both']}
        assert used <= fields
        # SFT takes no Liger kernel: its loss is computed in chunks without it
        left = {'use_liger_kernel'} if method == 'SFT' else set()
        assert fields - used - set(refused) == left
    ours = {f.name for kind in (SFTConfig, DPOConfig) for f in dataclasses.fields(kind)}
    assert set(known) <= ours


OPTIONS = [
    (
        'train_sft_domain',
        'learning_rat=1e-4',
        "no option 'learning_rat' (did you mean 'learning_rat",
    ),
    ('train_sft_domain', 'seed=7', "the stage's `seed` is the only source of randomness"),
    ('train_sft_domain', 'packing=true', "the stage's `pack` is true"),
    ('run_dpo_reasoning', 'padding_free=true', "the stage's `pack` is true"),
    ('train_sft_domain', 'max_length=12', "the stage's `length` says"),
    ('train_sft_domain', 'use_liger_kernel=true', 'is computed in chunks without it'),
    ('train_sft_domain', 'eval_strategy=steps', '`measures` are taken before and after'),
    ('train_sft_domain', 'load_best_model_at_end=true', 'nothing is evaluated while training'),
    ('train_sft_domain', 'router_aux_loss_coef=0.01', 'no logits to balance'),
    ('train_sft_domain', 'assistant_only_loss=true', 'with their loss mask'),
    ('train_sft_domain', 'eos_token=x', "the lab's own token ids"),
    ('train_sft_domain', 'beta=0.1', "SFT has no option 'beta' (it is one of DPO)"),
    ('run_dpo_reasoning', 'dataset_text_field=x', "the lab's own token ids"),
    ('run_dpo_reasoning', 'bta=0.1', "DPO has no option 'bta' (did you mean 'beta'?)"),
    ('train_continual_pretrain', 'output_dir=x', 'a run has a folder of its own'),
    ('make_nano_models', 'data_seed=7', 'the only source of randomness'),
    ('make_nano_models', 'adam_beta1=0.5', 'adam_beta1 would change nothing: optimizer is muon'),
    (
        'train_sft_domain',
        'gradient_checkpointing_kwargs={use_reentrant: true}',
        'needs gradient_che',
    ),
]


@pytest.mark.parametrize('stage, word, message', OPTIONS)
def test_options_of_trl_that_a_stage_does_not_use_are_refused(stage, word, message):
    with pytest.raises(LabError) as e:
        resolved(stage, 'smoke', changes_of([f'trainer.{word}']))
    assert message in str(e.value) and '\n' not in str(e.value)


def test_the_control_of_dpo_takes_the_options_that_sft_has():
    from k2lab.run_dpo_reasoning import Config

    changes = {'trainer.ld_alpha': '0.5', 'control_trainer.max_steps': '2'}
    cfg = resolve(Config, 'run_dpo_reasoning', 'smoke', changes)
    assert cfg.trainer['ld_alpha'] == 0.5
    assert cfg.control_options() == {
        'learning_rate': 5e-6,
        'per_device_train_batch_size': 4,
        'num_train_epochs': 1,
        'warmup_steps': 0,
        'max_steps': 2,
        'logging_steps': 1,
    }
    with pytest.raises(LabError, match="SFT has no option 'beta'"):
        resolve(Config, 'run_dpo_reasoning', 'smoke', {'control_trainer.beta': 1})


HEADS = [
    ('train_sft_domain', {}, 'write trainer.loss_type=nll'),
    ('run_dpo_reasoning', {}, 'write trainer.loss_type=nll'),  # of the control
    (
        'run_dpo_reasoning',
        {'trainer.use_liger_kernel': True},
        'write trainer.use_liger_kernel=false',
    ),
    ('run_dpo_reasoning', {'control': False}, ''),
    ('train_sft_domain', {'trainer.loss_type': 'nll'}, ''),
]


@pytest.mark.parametrize('stage, changes, message', HEADS)
def test_a_head_is_adapted_only_where_the_loss_sees_it(stage, changes, message):
    changes = {'load.lora_rank': 4, 'load.adapt': '[attention, head]', **changes}
    if not message:
        return resolved(stage, 'smoke', changes)
    with pytest.raises(LabError) as e:
        resolved(stage, 'smoke', changes)
    assert message in str(e.value)


SERVERS = [
    ({'vllm.port': 1}, 'vllm: port is the field `port`; set that'),
    ({'vllm.revision': 'v1'}, 'part of the place in env.yaml, org/name@revision'),
    ({'vllm.api_key': 'x'}, 'set the variable named by key_env instead'),
    ({'engine': 'embedded'}, 'vllm: the engine is embedded; write engine=vllm'),
    ({'vllm.trust_remote_code': True}, 'would run code that comes with the checkpoint'),
    ({'vllm.lora_modules': ['a=/b']}, 'vllm: lora_modules is the field `adapter`; set that'),
    ({'vllm.middleware': []}, 'vllm: middleware is an empty list; leave it out'),
]


@pytest.mark.parametrize('changes, message', SERVERS)
def test_options_of_vllm_that_the_lab_decides_are_refused(changes, message):
    with pytest.raises(LabError) as e:
        resolved('launch_teacher_vllm', 'full', changes)
    assert message in str(e.value)


def test_an_adapter_needs_vllm():
    with pytest.raises(LabError) as e:
        resolved('launch_teacher_vllm', 'nano', {'adapter': 'k2_domain_instruct_adapter@r1'})
    assert 'write engine=vllm, or serve the merged checkpoint: model=k2_domain_instruct' in str(
        e.value
    )
    resolved('launch_teacher_vllm', 'full', {'vllm.trust_remote_code': False})


def test_a_hub_name_while_offline_names_the_switch(monkeypatch):
    from k2lab.models.quantized import fetched

    monkeypatch.setattr('huggingface_hub.is_offline_mode', lambda: True)
    with pytest.raises(LabError, match=r'set offline = false under \[hub\] in settings.ini'):
        fetched('nobody/no-such-model')
    monkeypatch.setenv('K2LAB_HUB_OFFLINE', 'false')
    with pytest.raises(LabError, match='unset HF_HUB_OFFLINE'):
        fetched('nobody/no-such-model')


@pytest.mark.parametrize(
    'url', ['hf://datasets/org/rows/*.jsonl', 'hf://datasets/org/rows/a.jsonl']
)
def test_data_of_the_hub_while_offline_names_the_switch(url, monkeypatch):
    from huggingface_hub import constants

    from k2lab.corpus.readers import find_files, open_raw, stamp
    from k2lab.text.rows import read_bytes

    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    for read in [find_files] if '*' in url else [stamp, open_raw, read_bytes]:
        with pytest.raises(LabError, match='lab is offline; set offline = false under') as e:
            read(url)
        assert '\n' not in str(e.value)


def test_processes_without_gpus_are_refused_before_one_starts(monkeypatch):
    from types import SimpleNamespace

    import torch

    from k2lab.lab.launch import work_in_processes

    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 7)
    monkeypatch.setattr('k2lab.lab.launch.run_group', lambda *a: pytest.fail('something started'))
    monkeypatch.setenv('SLURM_JOB_NUM_NODES', '1')
    cfg = SimpleNamespace(accelerate='zero3', processes=8)
    job: typing.Any = SimpleNamespace(cfg=cfg, folder=None)
    with pytest.raises(LabError, match='need 8 GPUs here, and there are 7'):
        work_in_processes(job)


EVALUATED = [
    ({'checkpoints.mine': 'Kimi-K2-Base'}, "measures: nothing for 'mine'; write measures.mine="),
    ({'measures.k2_think_dp': '[x]'}, "measures: unknown checkpoint 'k2_think_dp' (did you mean"),
]


@pytest.mark.parametrize('changes, message', EVALUATED)
def test_measures_belong_to_checkpoints(changes, message):
    with pytest.raises(LabError) as e:
        resolved('evaluate', 'nano', changes)
    assert message in str(e.value)


LOSSES = [
    (
        'run_dpo_reasoning',
        {'trainer.loss_type': '[sigmoid, sfft]'},
        "unknown loss_type 'sfft' (did",
    ),
    ('run_dpo_reasoning', {'trainer.loss_type': 'ipo'}, '2 loss_weights for 1 losses'),
    (
        'run_dpo_reasoning',
        {'trainer.label_smoothing': '0.1'},
        'without loss_type: exo_pair or robust',
    ),
    ('run_dpo_reasoning', {'trainer.ref_model_sync_steps': '4'}, 'without sync_ref_model: true'),
    (
        'train_sft_domain',
        {'trainer.loss_type': 'dtf'},
        "unknown loss_type 'dtf' (did you mean 'dft'?)",
    ),
    (
        'run_dpo_reasoning',
        {'load.lora_rank': 4, 'load.lora_dropout': 0.1},
        'write trainer.disable_dropout=false beside it',
    ),
]


@pytest.mark.parametrize('stage, changes, message', LOSSES)
def test_losses_and_their_options(stage, changes, message):
    with pytest.raises(LabError) as e:
        resolved(stage, 'smoke', changes)
    assert message in str(e.value) and '\n' not in str(e.value)


def test_the_losses_are_those_of_trl():
    "By the message that TRL has for an unknown one."
    import inspect
    import re

    from trl.trainer import dpo_trainer, sft_trainer

    from k2lab.training.trainer import LOSSES as ours

    told = re.search(r'Should be one of \[(.*?)\]', inspect.getsource(dpo_trainer), re.S)
    assert told and set(re.findall(r"'(\w+)'", told[1])) == set(ours['DPO'])
    told = re.search(r'Supported values are (.*?)\."', inspect.getsource(sft_trainer), re.S)
    assert told and set(re.findall(r"'(\w+)'", told[1])) == set(ours['SFT'])


def test_dpo_switches_the_dropout_of_an_adapter_off():
    "Why lora_dropout needs disable_dropout: false: TRL changes every dropout of the model it has wrapped."
    from trl.trainer.utils import disable_dropout_in_model

    tuned, _ = adapted('k2', lora_dropout=0.25)
    disable_dropout_in_model(tuned)
    layer: typing.Any = next(m for m in tuned.modules() if hasattr(m, 'lora_dropout'))
    assert layer.lora_dropout['default'].p == 0


BLOCKS = [
    ('train_sft_domain', {'mix.general': '-1'}, 'mix: general is -1; 0 leaves it out'),
    (
        'train_sft_domain',
        {'mix.domain_sft': 0, 'mix.domain': 0, 'mix.general': 0},
        'mix: nothing is left of domain_sft, domain, general',
    ),
    (
        'train_sft_domain',
        {'measures': '[domain_question]'},
        "unknown measure 'domain_question' (did",
    ),
    (
        'evaluate',
        {'measures.k2_think_dpo': '[bits]'},
        "measures.k2_think_dpo: unknown measure 'bits'",
    ),
    (
        'sample_teacher',
        {'samples.preference': '2'},
        "samples: unknown key 'preference' (did you mean",
    ),
    ('sample_teacher', {'teacher.preferenses': 'x'}, "teacher: unknown key 'preferenses' (did you"),
    ('sample_teacher', {'samples.preferences': '0'}, 'samples from 1 on'),
    ('sample_teacher', {'temperature.preferences': 'warm'}, 'preferences must be float, not'),
    ('sample_teacher', {'teacher.preferences': 'null'}, "teacher: nothing for mode 'preferences'"),
    ('sample_teacher', {'load.lora_rank': '4'}, 'lora_rank is for training'),
    ('prepare_corpus', {'refine.min_char': '4'}, "refine: unknown key 'min_char' (did you mean"),
    ('prepare_corpus', {'refine.least': '4'}, "refine: 'least' is now called 'min_chars'"),
    ('prepare_corpus', {'refine.redact': 'maybe'}, "refine.redact must be bool, not 'maybe'"),
    ('prepare_corpus', {'refine.tokenizer': 'x'}, 'refine: tokenizer is a field of the stage'),
    ('prepare_corpus', {'family_weights.srot': '4'}, "unknown puzzle family 'srot' (did you mean"),
    ('prepare_corpus', {'family_weights.sort': 'null'}, ''),
    ('prepare_corpus', {'refine.near_duplicate_jaccard': 'null'}, ''),
    (
        'report',
        {'goals': '[{stage: a, says: b, measure: c, at_leats: 1}]'},
        "unknown key 'at_leats'",
    ),
    ('report', {'goals': '[{stage: a, says: b, any: [[{measure: c, gian: 1}]]}]'}, "key 'gian'"),
    (
        'report',
        {'goals': '[{stage: a, says: b, measure: c}]'},
        'a condition has a measure and one of',
    ),
    (
        'report',
        {'goals': '[{says: b, measure: c, gain: 1}]'},
        "name a 'checkpoint', or the 'stage'",
    ),
]


@pytest.mark.parametrize('stage, changes, message', BLOCKS)
def test_unknown_keys_and_values_of_blocks_are_refused(stage, changes, message):
    if not message:
        return resolved(stage, 'nano', changes)
    with pytest.raises(LabError) as e:
        resolved(stage, 'nano', changes)
    assert message in str(e.value) and '\n' not in str(e.value)
