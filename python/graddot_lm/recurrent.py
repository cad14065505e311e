"""nn.RNN, LSTM and GRU: PyTorch's own kernels, with what they compute with weights taken apart.

The gates of a step are gates(x_t) + W_hh h_(t-1) + b_hh, of which a kernel tells no gradient. It is
given gates(x) = W_ih x + b_ih as its input, with the identity in the place of W_ih, so that its input's
gradient is the gates' own. The hidden states, of a run before it without a graph, make
W_hh h + b_hh, whose difference with itself, zero, is added to the gates: it takes their gradient to
the layer's rule for W_hh and b_hh, and the kernel's own copy of these takes none.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import GraddotError
from .layers import no_autocast
from .scored import Scored, any_layout

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
    """x (rows, T, D), or (T, rows, D) where the model has it so; hx (layers · directions, rows, H)."""
    assert isinstance(module, nn.RNNBase)
    if module.proj_size > 0:
        raise GraddotError(f"layer {scored.name}: {PROJECTIONS}")
    if not isinstance(x, Tensor) or x.dim() != 3:
        got = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise GraddotError(
            f"layer {scored.name} ({type(module).__name__}) got {got}; expected sequences, (rows, T, D)"
        )
    out = scored.step.as_rows(scored.name, x)
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
    return scored.shaped(out), end if module.mode == "LSTM" else end[0]


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
    kernel = KERNELS[module.mode]
    state = tuple(s.to(gates.dtype) for s in state)
    identity = torch.eye(gates.shape[2], dtype=gates.dtype, device=gates.device)
    values = [identity, w_hh.detach().to(gates.dtype)]
    if b_hh is not None:
        values += [torch.zeros_like(b_hh, dtype=gates.dtype), b_hh.detach().to(gates.dtype)]

    def run(gates: Tensor) -> tuple[Tensor, State]:
        start = state if module.mode == "LSTM" else state[0]
        with no_autocast(gates.device.type):
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
    out, end = run(gates + zero)
    return in_time(out), end
