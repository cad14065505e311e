"""A step as torch.compile traces it: calls of the ops of compiled.py, and what these then run."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .compiled import new_site
from .errors import GraddotError
from .layers import Step
from .verify import tensors_in

# One tensor of as many entries as the batch has rows, by engine. Not an attribute of the engine:
# the compiler takes the sizes of whatever it reaches through a module to be constant.
rows_of: dict[int, Tensor] = {}
TENSOR, NUMBER = "tensor", "number"  # what stands for them in a form


def trace_layer(scored: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A scored layer's call in a graph."""
    if scored.model_forward is None or not scored.model_forward.scoring():
        return scored.own_forward(*args, **kwargs)
    tensors: list[Tensor] = []
    numbers: list[int] = []
    form = form_of((args, tuple(kwargs.values())), tensors, numbers)
    if form is None or not tensors or scored.returns is None:
        return scored.uncompiled(*args, **kwargs)
    site = new_site(
        LayerSite, scored.key, form, tuple(kwargs), scored.returns, scored.with_rows, scored.broadcasts
    )  # fmt: skip
    # Only where an output depends on them, for then the graph is bound to them.
    several = scored.returns != TENSOR and True in scored.with_rows
    rows = rows_of[scored.model_forward.number].shape[0] if scored.broadcasts or several else 0
    outputs = _trace_call(site, scored, tensors, numbers, rows)
    return filled(scored.returns, outputs[:-1], [])


def trace_head(
    scored: Any, hidden: Tensor, labels: Tensor, num_labels: Any, *options: Any
) -> tuple[Tensor, Tensor]:
    """The fused head's call: (loss, token losses)."""
    tensors = [hidden, labels]
    if num_labels is not None:
        tensors.append(_as_tensor(num_labels))
    site = new_site(HeadSite, scored.key, *options)
    loss, losses, _ = _trace_call(site, scored, tensors, [], 0)
    return loss, losses.detach()


def _as_tensor(x: Any) -> Tensor:
    return x if isinstance(x, Tensor) else torch.full((), float(x), dtype=torch.float64)


def form_of(value: Any, tensors: list[Tensor], numbers: list[int]) -> Any:
    """What is left of a value, a constant, once its tensors and integers, which the compiler may
    take for variables, are appended to the lists. None if no graph can hold it."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return TENSOR
    if value is None or isinstance(value, (bool, str)):
        return (value,)
    if isinstance(value, int):
        numbers.append(value)
        return NUMBER
    if type(value) not in (tuple, list):
        return None
    forms = tuple(form_of(x, tensors, numbers) for x in value)
    return None if None in forms else (type(value) is tuple, forms)


def filled(form: Any, tensors: list[Tensor], numbers: Sequence[int]) -> Any:
    """The value of a form; both lists are emptied."""
    return _filled(form, list(tensors), list(numbers))


def _filled(form: Any, tensors: list[Tensor], numbers: list[int]) -> Any:
    if form == TENSOR:
        return tensors.pop(0)
    if form == NUMBER:
        return numbers.pop(0)
    if len(form) == 1:
        return form[0]
    values = [_filled(x, tensors, numbers) for x in form[1]]
    return tuple(values) if form[0] else values


def _trace_call(
    site: int, scored: Any, tensors: list[Tensor], numbers: list[int], rows: int
) -> list[Tensor]:
    parameters = [p for p in scored.module.parameters() if p.requires_grad]
    needs = [x.requires_grad for x in tensors]
    kind = tensors[0].device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return torch.ops.graddot_lm.layer(
        site, scored.model_forward.clock, tensors, parameters, needs, numbers, rows, autocast
    )


def trace_before(model_forward: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
    """What comes before the forward, where the hooks of the model are part of the graph."""
    if model_forward.logged_unapplied and model_forward.micro is None and torch.is_grad_enabled():
        model_forward.logged_unapplied = False
    if not model_forward.scoring():
        return
    items = kwargs.get("num_items_in_batch")
    items = None if items is None else _as_tensor(items)
    inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    labelled = kwargs.get("labels") is not None
    site = new_site(ForwardSite, model_forward.key)
    torch.ops.graddot_lm.begin(site, model_forward.clock, inputs, items, labelled)


def trace_after(model_forward: Any, output: Any) -> Any:
    """What comes after it."""
    if not model_forward.scoring():
        return output
    outputs = list(tensors_in(output))
    site = new_site(ForwardSite, model_forward.key)
    torch.ops.graddot_lm.end(site, model_forward.clock, outputs)
    if isinstance(output, Mapping) and isinstance(output.get("loss"), Tensor):
        loss = output["loss"]
        tracked = loss + model_forward.micro.loss_scales[0].to(loss.device, loss.dtype)
        output["loss"] = tracked  # type: ignore[index]
    return output


# What the ops run


class LayerSite:
    """One call of a scored layer in a compiled graph.

    arguments is the form of (positional ones, keywords' values); returns, with_rows and broadcasts
    are those of the `ScoredForward`.
    """

    def __init__(
        self, scored: Any, arguments: Any, keywords: tuple[str, ...], returns: Any,
        with_rows: tuple[bool, ...], broadcasts: bool,
    ) -> None:  # fmt: skip
        self.scored, self._arguments, self._keywords = scored, arguments, keywords
        self._returns, self._with_rows, self._broadcasts = returns, with_rows, broadcasts

    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.scored.module.parameters() if p.requires_grad]

    def step(self) -> Step:
        step = self.scored.begin(self.scored.module, self.scored.name)
        if step is None:
            raise GraddotError(f"compiled layer {self.scored.name} ran outside of a step")
        return step

    def _called(
        self, function: Callable[..., Any], tensors: list[Tensor], numbers: Sequence[int]
    ) -> Any:
        args, values = filled(self._arguments, tensors, numbers)
        return function(*args, **dict(zip(self._keywords, values, strict=True)))

    def run(self, tensors: list[Tensor], numbers: Sequence[int]) -> list[Tensor]:
        scored = self.scored
        out = self._called(scored, tensors, numbers)
        results: list[Tensor] = []
        if form_of(out, results, []) != self._returns or scored.broadcasts != self._broadcasts:
            without = "without" if self._broadcasts else "with"
            raise GraddotError(
                f"layer {scored.name} was compiled for an input {without} rows and for what it then"
                " returned, and now sees or returns another; call torch.compiler.reset()"
            )
        return results

    def shapes(self, tensors: list[Tensor], numbers: Sequence[int], rows: int) -> list[Tensor]:
        with _fake_state(self.scored.module):
            out = self._called(self.scored.own_forward, tensors, numbers)
        results: list[Tensor] = []
        form_of(out, results, [])
        if self._broadcasts:
            same = tensors[0].dim() > 1 and tensors[0].shape[0] == 1
            return [x.new_empty((rows, *(x.shape[1:] if same else x.shape))) for x in results]
        # What is the same for all rows, (1, ...), each row got a copy of where it is scored.
        return [
            x.new_empty((rows, *x.shape[1:])) if rows and every and x.shape[0] == 1 else x
            for x, every in zip(results, self._with_rows, strict=True)
        ]


@contextlib.contextmanager
def _fake_state(module: nn.Module) -> Iterator[None]:
    """Parameters and buffers without values in the place of a module's, its layers unscored."""
    parts = list(module.modules())
    before = [(part, part._parameters.copy(), part._buffers.copy()) for part in parts]
    forwards: list[tuple[nn.Module, Any]] = [(p, p.__dict__.get("forward")) for p in parts]
    scored = [(part, forward) for part, forward in forwards if hasattr(forward, "own_forward")]

    def fakes(tensors: Mapping[str, Tensor | None]) -> dict[str, Any]:
        kinds = {n: (x.shape, x.dtype, x.device) for n, x in tensors.items() if x is not None}
        return {n: torch.empty(shape, dtype=t, device=d) for n, (shape, t, d) in kinds.items()}

    try:
        for part, parameters, buffers in before:
            part._parameters.update(fakes(parameters))
            part._buffers.update(fakes(buffers))
        for part, forward in scored:
            part.__dict__["forward"] = forward.own_forward
        yield
    finally:
        for part, parameters, buffers in before:
            part._parameters.update(parameters)
            part._buffers.update(buffers)
        for part, forward in scored:
            part.__dict__["forward"] = forward


class HeadSite(LayerSite):
    """The same of the fused head, which runs in a linear layer's place."""

    def __init__(self, scored: Any, *options: Any) -> None:
        self.scored, self._options = scored, options

    def run(self, tensors: list[Tensor], numbers: Sequence[int]) -> list[Tensor]:
        from .fused_head import cross_entropy  # which traces calls of this

        hidden, labels, *num_labels = tensors
        head, total = self.scored.module, num_labels[0] if num_labels else None
        return list(cross_entropy(hidden, head, labels, total, *self._options))

    def shapes(self, tensors: list[Tensor], numbers: Sequence[int], rows: int) -> list[Tensor]:
        hidden, labels, *_ = tensors
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        return [hidden.new_empty(shape, dtype=dtype) for shape in ((), labels.shape)]


class ForwardSite:
    """One beginning or end of the model's forward in a compiled graph."""

    def __init__(self, model_forward: Any) -> None:
        self.model_forward = model_forward
