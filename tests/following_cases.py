"""Layers that use parameters in their own forward, around a large layer inside of them."""

import functools

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """A layer inside, and tensors of the case that its forward uses beside it."""

    def __init__(self, forward, **tensors):
        super().__init__()
        self.inner, self._forward = nn.Linear(6, 6), forward
        for name, x in tensors.items():
            keep = self.register_buffer if name.isupper() else self.register_parameter
            keep(name, x if name.isupper() else nn.Parameter(x))

    def forward(self, x):
        return self._forward(self, x)


def _state_space(m, x):
    step = F.softplus(m.inner(x) + m.dt)
    decay = torch.exp(step[..., None] * -torch.exp(m.log.float())[None, None])
    return (decay * x[..., None]).sum(-1) + x * m.d[None, None]


def _sinks(m, x):
    sinks = m.s.reshape(1, -1, 1, 1).expand(len(x), -1, x.shape[1], -1)
    scores = (x[:, None] @ m.inner(x)[:, None].mT).expand(-1, 2, -1, -1)
    weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    return (weights @ x[:, None]).sum(1)


def _masked(m, x):
    mask = (x[..., :1] > 0).to(x)
    return m.inner(x) * (1 - mask) + m.t.expand(len(x), x.shape[1], -1) * mask


def _in_pieces(m, x):
    shift, scale = m.t[None].chunk(2, dim=1)
    return m.inner(x) * (1 + scale) + shift


def _written(m, x):
    out = torch.zeros(x.shape).to(x)
    out[:, :2] = m.inner(x)[:, :2]
    return out * m.w


def _clamped(m, x):
    scale = m.w * 2
    scale.clamp_(max=1.0)
    scale *= 0.5
    return m.inner(x) * scale


def _written_by_a_view(m, x):
    scale = (m.w * 2)[None].squeeze(0)
    scale /= 3
    return m.inner(x) * scale


def _skew(m, x):
    t = torch.zeros(6, 6).to(x)
    t[[0, 1, 4], [1, 3, 5]] = m.w
    whole = torch.eye(6).to(x).repeat(1, 1)
    whole.add_(t - t.T, alpha=2.0)
    whole.add_(m.w[0])
    whole[0] = 0
    return m.inner(x) @ whole


def _bias_of_positions(m, x):
    ids = torch.arange(x.shape[1])
    bias = F.embedding((ids[:, None] - ids).abs(), m.w).permute(2, 0, 1)[None]
    q, k = m.inner(x)[:, None], x[:, None]
    return F.scaled_dot_product_attention(q, k, k, attn_mask=bias).sum(1)


def _resampled(m, x):
    return m.inner(x) + F.interpolate(m.t.mT, size=x.shape[1], mode="linear").mT


ZERO, N = torch.zeros, functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))


class ScaledBy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x, scale)
        return x * scale

    @staticmethod
    def backward(ctx, grad):
        x, scale = ctx.saved_tensors
        return grad * scale, (grad * x).flatten(0, -2).sum(0) if x.dim() > 1 else grad * x


def _picked(m, x):
    out = m.inner(x)
    out[x[..., 0] > 0] = m.w
    return out


CASES = {
    "gain": (lambda m, x: m.inner(x) * m.w, {"w": N(6)}),
    "gate-of-zero": (lambda m, x: x + m.a * m.inner(x * m.b), {"a": ZERO(()), "b": N(6)}),
    "gate-of-inputs": (lambda m, x: torch.lerp(x, m.inner(x), m.w.sigmoid()), {"w": N(6)}),
    "gates-in-one": (lambda m, x: m.w[0] * x + m.w[1] * m.inner(x), {"w": N(2)}),
    "gates-unbound": (lambda m, x: sum(w * m.inner(x) for w in m.w), {"w": N(2)}),
    "in-pieces": (_in_pieces, {"t": N(2, 6)}),
    "written-to": (lambda m, x: m.inner(x).mul_(m.w).add_(m.b), {"w": N(6), "b": N(1, 5, 6)}),
    "written-buffer": (_written, {"w": N(6)}),
    "written-in-place": (_clamped, {"w": N(6)}),
    "written-by-a-view": (_written_by_a_view, {"w": N(6)}),
    "written-into-constants": (_skew, {"w": N(3)}),
    "flattened": (lambda m, x: (m.inner(x.flatten(0, 1)) * m.w).view(x.shape), {"w": N(6)}),
    "as-the-input": (lambda m, x: m.inner(x) * m.w.to(x) + m.w.type_as(x), {"w": N(6)}),
    "where": (lambda m, x: torch.where(x[..., :1] > 0, m.t, m.inner(x)), {"t": N(6)}),
    "mask-token": (_masked, {"t": N(1, 1, 6)}),
    "class-token": (
        lambda m, x: m.inner(torch.cat([m.c.expand(len(x), -1, -1), x], 1) + m.p[:, :6]),
        {"c": N(1, 1, 6), "p": N(1, 9, 6)},
    ),
    "table": (lambda m, x: m.inner(x) + m.p[: x.shape[1]], {"p": N(9, 6)}),
    "table-resampled": (_resampled, {"t": N(1, 3, 6)}),
    "table-through-a-layer": (
        lambda m, x: x + m.inner(m.p[:, : x.shape[1]]),
        {"p": N(1, 9, 6)},
    ),
    "table-through-two": (
        lambda m, x: x + F.linear(m.inner(m.p[:, : x.shape[1]]).sin(), m.w, m.b),
        {"p": N(1, 9, 6), "w": N(6, 6), "b": N(6)},
    ),
    "queries": (lambda m, x: m.inner(m.q.expand(len(x), -1, -1)) * x[:, :3], {"q": N(1, 3, 6)}),
    "queries-repeated": (
        lambda m, x: m.inner(m.q[None].repeat(len(x), 1, 1)) * x[:, :3],
        {"q": N(3, 6)},
    ),
    "queries-repeated-by-name": (
        lambda m, x: m.inner(m.q[None].repeat(repeats=(len(x), 1, 1))) * x[:, :3],
        {"q": N(3, 6)},
    ),
    "pooling": (
        lambda m, x: F.scaled_dot_product_attention(m.q.expand(len(x), -1, -1), m.inner(x), x),
        {"q": N(1, 3, 6)},
    ),
    "table-transposed": (
        lambda m, x: m.inner(x) + F.embedding((x[..., 0] > 0).long(), m.w.T, padding_idx=-1),
        {"w": N(6, 2)},
    ),
    "relative-bias": (_bias_of_positions, {"w": N(9, 1)}),
    "sinks": (_sinks, {"s": N(2)}),
    "state-space": (_state_space, {"log": N(6, 3), "d": N(6), "dt": N(6)}),
    "matmul": (lambda m, x: m.inner(x) @ m.w + m.b, {"w": N(6, 3), "b": N(3)}),
    "matmul-transposed": (lambda m, x: torch.matmul(m.inner(x), m.w.T), {"w": N(3, 6)}),
    "matmul-flattened": (lambda m, x: (m.inner(x).flatten(0, 1) @ m.w).view(x.shape), {"w": N(6, 6)}),
    "linear": (lambda m, x: F.linear(m.inner(x), m.w.t(), m.b), {"w": N(6, 3), "b": N(3)}),
    "linear-cast": (
        lambda m, x: F.linear(m.inner(x), m.w.float().to(x), m.b.float().type_as(x)),
        {"w": N(8, 6), "b": N(8)},
    ),
    "matmul-cast": (lambda m, x: m.inner(x) @ m.w.float().T.to(x), {"w": N(8, 6)}),
    "linear-computed": (lambda m, x: F.linear(m.inner(x), m.w.square()), {"w": N(6, 6)}),
    "linear-inside": (lambda m, x: F.linear(x, m.inner.weight, m.inner.bias) * m.w, {"w": N(6)}),
    "einsum": (lambda m, x: torch.einsum("btd,dk->btk", m.inner(x), m.w), {"w": N(6, 3)}),
    "convolution": (
        lambda m, x: F.conv1d(m.inner(x).mT, m.w, m.b, padding=1, groups=6).mT,
        {"w": N(6, 1, 3), "b": N(6)},
    ),
    "layer-norm": (lambda m, x: F.layer_norm(m.inner(x), (6,), m.w, m.b), {"w": N(6), "b": N(6)}),
    "layer-norm-computed": (lambda m, x: F.layer_norm(m.inner(x), (6,), m.w + 1), {"w": N(6)}),
    "rms-norm": (lambda m, x: F.rms_norm(m.inner(x), (6,), m.w), {"w": N(6)}),
    # Autograd functions of one's own, and entries that a mask picks, which vmap cannot map.
    "function": (lambda m, x: ScaledBy.apply(m.inner(x), m.w), {"w": N(6)}),
    "function-without-rows": (lambda m, x: m.inner(x) * ScaledBy.apply(m.w, m.v), {"w": N(6), "v": N(6)}),
    "picked": (_picked, {"w": N(6)}),
    # Constants, which are as long as the batch in some step.
    "buffer": (lambda m, x: m.inner(x) + m.w * m.B[: x.shape[1]], {"w": N(6), "B": N(9, 6)}),
    "range": (
        lambda m, x: m.inner(x) + m.w * torch.arange(x.shape[1])[:, None].to(x),
        {"w": N(6)},
    ),
}  # fmt: skip

FP32 = ["state-space", "linear-cast", "matmul-cast"]  # which compute in it


def block(name):
    torch.manual_seed(0)
    forward, tensors = CASES[name]
    return Block(forward, **{name: x.clone() for name, x in tensors.items()})


def data(rows, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 5, 6, generator=g), torch.randint(3, (rows,), generator=g)
