"""Activation checkpointing: telling a forward that is run again, and checking what it hides.

A reentrant checkpoint runs its forward without a graph, and again, with one, inside the backward.
The graph of the loss then ends at the checkpoint, and a parameter used behind its layer's back in
there cannot be seen in it. It shows in the gradients: what arrives at the parameter is more than
what the scored layers sent.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .errors import GraddotError


def recomputing() -> bool:
    """Whether this runs inside a backward, as the forward of a checkpointed layer does there."""
    return torch._C._current_graph_task_id() != -1


def has_reentrant_checkpoint(outputs: Iterable[Tensor]) -> bool:
    """Whether `checkpoint(..., use_reentrant=True)` is in the graph of these tensors."""
    return any("CheckpointFunction" in node.name() for node in _nodes(outputs, set()))


def _nodes(outputs: Iterable[Tensor], seen: set[Any]) -> Iterator[Any]:
    """The autograd nodes behind the outputs that are not in `seen`, which grows by them."""
    stack = [output.grad_fn for output in outputs]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [following for following, _ in node.next_functions]
            yield node


class ReentrantCheck:
    """Compares, over one step, what parameters got with what the scored layers sent them.

    scored are the autograd functions of the layers; `watch` takes what a forward returned.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], scored: tuple[type, ...]) -> None:
        self._parameters, self._scored = parameters, scored
        self._keys = {id(p) for p in parameters.values()}
        self._watched: set[Any] = set()
        self._got: dict[int, Tensor] = {}
        self._sent: dict[int, Tensor] = {}
        self._size: dict[int, float] = {}
        self._handles = [
            p.register_hook(partial(self._on_gradient, p)) for p in parameters.values()
        ]

    def watch(self, outputs: Iterable[Tensor]) -> None:
        """Note what the scored layers in the graph of these tensors will send."""
        for node in _nodes(outputs, self._watched):
            if getattr(node, "_forward_cls", None) in self._scored:
                self._handles.append(node.register_hook(partial(self._on_layer, node)))

    def _on_gradient(self, p: nn.Parameter, grad: Tensor) -> None:
        self._got[id(p)] = self._got.get(id(p), 0) + grad.double()

    def _on_layer(self, node: Any, sent: tuple[Tensor | None, ...], _: Any) -> None:
        for (following, _index), grad in zip(node.next_functions, sent, strict=True):
            key = id(getattr(following, "variable", None))
            if grad is not None and key in self._keys:
                self._sent[key] = self._sent.get(key, 0) + grad.double()
                self._size[key] = self._size.get(key, 0.0) + float(grad.double().norm())

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._watched.clear()

    def finish(self) -> bool:
        """Whether gradients were finite, so that there was something to compare.

        Raises GraddotError if a parameter got what no scored layer sent.
        """
        self.remove()
        foreign, finite = [], True
        for name, p in self._parameters.items():
            got, sent = self._got.get(id(p)), self._sent.get(id(p))
            if got is None:
                continue
            difference = float((got if sent is None else got - sent).norm())
            finite = finite and difference < float("inf")
            # Autograd adds the terms in p's dtype, in an order of its own.
            if difference > 8 * torch.finfo(p.dtype).eps * self._size.get(id(p), 0.0):
                foreign.append(name)
        if foreign and finite:
            raise GraddotError(
                "parameters used outside of the layer that owns them cannot be scored:"
                f" {', '.join(foreign)}, inside a reentrant checkpoint. Freeze them, or call their"
                " layer's forward instead"
            )
        return finite
