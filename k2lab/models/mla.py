"""Multi-head latent attention decoded from its latent, without expanding the whole cache for every new token."""

from contextlib import contextmanager

NAME = 'mla_absorbed'


def absorbed(module, query, latent, value, mask, scaling, **options):
    """Attention of one new token on cached latents; of several tokens as usual.

    query [B, H, Q, nope+rope]; latent [B, 1, L, rank+rope]; value [B, 1, L, rank], the first `rank`
    of the latent. Returns ([B, Q, H, v], None). For Q = 1 `kv_b_proj` is applied to the query and to the
    result, B*H vectors each, and not to the B*L latents: the same sums in another order
    (DeepSeek-V2, arXiv 2405.04434, section 2.1.2)."""
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    rank, nope = module.kv_lora_rank, module.qk_nope_head_dim
    if query.shape[2] > 1:
        key, value = DeepseekV3Attention.expand_kv(module, value, latent[..., rank:])
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **options)
    up_k, up_v = module.kv_b_proj.weight.view(-1, nope + module.v_head_dim, rank).split(
        [nope, module.v_head_dim], 1
    )  # [H, nope | v, rank]
    inner = torch.einsum('bhqd,hdr->bqhr', query[..., :nope], up_k)  # [B, 1, H, rank]
    scores = scaling * (
        torch.cat((inner, query[..., nope:].transpose(1, 2)), -1) @ latent.mT
    )  # [B, 1, H, L]
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, float('-inf')) if mask.dtype == torch.bool else scores + mask
        )
    seen = scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value  # [B, 1, H, rank]
    return torch.einsum('bqhr,hvr->bqhv', seen, up_v), None


def latents(kv, rope):
    "What is cached, as it is: key [B, 1, L, rank+rope] and value [B, 1, L, rank]."
    import torch

    return torch.cat((kv, rope), -1), kv


def plain_layers(model) -> list:
    """The latent attention layers, if each caches latents and its `kv_b_proj` is a plain linear layer, else none.

    An adapter or 4-bit weights would be bypassed. transformers caches latents since it has `expand_kv`."""
    from torch.nn import Linear

    layers = [m for m in model.modules() if type(m).__name__ == 'DeepseekV3Attention']
    return (
        layers
        if all(type(m.kv_b_proj) is Linear and hasattr(type(m), 'expand_kv') for m in layers)
        else []
    )


@contextmanager
def from_latents(model):
    "Inside, a model with latent attention decodes from its latents; other models are left alone. Not for training."
    layers = plain_layers(model)
    if not layers or model.config._attn_implementation != 'sdpa':
        yield
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, absorbed)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    for m in layers:
        m.expand_kv = latents
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = 'sdpa'
        for m in layers:
            del m.expand_kv
