"""Checks that everything which the scores rest on is as assumed.

All but `check_same_model`, which is made in every step, look once, and cost nothing afterwards.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..distributed import is_sharded, own_part
from ..errors import GraddotError
from ..rules.layers import ScoredFunction
from .own_loss import EqualWeights, RowWeights, TokenWeights, sums_of_rows


def tensors_in(output: Any) -> Iterator[Tensor]:
    """Every tensor in a model's output: a tensor, a tuple or list, or a mapping, dataclass or
    namespace of them."""
    for _, x in placed_tensors(output):
        yield x


def placed_tensors(output: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, Tensor]]:
    """The same, each with the names and numbers by which it is found."""
    if isinstance(output, Tensor):
        yield place, output
        return
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(output, Mapping):
        items = output.items()
    elif isinstance(output, (tuple, list)):
        items = enumerate(output)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        names = [field.name for field in dataclasses.fields(output)]
        items = [(name, getattr(output, name, None)) for name in names]
    elif isinstance(output, SimpleNamespace):
        items = vars(output).items()
    for name, value in items:
        yield from placed_tensors(value, (*place, name))


def map_tensors(output: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """An output with `function` of its tensors in their place, where `tensors_in` finds them; in a
    mapping, dataclass or namespace in place. What does not allow that keeps its tensors."""
    if isinstance(output, Tensor):
        return function(output)
    if isinstance(output, tuple):
        items = [map_tensors(value, function) for value in output]
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    if isinstance(output, list):
        output[:] = [map_tensors(value, function) for value in output]
    elif isinstance(output, MutableMapping):
        changed = {key: map_tensors(value, function) for key, value in output.items()}
        for key, value in changed.items():
            if value is not output[key]:
                output[key] = value
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for field in dataclasses.fields(output):
            value = getattr(output, field.name, None)
            object.__setattr__(output, field.name, map_tensors(value, function))
    elif isinstance(output, SimpleNamespace):
        vars(output).update(map_tensors(dict(vars(output)), function))
    return output


def check_same_model(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], scored: Sequence[nn.Module]
) -> None:
    """Raise GraddotError if the model has trainable parameters beside those given, or has lost a
    scored layer: they would be missing from the scores, and their gradient would be that of training
    and validation rows together."""
    known = {id(p) for p in parameters.values()}
    modules = list(model.modules())
    new = {
        id(p)
        for module in modules
        for p in module._parameters.values()
        if p is not None and p.requires_grad and id(p) not in known
    }
    if new:  # of a sharded model others of the same names may stand in their place
        sharded = is_sharded(parameters.values())
        named = [name for name, p in model.named_parameters() if id(p) in new]
        names = [name for name in named if not (sharded and name in parameters)]
        if names:
            raise GraddotError(
                f"{', '.join(names[:5])}{' …' if names[5:] else ''}: not a trainable parameter of the"
                " model when the engine was made, but now; detach() the engine and make another one"
                " after layers are unfrozen, added, or replaced as by fully_shard"
            )
    present = set(map(id, modules))
    for module in scored:
        if id(module) not in present:
            raise GraddotError(
                f"a {type(module).__name__} that was scored is no longer in the model; detach() the"
                " engine before layers are replaced, and make another one afterwards"
            )


_SOME = 2**16


def _some(x: Tensor) -> Tensor:
    """A copy of it, or of so many of its numbers, from everywhere; none of what cannot be read so: other
    types of tensors, as of quantized weights, and what is not there, as weights that are offloaded."""
    plain = None if is_lazy(x) else own_part(x.detach())
    if type(plain) is not Tensor or plain.is_meta or plain.layout != torch.strided:
        return torch.empty(0, device="cpu")
    flat = plain.flatten()
    return flat[:: -(-flat.numel() // _SOME) or 1].clone()


def _are_same(x: Tensor, y: Tensor) -> bool:
    """NaNs, too."""
    return x.shape == y.shape and bool(((x == y) | (x.isnan() & y.isnan())).all())


class FrozenCheck:
    """A model's frozen parameters before the checks run it; no run has copies of them, for they may be most
    of the model."""

    def __init__(self, model: nn.Module) -> None:
        self._before = [
            (name, p, _some(p))
            for name, p in model.named_parameters()
            if not p.requires_grad and p.is_floating_point()
        ]

    def compare(self) -> None:
        """Raise GraddotError if a forward changed one, as that of a teacher which follows the weights."""
        changed = [name for name, p, before in self._before if not _are_same(_some(p), before)]
        if changed:
            raise GraddotError(
                f"{', '.join(changed[:5])}{' …' if changed[5:] else ''}: frozen, but changed by the model's"
                " forward, as a teacher that follows the weights. The checks of a first step run the model"
                " several times, and have changed it as often: make the model anew, and change it in the"
                " training loop, after the optimizer's step"
            )


class BufferCheck:
    """A model's floating-point buffers, and what it holds in attributes, before a forward in which
    validation rows ride along."""

    def __init__(
        self,
        model: nn.Module,
        held: Mapping[nn.Module, Mapping[str, Any]],
        counts: Mapping[str, Tensor],
    ) -> None:
        self.held, self.counts = held, counts
        self._before = [
            (name, x, version(x), _some(x))
            for name, x in model.named_buffers()
            if x.is_floating_point()
        ]

    def compare(self, model: nn.Module) -> None:
        """Raise GraddotError if the forward changed one, as a running mean."""
        now = dict(model.named_buffers())
        for name, x, before, numbers in self._before:
            y = now.get(name)
            same = y is not None and (y is x or y.shape == x.shape and torch.equal(x, y.to(x)))
            # Not every way to write to a tensor counts its versions.
            if not same or version(x) != before or not _are_same(_some(x), numbers):
                raise changed_by_validation(f"buffer {name}", "a running mean")


def changed_by_validation(what: str, kind: str) -> GraddotError:
    return GraddotError(
        f"{what} was changed by the forward, in which validation rows ride along"
        f" with the training rows, as {kind} would be. Leave val_data out and"
        " give directions (compute_directions), for training rows then run alone"
    )


def version(x: Tensor) -> int:
    """Which changes in place increase."""
    return 0 if x.is_inference() else x._version


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
    foreign = foreign_uses(output, {id(p): name for name, p in names.items()})
    if foreign:
        uses = ", ".join(f"{name} (by {op})" for name, op in sorted(foreign.items()))
        raise GraddotError(
            f"parameters used outside of the layer that owns them cannot be scored: {uses}."
            " Freeze them, or call their layer's forward instead; where a language model's head and loss"
            " are one function, as with Liger's kernels, call graddot_lm.fuse_head(model); where the model"
            " adds a penalty of its weights to its loss, as AdaLoRA does, pass it no labels and compute"
            " the loss from its logits"
        )


def foreign_uses(output: Any, by_id: Mapping[int, str]) -> dict[str, str]:
    """The parameters, named by id, that reach the output other than through a scored layer, and what
    used them."""
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
    return foreign


class LabelCheck:
    """Compares the labelled tokens counted from the labels with those that got a gradient.

    A wrong `label_shift` rescales scores silently when labels are ragged; the gradient at the
    logits shows which positions the loss really used. Those of labels of whole rows without a
    gradient are a problem in the `first` step only, a hinge loss having none once a margin is reached,
    and where the labels have one that the loss `ignores`.
    """

    def __init__(
        self,
        output: Any,
        labels: Tensor,
        counts: Tensor,
        summed: Callable[[Tensor], Tensor],
        first: bool,
        ignores: bool = False,
    ) -> None:
        """summed adds up what each token has, (rows, T), as counts are."""
        # Of each output, whether its gradient is that of a cross-entropy, and what is wrong with it.
        self._problems: dict[int, tuple[bool, str | None]] = {}
        self.weights: list[RowWeights] = []  # what the backward under way has shown
        self.of_losses: list[EqualWeights] = []  # the same, of losses of rows or tokens
        self._counts, self._summed, self._most = counts, summed, math.inf
        self._first, self._strict = first, first or ignores or labels.dim() > 1
        for x in tensors_in(output):
            if x.requires_grad and x.dim() in (1, 2) and len(x) == len(labels):
                x.register_hook(self._note_losses)
                if x.dim() == 2 and labels.dim() > 1:  # a class of whole rows beside tokens
                    x.register_hook(functools.partial(self._note_classes, x.detach()))
        behind, before = [], []  # (rows, ..., C), and (rows, C, ...) as of images
        for x in tensors_in(output):
            if x.requires_grad and x.dim() == labels.dim() + 1 and not labels.is_floating_point():
                if x.shape[:-1] == labels.shape:
                    behind.append(x)
                elif x.shape[:1] + x.shape[2:] == labels.shape:
                    before.append(x)
        if isinstance(output, Mapping) and any(output.get("logits") is x for x in behind):
            behind = [output["logits"]]
        if not (behind or before):
            behind = self._longer(output, labels)
        classes = -1 if behind else 1
        self._heads = len(behind or before)
        for place, logits in enumerate(behind or before):
            compare = functools.partial(self._compare, place, logits.detach(), classes)
            logits.register_hook(compare)

    @property
    def problem(self) -> str | None:
        """What is wrong with an output whose gradient is a cross-entropy's, or, if there is none, with the
        last that has a gradient: another may be what logits are made of."""
        found = [self._problems[place] for place in sorted(self._problems)]
        judged = [problem for known, problem in found if known] or [p for _, p in found[-1:]]
        return next((problem for problem in judged if problem is not None), None)

    def watch(self, loss: Tensor) -> None:
        """See what rows weigh in a loss of the caller's own whose backward is to come."""
        for node in sums_of_rows(loss):
            node.register_prehook(self._note_sums)

    def _note_sums(self, grads: tuple[Tensor | None, ...]) -> None:
        if grads[0] is not None and grads[0].shape == (len(self._counts),):
            self.weights.append(RowWeights(grads[0]))

    def _note_losses(self, grad: Tensor | None) -> None:  # None where DDP has none
        if grad is not None and (found := EqualWeights.of(grad)) is not None:
            self.of_losses.append(found)

    def _note_classes(self, logits: Tensor, grad: Tensor | None) -> None:
        if grad is not None:
            used = (grad != 0).any(1, keepdim=True)
            self.weights.append(TokenWeights(logits[:, None], grad[:, None], used))

    def _longer(self, output: Any, labels: Tensor) -> list[Tensor]:
        """The logits of a model that puts tokens of its own before those that labels have."""
        logits = output.get("logits") if isinstance(output, Mapping) else None
        if not isinstance(logits, Tensor) or labels.dim() != 2 or labels.is_floating_point():
            return []
        if not (logits.requires_grad and logits.dim() == 3 and len(logits) == len(self._counts)):
            return []
        if logits.shape[1] <= labels.shape[1]:
            return []
        self._summed, self._most = lambda by_token: by_token.sum(1), labels.shape[1]
        return [logits]

    def _compare(self, place: int, logits: Tensor, classes: int, grad: Tensor) -> None:
        last = [x.movedim(classes, -1) for x in (logits, grad)]
        logits, grad = (x.reshape(x.shape[0], -1, x.shape[-1]) for x in last)
        if not self._first and grad.isnan().any():  # it may be of 0 times NaN
            return
        idle = (grad == 0).all(-1)
        used = self._summed(~idle)
        if (used > self._most).any():  # frames of speech, of which labels are no tokens
            return
        weights = TokenWeights(logits, grad, ~idle)
        self.weights.append(weights)
        missing = self._counts.to(used.device) - used
        if (missing > 0).any():
            gone = self._summed(idle & _rounds_to_zero(logits, grad))
            missing = torch.where(missing > 0, (missing - gone).clamp(min=0), missing)
        wrong = (missing != 0 if self._strict else missing < 0).nonzero().flatten().tolist()
        problem = None
        if wrong:
            row = wrong[0]
            problem = (
                f"row {row} of the batch has {int(self._counts[row])} labelled tokens by its"
                f" labels, but the loss used {int(used[row])}. Pass label_shift=1 if the loss"
                " shifts the labels itself, and 0 if it does not; if it ignores another value than"
                " -100, pass ignore_index"
                + (
                    "; several heads' losses have to be of the same tokens"
                    if self._heads > 1
                    else ""
                )
            )
        self._problems[place] = weights.known, problem


def _rounds_to_zero(logits: Tensor, grad: Tensor) -> Tensor:
    """Where the gradient of a cross-entropy at logits (..., C) is too small for grad's dtype: at
    tokens that are predicted with all but certainty."""
    wide = logits.double()
    most = wide.argmax(-1, keepdim=True)
    doubt = wide.scatter(-1, most, -torch.inf).logsumexp(-1) - wide.logsumexp(-1)  # logarithm
    size = grad.abs().amax(-1).double().log()
    weight = torch.where(
        size > -torch.inf, size - doubt, torch.inf
    ).amin()  # of a token in the loss
    return doubt + weight < math.log(torch.finfo(grad.dtype).smallest_normal)
