"""nn.RNN, LSTM and GRU, and their cells, with what they compute with weights taken apart.

The gates of a step are gates(x_t) + W_hh h_(t-1) + b_hh, with gates(x) = W_ih x + b_ih a linear layer's.
A zero that is added to the rest takes its gradient to W_hh and b_hh, whose values in it take none.

Two ways. *Step by step* the hidden states are known when the run is over, before the zero's backward.
*PyTorch's kernel* tells no gradient of the gates: it is given gates(x) as its input, with the identity in
the place of W_ih. There the zero is W_hh h + b_hh less itself, with the hidden states of a run before it
without a graph.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graddot_kernels.torch_impl import column_sums

from ..autocast import no_autocast, without_autocast
from ..errors import GraddotError
from ..scored import Scored, any_layout, by_token
from .layers import ScoredFunction, linear_grad, note_uses, vector_grad

KERNELS: dict[str, Any] = {
    "LSTM": torch._VF.lstm,  # type: ignore[attr-defined]
    "GRU": torch._VF.gru,  # type: ignore[attr-defined]
    "RNN_TANH": torch._VF.rnn_tanh,  # type: ignore[attr-defined]
    "RNN_RELU": torch._VF.rnn_relu,  # type: ignore[attr-defined]
}
PROJECTIONS = "no rule for an LSTM with projections (proj_size)"
State = tuple[Tensor, ...]  # h, and an LSTM's c, (1, rows, H) each


@any_layout
def recurrent_rule(module: nn.Module, scored: Scored, x: Any, hx: Any = None) -> Any:
    """x (rows, T, D), or (T, rows, D) where the model has it so; hx (layers · directions, rows, H). Where each
    row has S sequences, as words of letters, or a picture's lines, x is (rows · S, T, D)."""
    assert isinstance(module, nn.RNNBase)
    if module.proj_size > 0:
        raise GraddotError(f"layer {scored.name}: {PROJECTIONS}")
    if not isinstance(x, Tensor) or x.dim() != 3:
        got = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise GraddotError(
            f"layer {scored.name} ({type(module).__name__}) got {got}; expected sequences, (rows, T, D)"
        )
    # Of a single row it is only seen that T comes first, as where its tokens lie together.
    time_first = scored.rows == x.shape[1] == 1 and not module.batch_first
    sequences = scored.step.row_tokens(scored.name)
    several = sequences > 0 and x.shape[0] == scored.rows * sequences and not time_first
    if several and not module.batch_first:
        raise GraddotError(
            f"layer {scored.name} ({type(module).__name__}) got its rows one after the other in the"
            f" dimension that it takes for time, as {tuple(x.shape)}; expected them where batch_first=True"
            " has them"
        )
    if several:
        out = x
    else:
        out = x.transpose(0, 1) if time_first else scored.step.as_rows(scored.name, x)
    rows, directions = out.shape[0], 1 + module.bidirectional
    if hx is None:
        zeros = out.new_zeros(module.num_layers * directions, rows, module.hidden_size)
        hx = (zeros, zeros) if module.mode == "LSTM" else zeros
    states = hx if isinstance(hx, tuple) else (hx,)
    if any(s.shape[1] != rows for s in states):
        raise GraddotError(
            f"layer {scored.name} got a state of shape {tuple(states[0].shape)}; expected {rows} rows"
            " in its second dimension"
        )
    last: list[State] = []
    for layer in range(module.num_layers):
        if layer > 0:
            out = F.dropout(out, module.dropout, module.training)
        sides = []
        for direction in range(directions):
            state = tuple(s[len(last)][None] for s in states)
            weights = f"l{layer}{'_reverse' if direction else ''}"
            side, state = _run(module, scored, out, state, weights)
            sides.append(side)
            last.append(state)
        out = torch.cat(sides, 2) if directions > 1 else sides[0]
    end = tuple(torch.cat(parts) for parts in zip(*last, strict=True))
    if not several:
        out = out.transpose(0, 1) if time_first else scored.shaped(out)
    return out, end if module.mode == "LSTM" else end[0]


@by_token
def cell_rule(module: nn.Module, scored: Scored, x: Tensor, hx: Any = None) -> Any:
    """One step of nn.RNNCell, LSTMCell or GRUCell, x (rows, D) and hx (rows, H), or two of an LSTM's."""
    assert isinstance(module, nn.RNNCellBase)
    is_lstm = isinstance(module, nn.LSTMCell)
    if x.dim() != 2:
        raise GraddotError(
            f"layer {scored.name} ({type(module).__name__}) got a tensor of shape {tuple(x.shape)};"
            " expected (rows, D)"
        )
    zero = x.new_zeros(len(x), module.hidden_size)
    h, c = hx if hx is not None and is_lstm else (zero if hx is None else hx, zero)
    gates = scored.linear(x, module.weight_ih, module.bias_ih)
    of_hidden = scored.linear(h, module.weight_hh, module.bias_hh)
    h, c = h.to(gates.dtype), c.to(gates.dtype)
    if is_lstm:
        return _lstm(gates + of_hidden, c)
    if isinstance(module, nn.GRUCell):
        return _gru(gates, of_hidden, h)
    activation = torch.relu if module.nonlinearity == "relu" else torch.tanh
    return activation(gates + of_hidden)


def _lstm(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The next h and c."""
    both, new, last = gates.tensor_split((2 * c.shape[1], 3 * c.shape[1]), 1)
    enter, keep = both.sigmoid().chunk(2, 1)
    c = keep * c + enter * new.tanh()
    return last.sigmoid() * c.tanh(), c


def _gru(gates: Tensor, of_hidden: Tensor, h: Tensor) -> Tensor:
    """The next h."""
    two = 2 * h.shape[1]
    reset, keep = (gates[:, :two] + of_hidden[:, :two]).sigmoid().chunk(2, 1)
    new = (gates[:, two:] + reset * of_hidden[:, two:]).tanh()
    return new + keep * (h - new)


def _run(
    module: nn.RNNBase, scored: Scored, x: Tensor, state: State, weights: str
) -> tuple[Tensor, State]:
    """One layer in one direction: the hidden states (rows, T, H), and the last state."""
    # The weights see the tokens in the order of the row, in which they are scored by themselves.
    in_time = (lambda x: x.flip(1)) if weights.endswith("_reverse") else (lambda x: x)
    named = [f"{kind}_{weights}" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    w_ih, w_hh, b_ih, b_hh = (getattr(module, name, None) for name in named)
    assert w_ih is not None and w_hh is not None
    gates = in_time(scored.linear_of_rows(x, w_ih, b_ih))
    state = tuple(s.to(gates.dtype) for s in state)
    with no_autocast(gates.device.type):
        if by_kernel(gates):
            out, end = _by_kernel(module, scored, gates, state, w_hh, b_hh, in_time)
        else:
            out, end = _step_by_step(module.mode, scored, gates, state, w_hh, b_hh, in_time)
    return in_time(out), end


def by_kernel(gates: Tensor) -> bool:
    """Whether to run PyTorch's kernel: twice, and with a product more, which on a CPU takes longer than
    all its steps one by one."""
    return gates.is_cuda


def _by_kernel(
    module: nn.RNNBase, scored: Scored, gates: Tensor, state: State, w_hh: Tensor, b_hh: Any,
    in_time: Callable[[Tensor], Tensor],
) -> tuple[Tensor, State]:  # fmt: skip
    kernel = KERNELS[module.mode]
    identity = torch.eye(gates.shape[2], dtype=gates.dtype, device=gates.device)
    values = [identity, w_hh.detach().to(gates.dtype)]
    if b_hh is not None:
        values += [torch.zeros_like(b_hh, dtype=gates.dtype), b_hh.detach().to(gates.dtype)]

    def run(gates: Tensor) -> tuple[Tensor, State]:
        start = state if module.mode == "LSTM" else state[0]
        out, *end = kernel(
            gates, start, values, b_hh is not None, 1, 0.0, module.training, False, True
        )
        return out, tuple(end)

    with torch.no_grad():
        before = torch.cat([state[0].transpose(0, 1), run(gates)[0][:, :-1]], 1)
    hidden = in_time(scored.linear_of_rows(in_time(before), w_hh, b_hh))
    zero = hidden - hidden.detach()
    if module.mode == "GRU":  # whose reset gate multiplies the third part of it
        two, new = zero.split([2 * w_hh.shape[1], w_hh.shape[1]], 2)
        reset = (gates + hidden).detach()[..., : w_hh.shape[1]].sigmoid()
        zero = torch.cat([two, reset * new], 2)
    return run(gates + zero)


class HiddenDot(ScoredFunction):
    """W_hh h + b_hh is computed step by step; this is a zero to be added to it, (rows, T, G), that takes
    the gradient of all steps to W_hh and b_hh. `hidden` gets the h of every step, (rows, H) each, until
    the backward."""

    @staticmethod
    def forward(ctx, gates, weight, bias, step, hidden, in_time):  # type: ignore[no-untyped-def]
        ctx.hidden, ctx.in_time, ctx.dtype = hidden, in_time, weight.dtype
        note_uses(ctx, step, weight, bias, vector=False)
        return gates.new_zeros(()).expand(gates.shape)

    @staticmethod
    @without_autocast
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        step, result = ctx.step, [None] * 6
        grad = step.as_samples(ctx.in_time(grad_out))
        if ctx.bias_uses is not None:
            row_grads = column_sums(grad)
            result[2] = vector_grad(step, ctx.bias_uses, row_grads).to(ctx.bias_dtype)
        if ctx.uses is not None:
            act = step.as_samples(ctx.in_time(torch.stack(ctx.hidden, 1)))
            result[1] = linear_grad(step, ctx.uses, act, grad).to(ctx.dtype)
        return tuple(result)


def _step_by_step(
    mode: str, scored: Scored, gates: Tensor, state: State, w_hh: Tensor, b_hh: Any,
    in_time: Callable[[Tensor], Tensor],
) -> tuple[Tensor, State]:  # fmt: skip
    hidden: list[Tensor] = []  # detached, and the first copied: the caller may write to it
    zero = HiddenDot.apply(gates, w_hh, b_hh, scored.step, hidden, in_time)
    by_hidden = w_hh.detach().to(gates.dtype).t()
    added = zero if b_hh is None else zero + b_hh.detach().to(gates.dtype)
    if mode != "GRU":
        gates = gates + added
    h, c = state[0][0].clone(), state[-1][0]
    out = []
    for x, y in zip(gates.unbind(1), added.unbind(1), strict=True):
        hidden.append(h.detach())
        if mode == "LSTM":
            h, c = _lstm(torch.addmm(x, h, by_hidden), c)
        elif mode == "GRU":
            h = _gru(x, torch.addmm(y, h, by_hidden), h)
        else:
            activation = torch.relu if mode == "RNN_RELU" else torch.tanh
            h = activation(torch.addmm(x, h, by_hidden))
        out.append(h)
    return torch.stack(out, 1), (h[None], c[None]) if mode == "LSTM" else (h[None],)
