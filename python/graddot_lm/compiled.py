"""torch.compile of a model with an engine attached: every scored layer is one op of the graph.

The compiler sees `graddot_lm::layer`, whose shapes are those of the layer's own forward. When the
graph runs, the op runs the layer's rule, as uncompiled code does, on a small autograd graph of its
own, and its backward goes back through that. The scores arrive in the step's leaves there and then,
so they are no part of the compiled graph, and nothing that changes from step to step is baked in:
the step is looked up at run time, and a number that the forward returns tells the backward which
call it belongs to.

A compiler reuses a tensor's memory once the graph has no more use for it. What a rule keeps for the
backward is therefore either handed over by the graph (a layer's inputs) or a copy.
"""

import contextlib
import dataclasses
import functools
import itertools
import secrets
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from .errors import GraddotError
from .layers import Step
from .verify import tensors_in

# Numbers of engines and of calls in the graphs: never twice the same, so that a compiler does not take two calls
# for one, or a graph in its cache on disk for that of another model.
numbers = itertools.count(secrets.randbits(61))
_sites: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_call_numbers = itertools.count()
_calls: dict[int, "_Call"] = {}
_keys = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
# One tensor of as many entries as the batch has rows, by engine. Not an attribute of the engine: the
# compiler takes the sizes of whatever it reaches through a module to be constant.
rows_of: dict[int, Tensor] = {}
_skipped: list[Any] = []  # functions whose own frames the compiler is to leave alone


def skipped(function: Any) -> Any:
    """A function that runs as it is where it is called from outside of a graph."""
    _skipped.append(function)
    return function


def prepare_compiler() -> None:
    """Tell the compiler about `skipped` functions, if there is one; it is slow to import."""
    dynamo = sys.modules.get("torch._dynamo")
    while dynamo is not None and _skipped:
        dynamo.eval_frame.skip_code(_skipped.pop().__code__)


def uncompiled(reason: str) -> Callable[[Any], Any]:
    """A function that the compiler leaves alone; a graph in which it is called breaks there."""

    def decorate(function: Any) -> Any:
        @functools.wraps(function)
        def outside(*args: Any, **kwargs: Any) -> Any:
            dynamo = sys.modules.get("torch._dynamo")
            return (dynamo.disable(function) if dynamo else function)(*args, **kwargs)

        skipped(outside)
        outside._torchdynamo_disable = True  # type: ignore[attr-defined]
        outside._torchdynamo_disable_msg = reason  # type: ignore[attr-defined]
        return outside

    return decorate


class Eagerly:
    """Until `end`, whatever torch.compile made runs as if it had not."""

    def __init__(self) -> None:
        self._stance: Any = None

    def begin(self) -> None:
        dynamo = sys.modules.get("torch._dynamo")
        if dynamo is not None and self._stance is None:
            self._stance = dynamo.eval_frame._stance
            dynamo.set_stance("force_eager")

    def end(self) -> None:
        if self._stance is not None:
            stance, self._stance = self._stance, None
            sys.modules["torch._dynamo"].eval_frame._set_stance(stance)


@dataclasses.dataclass
class _Call:
    """What the backward of one call needs. inputs is filled only while it runs."""

    step: Step
    outputs: list[GradientEdge | None]
    leaves: list[Tensor]
    inputs: list[Tensor]


class _Kept:
    """What autograd keeps of a call: by the input's index what is an input, else a copy."""

    def __init__(self, inputs: list[Tensor]) -> None:
        self.inputs: list[Tensor] = []  # the backward's, while it runs
        self.storages: set[int] = set()  # of tensors kept that are not inputs
        self._borrowed: dict[int, list[tuple[int, Any]]] = {}
        for i, x in enumerate(inputs):
            layout = x.data_ptr(), x.dtype, x.shape, x.stride()
            self._borrowed.setdefault(_storage(x), []).append((i, layout))

    def borrowed(self) -> set[int]:
        return {pointer for pointer in self._borrowed if pointer}

    def pack(self, x: Tensor) -> Any:
        candidates = self._borrowed.get(_storage(x), []) if _storage(x) else []
        for i, layout in candidates:
            if layout == (x.data_ptr(), x.dtype, x.shape, x.stride()):
                return i, None
        if not candidates:
            self.storages.add(_storage(x))
            return x.detach()
        i, (_, dtype, shape, stride) = candidates[0]
        whole = dtype == x.dtype and shape.numel() == x.numel() and len(candidates) == 1
        if whole and x.is_contiguous() and _is_contiguous(shape, stride):
            return i, x.shape
        return x.detach().clone()

    def unpack(self, kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        i, shape = kept
        x = self.inputs[i]
        return x if shape is None else x.reshape(shape)


def _is_contiguous(shape: torch.Size, stride: tuple[int, ...]) -> bool:
    return torch.empty_strided(shape, stride, device="meta").is_contiguous()


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _owned(value: Any, borrowed: set[int]) -> Any:
    """The value, a structure of lists, mappings and dataclasses, with copies of borrowed tensors."""
    if isinstance(value, Tensor):
        return value.clone() if _storage(value) in borrowed else value
    if isinstance(value, (list, tuple)):
        return type(value)(_owned(item, borrowed) for item in value)
    if isinstance(value, dict):
        return {key: _owned(item, borrowed) for key, item in value.items()}
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            setattr(value, field.name, _owned(getattr(value, field.name), borrowed))
    return value


def _own_uses(step: Step, module: nn.Module, borrowed: set[int]) -> None:
    for p in module.parameters():
        if id(p) in step.shared:
            _owned(step.shared[id(p)], borrowed)


def _returned(tensors: list[Tensor], borrowed: set[int]) -> list[Tensor]:
    """Contiguous tensors that share memory with nothing else."""
    taken, result = set(borrowed), []
    for x in tensors:
        x = x.detach().contiguous()
        x = x.clone() if _storage(x) in taken and x.numel() else x
        taken.add(_storage(x))
        result.append(x)
    return result


@contextlib.contextmanager
def _with_autograd(device: torch.device, autocast: torch.dtype | None) -> Iterator[None]:
    """Ops run below autograd and autocast; a rule needs both, as they were where it was called."""
    as_it_was = torch.autocast(device.type, dtype=autocast, enabled=autocast is not None)
    with torch._C._ForceDispatchKeyGuard(*_keys), torch.enable_grad(), as_it_was:
        yield


# The ops

_library = torch.library.Library("graddot_lm", "DEF")  # noqa: TOR901
_tags = (torch.Tag.cudagraph_unsafe,)
_library.define(
    "layer(int site, Tensor clock, Tensor[] inputs, Tensor[] parameters, bool[] needs, SymInt rows,"
    " ScalarType? autocast) -> Tensor[]",
    tags=_tags,
)
_library.define(
    "layer_backward(int site, Tensor number, Tensor[] grads, Tensor[] inputs, Tensor[] parameters,"
    " bool[] needs) -> Tensor[]",
    tags=_tags,
)
_library.define(
    "begin(int site, Tensor(a!) clock, Tensor[] inputs, Tensor? items, bool labelled) -> ()",
    tags=_tags,
)
_library.define("end(int site, Tensor(a!) clock, Tensor[] outputs) -> ()", tags=_tags)


def _site(number: int) -> Any:
    site = _sites.get(number)
    if site is None:
        raise GraddotError(
            "the engine that this compiled model was scored by is gone; compile again"
        )
    return site


def _layer(number, clock, inputs, parameters, needs, rows, autocast):  # type: ignore[no-untyped-def]
    site = _site(number)
    if any(p._backward_hooks for p in parameters):
        raise GraddotError(
            f"layer {site.scored.name} has a parameter with a gradient hook (register_hook), which"
            " would run twice in a compiled model; use register_post_accumulate_grad_hook"
        )
    kept = _Kept(inputs)
    with _with_autograd(inputs[0].device, autocast):
        step = site.step()
        leaves = [x.detach().requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
        with saved_tensors_hooks(kept.pack, kept.unpack):
            outputs = site.run(leaves, rows)
    edges = [get_gradient_edge(out) if out.requires_grad else None for out in outputs]
    call = _Call(step, edges, [x for x in leaves if x.requires_grad], kept.inputs)
    _own_uses(step, site.scored.module, kept.borrowed())
    own = _returned(outputs, kept.borrowed() | kept.storages)
    return [*own, _numbered(call)]


def _numbered(call: _Call) -> Tensor:
    """A 0-dim tensor by which the backward finds the call; it is kept for as long as that is.

    Where an activation checkpoint runs the forward again, nobody keeps the first one's.
    """
    number = next(_call_numbers)
    _calls[number] = call
    memory = np.array(number)  # goes when the last tensor that shares it does
    weakref.finalize(memory, _calls.pop, number, None).atexit = False
    return torch.from_numpy(memory)


def _layer_fake(number, clock, inputs, parameters, needs, rows, autocast):  # type: ignore[no-untyped-def]
    with torch.autocast(inputs[0].device.type, dtype=autocast, enabled=autocast is not None):
        outputs = _site(number).shapes(inputs, rows)
    own = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in outputs]
    return [*own, torch.empty((), dtype=torch.int64)]


def _layer_backward(number, call_number, grads, inputs, parameters, needs):  # type: ignore[no-untyped-def]
    site = _site(number)
    call = _calls.pop(int(call_number), None)
    if call is None:
        raise GraddotError(
            f"a second backward through the compiled layer {site.scored.name}; call backward() once"
            " a batch, on the sum of all losses"
        )
    step = call.step
    own = site.parameters()
    sinks = {id(sink): sink for p in own if (sink := step.sink(p)) is not None}
    wanted = [*call.leaves, *own, *sinks.values()]
    call.inputs += inputs
    with _with_autograd(inputs[0].device, None):
        used = [i for i, edge in enumerate(call.outputs) if edge is not None]
        edges, grads = [call.outputs[i] for i in used], [grads[i] for i in used]
        found = list(torch.autograd.grad(edges, wanted, grads, allow_unused=True))
    call.inputs.clear()
    for sink, dots in zip(sinks.values(), found[len(wanted) - len(sinks) :], strict=True):
        if dots is not None:
            sink.grad = dots if sink.grad is None else sink.grad + dots
    for at, parameter in enumerate(own, len(call.leaves)):
        uses = step.shared.get(id(parameter))
        if found[at] is None and uses is not None and uses.held is not None:
            found[at], uses.held = uses.held, None  # the graph adds up the uses itself
    results = [
        torch.zeros_like(x) if grad is None else grad.to(x.dtype)
        for x, grad in zip(wanted, found[: len(wanted) - len(sinks)], strict=False)
    ]
    borrowed = {_storage(x) for x in (*inputs, *grads)} - {0}
    returned = _returned(results, borrowed)
    _own_uses(step, site.scored.module, borrowed | {_storage(x) for x in returned})
    return returned


def _layer_backward_fake(number, call_number, grads, inputs, parameters, needs):  # type: ignore[no-untyped-def]
    wanted = [*(x for x, need in zip(inputs, needs, strict=True) if need), *parameters]
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in wanted]


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.site, _, tensors, parameters, ctx.needs, _, _ = inputs
    ctx.inputs = len(tensors)
    ctx.save_for_backward(output[-1], *tensors, *parameters)


def _backward(ctx, grads):  # type: ignore[no-untyped-def]
    call, *saved = ctx.saved_tensors
    inputs, parameters = saved[: ctx.inputs], saved[ctx.inputs :]
    result = iter(
        torch.ops.graddot_lm.layer_backward(
            ctx.site, call, grads[:-1], inputs, parameters, ctx.needs
        )
    )
    input_grads = [next(result) if need else None for need in ctx.needs]
    return None, None, input_grads, list(result), None, None, None


def _begin(number, clock, inputs, items, labelled):  # type: ignore[no-untyped-def]
    _site(number).engine._begin_compiled(inputs, items, labelled)
    clock.add_(1)


def _end(number, clock, outputs):  # type: ignore[no-untyped-def]
    _site(number).engine._end_compiled()
    clock.add_(1)


for _name, _function, _fake in (
    ("layer", _layer, _layer_fake),
    ("layer_backward", _layer_backward, _layer_backward_fake),
    ("begin", _begin, lambda *args: None),
    ("end", _end, lambda *args: None),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"graddot_lm::{_name}", _fake, lib=_library)
torch.library.register_autograd("graddot_lm::layer", _backward, setup_context=_save, lib=_library)


# What the ops run


class LayerSite:
    """One call of a scored layer in a compiled graph.

    form has the call's arguments, None where there is a tensor, and keywords those names that
    belong to the last of the tensors.
    """

    def __init__(self, scored: Any, arguments: tuple[Any, ...], keywords: tuple[str, ...]) -> None:
        self.scored, self._arguments, self._keywords = scored, arguments, keywords

    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.scored.module.parameters() if p.requires_grad]

    def step(self) -> Step:
        step = self.scored.begin(self.scored.module, self.scored.name)
        if step is None:
            raise GraddotError(f"compiled layer {self.scored.name} ran outside of a step")
        return step

    def _called(self, function: Callable[..., Any], tensors: list[Tensor]) -> Any:
        given = iter(tensors)
        args = [next(given) if x is None else x[0] for x in self._arguments]
        return function(*args, **dict(zip(self._keywords, given, strict=True)))

    def run(self, tensors: list[Tensor], rows: int) -> list[Tensor]:
        scored = self.scored
        out = self._called(scored, tensors)
        if not isinstance(out, Tensor) or scored.broadcasts != bool(rows):
            raise GraddotError(
                f"layer {scored.name} was compiled for an input {'without' if rows else 'with'} rows"
                " and one tensor as its output, and now sees another; call torch.compiler.reset()"
            )
        return [out]

    def shapes(self, tensors: list[Tensor], rows: int) -> list[Tensor]:
        with _fake_state(self.scored.module):
            out = self._called(self.scored.own_forward, tensors)
        if not rows:
            return [out]
        same = tensors[0].dim() > 1 and tensors[0].shape[0] == 1
        return [out.new_empty((rows, *(out.shape[1:] if same else out.shape)))]


@contextlib.contextmanager
def _fake_state(module: nn.Module) -> Iterator[None]:
    """Parameters and buffers without values in the place of a module's, its layers unscored."""
    parts = list(module.modules())
    before = [(part, part._parameters.copy(), part._buffers.copy()) for part in parts]
    scored = [(part, part.__dict__.get("forward")) for part in parts]
    scored = [(part, f) for part, f in scored if hasattr(f, "own_forward")]
    fake = lambda x: x if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    try:
        for part, parameters, buffers in before:
            part._parameters.update({name: fake(x) for name, x in parameters.items()})
            part._buffers.update({name: fake(x) for name, x in buffers.items()})
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

    def run(self, tensors: list[Tensor], rows: int) -> list[Tensor]:
        from .fused_head import cross_entropy  # which traces calls of this

        hidden, labels, *num_labels = tensors
        head, total = self.scored.module, num_labels[0] if num_labels else None
        return list(cross_entropy(hidden, head, labels, total, *self._options))

    def shapes(self, tensors: list[Tensor], rows: int) -> list[Tensor]:
        hidden, labels, *_ = tensors
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        return [hidden.new_empty(shape, dtype=dtype) for shape in ((), labels.shape)]


class EngineSite:
    """One beginning or end of the model's forward in a compiled graph."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine


def new_site(kind: type, owner: Any, *form: Any) -> int:
    """The number of a new call in a graph. Runs while the compiler traces."""
    number = next(numbers)
    _sites[number] = site = kind(owner, *form)
    owner.sites.append(site)
    return number


new_site._dynamo_marked_constant = True  # type: ignore[attr-defined]  # assume_constant_result


# What the compiler traces


def trace_layer(scored: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A scored layer's call in a graph."""
    if scored.engine is None or not scored.engine.scoring():
        return scored.own_forward(*args, **kwargs)
    known = all(x is None or isinstance(x, (Tensor, bool, int, float, str)) for x in args)
    if not scored.returns_tensor or not known or not all(map(_is_tensor, kwargs.values())):
        return scored.uncompiled(*args, **kwargs)
    form = tuple(None if isinstance(x, Tensor) else (x,) for x in args)
    tensors = [*(x for x in args if isinstance(x, Tensor)), *kwargs.values()]
    site = new_site(LayerSite, scored, form, tuple(kwargs))
    rows = rows_of[scored.engine.number].shape[0] if scored.broadcasts else 0
    return _trace_call(site, scored, tensors, rows)[0]


def trace_head(
    scored: Any, hidden: Tensor, labels: Tensor, num_labels: Any, *options: Any
) -> tuple[Tensor, Tensor]:
    """The fused head's call: (loss, token losses)."""
    tensors = [hidden, labels]
    if num_labels is not None:
        tensors.append(_as_tensor(num_labels))
    site = new_site(HeadSite, scored, *options)
    loss, losses, _ = _trace_call(site, scored, tensors, 0)
    return loss, losses.detach()


def _as_tensor(x: Any) -> Tensor:
    return x if isinstance(x, Tensor) else torch.full((), float(x), dtype=torch.float64)


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def _trace_call(site: int, scored: Any, tensors: list[Tensor], rows: int) -> list[Tensor]:
    parameters = [p for p in scored.module.parameters() if p.requires_grad]
    needs = [x.requires_grad for x in tensors]
    kind = tensors[0].device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return torch.ops.graddot_lm.layer(
        site, scored.engine.clock, tensors, parameters, needs, rows, autocast
    )


def trace_before(engine: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
    """What comes before the forward, where the hooks of the model are part of the graph."""
    if engine._logged_unapplied and engine._active is None and torch.is_grad_enabled():
        engine._logged_unapplied = False
    if not engine.scoring():
        return
    items = kwargs.get("num_items_in_batch")
    items = None if items is None else _as_tensor(items)
    inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    labelled = kwargs.get("labels") is not None
    site = new_site(EngineSite, engine)
    torch.ops.graddot_lm.begin(site, engine.clock, inputs, items, labelled)


def trace_after(engine: Any, output: Any) -> Any:
    """What comes after it."""
    if not engine.scoring():
        return output
    outputs = [x for x in tensors_in(output)]
    torch.ops.graddot_lm.end(new_site(EngineSite, engine), engine.clock, outputs)
    if isinstance(output, Mapping) and isinstance(output.get("loss"), Tensor):
        loss = output["loss"]
        output["loss"] = loss + engine._active.loss_scales[0].to(loss.device, loss.dtype)
    return output
