"Adapters asked for are there, learn, are saved and published; each fault is seeded here and must be noticed."

import pytest

torch = pytest.importorskip('torch')
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from k2lab.lab.config import LabError
from k2lab.models.adapters import (
    LINEAR,
    adaptable,
    adapters,
    apart,
    certified,
    certified_export,
    check_bits,
    check_saved,
    coverage,
    export_report,
    lora,
    merge_adapter,
    probe_logits,
    weight_bits,
    with_gradient,
)
from k2lab.models.load import (
    Loading,
    open_model,
    open_tokenizer,
    save_checkpoint,
    small_model,
    smoke_model,
)

ALL = ('attention', 'shared', 'dense', 'routed')
IDS = torch.arange(8, 136).view(4, 32)


@pytest.fixture(scope='module', autouse=True)
def runs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('K2LAB_LAB_RUNS_PATH', str(tmp_path_factory.mktemp('runs')))
        yield


def base(kind='k2'):
    return open_model(smoke_model(kind))


def adapted(load: Loading, model=None, **changes):
    "A model with the adapter that `load` asks for, or one whose config was changed by a fault."
    model = model or base()
    config = lora(model, load)
    for key, value in changes.items():
        setattr(config, key, value(getattr(config, key)))
    return get_peft_model(model, config)


def one_step(model) -> dict:
    "The coverage after a backward pass."
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    return with_gradient(model, coverage(model))


# ---- coverage: 10 faults and more --------------------------------------------------------------------------


def deepseek(load):
    "As transformers and PEFT do it under the checkpoint's own model type."
    from transformers import AutoModelForCausalLM, DeepseekV3Config

    config = {k: v for k, v in base().config.to_dict().items() if k not in ('model_type', 'dtype')}
    return AutoModelForCausalLM.from_config(DeepseekV3Config(**config))


def moved_by_peft(load):
    return get_peft_model(
        deepseek(load),
        LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=[
                n.split('.')[-1] for part in LINEAR for n in adaptable(base())[part][0]
            ],
        ),
    )


def all_linear(load):
    return get_peft_model(
        deepseek(load), LoraConfig(r=4, lora_alpha=8, target_modules='all-linear')
    )


def router_too(load):
    return adapted(load, target_parameters=lambda t: t + ['model.layers.1.mlp.gate.weight'])


def head_too(load):
    return adapted(load, target_modules=lambda t: t | {'lm_head'})


def a_layer_left_out(load):
    return adapted(load, target_modules=lambda t: t - {'model.layers.1.self_attn.o_proj'})


def half_of_the_experts(load):
    return adapted(load, target_parameters=lambda t: t[:1])


def another_rank(load):
    return adapted(load, r=lambda r: 2 * r, lora_alpha=lambda a: 2 * a)


def another_scale(load):
    return adapted(load, lora_alpha=lambda a: 4 * a)


def frozen_experts(load):
    model = adapted(load)
    for n, p in model.named_parameters():
        if '.experts.' in n:
            p.requires_grad_(False)
    return model


def a_norm_left_trainable(load):
    model = adapted(load)
    model.get_base_model().model.norm.weight.requires_grad_(True)
    return model


def inert_experts(load):
    "Adapters that are there and trainable, and code that never looks at them."
    model = adapted(load)
    for part, layer in adapters(model):
        if part == 'routed':
            layer.forward = layer.get_base_layer().forward
    return model


def no_dense(load):
    return adapted(load, target_modules=lambda t: {n for n in t if '.layers.0.mlp.' not in n})


FAULTS = {
    moved_by_peft: 'shared: 0 of 3',
    all_linear: 'router: 1 layers have an adapter, and none was asked for',
    router_too: 'router: 1 layers',
    head_too: 'head: 1 layers',
    a_layer_left_out: 'attention: 9 of 10',
    half_of_the_experts: 'routed: 1 of 2',
    another_rank: 'ranks [8]',
    another_scale: 'scales [8.0]',
    frozen_experts: 'routed: 2 of 2 adapters are frozen',
    a_norm_left_trainable: 'norm: 1 tensors of the base are trained',
    inert_experts: 'routed: 2 of 2 adapters got no gradient',
    no_dense: 'dense: 0 of 3',
}


@pytest.mark.parametrize('fault', FAULTS, ids=lambda f: f.__name__)
def test_a_fault_of_coverage_is_found(fault):
    load = Loading(lora_rank=4, adapt=ALL)
    with pytest.raises(LabError) as e:
        certified(one_step(fault(load)), load)
    assert FAULTS[fault] in str(e.value)


def test_there_are_10_faults():
    assert len(FAULTS) >= 10


@pytest.mark.parametrize(
    'kind, rank, adapt',
    [
        ('k2', 4, ALL),
        ('k2', 8, LINEAR),
        ('k2', 4, ('attention',)),
        ('k2', 4, ('shared',)),
        ('k2', 4, ('dense',)),
        ('k2', 4, ('routed',)),
        ('k2', 2, ('attention', 'routed')),
        ('k2', 4, ('attention', 'router')),
        ('qwen', 4, ('attention', 'dense')),
        ('qwen', 16, ('dense',)),
        ('k2', 4, ('attention', 'head')),
    ],
)
def test_a_good_config_raises_no_alarm(kind, rank, adapt):
    load = Loading(lora_rank=rank, adapt=adapt)
    found = certified(one_step(adapted(load, base(kind))), load)
    assert {part for part, c in found.items() if c['adapted']} == set(adapt) and all(
        c['gradient'] == c['layers'] for part, c in found.items() if part in adapt
    )


def test_training_all_weights_is_never_an_alarm():
    assert certified(coverage(base()), Loading())['routed']['others'] == 2


# ---- what was saved ----------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def trained():
    "A model whose adapter moved, as training would have left it."
    torch.manual_seed(0)
    model = adapted(Loading(lora_rank=4, adapt=ALL))
    for n, p in model.named_parameters():
        if 'lora_B' in n:
            torch.nn.init.normal_(p, std=0.05)
    return model


NAME = 'base_model.model.model.layers.1.mlp.experts.lora_B.weight'
SAVED = {
    'missing': lambda w: w.pop(NAME),
    'zero': lambda w: w[NAME].zero_(),
    'another shape': lambda w: w.update({NAME: w[NAME][:, :2].contiguous()}),
    'not finite': lambda w: w[NAME].fill_(float('nan')),
    'none of the model': lambda w: w.update(extra=torch.zeros(1)),
    'empty': lambda w: w.update({NAME: torch.zeros(0)}),
}


@pytest.mark.parametrize('fault', SAVED)
def test_a_fault_of_the_saved_adapter_is_found(fault, trained, tmp_path):
    trained.save_pretrained(tmp_path)
    check_saved(trained, tmp_path)
    weights = load_file(tmp_path / 'adapter_model.safetensors')
    SAVED[fault](weights)
    save_file(weights, tmp_path / 'adapter_model.safetensors')
    with pytest.raises(LabError, match='1 of 36 tensors are wrong'):
        check_saved(trained, tmp_path)


# ---- the export certificate: 8 faults ----------------------------------------------------------------------


def balanced():
    "The smoke base with a router bias that matters, as a trained one has."
    model = base()
    for n, b in model.named_buffers():
        if 'e_score_correction_bias' in n:
            b.copy_(torch.linspace(-1, 1, len(b)))
    return model


def export(folder, on_disk=lambda weights: None, other=None):
    "Train an adapter a little, merge, save, with a fault somewhere; what the certificate says."
    torch.manual_seed(0)
    load, tok = Loading(lora_rank=4, adapt=ALL), open_tokenizer(smoke_model('k2'))
    model = adapted(load, balanced())
    for n, p in model.named_parameters():
        if 'lora_B' in n:
            torch.nn.init.normal_(p, std=0.05)
    trained = probe_logits(model)
    with model.disable_adapter():
        plain = probe_logits(model)
    save_checkpoint(other(model) if other else merge_adapter(model), tok, folder)
    weights = load_file(folder / 'model.safetensors')
    on_disk(weights)
    save_file(weights, folder / 'model.safetensors', metadata={'format': 'pt'})
    report = export_report(plain, trained, probe_logits(open_model(folder)))
    return certified_export(report, 'float32')


DOWN = 'model.layers.1.mlp.experts.2.down_proj.weight'


def rebuilt(times: int = 1, alpha: int = 8, seed: int = 0):
    "Makes the base with an adapter folded in so many times, with this alpha; of another base for another seed."

    def build(_):
        model = (
            balanced()
            if not seed
            else small_model('k2', 'smoke', open_tokenizer(smoke_model('k2')), seed)
        )
        for _ in range(times):
            torch.manual_seed(0)
            model = adapted(Loading(lora_rank=4, adapt=ALL), model, lora_alpha=lambda a: alpha)
            for n, p in model.named_parameters():
                if 'lora_B' in n:
                    torch.nn.init.normal_(p, std=0.05)
            model = merge_adapter(model)
        return model

    return build


EXPORT = {
    'not applied': dict(other=rebuilt(0)),
    'wrong alpha': dict(other=rebuilt(1, 16)),
    'applied twice': dict(other=rebuilt(2)),
    'wrong base': dict(other=rebuilt(1, 8, 1)),
    'a transposed expert': dict(on_disk=lambda w: w.update({DOWN: w[DOWN].T.contiguous()})),
    'lost head': dict(on_disk=lambda w: w.pop('lm_head.weight')),
    'a zeroed router bias': dict(
        on_disk=lambda w: w['model.layers.1.mlp.gate.e_score_correction_bias'].zero_()
    ),
    'an empty tensor': dict(on_disk=lambda w: w.update({DOWN: torch.zeros(0)})),
    'weights that are no numbers': dict(on_disk=lambda w: w[DOWN].fill_(float('nan'))),
    'two experts swapped': dict(
        on_disk=lambda w: w.update(
            {
                DOWN: w[DOWN.replace('.2.', '.3.')].clone(),
                DOWN.replace('.2.', '.3.'): w[DOWN].clone(),
            }
        )
    ),
}


@pytest.mark.parametrize('fault', EXPORT)
def test_a_fault_of_the_export_is_found(fault, tmp_path):
    with pytest.raises((LabError, RuntimeError)) as e:
        export(tmp_path / 'out', **EXPORT[fault])
    assert (
        'not the trained one' in str(e.value)
        or 'keys' in str(e.value)
        or 'is empty' in str(e.value)
        or 'do not fit' in str(e.value)
    )


def test_a_good_export_is_certified(tmp_path):
    report = export(tmp_path / 'out', other=rebuilt())
    assert report['prompts'] == 64 and report['saved'] < 1e-5 < 0.01 < report['moved']


def test_logits_that_cannot_be_compared_are_far_apart():
    assert (
        apart(torch.ones(2, 3), torch.ones(2, 4))
        == apart(torch.ones(1), torch.tensor([float('nan')]))
        == float('inf')
    )


# ---- 4 bits ------------------------------------------------------------------------------------------------


def test_bits_are_counted_on_the_loaded_model():
    pytest.importorskip(
        'bitsandbytes', reason='4-bit weights need bitsandbytes: pip install "k2lab[gpu]"'
    )
    load = Loading(four_bit=True, lora_rank=4)
    whole, quarter = weight_bits(base()), weight_bits(open_model(smoke_model('k2'), load))
    assert {part: c['weights'] for part, c in whole.items()} == {
        part: c['weights'] for part, c in quarter.items()
    }
    assert all(4 < quarter[part]['bits'] < 6 for part in LINEAR)
    assert whole['routed'] == dict(weights=4 * 3 * 64 * 64, bytes=16 * 3 * 64 * 64, bits=32.0)
    assert quarter['routed'] == dict(whole['routed'], bytes=9 * 3 * 64 * 64 // 4, bits=4.5)
    assert 'routed' not in check_bits(quarter, load)
    narrow = {part: quarter[part] for part in LINEAR}
    with pytest.raises(LabError, match='four_bit was asked for, but routed has 32.0 bits'):
        check_bits(whole | narrow, load)
    with pytest.raises(
        LabError,
        match='attention has 32.0 bits, shared has 32.0 bits, dense has 32.0 bits, routed has',
    ):
        check_bits(whole, load)
    assert check_bits(whole, Loading()) is None


def test_layers_that_were_skipped_are_found():
    pytest.importorskip(
        'bitsandbytes', reason='4-bit weights need bitsandbytes: pip install "k2lab[gpu]"'
    )
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from k2lab.models.load import register_kimi_k2

    register_kimi_k2()
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type='nf4',
        llm_int8_skip_modules=['model.layers.1.mlp.shared_experts', 'lm_head'],
    )
    model = AutoModelForCausalLM.from_pretrained(
        smoke_model('k2'), quantization_config=config, device_map={'': 'cpu'}
    )
    with pytest.raises(LabError, match='four_bit was asked for, but shared has'):
        check_bits(weight_bits(model), Loading(four_bit=True, lora_rank=4))
