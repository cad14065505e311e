"""torch.compile of a model with an engine attached: scored layers that are an op of the graph each.

Most layers of a transformer need none: see in_graph.py.

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
import itertools
import secrets
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from ..checkpointing import recomputing
from ..distributed import own_part
from ..errors import GraddotError
from ..step import Step
from .compiler import uncompiled

# Numbers of engines and of calls in the graphs: never twice the same, so that a compiler does not
# take two calls for one, or a graph in its cache on disk for that of another model.
numbers = itertools.count(secrets.randbits(61))
_owners: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_sites: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_call_numbers = itertools.count()
_calls: dict[int, "_Call"] = {}
_keys = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()


def new_owner(one: Any) -> str:
    """The key by which traced code names an owner of sites: no object is a constant to torch 2.11,
    and numbers may become variables."""
    key = str(next(numbers))
    _owners[key] = one
    return key


def owner(key: str) -> Any:
    return _owners[key]


def new_site(kind: type, owner_key: str, *form: Any) -> int:
    """The number of a new call in a graph. Runs while the compiler traces."""
    number, owned_by = next(numbers), owner(owner_key)
    _sites[number] = site = kind(owned_by, *form)
    owned_by.sites.append(site)
    return number


new_site._dynamo_marked_constant = True  # type: ignore[attr-defined]  # assume_constant_result


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
    return own_part(x).untyped_storage().data_ptr()  # a sharded direction has none of its own


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


def _own_uses(step: Step, parameters: list[nn.Parameter], borrowed: set[int]) -> None:
    for p in parameters:
        uses = step.shared.get(id(p))
        if uses is not None and uses.holds:
            _owned(uses, borrowed)


def _returned(tensors: list[Tensor], borrowed: set[int]) -> list[Tensor]:
    """Contiguous tensors that share memory with nothing else."""
    taken, result = set(borrowed), []
    for x in tensors:
        x = x.detach().contiguous()
        if 1 in x.shape:  # where such a dimension's stride may be any
            x = x.flatten().view(x.shape)
        x = x.clone() if _storage(x) in taken and x.numel() else x
        taken.add(_storage(x))
        result.append(x)
    return result


@contextlib.contextmanager
def _with_autograd(device: torch.device, autocast: torch.dtype | None) -> Iterator[None]:
    """Ops run below autograd and autocast; a rule needs both, as they were where it was called."""
    as_it_was: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    # Entering its context takes longer than small layers.
    if autocast is not None or torch.is_autocast_enabled(device.type):
        as_it_was = torch.autocast(device.type, dtype=autocast, enabled=autocast is not None)
    with torch._C._ForceDispatchKeyGuard(*_keys), torch.enable_grad(), as_it_was:
        yield


@contextlib.contextmanager
def _drawing(site: Any, device: torch.device) -> Iterator[None]:
    """Inside of it a forward that an activation checkpoint runs again draws the numbers that it drew at
    first, which a compiler sees to for PyTorch's own random operations alone."""
    kind, gpus = device.type, [] if device.type == "cpu" else [device]
    if not recomputing():
        states = [torch.get_device_module(kind).get_rng_state(gpu) for gpu in gpus]
        site.random = torch.get_rng_state(), *states
        yield
        return
    with torch.random.fork_rng(gpus, device_type="cuda" if kind == "cpu" else kind):
        first, *states = site.random
        torch.set_rng_state(first)
        for state, gpu in zip(states, gpus, strict=True):
            torch.get_device_module(kind).set_rng_state(state, gpu)
        yield


# The ops

_library = torch.library.Library("graddot_lm", "DEF")  # noqa: TOR901
_tags = (torch.Tag.cudagraph_unsafe,)
_library.define(
    "layer(int site, Tensor clock, Tensor[] inputs, Tensor[] parameters, bool[] needs,"
    " SymInt[] numbers, SymInt rows, ScalarType? autocast) -> Tensor[]",
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
_library.define("scale(int site, Tensor grad) -> Tensor", tags=_tags)
_library.define("end(int site, Tensor(a!) clock, Tensor[] outputs) -> ()", tags=_tags)


def site_of(number: int) -> Any:
    site = _sites.get(number)
    if site is None:
        raise GraddotError(
            "the engine that this compiled model was scored by is gone; compile again"
        )
    return site


def _layer(number, clock, inputs, parameters, needs, numbers, rows, autocast):  # type: ignore[no-untyped-def]
    site = site_of(number)
    own = site.parameters()
    if any(p._backward_hooks for p in own):
        raise GraddotError(
            f"layer {site.scored.name} has a parameter with a gradient hook (register_hook), which"
            " would run twice in a compiled model; use register_post_accumulate_grad_hook"
        )
    kept, device = _Kept(inputs), inputs[0].device
    with _with_autograd(device, autocast), _drawing(site, device):
        step = site.step()
        leaves = [x.detach().requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
        with saved_tensors_hooks(kept.pack, kept.unpack):
            outputs = site.run(leaves, numbers)
            if autocast is not None and site.dtypes is not None:
                # A layer that is followed may return a wider dtype than its own forward.
                outputs = [out.to(t) for out, t in zip(outputs, site.dtypes, strict=True)]
            # A view: torch 2.11 cannot start a backward at the edge of an autograd.Function.
            outputs = [out.view_as(out) for out in outputs]
    if site.dtypes is not None and [out.dtype for out in outputs] != site.dtypes:
        raise GraddotError(  # which compiled code would not notice, but read the memory otherwise
            f"layer {site.scored.name} returned {[out.dtype for out in outputs]}, but when it was"
            f" compiled {site.dtypes}; call torch.compiler.reset()"
        )
    edges = [get_gradient_edge(out) if out.requires_grad else None for out in outputs]
    call = _Call(step, edges, [x for x in leaves if x.requires_grad], kept.inputs)
    _own_uses(step, own, kept.borrowed())
    results = _returned(outputs, kept.borrowed() | kept.storages)
    return [*results, _numbered(call)]


def _numbered(call: _Call) -> Tensor:
    """A 0-dim tensor by which the backward finds the call; it is kept for as long as that is.

    Where an activation checkpoint runs the forward again, nobody keeps the first one's.
    """
    number = next(_call_numbers)
    _calls[number] = call
    memory = np.array(number)  # goes when the last tensor that shares it does
    weakref.finalize(memory, _calls.pop, number, None).atexit = False
    return torch.from_numpy(memory)


def _layer_fake(number, clock, inputs, parameters, needs, numbers, rows, autocast):  # type: ignore[no-untyped-def]
    with torch.autocast(inputs[0].device.type, dtype=autocast, enabled=autocast is not None):
        outputs = site_of(number).shapes(inputs, numbers, rows)
    site_of(number).dtypes = [x.dtype for x in outputs]
    own = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in outputs]
    return [*own, torch.empty((), dtype=torch.int64, device="cpu")]


def _layer_backward(number, call_number, grads, inputs, parameters, needs):  # type: ignore[no-untyped-def]
    site = site_of(number)
    call = _calls.pop(int(call_number), None)
    if call is None:
        raise GraddotError(
            f"a second backward through the compiled layer {site.scored.name}; call backward() once"
            " a batch, on the sum of all losses"
        )
    step = call.step
    own = site.parameters()
    wanted = [*call.leaves, *own]
    call.inputs += inputs
    with _with_autograd(inputs[0].device, None):
        used = [i for i, edge in enumerate(call.outputs) if edge is not None]
        edges, grads = [call.outputs[i] for i in used], [grads[i] for i in used]
        found = list(torch.autograd.grad(edges, wanted, grads, allow_unused=True))
    call.inputs.clear()
    for at, parameter in enumerate(own, len(call.leaves)):
        uses = step.shared.get(id(parameter))
        if found[at] is None and uses is not None and uses.held is not None:
            found[at], uses.held = uses.held, None  # the graph adds up the uses itself
    results = [
        torch.zeros_like(x) if grad is None else grad.to(x.dtype)
        for x, grad in zip(wanted, found, strict=True)
    ]
    borrowed = {_storage(x) for x in (*inputs, *grads)} - {0}
    returned = _returned(results, borrowed)
    _own_uses(step, own, borrowed | {_storage(x) for x in returned})
    return returned


def _layer_backward_fake(number, call_number, grads, inputs, parameters, needs):  # type: ignore[no-untyped-def]
    wanted = [*(x for x, need in zip(inputs, needs, strict=True) if need), *parameters]
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in wanted]


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.site, _, tensors, parameters, ctx.needs, numbers, _, _ = inputs
    ctx.numbers_grad = None if numbers else []  # as torch takes an empty list for one of tensors
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
    return None, None, input_grads, list(result), None, ctx.numbers_grad, None, None


def _begin(number, clock, inputs, items, labelled):  # type: ignore[no-untyped-def]
    items = None if items is None else items.clone()  # kept until the step's scores are made
    site_of(number).model_forward.begin_compiled(inputs, items, labelled)
    clock.add_(1)


def _scale(number, grad):  # type: ignore[no-untyped-def]
    """The step's scale, as it is once there is such a gradient."""
    # As its fake says, whatever the step holds; a copy, as the next step writes to that.
    return site_of(number).scale().to(torch.float64, copy=True)


def _scale_fake(number, grad):  # type: ignore[no-untyped-def]
    return torch.empty((), dtype=torch.float64, device=grad.device)


def _end(number, clock, outputs):  # type: ignore[no-untyped-def]
    site_of(number).model_forward.end_compiled()
    clock.add_(1)


for _name, _function, _fake in (
    ("layer", _layer, _layer_fake),
    ("layer_backward", _layer_backward, _layer_backward_fake),
    ("scale", _scale, _scale_fake),
    ("begin", _begin, lambda *args: None),
    ("end", _end, lambda *args: None),
):
    _function = uncompiled("graddot: an op")(_function)  # where it is called outside of a graph
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"graddot_lm::{_name}", _fake, lib=_library)
torch.library.register_autograd("graddot_lm::layer", _backward, setup_context=_save, lib=_library)
