"""Real vLLM serves what the lab writes: `K2LAB_VLLM=/path/to/python pytest tests/test_vllm.py`.

The interpreter is that of an environment that has vLLM (its CPU build will do).
"""

import os

import pytest

torch = pytest.importorskip('torch')
import test_formats as formats

from k2lab.launch_teacher_vllm import Config, serving
from k2lab.models.adapters import lora
from k2lab.models.load import (
    Loading,
    open_model,
    open_tokenizer,
    ready,
    register_kimi_k2,
    save_checkpoint,
    shipped,
)
from k2lab.models.quantized import to_bf16
from k2lab.serving.client import check_parity

PYTHON = os.environ.get('K2LAB_VLLM', '')
pytestmark = pytest.mark.skipif(not PYTHON, reason='K2LAB_VLLM names no interpreter that has vLLM')
LATENT = dict(
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    q_lora_rank=128,
    num_attention_heads=2,
    num_key_value_heads=2,
)  # the sizes that vLLM's kernels are made for
SHAPE = (
    formats.SHAPE
    | LATENT
    | dict(
        hidden_size=256,
        moe_intermediate_size=128,
        intermediate_size=256,
        max_position_embeddings=512,
    )
)
OPTIONS = dict(
    dtype='float32', max_model_len=512, max_num_seqs=4, enforce_eager=True, max_logprobs=20
)


@pytest.fixture(scope='module')
def folders(tmp_path_factory) -> dict:
    "A small K2 as the lab saves it, in 8 and 4 bits, both converted, with a merged adapter; and a Qwen."
    home, tok = tmp_path_factory.mktemp('vllm'), open_tokenizer(shipped('k2'))
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = ready(
        AutoModelForCausalLM.from_config(register_kimi_k2()(**SHAPE, vocab_size=len(tok)))
    ).bfloat16()
    biases = [
        t
        for n, t in [*model.named_parameters(), *model.named_buffers()]
        if 'e_score_correction_bias' in n
    ]
    for bias in biases:
        bias.data.copy_(torch.tensor([0.1, -0.2, 0.3001, 0.4]))
    save_checkpoint(model, tok, home / 'plain')
    config, plain = formats.read(home / 'plain')
    for name in ('eight', 'four'):
        stored, _ = formats.stored_as(name, plain)
        formats.write(
            home / name,
            config | {'quantization_config': formats.EIGHT if name == 'eight' else formats.FOUR},
            stored,
        )
        tok.save_pretrained(home / name)
        to_bf16(home / name, home / f'{name}-converted')
    merged(home / 'plain', tok, home / 'merged')
    return {path.name: path for path in home.iterdir()} | {'qwen': shipped('qwen')}


def merged(base, tok, out):
    "A checkpoint with a random adapter on every part merged into it."
    from peft import get_peft_model

    model = open_model(base)
    model = get_peft_model(
        model, lora(model, Loading(lora_rank=4, adapt=('attention', 'shared', 'dense', 'routed')))
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if 'lora_' in name:
                p.normal_(0, 0.05)
    save_checkpoint(model.merge_and_unload(), tok, out, torch.bfloat16)


def own_logprobs(place, ids) -> list:
    "Log-probability of each token of a prompt but the first, by transformers in 32 bits."
    model = open_model(place)
    with torch.no_grad():
        told = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [told[i, t].item() for i, t in enumerate(ids[1:])]


@pytest.mark.parametrize(
    'name,family',
    [
        ('plain', 'kimi'),
        ('merged', 'kimi'),
        ('eight-converted', 'kimi'),
        ('four-converted', 'kimi'),
        ('qwen', 'qwen'),
    ],
)
def test_vllm_says_what_the_checkpoint_says(folders, name, family, tmp_path):
    place, options = (
        folders[name],
        OPTIONS | (dict(attention_backend='CPU_MLA') if family == 'kimi' else {}),
    )
    tok = open_tokenizer(place)
    ids = tok.encode(
        'The shortest path from node 7 to node 12 is found by Dijkstra, 2024.',
        add_special_tokens=False,
    )
    with serving(
        Config(
            model='tiny', engine='vllm', family=family, python=PYTHON, vllm=options, ready_s=400
        ),
        place,
        tmp_path / 'server.log',
    ) as served:
        teacher = served.teacher()
        parity = check_parity(teacher, tok)
        (reply,) = teacher.complete(ids, temperature=0, max_tokens=8, logprobs=1, echo=True)
    seen = reply['logprobs']['token_logprobs'][1 : len(ids)]
    first, *apart = [abs(a - b) for a, b in zip(seen, own_logprobs(place, ids), strict=True)]
    print(
        f'{name}: {parity} conversations with the same ids, ready in {served.ready_s} s, '
        f'log-probabilities {first:.1e} apart after one token, at most {max(apart):.1e} '
        f'after {len(seen)}'
    )
    assert (
        parity == 4 and first < 1e-5
    )  # one token alone attends to nothing else: every weight is where it belongs
    assert max(apart) < (
        3e-2 if family == 'kimi' else 1e-5
    )  # vLLM's latent attention on a CPU rounds; without experts it is as far off
