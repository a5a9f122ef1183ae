"Mechanism under the models: latent attention decoded from its latents, and Muon."

import pytest

torch = pytest.importorskip('torch')
from k2lab.models.adapters import lora
from k2lab.models.load import Loading, small_model
from k2lab.models.mla import NAME, from_latents
from k2lab.training.muon import STACK, Muon, orthogonalise, orthogonalise_all, stacks


class Vocabulary:
    "All that a small model must know of its tokenizer."

    bos_token_id = eos_token_id = pad_token_id = 0

    def __len__(self):
        return 64


@pytest.fixture(scope='module')
def model():
    return small_model('k2', 'smoke', Vocabulary()).eval()


def decoded(model, ids, mask, new):
    "Logits [rows, len(new), vocabulary] of tokens `new` that come one by one after a left-padded batch."
    place, out = mask.cumsum(-1).clamp(min=1) - 1, []
    with torch.no_grad():
        cache = model(
            input_ids=ids, attention_mask=mask, position_ids=place, use_cache=True
        ).past_key_values
        for t in new:
            mask, place = torch.cat((mask, torch.ones_like(mask[:, :1])), 1), place[:, -1:] + 1
            out.append(
                model(
                    input_ids=torch.full_like(ids[:, :1], t),
                    attention_mask=mask,
                    position_ids=place,
                    past_key_values=cache,
                    use_cache=True,
                ).logits
            )
    return torch.cat(out, 1)


def test_decoding_from_latents_says_the_same(model):
    ids, mask = torch.arange(1, 28).view(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = mask[2, :1] = 0
    plain = decoded(model, ids, mask, [5, 40, 6])
    with from_latents(model):
        assert model.config._attn_implementation == NAME
        latent = decoded(model, ids, mask, [5, 40, 6])
    assert plain.std() > 0.01 and torch.allclose(plain, latent, atol=1e-5)
    assert model.config._attn_implementation == 'sdpa'
    assert not any('expand_kv' in vars(m) for m in model.modules())


def test_an_adapter_on_the_latents_is_not_passed_over():
    from peft import get_peft_model

    base = small_model('k2', 'smoke', Vocabulary())
    adapted = get_peft_model(base, lora(base, Loading(lora_rank=2, adapt=('attention',))))
    with from_latents(adapted):
        assert adapted.config._attn_implementation == 'sdpa'


def test_a_model_without_latents_is_left_alone():
    student = small_model('qwen', 'smoke', Vocabulary())
    with from_latents(student):
        assert student.config._attn_implementation == 'sdpa'


def test_muon_takes_matrices_of_one_shape_together():
    torch.manual_seed(0)
    updates = [
        torch.randn(4, 6),
        torch.randn(6, 4),
        torch.randn(3, 4, 6),
        torch.randn(5, 5),
        torch.randn(2, 6, 4),
    ]
    assert stacks(updates) == [[0, 1, 2, 4], [3]]
    for update, moved in zip(updates, orthogonalise_all(updates)):
        assert moved.shape == update.shape and torch.allclose(
            moved, orthogonalise(update), atol=1e-3
        )
        values = torch.linalg.svdvals(moved)
        assert (
            0.6 < values.min() and values.max() < 1.3
        )  # Jordan's five steps bring singular values near one, no nearer


def test_a_stack_holds_no_more_than_it_may():
    side = int(STACK**0.5)
    assert stacks([torch.empty(side, side, device='meta')] * 2) == [[0], [1]]


def test_muon_moves_the_head_at_its_share_of_the_rate():
    model = torch.nn.Module()
    model.body, model.lm_head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 6, bias=False)
    before = model.lm_head.weight.detach().clone()
    optimizer = Muon(model, lr=0.01, weight_decay=0.0, head_rate=0.05)
    model.lm_head(model.body(torch.ones(2, 4))).pow(2).sum().backward()
    optimizer.step()
    # Adam's first step is the rate itself, whatever the gradient
    moved = (model.lm_head.weight - before).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.0005), rtol=1e-2, atol=0)
    assert [len(group['params']) for group in optimizer.param_groups] == [1, 1, 1]
