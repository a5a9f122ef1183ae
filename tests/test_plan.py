"The plan before a launch: its counts against transformers, its bytes against torch, its refusals."

import pytest

from k2lab.lab.config import LabError
from k2lab.scale.parts import KNOWN, adapter_weights, config_at, counted, known_shape, matrices_of

SMOL = dict(
    model_type='llama',
    vocab_size=49152,
    hidden_size=576,
    num_hidden_layers=30,
    intermediate_size=1536,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
QWEN3 = SMOL | dict(model_type='qwen3', head_dim=128, tie_word_embeddings=False)


def on_meta(config: dict):
    "The model of a config as transformers builds it, without memory."
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from k2lab.models.load import register_kimi_k2
    from k2lab.models.quantized import backbone

    c = dict(backbone(config))
    kimi, kind = register_kimi_k2(), c.pop('model_type')
    made = (kimi if kind in ('kimi_k2', 'deepseek_v3') else CONFIG_MAPPING[kind]).from_dict(c)
    with torch.device('meta'):
        return AutoModelForCausalLM.from_config(made)


SHAPES = {**KNOWN, 'SmolLM2-135M': SMOL, 'qwen3': QWEN3, 'smoke:k2': None, 'smoke:qwen': None}


@pytest.mark.parametrize('name', SHAPES)
def test_the_counts_of_a_config_are_those_of_the_model(name):
    from k2lab.models.adapters import lora
    from k2lab.models.load import Loading, parameter_counts

    config = SHAPES[name] or config_at(name)
    model, ours = on_meta(config), counted(matrices_of(config))
    theirs = parameter_counts(model)
    assert ours == {k: n for k, n in theirs.items() if k not in ('total', 'active')}
    if name in ('Moonlight-16B-A3B', 'Qwen2.5-7B', 'smoke:k2'):
        from peft import get_peft_model

        load = Loading(lora_rank=8)
        want = adapter_weights(matrices_of(config), load)
        adapted = get_peft_model(model, lora(model, load))
        assert want == sum(p.numel() for n, p in adapted.named_parameters() if 'lora_' in n)


def test_a_shape_nobody_knows_is_refused_in_one_line():
    assert known_shape('moonshotai/Kimi-K2.5') and not known_shape('moonshotai/Kimi-Linear-48B')
    with pytest.raises(LabError, match=r'nobody here knows.*config\.json into a folder') as e:
        config_at('meta-llama/Llama-4-Scout')
    assert '\n' not in str(e.value)
    lacking = {k: v for k, v in KNOWN['Moonlight-16B-A3B'].items() if k != 'moe_intermediate_size'}
    with pytest.raises(LabError, match='no moe_intermediate_size'):
        matrices_of(lacking)
