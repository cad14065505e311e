"""Checks on the first step that everything which the scores rest on is as assumed.

Both look at the autograd graph or at one gradient once, and cost nothing afterwards.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from .errors import GraddotError
from .layers import ScoredFunction


def tensors_in(output: Any) -> Iterator[Tensor]:
    """Every tensor in a model's output: a tensor, a tuple or list, or a mapping, dataclass or
    namespace of them."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_in(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from tensors_in(value)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for field in dataclasses.fields(output):
            yield from tensors_in(getattr(output, field.name, None))
    elif isinstance(output, SimpleNamespace):
        yield from tensors_in(vars(output))


def check_parameter_uses(output: Any, names: Mapping[str, nn.Parameter]) -> None:
    """Raise if a trainable parameter reaches the output other than through a scored layer.

    Such a use (a weight read by another module's forward, say) would be missing from the scores,
    and its gradient would be that of training and validation rows together.
    """
    if output is not None and next(tensors_in(output), None) is None:
        raise GraddotError(
            f"the model returned a {type(output).__name__}, in which no tensor was found, so that it"
            " cannot be checked; return tensors, or a tuple, mapping or dataclass of them"
        )
    by_id = {id(p): name for name, p in names.items()}
    stack = [t.grad_fn for t in tensors_in(output) if t.grad_fn is not None]
    seen = set(stack)
    foreign: dict[str, str] = {}
    while stack:
        node = stack.pop()
        scored = issubclass(getattr(node, "_forward_cls", object), ScoredFunction)
        for following, _ in node.next_functions:
            if following is None:
                continue
            variable = getattr(following, "variable", None)
            if variable is not None and id(variable) in by_id and not scored:
                foreign[by_id[id(variable)]] = node.name()
            if following not in seen:
                seen.add(following)
                stack.append(following)
    if foreign:
        uses = ", ".join(f"{name} (by {op})" for name, op in sorted(foreign.items()))
        raise GraddotError(
            f"parameters used outside of the layer that owns them cannot be scored: {uses}."
            " Freeze them, or call their layer's forward instead"
        )


class LabelCheck:
    """Compares the labelled tokens counted from the labels with those that got a gradient.

    A wrong `label_shift` rescales scores silently when labels are ragged; the gradient at the
    logits shows which positions the loss really used.
    """

    def __init__(self, output: Any, labels: Tensor, counts: Tensor) -> None:
        self.problem: str | None = None
        self._counts = counts
        fitting = [
            t
            for t in tensors_in(output)
            if t.requires_grad and t.dim() == labels.dim() + 1 and t.shape[:-1] == labels.shape
        ]
        if fitting and not labels.is_floating_point():
            fitting[0].register_hook(self._compare)

    def _compare(self, grad: Tensor) -> None:
        used = (grad != 0).any(-1).reshape(grad.shape[0], -1).sum(1)
        wrong = (used != self._counts.to(used.device)).nonzero().flatten().tolist()
        if wrong:
            row = wrong[0]
            self.problem = (
                f"row {row} of the joint batch has {int(self._counts[row])} labelled tokens by its"
                f" labels, but the loss used {int(used[row])}. If the loss shifts the labels"
                " itself, pass label_shift=1; if it ignores another value than -100, pass"
                " ignore_index"
            )
