"""What a layer's rule may do with the layer's parameters while a step is active."""

import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from .autocast import autocast_input, no_autocast
from .checkpointing import recomputing, runs_again_alone
from .compiling.compiled import new_owner
from .compiling.compiler import uncompiled
from .compiling.tracing import Call, form_of, trace_layer
from .errors import GraddotError
from .rules.layers import EmbeddingDot, LayerNormDot, LinearDot, PerSampleDot
from .rules.recompute import remember
from .step import Step


class Scored:
    """One layer in one step: the operations that score its parameters.

    A rule computes the layer's output with these instead of with the parameters themselves.
    `rows` is how many samples the joint batch has, training rows first; `own_forward` is the
    layer's own forward.
    """

    def __init__(self, name: str, step: Step, own_forward: Callable[..., Any]) -> None:
        self.name, self.step, self.own_forward = name, step, own_forward
        self.rows = step.rows
        self.same: list[Tensor] = []  # inputs of the layer that are the same for every row
        self.several: list[Tensor] = []  # and those with several entries of each, (rows·S, ...)
        self.broadcasts = False  # whether the layer's output got rows that its input had not

    def has_rows(self, x: Tensor) -> bool:
        """Whether a tensor's first dimension holds the samples."""
        # However many entries they have.
        if isinstance(x, nn.Parameter) or any(x is same for same in self.same):
            return False
        if any(x is several for several in self.several):
            return True
        tokens = self.step.row_tokens(self.name)
        if x.dim() == 0 or x.shape[0] not in (self.rows, self.rows * tokens):
            return False
        return x.requires_grad or not self.step.is_buffer(x)

    def require_rows_first(self) -> None:
        """Raise GraddotError if the layer may be used where the rows are the second dimension."""
        layouts = self.step.layouts
        if "second" in layouts.values() and layouts.get(self.name) in (
            "second", "same", "unseen", None,
        ):  # fmt: skip
            raise GraddotError(
                f"layer {self.name} got an input with the rows as its second dimension, or none in"
                " a model that has them there; its rule needs them as the first (batch_first)"
            )

    def per_sample(self, parameter: Tensor) -> Tensor:
        """The parameter as (rows, *shape), row i to be used for sample i alone.

        The backward holds a gradient of this shape: for parameters that are small.
        """
        if not parameter.requires_grad:
            return parameter.expand(self.rows, *parameter.shape)
        return PerSampleDot.apply(parameter, self.step)

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False
    ) -> Tensor:
        """x @ weight.T + bias for x (rows, ..., Din), weight (Dout, Din), or (Din, Dout) transposed."""
        act = self.step.as_rows(self.name, x)
        return self.shaped(self.linear_of_rows(act, weight, bias, transposed=transposed))

    def linear_of_rows(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False
    ) -> Tensor:
        """The same of an x that is known to have the rows as its first dimension."""
        act = autocast_input(x)
        with no_autocast(act.device.type):
            return LinearDot.apply(act, weight, bias, self.step, transposed)

    def embedding(self, ids: Tensor, weight: Tensor, padding_idx: int | None = None) -> Tensor:
        """weight[ids] for ids (rows, ...), or the same for every row and (1, T) or (T,)."""
        rows = self.step.id_rows(self.name, ids)
        if not weight.requires_grad:
            return F.embedding(ids, weight, padding_idx)
        same = rows.shape != ids.shape and rows.numel() != ids.numel()
        out = self.embedding_of_rows(rows, weight, padding_idx, same=same)
        if same:
            return self.expanded(out)
        if self.step.layouts.get(self.name) == "second":
            return out.transpose(0, 1)
        return out.view(*ids.shape, -1)

    def embedding_of_rows(
        self, ids: Tensor, weight: Tensor, padding_idx: int | None = None, *, same: bool = False
    ) -> Tensor:
        """The same of ids (rows, ...) that are known to have the rows as their first dimension;
        same for every row, if so."""
        if not weight.requires_grad:
            return F.embedding(ids, weight, padding_idx)
        return EmbeddingDot.apply(ids, weight, self.step, padding_idx, same)  # type: ignore[no-any-return]

    def table(self, ids: Tensor, weight: Tensor, padding_idx: int | None = None) -> Tensor:
        """weight[ids] for ids of any shape, the same for every row, as (rows, *ids.shape, d)."""
        rows = ids.flatten().expand(self.rows, -1)
        out = self.embedding_of_rows(rows, weight, padding_idx, same=True)
        return out.unflatten(1, ids.shape) if ids.dim() else out.squeeze(1)

    def layer_norm(
        self, x: Tensor, shape: list[int], weight: Tensor, bias: Tensor | None, eps: float
    ) -> Tensor:
        """Layer norm over the last dimensions, x (rows, ..., *shape)."""
        act = self.step.as_rows(self.name, x)
        if torch.is_autocast_enabled(x.device.type):  # native autocast normalises in fp32
            act = act.to(weight.dtype)
        out = LayerNormDot.apply(act, weight, bias, self.step, shape, eps)
        if not self.step.sharded:
            again = lambda x, w, b: torch.native_layer_norm(x, shape, w, b, eps)[0]
            remember(out, again, act, weight, bias)
        return self.shaped(out)

    def shaped(self, out: Tensor) -> Tensor:
        """An output (rows, ...) with the rows where the layer's input had them."""
        layout = self.step.layouts.get(self.name)
        if layout == "same":
            return self.expanded(out)
        if layout == "second":
            return out.transpose(0, 1)
        return out.flatten(0, 1) if self.step.row_tokens(self.name) else out

    def expanded(self, out: Tensor) -> Tensor:
        """An output whose rows are the same, checked in the first step to be used row by row."""

        def check(grad: Tensor) -> None:
            counts = self.step.counts
            unlabelled = counts is not None and not counts[1:].any()
            if grad[0].any() and not grad[1:].any() and not unlabelled:
                raise GraddotError(
                    f"layer {self.name} got an input without rows, and the model used the first of"
                    " its expanded output's rows for all samples; use it by broadcasting"
                )

        self.broadcasts = True
        self.step.expands.add(self.name)
        if self.step.first and out.requires_grad:
            out.register_hook(check)
        return out


def any_layout(rule: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a rule whose layer may get the rows as its second dimension, (T, rows, ...)."""
    rule.any_layout = True  # type: ignore[attr-defined]
    return rule


def in_graph(forward: Callable[..., Tensor]) -> Callable[..., Any]:
    """Marks a rule for which this stands in a graph, where the layer's parameters are used once: see
    in_graph.py."""

    def decorate(rule: Callable[..., Any]) -> Callable[..., Any]:
        rule.in_graph = forward  # type: ignore[attr-defined]
        return rule

    return decorate


def by_token(rule: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a rule whose layer works on each token alone, so that it may get (1, rows·T, ...) too."""
    rule.by_token = True  # type: ignore[attr-defined]
    return any_layout(rule)


class _Thread(threading.local):
    """What is so in this thread: another may run another model."""

    around: Any = None  # what follows the parameters of the layer that calls (following.py)


thread = _Thread()


class ScoredForward:
    """Stands in the place of a layer's forward: by its rule in a step, the layer's own otherwise."""

    def __init__(
        self,
        module: nn.Module,
        name: str,
        rule: Callable[..., Any],
        begin: Callable[[nn.Module, str], Step | None],
        watch: Callable[[Any], None] = lambda out: None,
        model_forward: Any = None,
    ) -> None:
        """begin(module, name) gives the step that is under way, if any; watch sees the output;
        model_forward is what compiled code asks (compiled.py)."""
        self.module, self.name, self._rule = module, name, rule
        self._any_layout = getattr(getattr(rule, "func", rule), "any_layout", False)
        self.in_graph = getattr(rule, "in_graph", None)
        self.begin, self._watch, self.own_forward = begin, watch, module.forward
        self.model_forward, self.sites = model_forward, []  # type: ignore[var-annotated]
        self.key = new_owner(self)
        # For graphs (tracing.py): what was called how, by the arguments' form and keywords and
        # whether the batch had one row; and whether a call left a tensor in an attribute.
        self.calls: dict[Any, Call] = {}
        self.keeps_tensors = False
        # Whether the last call was in the forward of a layer that is followed, and got something of that.
        self._reached = False
        functools.update_wrapper(self, module.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return trace_layer(self, args, kwargs)
        step = self.begin(self.module, self.name)
        if step is None:
            return self.own_forward(*args, **kwargs)
        around = thread.around
        goes_on = around is not None and around.goes_on_inside(self._rule, args, kwargs)
        if not recomputing():
            self._reached = goes_on or (around is not None and around.reaches(args, kwargs))
        elif self._reached and around is None:
            raise runs_again_alone(f"layer {self.name}")
        if goes_on:
            return self.own_forward(*args, **kwargs)
        if self.model_forward is not None:
            self.model_forward.require_layout(step, self.name)
        scored = Scored(self.name, step, self.own_forward)
        if not self._any_layout:
            scored.require_rows_first()
        thread.around = None
        before = _tensor_attributes(self.module) if step.first else None
        try:
            if around is not None:
                args, kwargs = around.as_rows((args, kwargs))
            layout, first = step.layouts.get(self.name), first_tensor(args, kwargs)
            if layout == "same" and first is not None:
                scored.same = [first]
            if isinstance(layout, int) and first is not None and first.shape[:1] == (1,):
                out = self._in_one_sequence(scored, args, kwargs)
            else:
                out = self._rule(self.module, scored, *args, **kwargs)
            if step.moved is not None:
                out = _moved(out, step, self.name)
        finally:
            thread.around = around
        if before is not None and before != _tensor_attributes(self.module):
            self.keeps_tensors = True
        self._record(args, kwargs, out, scored)
        self._watch(out)
        return out

    def _in_one_sequence(self, scored: Scored, args: Any, kwargs: Any) -> Any:
        """A layer that works on each token alone, of (1, rows·T, ...), as of (rows·T, ...)."""
        by_token = getattr(getattr(self._rule, "func", self._rule), "by_token", False)
        if not by_token or len(args) != 1 or kwargs:
            shape = tuple(first_tensor(args, kwargs).shape)  # type: ignore[union-attr]
            raise GraddotError(
                f"layer {self.name} got an input of shape {shape}, all rows' tokens one after the"
                " other; its rule needs the rows as the first dimension"
            )
        return self._rule(self.module, scored, args[0][0])[None]

    def _record(self, args: Any, kwargs: dict[str, Any], out: Any, scored: Scored) -> None:
        tensors: list[Tensor] = []
        numbers: list[int] = []
        returns = form_of(out, tensors, numbers)
        if numbers:  # a graph's output is tensors
            returns = None
        first = scored.step.layouts.get(self.name) != "second"  # where T may be as many
        with_rows = tuple([first and x.shape[:1] == (scored.rows,) for x in tensors])
        if len(args) == 1 and not kwargs and type(args[0]) is Tensor:  # as most calls
            form = _ONE_TENSOR
        else:
            form = form_of((args, tuple(kwargs.values())), [], [])
        arguments = form, tuple(kwargs), scored.rows == 1
        self.calls[arguments] = Call(returns, with_rows, scored.broadcasts)

    @uncompiled("graddot: a scored layer with an input or a result that no graph can hold")
    def uncompiled(self, *args: Any, **kwargs: Any) -> Any:
        """A call that breaks the compiled graph."""
        return self(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copied model is a plain one: its layers must not run this model's weights."""
        copied = memo[id(self.module)]
        return type(copied).forward.__get__(copied)

    def __reduce__(self) -> Any:
        """So is a pickled one: its layer's forward is that of its class."""
        return getattr, (self.module, "forward")


_ONE_TENSOR = form_of(((torch.empty(0, device="cpu"),), ()), [], [])


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The tensor among a call's arguments by which a layer's layout is judged."""
    if args and type(args[0]) is Tensor:  # as most are; to search takes as long as a small layer
        return args[0]
    return next((x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)), None)


def _moved(out: Any, step: Step, name: str) -> Any:
    """What a layer returned in a trial, moved as `Step.moved` says."""
    assert step.moved is not None
    (here, names), layout = step.moved, step.layouts.get(name, "unseen")
    if name not in names or layout == "unseen":
        return out
    first = first_tensor((out,), {})
    in_one = isinstance(layout, int) and first is not None and first.shape[:1] == (1,)
    at = int(layout == "second" or in_one)
    chosen = torch.zeros(step.rows, dtype=torch.bool, device="cpu")
    chosen[here] = True

    def one(x: Tensor) -> Tensor:
        if not x.is_floating_point() or x.dim() <= at or x.shape[at] % step.rows or not x.numel():
            return x
        if at and x is not first:  # attention's weights
            return x
        if first is not None and len(x) != len(first) and x.shape[1:2] == first.shape[:1]:
            return x  # a recurrent layer's last state, which has the rows second
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(x.shape[-1], generator=generator, device="cpu").to(x)
        by_row = x.unflatten(at, (step.rows, -1))
        others = [k for k in range(by_row.dim()) if k != at]  # by as much whatever else is moved
        size = torch.linalg.vector_norm(by_row, dim=others, keepdim=True)
        size = size * (step.rows / x.numel()) ** 0.5 / 8 + 1e-3
        rows = chosen.to(x.device).view(-1, *[1] * (by_row.dim() - at - 1))
        return torch.where(rows, 1.125 * by_row + (1 + noise) * size, by_row).flatten(at, at + 1)

    return tree_map_only(Tensor, one, out)


def _tensor_attributes(module: nn.Module) -> set[tuple[str, str, int]]:
    """Where tensors are that are neither parameters nor buffers."""
    return {
        (name, key, id(x))
        for name, part in module.named_modules()
        for key, x in part.__dict__.items()
        if isinstance(x, Tensor)
    }


def has_own_forward(module: nn.Module) -> bool:
    """Whether the module's forward is its class's, unless an engine replaced it."""
    forward = module.__dict__.get("forward")
    own = forward is None or isinstance(forward, ScoredForward)
    return own or getattr(forward, "__func__", None) is type(module).forward


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The module's own trainable parameters, those of its children left out."""
    return {n: p for n, p in module.named_parameters(recurse=False) if p.requires_grad}
