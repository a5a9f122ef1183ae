"Paths that a laptop seldom takes: adapters, 4-bit weights, launch files, scales `qlora` and `full`."

import importlib
import json
import shutil
from pathlib import Path

import pytest

from k2lab.lab.config import LabError, lab_path, resolve
from k2lab.lab.job import start
from k2lab.lab.launch import launch_command

torch = pytest.importorskip('torch')
from k2lab.models.adapters import adaptable, is_split, lora
from k2lab.models.load import (
    Loading,
    check_window,
    group_of,
    open_model,
    open_tokenizer,
    smoke_model,
    trained_counts,
)
from k2lab.models.stacks import stacks
from k2lab.training.stage import publish_model
from k2lab.training.trainer import options

IDS = torch.arange(8, 72).view(2, 32)
PARTS = {'attention', 'shared', 'dense'}
STAGES = [
    'train_continual_pretrain',
    'train_sft_domain',
    'train_sft_reasoning',
    'run_dpo_reasoning',
    'distill_to_student',
]


@pytest.fixture(scope='module', autouse=True)
def runs(tmp_path_factory):
    "Runs and smoke models of this file lie in a folder of their own."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('K2LAB_LAB_RUNS_PATH', str(tmp_path_factory.mktemp('runs')))
        yield


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def layers(model, parts) -> list:
    return sorted(n for part in parts for n in adaptable(model)[part][0])


def far(a, b) -> float:
    "Relative distance of two tensors."
    return float((a - b).norm() / b.norm())


def plain(state: dict) -> dict:
    "The frozen weights of a model with an adapter, under the names they had before."
    return {
        n.removeprefix('base_model.model.').replace('.base_layer', ''): p
        for n, p in state.items()
        if 'lora_' not in n
    }


def trained(stage: str, **changes) -> dict:
    "A smoke run of a stage: its job, the model as trained, what it said, and what it published."
    seen = {}

    def watching(model):
        if (
            job.cfg.saves not in job.record['saves']
        ):  # what is measured later is the published model
            seen.update(
                model=model,
                said=logits(model),
                state={n: p.detach().clone() for n, p in model.named_parameters()},
            )
        return is_split(model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('k2lab.training.stage.is_split', watching)
        job = start(stage, 'smoke', changes={'measures': ['domain_bits_per_byte'], **changes})
        importlib.import_module(f'k2lab.{stage}').work(job)
    return dict(
        seen,
        job=job,
        published=open_model(job.folder / job.cfg.saves),
        fit=json.loads((job.folder / 'run.json').read_text())['training']['train'],
    )


def by_hand(base, state: dict, scale: int = 2) -> dict:
    "The weights that should be published: W + scale * B A, with PEFT's scale being alpha over rank."
    weights = dict(base.state_dict())
    for name in [n for n in state if n.endswith('lora_A.default.weight')]:
        at = (
            name.removeprefix('base_model.model.').removesuffix('.lora_A.default.weight')
            + '.weight'
        )
        weights[at] = weights[at] + scale * (
            state[name.replace('lora_A', 'lora_B')].float() @ state[name].float()
        )
    return weights


# ---- LoRA --------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def adapted():
    return trained('train_sft_domain', **{'load.lora_rank': 4})


def test_only_the_adapter_trains_and_the_record_says_what(adapted):
    base, state = open_model(smoke_model('k2')), adapted['state']
    inside = {n.split('.lora_')[0].removeprefix('base_model.model.') for n in state if 'lora_' in n}
    assert sorted(inside) == layers(base, PARTS) and not any(
        'experts.' in n.replace('shared_experts.', '') or n.endswith('mlp.gate') for n in inside
    )
    assert all(torch.equal(p, plain(state)[n]) for n, p in base.named_parameters()) and all(
        p.any() for n, p in state.items() if 'lora_B' in n
    )
    sizes = {
        part: sum(4 * sum(base.get_submodule(n).weight.shape) for n in layers(base, [part]))
        for part in PARTS
    }
    assert (
        adapted['fit']['trained_parameters']
        == sizes
        == dict(attention=4992, shared=1536, dense=2304)
    )


def test_a_published_adapter_is_a_whole_model_that_says_the_same(adapted):
    assert far(logits(adapted['published']), adapted['said']) < 1e-5
    base, now = open_model(smoke_model('k2')).state_dict(), adapted['published'].state_dict()
    assert {group_of(n) for n in base if not torch.equal(base[n], now[n])} == PARTS
    assert trained('train_sft_reasoning', **{'load.lora_rank': 4, 'load.adapt': '[attention]'})[
        'fit'
    ]['trained_parameters'] == dict(attention=4992)


def test_a_deepseek_checkpoint_gets_its_adapter_where_asked(tmp_path):
    "PEFT moves the adapter of a `deepseek_v3` model, such as Moonlight (scale qlora), to the routed experts."
    folder = Path(shutil.copytree(smoke_model('k2'), tmp_path / 'moon'))
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(
        json.dumps(
            dict(
                config,
                model_type='deepseek_v3',
                auto_map={'AutoConfig': 'configuration_deepseek.DeepseekV3Config'},
            )
        )
    )
    from peft import get_peft_model

    model = open_model(folder)
    assert torch.equal(logits(model), logits(open_model(smoke_model('k2'))))
    assert set(trained_counts(get_peft_model(model, lora(model, Loading(lora_rank=4))))) == PARTS


@pytest.mark.parametrize(
    'changes, line',
    [
        ({'load.lora_rank': 4, 'optimizer': 'muon'}, 'muon does not train adapters'),
        ({'load.four_bit': True}, 'give lora_rank as well'),
        ({'load.lora_rank': 4, 'load.adapt': '[attention, mlp]'}, "adapt: unknown part 'mlp'"),
        ({'load.lora_rnk': 4}, "load: unknown key 'lora_rnk' (did you mean 'lora_rank'?)"),
    ],
)
def test_loading_that_would_train_nothing_is_refused_before_there_is_a_run(changes, line):
    with pytest.raises(LabError) as e:
        start('train_sft_domain', 'smoke', changes=changes)
    assert line in str(e.value)


@pytest.mark.parametrize(
    'fault, line',
    [
        (lambda f: (f / 'model.safetensors').unlink(), 'no weights there'),
        (
            lambda f: (f / 'model.safetensors').write_bytes(
                (f / 'model.safetensors').read_bytes()[:-100]
            ),
            'it was cut short',
        ),
        (
            lambda f: (
                (f / 'model.safetensors').rename(f / 'model-1.safetensors')
                and (f / 'model.safetensors.index.json').write_text(
                    json.dumps(
                        {
                            'weight_map': {
                                'lm_head.weight': 'model-1.safetensors',
                                'model.norm.weight': 'model-2.safetensors',
                            }
                        }
                    )
                )
            ),
            'names model-2.safetensors, which is not there',
        ),
        (
            lambda f: (f / 'config.json').write_text(
                (f / 'config.json').read_text().replace('"hidden_size": 64', '"hidden_size": 96')
            ),
            'do not fit|mismatched keys',
        ),
        (
            lambda f: (f / 'config.json').write_text(
                (f / 'config.json').read_text().replace('"vocab_size": 3072', '"vocab_size": 4000')
            ),
            'do not fit|mismatched keys',
        ),
    ],
)
def test_a_checkpoint_that_is_not_whole_says_so(fault, line, tmp_path):
    folder = Path(shutil.copytree(smoke_model('k2'), tmp_path / 'model'))
    fault(folder)
    with pytest.raises(LabError, match=line):
        open_model(folder)


def test_rows_and_tokens_that_the_model_has_no_place_for_are_refused():
    model, tok = open_model(smoke_model('k2')), open_tokenizer(smoke_model('k2'))
    check_window(model, tok, 'here', 1024)
    with pytest.raises(
        LabError, match='length: 1025 tokens, but the positions of here reach to 1024'
    ):
        check_window(model, tok, 'here', 1025)
    tok.add_tokens(['one', 'two'])
    with pytest.raises(LabError, match='they do not belong together'):
        check_window(model, tok, 'here', 10)
    with pytest.raises(LabError, match='reach to 1024'):
        trained('train_sft_domain', length=4096)


# ---- 4 bits ------------------------------------------------------------------------------------------------


FOUR_BIT = {
    'load.four_bit': True,
    'load.lora_rank': 4,
    'trainer.gradient_checkpointing': True,
}


@pytest.fixture(scope='module')
def four_bit():
    pytest.importorskip(
        'bitsandbytes', reason='4-bit weights need bitsandbytes: pip install "k2lab[gpu]"'
    )
    return trained('train_sft_domain', **FOUR_BIT)


def test_four_bits_are_for_linear_layers_and_stacked_experts(four_bit):
    kinds = {
        (group_of(n + '.weight'), type(m).__name__)
        for n, m in open_model(smoke_model('k2'), Loading(four_bit=True)).named_modules()
        if 'Linear' in type(m).__name__
    }
    assert kinds == {
        ('attention', 'Linear4bit'),
        ('shared', 'Linear4bit'),
        ('dense', 'Linear4bit'),
        ('head', 'Linear'),
    }
    frozen = plain(four_bit['state'])
    assert {group_of(n) for n, p in frozen.items() if p.dtype == torch.uint8} == {*PARTS, 'routed'}
    assert all(frozen[n].dtype == torch.float32 for n in frozen if group_of(n) == 'router')


def dequantised(model):
    "A 4-bit model's weights as bitsandbytes gives them back, by name."
    import bitsandbytes as bnb

    return {
        n: bnb.functional.dequantize_4bit(p.data, p.quant_state)
        if isinstance(p, bnb.nn.Params4bit)
        else p.data
        for n, p in model.named_parameters()
        if '.experts.' not in n
    } | {n: form() for n, form in stacks(model).items()}


def test_an_adapter_trained_on_four_bits_is_published_in_full_precision(four_bit):
    "On the 4-bit weights that it was trained on, not on those they were rounded from."
    assert 0 < four_bit['fit']['loss'] < 20 and set(four_bit['fit']['trained_parameters']) == PARTS
    assert all(
        p.any() and p.isfinite().all() for n, p in four_bit['state'].items() if 'lora_B' in n
    )  # B starts at zero: each had a gradient
    place, now = four_bit['job'].folder / 'k2_domain_instruct', four_bit['published']
    assert 'quantization_config' not in json.loads((place / 'config.json').read_text())
    base = open_model(smoke_model('k2'))
    base.load_state_dict(
        dequantised(open_model(smoke_model('k2'), Loading(four_bit=True))), strict=False
    )
    want = by_hand(base, four_bit['state'])
    assert all(far(now.state_dict()[n], w) < 1e-5 for n, w in want.items() if w.any())
    assert far(logits(now), four_bit['said']) < 1e-5


# ---- DPO with an adapter: the reference is the base with the adapter switched off; the control trains the sa


def test_dpo_trains_an_adapter_and_so_does_its_control():
    pytest.importorskip(
        'bitsandbytes', reason='4-bit weights need bitsandbytes: pip install "k2lab[gpu]"'
    )
    run = trained('run_dpo_reasoning', **FOUR_BIT)
    phases = run['job'].record['training']
    assert (
        phases['train']['trained_parameters']
        == phases['control']['trained_parameters']
        == dict(attention=4992, shared=1536, dense=2304)
    )


def test_of_several_processes_the_first_one_publishes():
    "All of them reach the end; a second one that publishes too would fail the run."
    job, place = start('train_sft_domain', 'smoke'), smoke_model('k2')
    model, tok = open_model(place), open_tokenizer(place)
    model.lm_head.weight.data *= 1.1
    job.first = False
    publish_model(job, model, tok)
    assert not (job.folder / 'k2_domain_instruct').exists()
    job.first = True
    publish_model(job, model, tok)
    assert torch.equal(logits(open_model(job.folder / 'k2_domain_instruct')), logits(model))


# ---- what qlora and full ask for ---------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['cpu', 'ddp', 'fsdp2', 'zero2', 'zero3'])
def test_accelerate_accepts_the_launch_file(name, monkeypatch):
    from accelerate.commands import launch

    monkeypatch.setattr(launch, 'is_bf16_available', lambda *a: True)
    args = launch.launch_command_parser().parse_args(
        [
            '--config_file',
            str(lab_path('configs') / 'accelerate' / f'{name}.yaml'),
            '--num_processes',
            '2',
            'train.py',
        ]
    )
    args, defaults, _ = launch._validate_launch_command(args)
    starts = (
        args.use_deepspeed or args.use_fsdp or args.multi_gpu
    )  # otherwise accelerate starts one process, whatever was asked
    assert (
        starts
        and args.num_processes == 2
        and args.mixed_precision == ('no' if name == 'cpu' else 'bf16')
    )
    if name == 'zero3':
        assert (
            args.zero_stage == 3
            and args.zero3_init_flag is True
            and args.zero3_save_16bit_model is False  # a split model is published in slices
        )


@pytest.mark.parametrize('scale', ['qlora', 'full'])
@pytest.mark.parametrize('stage', STAGES)
def test_trl_accepts_what_the_scale_asks_for(stage, scale, tmp_path):
    from trl import DPOConfig, SFTConfig

    cfg = resolve(importlib.import_module(f'k2lab.{stage}').Config, stage, scale)
    kind = DPOConfig if 'dpo' in stage else SFTConfig
    opts = options(
        kind, cfg.trainer, output_dir=str(tmp_path), max_length=None, bf16=True, use_cpu=True
    )  # as on a GPU: bf16 is what differs
    assert {
        k: getattr(opts, k) for k in ('learning_rate', 'save_steps', 'gradient_checkpointing')
    } == {k: cfg.trainer[k] for k in ('learning_rate', 'save_steps', 'gradient_checkpointing')}
    load = Loading(**cfg.load)
    kind = 'qwen' if stage == 'distill_to_student' else 'k2'
    assert load.dtype == 'bfloat16' and (
        not load.lora_rank or lora(open_model(smoke_model(kind)), load)
    )
    if cfg.processes > 1:
        assert launch_command(start(stage, scale, anyway=True))[3:5] == [
            '--config_file',
            str(lab_path('configs') / 'accelerate' / f'{cfg.accelerate}.yaml'),
        ]
