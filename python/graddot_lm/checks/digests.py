"""Runs of a model beside its training, and what is kept of its layers' inputs to compare them."""

import contextlib
import functools
import random
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from ..errors import GraddotError
from ..rules.recurrent import KERNELS
from ..scored import first_tensor
from .parts import Numbers
from .verify import tensors_in

OUTPUTS = " outputs"  # beside the layers' names
ROUGH = 1e-2  # tolerance for fp32, by which 16 bits may have gone, or TF32

DROPOUTS = {
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
    torch.dropout, torch.alpha_dropout, torch.feature_dropout,
}  # fmt: skip


# What is drawn in place of random numbers. Uniform ones are compared with a rate, by layers of random
# depth: what keeps a layer.
_DRAWN = {
    torch.rand: 1 - 2**-7, torch.rand_like: 1 - 2**-7, Tensor.uniform_: 1 - 2**-7,
    torch.randn: 0.5, torch.randn_like: 0.5, torch.normal: 0.5, Tensor.normal_: 0.5,
    torch.bernoulli: 1, Tensor.bernoulli_: 1, Tensor.exponential_: 1,
}  # fmt: skip

_NEEDS_GRADIENT = {Tensor.register_hook, Tensor.retain_grad}

# What `NoDropout` looks at: a forward asks for a shape or the like far more often.
_CHANGED = {
    *DROPOUTS, *_DRAWN, *_NEEDS_GRADIENT, *KERNELS.values(), torch.randperm, torch.randint,
    F.scaled_dot_product_attention, F.multi_head_attention_forward, F.gumbel_softmax,
}  # fmt: skip


def _draws(function: Any) -> bool:
    """Whether a function of numpy.random draws of its global state."""
    state = getattr(function, "__self__", None)
    sets = {"seed", "get_state", "set_state"}
    return hasattr(state, "get_state") and function.__name__ not in sets


def _first_drawn(draw: Any, *args: Any, **kwargs: Any) -> Any:
    """What a function of numpy's random state draws first."""
    return getattr(type(draw.__self__)(0), draw.__name__)(*args, **kwargs)


def _softmax_without_noise(
    logits: Tensor, tau: float = 1, hard: bool = False, eps: float = 0, dim: int = -1
) -> Tensor:
    """F.gumbel_softmax with the same noise for every class."""
    soft = (logits / tau).softmax(dim)
    if not hard:
        return soft
    one_hot = torch.zeros_like(soft).scatter_(dim, soft.argmax(dim, keepdim=True), 1.0)
    return one_hot - soft.detach() + soft


class NoDropout(TorchFunctionMode):
    """Dropout does nothing, whatever the mode of the module that calls it, and noise is the same for
    every row and in every run, so that layers behind it can be compared. Numpy's, too, of which
    transformers makes the masks of SpecAugment."""

    def __enter__(self) -> Any:
        self._drawn = {n: f for n, f in vars(np.random).items() if _draws(f)}
        first = {n: functools.partial(_first_drawn, f) for n, f in self._drawn.items()}
        vars(np.random).update(first)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        vars(np.random).update(self._drawn)

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func not in _CHANGED:
            return func(*args, **(kwargs or {}))
        kwargs = dict(kwargs or {})
        if func is torch.randn and kwargs.get("generator") is not None:  # our own numbers
            return func(*args, **kwargs)
        if func in _NEEDS_GRADIENT and not args[0].requires_grad:
            return RemovableHandle(OrderedDict())  # a model may ask for it in every forward
        if func in _DRAWN:
            return func(*args, **kwargs).fill_(_DRAWN[func])
        if func is torch.randperm:  # every row gets another
            return func(*args, **kwargs).sort().values.roll(1)
        if func is F.gumbel_softmax:  # which draws where no mode sees it
            return _softmax_without_noise(*args, **kwargs)
        if func is torch.randint:
            ints = [x for x in args[:2] if isinstance(x, int)]
            low = ints[0] if len(ints) == 2 else kwargs.get("low", 0)
            return func(*args, **kwargs).fill_(low)
        if func in DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            kwargs.pop("dropout_p", None)
        if func in KERNELS.values() and isinstance(args[3], bool):  # of no PackedSequence
            args = (*args[:5], 0.0, *args[6:])
        if func is F.multi_head_attention_forward:
            args = (*args[:10], 0.0, *args[11:])
        return func(*args, **kwargs)


@contextlib.contextmanager
def own_random() -> Iterator[None]:
    """Inside of it what is drawn at random, by torch, numpy or Python, is not missing afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Inside of it `parametrize.cached()`, in which a loop may run its model, keeps nothing: the weights
    that are computed here, perhaps without gradients, are not those of the step."""
    enabled, cache = parametrize._cache_enabled, parametrize._cache
    if not enabled:  # nor may another thread begin to meanwhile
        yield
        return
    parametrize._cache_enabled, parametrize._cache = 0, {}
    try:
        yield
    finally:
        parametrize._cache_enabled, parametrize._cache = enabled, cache


@contextlib.contextmanager
def must_run(what: str, shown: str) -> Iterator[None]:
    """Raise GraddotError if the model, whose own code may raise anything, does not run inside of it."""
    try:
        yield
    except Exception as error:
        raise GraddotError(
            f"the model {what} ({type(error).__name__}: {error}), so that it cannot be shown to {shown}"
        ) from error


@contextlib.contextmanager
def own_buffers(model: nn.Module) -> Iterator[None]:
    """Inside of it the model has copies of its buffers, and of what its modules hold in attributes, lists
    and dicts: what a forward adds to a running mean or a counter, or remembers, is gone afterwards."""
    modules = list(model.modules())
    kept = [(module, dict(module._buffers)) for module in modules if module._buffers]
    held = {module: _held_by(module) for module in modules}
    collected = {module: found for module in modules if (found := _collections_of(module))}
    copies: dict[int, Any] = {}
    own = lambda x: copies.setdefault(id(x), x.detach().clone())
    for module, buffers in kept:
        module._buffers.update({k: own(x) for k, x in buffers.items() if x is not None})
    for module, values in held.items():
        tensors = {k: x for k, x in values.items() if isinstance(x, Tensor)}
        vars(module).update({k: own(x) for k, x in tensors.items() if not x.requires_grad})
    copied = lambda x: (
        copies[id(x)] if id(x) in copies else copies.setdefault(id(x), _mapped(x, own))
    )
    for module, values in collected.items():
        vars(module).update({k: copied(x) for k, x in values.items()})
    try:
        yield
    finally:
        for module, buffers in kept:
            module._buffers.clear()
            module._buffers.update(buffers)
        hold(held)
        for module, values in collected.items():
            vars(module).update(values)


_OF_EVERY_MODULE = vars(nn.Module()).keys()


def _collections_of(module: nn.Module) -> dict[str, Any]:
    """Lists and dicts in a module's attributes, as of losses to add up, or of weights that it computed
    and keeps, which without a gradient would be the step's."""
    return {
        k: x
        for k, x in vars(module).items()
        if type(x) in (list, dict) and k not in _OF_EVERY_MODULE and "hook" not in k
    }


def _mapped(collection: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A list or dict with `function` of the tensors that a forward may write to: no parameters, and
    nothing that has a gradient."""

    def one(x: Any) -> Any:
        written = isinstance(x, Tensor) and not (x.requires_grad or isinstance(x, nn.Parameter))
        return function(x) if written else x

    if isinstance(collection, dict):
        return {k: one(x) for k, x in collection.items()}
    return [one(x) for x in collection]


Held = Mapping[nn.Module, Mapping[str, Any]]


def remembered_values(model: nn.Module) -> Held:
    """`held_values` and lists and dicts, with copies of the tensors."""
    own = lambda x: x.detach().clone()

    def copied(x: Any) -> Any:
        return (
            own(x) if isinstance(x, Tensor) else _mapped(x, own) if type(x) in (list, dict) else x
        )

    return {
        m: {k: copied(x) for k, x in values.items()} for m, values in kept_values(model).items()
    }


def kept_values(model: nn.Module) -> Held:
    """`held_values` and the lists and dicts there."""
    return {module: {**_held_by(module), **_collections_of(module)} for module in model.modules()}


_FEW = 2**16


def counts_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the buffers of whole numbers, by name, but for long ones. (In attributes forwards also leave
    what they got, as the number of rows, and do not look at it the next time.)"""
    counted = lambda x: not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
    buffers = [(name, x) for name, x in model.named_buffers() if x.numel() <= _FEW and counted(x)]
    return {name: x.clone() for name, x in buffers}


def held_values(model: nn.Module) -> Held:
    """The tensors, numbers and Nones in every module's attributes: no buffers, no parameters."""
    return {module: _held_by(module) for module in model.modules()}


def _held_by(module: nn.Module) -> dict[str, Any]:
    # Hooks that a forward installs stay (transformers'), and so does what says that they are there.
    found = {}
    for k, x in vars(module).items():  # of thousands of modules, in every run of a first step
        is_tensor = isinstance(x, Tensor) and not isinstance(x, nn.Parameter)
        if (is_tensor or x is None or isinstance(x, (int, float))) and "hook" not in k:
            found[k] = x
    return found


def hold(held: Held) -> None:
    """Put back what `held_values` gave."""
    for module, values in held.items():
        for key in _held_by(module).keys() - values.keys():
            del vars(module)[key]
        vars(module).update(values)


def kept_numbers(model: nn.Module) -> dict[int | str, Tensor]:
    """The numbers that modules hold in their attributes, or in lists and dicts there, by name, as
    auxiliary losses that a forward leaves for the training loop."""
    found: dict[int | str, Tensor] = {}
    for name, module in model.named_modules():
        for key, value in {**_held_by(module), **_collections_of(module)}.items():
            numbers = [x for x in tensors_in(value) if x.dim() == 0 and x.is_floating_point()]
            for k, x in enumerate(numbers):
                found[f"{name}.{key}".lstrip(".") + (f"[{k}]" if x is not value else "")] = x
    return found


def numbers_of(model: nn.Module, out: Any) -> Numbers:
    """To be called while the modules still hold what the forward left in them."""
    numbers = kept_numbers(model)
    numbers.update({k: x for k, x in enumerate(tensors_in(out)) if x.dim() == 0})
    aux_loss = out.get("aux_loss") if isinstance(out, Mapping) else None
    return Numbers({key: x.double() for key, x in numbers.items()}, aux_loss)


def own_inputs(arguments: Any) -> Any:
    """A call's arguments with copies of their tensors, for a model may write to its input."""
    copies: dict[int, Tensor] = {}
    one = lambda x: copies[id(x)] if id(x) in copies else copies.setdefault(id(x), x.clone())
    return tree_map_only(Tensor, one, arguments)


@contextlib.contextmanager
def forwards_replaced(
    layers: Mapping[str, nn.Module], by: Callable[[str, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Inside of it every layer's forward is by(name, forward): in its place, for it may be called
    directly, where no hook would see it."""
    before = [(module, module.__dict__.get("forward")) for module in layers.values()]
    try:
        for name, module in layers.items():
            module.forward = by(name, module.forward)  # type: ignore[method-assign]
        yield
    finally:
        for module, kept in before:
            module.__dict__.pop("forward", None)
            if kept is not None:
                module.__dict__["forward"] = kept


@dataclass
class Digest:
    """An input's shape, and one random projection of every vector in it."""

    shape: torch.Size
    values: Tensor
    tolerance: float = 0.0  # for what rounding makes of the same rows in a smaller batch
    caller: str | None = None  # the innermost of the layers around whose forward is followed


def digests(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    args: Any,
    kwargs: Any,
    on_layer: Callable[[nn.Module, str], None] = lambda module, name: None,
    followed: Collection[str] = (),
    on_output: Callable[[Any], None] = lambda out: None,
) -> dict[str, list[Digest]]:
    """Digests of every call's first tensor by layer name, and of the outputs. on_output gets the outputs
    while the modules still hold what the forward left in them."""
    found: dict[str, list[Digest]] = {}
    within: list[str] = []

    def seen(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def see(*args: Any, **kwargs: Any) -> Any:
            on_layer(layers[name], name)
            x = first_tensor(args, kwargs)
            # A layer without an input gives the same for every row.
            seen_now = digest(torch.zeros(1, device="cpu") if x is None else x)
            seen_now.caller = within[-1] if within else None
            found.setdefault(name, []).append(seen_now)
            if name not in followed:
                return forward(*args, **kwargs)
            within.append(name)
            try:
                return forward(*args, **kwargs)
            finally:
                within.pop()

        return see

    args, kwargs = own_inputs((args, kwargs))
    with forwards_replaced(layers, seen), own_buffers(model):
        out = model(*args, **kwargs)
        on_output(out)
    found[OUTPUTS] = [digest(x) for x in tensors_in(out) if x.dim() > 0]
    calls = [x for calls in found.values() for x in calls]
    if not any(x.tolerance > ROUGH for x in calls):  # nor is what 16 bits made cast to fp32
        for x in calls:
            on_cpu = x.values.device.type == "cpu"  # a GPU's kernels may take TF32 for some batches
            x.tolerance = min(x.tolerance, 1e-4) if on_cpu else x.tolerance
    return found


def digest(x: Tensor) -> Digest:
    if x.dim() == 0 or not x.is_floating_point():
        return Digest(x.shape, x.detach().clone())
    tolerance = {torch.float64: 1e-5, torch.float32: ROUGH}.get(x.dtype, 0.1)
    if torch.is_autocast_enabled(x.device.type):
        tolerance = 0.1
    generator = torch.Generator().manual_seed(x.shape[-1])
    direction = torch.randn(x.shape[-1], generator=generator, device="cpu")
    project = lambda x: times(x, direction) if x.dim() > 1 else x if x.itemsize > 2 else x.float()
    values = project(x)
    if not bool(values.isfinite().all()):
        # As logits of classes that are masked, or tokens that attend to nothing: one would hide all beside it.
        values = project(x.nan_to_num(nan=0.5, posinf=1.0, neginf=-1.0))
    return Digest(x.shape, values, tolerance)


def times(x: Tensor, directions: Tensor) -> Tensor:
    """x @ directions, in fp32, or fp64 where x is; nothing else as large as x is made of fp32."""
    wide = x if x.dtype == torch.float64 else x.float()
    with torch.autocast(x.device.type, enabled=False):
        return wide @ directions.to(wide)


def equal(a: list[Digest], b: list[Digest]) -> bool:
    return len(a) == len(b) and all(
        x.shape == y.shape and close(x.values, y.values, x.tolerance)
        for x, y in zip(a, b, strict=True)
    )


def close(values: Tensor, part: Tensor, tolerance: float) -> bool:
    if not values.is_floating_point():
        return torch.equal(values, part)
    return bool((values - part).norm() <= tolerance * values.norm())
