"""Muon for matrices and AdamW for the rest: the optimizer family that Moonlight and Kimi K2 were trained with."""

import torch


def orthogonalise(G, steps: int = 5):
    "The nearest semi-orthogonal matrices to `G` (..., m, n), by Newton-Schulz in bfloat16 (Jordan et al., 2024)."
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = G.size(-2) > G.size(-1)
    X = (G.mT if tall else G).bfloat16()
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return (X.mT if tall else X).to(G.dtype)


STACK = 2**24  # numbers that are orthogonalised in one call at most


def stacks(updates: list) -> list:
    "Lists of indices of `updates` (..., m, n) of one shape or its transpose, at most `STACK` numbers together."
    open_, out = {}, []
    for i, u in enumerate(updates):
        key = tuple(sorted(u.shape[-2:]))
        if key not in open_ or sum(updates[j].numel() for j in open_[key]) + u.numel() > STACK:
            open_[key] = []
            out.append(open_[key])
        open_[key].append(i)
    return out


def lying(G):
    "`G` (..., m, n) as a stack (k, short side, long side)."
    G = G.reshape(-1, *G.shape[-2:])
    return G.mT if G.size(1) > G.size(2) else G


def orthogonalise_all(updates: list) -> list:
    "`orthogonalise` of each, many small matrices in one call: 1.7 times faster for the nano K2."
    out: list = [None] * len(updates)
    for places in stacks(updates):
        parts = [lying(updates[i]) for i in places]
        for i, X in zip(places, orthogonalise(torch.cat(parts)).split([len(p) for p in parts])):
            out[i] = (X if lying(updates[i]).shape[1:] == updates[i].shape[-2:] else X.mT).reshape(
                updates[i].shape
            )
    return out


class Muon(torch.optim.Optimizer):
    """Muon with Moonlight's update scale (arXiv 2502.16982), so that AdamW's learning rates carry over.

    torch.optim.Muon takes two-dimensional parameters only; here a stack of expert matrices (E, m, n)
    is orthogonalised expert by expert.
    Embeddings, head, router, norms and biases get AdamW, embeddings and head at `head_rate` of the rate."""

    def __init__(
        self,
        model,
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        betas=(0.9, 0.95),
        eps: float = 1e-8,
        head_rate: float = 1.0,
    ):
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        kinds = {name: kind_of(name, p) for name, p in named}
        params = {
            kind: [p for n, p in named if kinds[n] == kind] for kind in ('matrix', 'rest', 'head')
        }
        groups = [
            dict(params=params['matrix'], adam=False),
            dict(params=params['rest'], adam=True),
            dict(params=params['head'], adam=True, lr=lr * head_rate),
        ]
        super().__init__(
            [g for g in groups if g['params']],
            dict(lr=lr, weight_decay=weight_decay, momentum=momentum, betas=betas, eps=eps),
        )

    @torch.no_grad()
    def step(self, closure=None):
        "One update of every parameter that has a gradient."
        for group in self.param_groups:
            moving = [p for p in group['params'] if p.grad is not None]
            for p in moving:
                if p.ndim > 1:
                    p.mul_(1 - group['lr'] * group['weight_decay'])
            if not group['adam']:
                self._muon(moving, group)
            else:
                for p in moving:
                    self._adam(p, self.state[p], group)

    def _muon(self, moving: list, group):
        updates = []
        for p in moving:
            m = (
                self.state[p]
                .setdefault('momentum', torch.zeros_like(p))
                .mul_(group['momentum'])
                .add_(p.grad)
            )
            updates.append(p.grad + group['momentum'] * m)
        for p, update in zip(moving, orthogonalise_all(updates)):
            p.add_(update, alpha=-group['lr'] * 0.2 * max(p.shape[-2:]) ** 0.5)

    def _adam(self, p, state, group):
        (b1, b2), t = group['betas'], state.get('step', 0) + 1
        state['step'] = t
        m = state.setdefault('m', torch.zeros_like(p)).lerp_(p.grad, 1 - b1)
        v = state.setdefault('v', torch.zeros_like(p)).lerp_(p.grad**2, 1 - b2)
        p.addcdiv_(m / (1 - b1**t), (v / (1 - b2**t)).sqrt() + group['eps'], value=-group['lr'])


def kind_of(name: str, p) -> str:
    "matrix: Muon takes it; head: an embedding or the head; rest: a router, norm or bias."
    if any(part in name for part in ('embed_tokens', 'lm_head')):
        return 'head'
    return 'matrix' if p.ndim > 1 and 'mlp.gate.weight' not in name else 'rest'
