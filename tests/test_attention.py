"""PyTorch's own attention and transformer layers, with the rows as first or second dimension."""

import pytest
import torch
import torch.nn.functional as F
from brute_force import lm_loss, token_batch
from engine_steps import run_step
from graddot_lm import GraddotError, GradDotProdEngine, linear_cross_entropy, register_layer
from graddot_lm.rules.table import _registered
from model_zoo import TimeFirst, shaken
from test_models import check
from torch import nn

WIDTH, T, S = 16, 8, 5


class Around(nn.Module):
    """Linear layers before and after, and between them `inner(x, y, padding)`: x (rows, T, WIDTH)
    and y (rows, S, WIDTH), or (T, rows, WIDTH) and (S, rows, WIDTH), padding (rows, T)."""

    def __init__(self, layer, inner, batch_first):
        super().__init__()
        self.batch_first, self.inner = batch_first, inner
        self.up, self.layer, self.head = nn.Linear(10, WIDTH), layer, nn.Linear(WIDTH, 5)

    def forward(self, x):
        padding = x[..., 0] > 0.7
        padding[:, :2] = False
        x = self.up(x)
        y = 0.7 * x[:, :S]
        if not self.batch_first:
            x, y = x.transpose(0, 1), y.transpose(0, 1)
        x = self.head(self.inner(self.layer, x, y, padding))
        return x.mean(1 if self.batch_first else 0)


def images(tokens=T, rows=6):
    g = torch.Generator().manual_seed(5)
    x, y = torch.randn(rows, tokens, 10, generator=g), torch.arange(rows) % 5
    return (x[:-2], y[:-2]), (x[-2:], y[-2:])


def check_around(layer, inner, batch_first, record, tokens=T):
    torch.manual_seed(0)
    model = shaken(Around(layer(), inner, batch_first))
    for dtype in (torch.float32, torch.float64):
        check(model, *images(tokens), dtype, record, loss=F.cross_entropy, label_shift=0)


def _slopes(x):
    return (torch.arange(T * T).view(T, T) / 20).to(x)


def _some(padding):
    """A mask for every row and head."""
    return (torch.arange(T * T).view(T, T) % 5 == 1).expand(2 * len(padding), T, T)


def _weighted(attention, x, y, padding, average):
    out, weights = attention(x, x, x, padding, average_attn_weights=average)
    last = weights.flatten(1)[:, -WIDTH:]
    return out * (last[:, None] if attention.batch_first else last)


CALLS = {
    "self": lambda a, x, y, p: a(x, x, x, key_padding_mask=p)[0],
    "weights": lambda a, x, y, p: _weighted(a, x, y, p, True),
    "weights-by-head": lambda a, x, y, p: _weighted(a, x, y, p, False),
    "cross": lambda a, x, y, p: a(y, x, x, key_padding_mask=p, need_weights=False)[0],
    "three-inputs": lambda a, x, y, p: a(y, x, x.tanh(), need_weights=False)[0],
    "added-mask": lambda a, x, y, p: a(x, x, x, attn_mask=_slopes(x), need_weights=False)[0],
    "two-masks": lambda a, x, y, p: a(x, x, x, attn_mask=_some(p), key_padding_mask=p)[0],
}
FORMS = {
    "plain": {},
    "no-bias": {"bias": False},
    "further-keys": {"add_bias_kv": True, "add_zero_attn": True},
}


@pytest.mark.parametrize("batch_first", [True, False], ids=["rows-first", "rows-second"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("call", CALLS)
def test_multihead_attention(call, form, batch_first, record_property):
    layer = lambda: nn.MultiheadAttention(WIDTH, 2, batch_first=batch_first, **FORMS[form])
    check_around(layer, CALLS[call], batch_first, record_property)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False], ids=["rows-first", "rows-second"])
def test_keys_and_values_of_other_widths(batch_first, bias, record_property):
    layer = lambda: nn.MultiheadAttention(
        WIDTH, 2, kdim=10, vdim=12, batch_first=batch_first, bias=bias
    )
    call = lambda a, x, y, p: a(y, x[..., :10], x[..., 2:14], key_padding_mask=p)[0]
    check_around(layer, call, batch_first, record_property)


@pytest.mark.parametrize("tokens", [T, 6], ids=["", "as-many-as-rows"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["rows-first", "rows-second"])
def test_transformer(batch_first, tokens, record_property):
    """Encoder and decoder, with the masks that they take; their layers call the attention's
    weights behind its back in evaluation mode, unless a gradient is needed."""

    def call(transformer, x, y, padding):
        mask = nn.Transformer.generate_square_subsequent_mask(S, dtype=x.dtype)
        masks = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding}
        return transformer(x, y, tgt_mask=mask, tgt_is_causal=True, **masks)

    layer = lambda: nn.Transformer(WIDTH, 2, 1, 1, 24, 0.0, batch_first=batch_first)
    check_around(layer, call, batch_first, record_property, tokens)
    check_around(lambda: layer().eval(), call, batch_first, record_property, tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("tokens", [9, 8], ids=["", "as-many-as-rows"])
def test_language_model_with_time_first(tokens, dtype, record_property):
    train, val = token_batch(6, tokens, 30, seed=1, ragged=True), token_batch(2, tokens, 30, seed=2)
    check(shaken(TimeFirst()), train, val, dtype, record_property)


def test_time_first_by_token():
    """A token's parts add up to its row's score."""
    model = shaken(TimeFirst()).double()
    train, val = token_batch(4, 9, 30, seed=1), token_batch(2, 9, 30, seed=2)
    want, _ = run_step(model, train, val)
    engine = GradDotProdEngine(model, label_shift=1, per_token=True)
    engine.attach()
    engine.set_directions(engine.compute_directions([val], lambda m, x, y: lm_loss(m(x), y)))
    model.zero_grad()
    engine.attach_train_batch(*train, 0, None)
    engine.track_loss(lm_loss(model(train[0]), train[1])).backward()
    engine.prepare_gradients()
    parts = engine.token_dots()
    assert parts.shape == (4, 9) and parts.count_nonzero() > 30
    torch.testing.assert_close(parts.sum(1), want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tokens", [9, 8], ids=["", "as-many-as-rows"])
@pytest.mark.parametrize("shape", [(-1,), (-1, 1), (1, -1)], ids=str)
def test_positions_without_rows_beside_rows_second_are_refused(tokens, shape):
    model = TimeFirst(lambda T, rows: torch.arange(T).view(shape))
    train, val = token_batch(6, tokens, 30, seed=1), token_batch(2, tokens, 30, seed=2)
    with pytest.raises(GraddotError, match=r"layer positions got an .* without rows.*\(T, rows\)"):
        run_step(model, train, val)


class Offset(nn.Module):
    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))

    def forward(self):
        return self.offset[None, None]


@pytest.mark.parametrize("tokens", [9, 8], ids=["", "as-many-as-rows"])
def test_parameters_given_out_beside_rows_second_are_refused(tokens):
    model = TimeFirst()
    model.offset = Offset()
    model.head.register_forward_pre_hook(lambda m, args: (args[0] + model.offset(),))
    train, val = token_batch(6, tokens, 30, seed=1), token_batch(2, tokens, 30, seed=2)
    with pytest.raises(GraddotError, match="layer offset .*rows as its second.*batch_first"):
        run_step(model, train, val)


class WithFusedHead(TimeFirst):
    def forward(self, ids):
        ids = ids.t()
        x = self.norm(self.layers(self.tokens(ids)))
        targets = F.pad(ids[1:], (0, 0, 0, 1), value=-100)
        return linear_cross_entropy(x, self.head, targets)[0]


@pytest.mark.parametrize("tokens, message", [(9, "expected 8 rows"), (8, "as many tokens as rows")])
def test_fused_head_needs_rows_first(tokens, message):
    train, val = token_batch(6, tokens, 30, seed=1), token_batch(2, tokens, 30, seed=2)
    engine = GradDotProdEngine(WithFusedHead(), val)
    engine.attach()
    engine.attach_train_batch(*train, 0, None)
    with pytest.raises(GraddotError, match=message):
        engine.model(engine.prepare_forward_input(*train)[0])


class Gain(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))

    def forward(self, x):
        return x * self.gain


@pytest.mark.parametrize("own_rule", [True, False])
@pytest.mark.parametrize("tokens", [9, 8], ids=["", "as-many-as-rows"])
def test_other_rules_need_rows_first(tokens, own_rule):
    if own_rule:
        register_layer(Gain, lambda m, scored, x: x * scored.per_sample(m.gain)[:, None])
    model = TimeFirst()
    model.norm = Gain()
    train, val = token_batch(6, tokens, 30, seed=1), token_batch(2, tokens, 30, seed=2)
    try:
        with pytest.raises(GraddotError, match="layer norm .*rows as its second.*batch_first"):
            run_step(model, train, val)
    finally:
        _registered.pop(Gain, None)


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_over_the_batch_is_refused(batch_first):
    """(rows, T, WIDTH) given to a layer that is for (T, rows, WIDTH), and the other way round."""
    layer = nn.MultiheadAttention(WIDTH, 2, batch_first=not batch_first)
    call = lambda a, x, y, p: a(x, x, x, need_weights=False)[0]
    with pytest.raises(GraddotError, match="depends on other samples"):
        check_around(lambda: layer, call, batch_first, lambda *_: None)
