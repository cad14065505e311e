"""A step as torch.compile traces it: calls of the ops of compiled.py, and what these then run."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..autocast import autocast_dtype
from ..checks.verify import map_tensors, tensors_in
from ..errors import GraddotError
from ..step import Step
from .compiled import new_site, owner
from .in_graph import enter_graph, inputs_of

# One tensor of as many entries as the batch has rows, by engine. Not an attribute of the engine:
# the compiler takes the sizes of whatever it reaches through a module to be constant.
rows_of: dict[int, Tensor] = {}


class Call(NamedTuple):
    """What a layer did with arguments of some form in a step that ran uncompiled.

    returns is the form of its output, None if no graph can hold it; with_rows says which of the
    tensors in it had rows; broadcasts, whether it is one tensor that got rows of its own.
    """

    returns: Any
    with_rows: tuple[bool, ...]
    broadcasts: bool


def call_of(key: str, *arguments: Any) -> Any:
    """The `Call` of a layer's arguments, (form, keywords, whether the batch has one row), as a
    plain tuple, or None. For other arguments than have been seen it is the one of all that have, if
    there is a single one. A constant in a graph; whether it still holds is seen when that runs."""
    known = owner(key).calls
    if arguments in known:
        return tuple(known[arguments])
    like = {call for (*_, one_row), call in known.items() if one_row == arguments[-1]}
    return tuple(like.pop()) if len(like) == 1 else None


call_of._dynamo_marked_constant = True  # type: ignore[attr-defined]  # assume_constant_result


def trace_layer(scored: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A scored layer's call in a graph."""
    if scored.model_forward is None or not scored.model_forward.scoring():
        return scored.own_forward(*args, **kwargs)
    if scored.in_graph is not None and len(args) == 1 and not kwargs:
        traced = _trace_in_graph(scored, args[0])
        if traced is not None:
            return traced
    tensors: list[Tensor] = []
    numbers: list[int] = []
    form = form_of((args, tuple(kwargs.values())), tensors, numbers)
    if form is None or not tensors or scored.keeps_tensors:
        return scored.uncompiled(*args, **kwargs)
    arguments = form, tuple(kwargs), scored.model_forward.one_row
    call = call_of(scored.key, *arguments)
    if call is None or call[0] is None:
        return scored.uncompiled(*args, **kwargs)
    returns, with_rows, broadcasts = call
    site = new_site(LayerSite, scored.key, arguments, call)
    # Only where an output depends on them, for then the graph is bound to them.
    # (Not by "returns != 0": torch 2.11 cannot trace that where returns is a constant tuple.)
    several = isinstance(returns, tuple) and True in with_rows
    rows = rows_of[scored.model_forward.number].shape[0] if broadcasts or several else 0
    outputs = _trace_call(site, scored, tensors, numbers, rows)
    return filled(returns, outputs[:-1], [])


def _trace_in_graph(scored: Any, x: Any) -> Tensor | None:
    """A layer that is scored by the graph's own operations; None for one that is not."""
    if not isinstance(x, Tensor) or x.dim() < 2 or not enter_graph(scored.model_forward.key):
        return None
    inputs = inputs_of.get(scored.key)
    if inputs is None or x.shape[0] != rows_of[scored.model_forward.number].shape[0]:
        return None
    return scored.in_graph(scored, inputs, x)  # type: ignore[no-any-return]


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
    take for variables, are appended to the lists. None if no graph can hold it.

    A tensor's form is its place in the list, which is one for the same tensor, since a layer may
    ask whether two are; a number's is ~ its place, a sequence's (whether it is a tuple, forms).
    """
    if isinstance(value, Tensor):
        # A parameter is the layer's own perhaps, and an op would not know it again.
        if type(value) is not Tensor and isinstance(value, nn.Parameter):  # the latter is slow
            return None
        for i, x in enumerate(tensors):
            if x is value:
                return i
        tensors.append(value)
        return len(tensors) - 1
    if isinstance(value, bool):
        return (True,) if value else (False,)  # one of a variable's size becomes a constant
    if value is None or isinstance(value, str):
        return (value,)
    if isinstance(value, int):
        numbers.append(value)
        return ~(len(numbers) - 1)
    if type(value) not in (tuple, list):
        return None
    forms = tuple(form_of(x, tensors, numbers) for x in value)
    return None if None in forms else (type(value) is tuple, forms)


def filled(form: Any, tensors: Sequence[Tensor], numbers: Sequence[int]) -> Any:
    """The value of a form."""
    if isinstance(form, int):
        return tensors[form] if form >= 0 else numbers[~form]
    if len(form) == 1:
        return form[0]
    values = [filled(x, tensors, numbers) for x in form[1]]
    return tuple(values) if form[0] else values


def _trace_call(
    site: int, scored: Any, tensors: list[Tensor], numbers: list[int], rows: int
) -> list[Tensor]:
    parameters = [p for p in scored.module.parameters() if p.requires_grad]
    needs = [x.requires_grad for x in tensors]
    autocast = autocast_dtype(tensors[0].device.type)
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

    def tracked(loss: Tensor) -> Tensor:
        return loss + model_forward.micro.loss_scale.compiled.to(loss.device, loss.dtype)

    if isinstance(output, Mapping) and isinstance(output.get("loss"), Tensor):
        output["loss"] = tracked(output["loss"])  # type: ignore[index]
        return output
    numbers = [x for x in outputs if x.dim() == 0 and x.requires_grad]
    if len(numbers) > 1:
        raise GraddotError(
            f"a compiled model returned {len(numbers)} numbers and no mapping with a loss, so that the"
            " loss's scale cannot be told; return one of them"
        )
    return (
        map_tensors(output, lambda x: tracked(x) if x is numbers[0] else x) if numbers else output
    )


# What the ops run


class LayerSite:
    """One call of a scored layer in a compiled graph; arguments and call as in `call_of`.

    dtypes are those that the compiler was told of what it returns, if it was: code around a layer that
    is not traced calls the op itself. random are the states of random numbers at its last forward that was
    no checkpoint's second.
    """

    dtypes: Sequence[torch.dtype] | None = None
    random: Sequence[Tensor] = ()

    def __init__(self, scored: Any, arguments: Any, call: Any) -> None:
        self.scored, self._arguments, self._call = scored, arguments, Call(*call)

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
        form, keywords, _ = self._arguments
        args, values = filled(form, tensors, numbers)
        return function(*args, **dict(zip(keywords, values, strict=True)))

    def run(self, tensors: list[Tensor], numbers: Sequence[int]) -> list[Tensor]:
        scored = self.scored
        out = self._called(scored, tensors, numbers)
        if scored.calls.get(self._arguments) != self._call:
            raise GraddotError(
                f"layer {scored.name} returned something else than when it was compiled, or what it"
                " got or returned had rows that it had not; call torch.compiler.reset()"
            )
        results: list[Tensor] = []
        form_of(out, results, [])
        return results

    def shapes(self, tensors: list[Tensor], numbers: Sequence[int], rows: int) -> list[Tensor]:
        forward = functools.partial(self._called, self.scored.own_forward, tensors, numbers)
        with _fake_state(self.scored.module):
            try:  # as where the graph runs: Mamba's takes a scan elsewhere, which this cannot trace
                with _told_it_is_compiled(False):
                    out = forward()
            except Exception:  # noqa: BLE001 - the layer's own code may raise anything, as grouped_mm's
                out = forward()
        results: list[Tensor] = []
        if form_of(out, results, []) != self._call.returns:
            raise GraddotError(
                f"layer {self.scored.name} returns something else for these arguments than it did"
                " for others in an uncompiled step; decorate its forward with torch.compiler.disable"
            )
        if self._call.broadcasts:
            same = tensors[0].dim() > 1 and tensors[0].shape[0] == 1
            return [x.new_empty((rows, *(x.shape[1:] if same else x.shape))) for x in results]
        # What is the same for all rows, (1, ...), each row got a copy of where it is scored.
        return [
            x.new_empty((rows, *x.shape[1:])) if rows and every and x.shape[0] == 1 else x
            for x, every in zip(results, self._call.with_rows, strict=True)
        ]


@contextlib.contextmanager
def _fake_state(module: nn.Module) -> Iterator[None]:
    """Parameters, which some adapters ask to be such, and buffers without values in the place of a
    module's, its layers unscored, and attention by the way of training, for its fast path returns
    another form."""
    parts = list(module.modules())
    before = [(part, part._parameters.copy(), part._buffers.copy()) for part in parts]
    forwards: list[tuple[nn.Module, Any]] = [(p, p.__dict__.get("forward")) for p in parts]
    scored = [(part, forward) for part, forward in forwards if hasattr(forward, "own_forward")]

    def fakes(tensors: Mapping[str, Tensor | None]) -> dict[str, Any]:
        kinds = {n: (x.shape, x.dtype, x.device) for n, x in tensors.items() if x is not None}
        return {n: torch.empty(shape, dtype=t, device=d) for n, (shape, t, d) in kinds.items()}

    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for part, parameters, buffers in before:
            own = lambda x: nn.Parameter(x, requires_grad=x.is_floating_point())
            part._parameters.update({n: own(x) for n, x in fakes(parameters).items()})
            part._buffers.update(fakes(buffers))
        for part, forward in scored:
            part.__dict__["forward"] = forward.own_forward
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for part, parameters, buffers in before:
            part._parameters.update(parameters)
            part._buffers.update(buffers)
        for part, forward in scored:
            part.__dict__["forward"] = forward


@contextlib.contextmanager
def _told_it_is_compiled(told: bool) -> Iterator[None]:
    before, torch.compiler._is_compiling_flag = torch.compiler._is_compiling_flag, told
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


class HeadSite(LayerSite):
    """The same of the fused head, which runs in a linear layer's place."""

    def __init__(self, scored: Any, *options: Any) -> None:
        self.scored, self._options = scored, options

    def run(self, tensors: list[Tensor], numbers: Sequence[int]) -> list[Tensor]:
        from ..fused_head import cross_entropy  # which traces calls of this

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
