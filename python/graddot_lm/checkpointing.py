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


def runs_again_alone(what: str) -> GraddotError:
    """Of what a checkpoint runs again, but not the followed layer around."""
    return GraddotError(
        f"{what} runs again for an activation checkpoint, which is inside of a layer whose forward is"
        " followed, and that is not; train without activation checkpointing, or checkpoint that layer as a"
        " whole"
    )


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
    """Compares, in one step, what parameters get with what the scored layers send them.

    scored is the base of the layers' autograd functions; `watch` takes what a forward returned.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], scored: type) -> None:
        self._scored = scored
        self._keys = {id(p) for p in parameters.values()}
        self._watched: set[Any] = set()
        # By backward, for that of a checkpoint runs inside another, and parameter.
        self._sent: dict[tuple[int, int], list[Tensor]] = {}
        self._foreign: list[str] = []
        self._finite = True
        self._handles = [
            p.register_hook(partial(self._on_gradient, name, p)) for name, p in parameters.items()
        ]

    def watch(self, outputs: Iterable[Tensor]) -> None:
        """Note what the scored layers in the graph of these tensors will send."""
        for node in _nodes(outputs, self._watched):
            if issubclass(getattr(node, "_forward_cls", object), self._scored):
                self._handles.append(node.register_hook(partial(self._on_layer, node)))

    def _on_layer(self, node: Any, sent: tuple[Tensor | None, ...], _: Any) -> None:
        for (following, _index), grad in zip(node.next_functions, sent, strict=True):
            parameter = id(getattr(following, "variable", None))
            if grad is not None and parameter in self._keys:
                key = torch._C._current_graph_task_id(), parameter
                self._sent.setdefault(key, []).append(grad)

    def _on_gradient(self, name: str, p: nn.Parameter, grad: Tensor | None) -> None:
        if grad is None:  # a head's, which the embedding of the same weight will send with its own
            return
        sent = self._sent.pop((torch._C._current_graph_task_id(), id(p)), [])
        left = grad.double()
        for part in sent:
            left = left - part
        difference, size = float(left.norm()), sum(float(part.double().norm()) for part in sent)
        self._finite = self._finite and difference < float("inf")
        # Autograd adds the parts in p's dtype, in an order of its own.
        if difference > 8 * torch.finfo(p.dtype).eps * size:
            self._foreign.append(name)

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._watched.clear()
        self._sent.clear()

    def finish(self) -> bool:
        """Whether gradients were finite, so that there was something to compare.

        Raises GraddotError if a parameter got what no scored layer sent.
        """
        self.remove()
        if self._foreign and self._finite:
            raise GraddotError(
                "parameters used outside of the layer that owns them cannot be scored:"
                f" {', '.join(sorted(set(self._foreign)))}, inside a reentrant checkpoint. Freeze"
                " them, or call their layer's forward instead"
            )
        return self._finite
