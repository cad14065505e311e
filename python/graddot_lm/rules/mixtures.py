"""The rule for mixtures whose experts are layers of their own, called on the tokens routed to them.

Of which row an expert's token is, is seen in each call: in the mixture's input every vector gets a mark
of its row, as its tangent of PyTorch's forward-mode differentiation. That goes wherever the vector is
copied to, by indexing, sorting, splitting or a product with zeros and ones, and nothing else leaves it
as it is. The expert's tokens are then laid out by row, as many a row as the row with the most has, and
so the layers inside of it get rows as those of any other layer do. What fills rows up is taken away
from what the expert returns, and gets no gradient.

That no other row's loss depends on what an expert returns for a token is what all checks of the model
are about: a capacity, or a choice of tokens by experts, mixes samples.
"""

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map_only

from ..errors import GraddotError
from ..scored import Scored, ScoredForward, first_tensor
from .general import ProvenRule

ROUTED = "routed"  # the layout of the layers inside of experts, but while these run
_DIGIT = 256  # marks are whole numbers up to this, which every floating-point type has


def mixture_rule(experts: Collection[str], found_by: str) -> ProvenRule:
    """For a layer in which these layers, by their names in it, get the tokens that are routed to them:
    of its input, or else also of what the layers inside of it return, such as a norm. found_by is the
    layer by which it was taken for a mixture."""
    why = f"as a mixture of experts, for {found_by} gets tokens of rows that are not known, with tokens"
    return ProvenRule(
        {
            f"{why} of its input": lambda _: Mixture(experts, marks_layers=False),
            f"{why} of its layers' outputs": lambda _: Mixture(experts, marks_layers=True),
        }
    )


class Mixture:
    """The mixture's own forward, with its experts run on their tokens by row."""

    def __init__(self, experts: Collection[str], *, marks_layers: bool) -> None:
        self._experts, self._marks_layers = experts, marks_layers

    def __call__(self, module: nn.Module, scored: Scored, *args: Any, **kwargs: Any) -> Any:
        if scored.step.tokens is not None:
            raise GraddotError(
                f"the experts of {scored.name} get some of the tokens, of which there are no scores by"
                " token; leave per_token out"
            )
        with contextlib.ExitStack() as stack:
            stack.enter_context(forward_ad.dual_level())
            # Off inside of a reentrant checkpoint.
            stack.enter_context(forward_ad._set_fwd_grad_enabled(True))
            for name, part in self._parts(module):
                inner = Scored(f"{scored.name}.{name}", scored.step, part.forward)
                run = _run_expert if name in self._experts else self._run_layer
                stack.enter_context(_in_place_of(part, functools.partial(run, part, inner)))
            first = first_tensor(args, kwargs)  # whose layout was judged

            def mark(x: Tensor) -> Tensor:
                return _marked(scored, x) if x is first else x

            args, kwargs = tree_map_only(Tensor, mark, (args, kwargs))
            return scored.own_forward(*args, **kwargs)

    def _parts(self, module: nn.Module, within: str = "") -> Iterator[tuple[str, nn.Module]]:
        """The experts that are trained, and the outermost of the other layers that are scored."""
        for key, part in module.named_children():
            name = within + key
            if name in self._experts:
                if any(p.requires_grad for p in part.parameters()):
                    yield name, part
            elif isinstance(part.__dict__.get("forward"), ScoredForward):
                yield name, part
            else:
                yield from self._parts(part, f"{name}.")

    def _run_layer(self, part: nn.Module, scored: Scored, *args: Any, **kwargs: Any) -> Any:
        """A scored layer, which knows nothing of marks. Its output has rows where it has them first."""
        args, kwargs = _without_marks((args, kwargs))
        out = scored.own_forward(*args, **kwargs)
        layout = scored.step.layouts.get(scored.name)
        if not self._marks_layers or not (layout == "rows" or isinstance(layout, int)):
            return out
        return tree_map_only(Tensor, functools.partial(_marked, scored), out)


def _run_expert(part: nn.Module, scored: Scored, *args: Any, **kwargs: Any) -> Any:
    """An expert, on its tokens laid out by row."""
    name, layouts = scored.name, scored.step.layouts
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim()]
    marked = [x for x in tensors if forward_ad.unpack_dual(x).tangent is not None]
    if not marked:
        raise GraddotError(
            f"expert {name} gets no copies of tokens, so that it is not known which row each of its"
            " tokens is of; let its input be taken from the mixture's as it is"
        )
    lead = marked[0].shape[:-1]
    others = [tuple(x.shape) for x in tensors if x.shape[: len(lead)] != lead]
    if others:
        raise GraddotError(
            f"expert {name} gets tokens of shape {tuple(marked[0].shape)} and a tensor of shape"
            f" {others[0]}, of which it is not known which token each entry is of"
        )
    rows, *further = (_rows_of(x, scored.rows, name) for x in marked)
    if not all(torch.equal(rows, other) for other in further):
        raise GraddotError(f"expert {name} gets tokens of different rows side by side")
    at, source, each = _by_row(rows, scored.rows)

    def laid_out(x: Tensor) -> Tensor:
        if not x.dim():
            return x
        flat = x.reshape(len(rows), *x.shape[len(lead) :])
        empty = flat.new_zeros(len(source), *flat.shape[1:])
        return flat.index_select(0, source) if len(rows) else empty

    def taken_out(x: Tensor) -> Tensor:
        if x.shape[:1] != source.shape:
            raise GraddotError(
                f"expert {name} returned a tensor of shape {tuple(x.shape)} for {len(source)} tokens"
            )
        return x.index_select(0, at).reshape(*lead, *x.shape[1:])

    args, kwargs = tree_map_only(Tensor, laid_out, _without_marks((args, kwargs)))
    layers = [f"{name}.{key}" if key else name for key, _ in part.named_modules()]
    layouts.update(dict.fromkeys(layers, each))
    try:
        out = scored.own_forward(*args, **kwargs)
    finally:
        layouts.update(dict.fromkeys(layers, ROUTED))
    return tree_map_only(Tensor, taken_out, out)


def _marked(scored: Scored, x: Tensor) -> Tensor:
    """With its row's mark for every vector of a tensor with rows."""
    if not x.is_floating_point() or x.dim() < 2 or not scored.has_rows(x):
        return x
    by_row = x.unflatten(0, (scored.rows, -1))
    marks = _marks(scored.rows, x.shape[-1], x.dtype, x.device)
    marks = marks.view(scored.rows, *[1] * (x.dim() - 1), -1).expand_as(by_row)
    return forward_ad.make_dual(x, marks.flatten(0, 1))


@functools.lru_cache(maxsize=16)
def _marks(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A vector of whole numbers a row, (rows, width), of which the first two tell the row."""
    generator = torch.Generator().manual_seed(0)
    marks = 1 + (100 * torch.randn(rows, width, generator=generator, device="cpu")).long() % _DIGIT
    number = torch.arange(rows, device="cpu")[:, None]
    marks[:, :1], marks[:, 1:2] = 1 + number % _DIGIT, 1 + number // _DIGIT
    return marks.to(device, dtype)


def _rows_of(x: Tensor, rows: int, name: str) -> Tensor:
    """The row of every vector of x by its mark, (M,)."""
    got = forward_ad.unpack_dual(x).tangent
    got = got.reshape(-1, x.shape[-1]) if x.numel() else got.new_zeros(0, x.shape[-1])
    digits = (got[:, :2].double().nan_to_num() - 1).long()
    number = digits[:, 0] + (_DIGIT * digits[:, 1] if digits.shape[1] > 1 else 0)
    number = number.clamp(0, rows - 1)
    marks = _marks(rows, x.shape[-1], x.dtype, x.device)
    if not torch.equal(got, marks[number]):
        raise GraddotError(
            f"expert {name} gets tokens that were computed after they were taken from their rows, or"
            " of several rows, so that it is not known which row each is of; let its input be taken"
            " from the mixture's as it is, and multiply by weights what it returns"
        )
    return number


def _by_row(row_of: Tensor, rows: int) -> tuple[Tensor, Tensor, int]:
    """Where tokens of these rows, (M,), are when every row has as many places, one row's after the
    other's: each token's place, (M,); the token in each place, (rows · places,), any one where there is
    none; and how many places a row has."""
    counts = torch.bincount(row_of, minlength=rows)
    each = max(1, int(counts.max()))
    numbers = torch.arange(len(row_of), device=row_of.device)
    order = row_of.argsort(stable=True)
    first = counts.cumsum(0) - counts  # of each row's tokens, in this order
    within = torch.empty_like(row_of)
    within[order] = numbers - first[row_of[order]]
    at = row_of * each + within
    source = row_of.new_zeros(rows * each)
    source[at] = numbers
    return at, source, each


def _without_marks(values: Any) -> Any:
    return tree_map_only(Tensor, lambda x: forward_ad.unpack_dual(x).primal, values)


@contextlib.contextmanager
def _in_place_of(part: nn.Module, run: Callable[..., Any]) -> Iterator[None]:
    """Inside of it, run in the place of a module's forward."""
    before = part.__dict__.get("forward")
    part.forward = run  # type: ignore[method-assign]
    try:
        yield
    finally:
        del part.__dict__["forward"]
        if before is not None:
            part.__dict__["forward"] = before
