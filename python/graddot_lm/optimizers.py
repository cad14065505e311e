"""The optimizers of a model that an engine is attached to, which are only read: what they update, at
which rates, and whether they took the step."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .checks.verify import version
from .errors import GraddotError
from .scores import MicroBatch, Number


class Optimizers:
    """given are one, several, or None; scored are the scored parameters by name.

    Raises GraddotError unless they update all that is scored, and nothing outside the model.
    """

    def __init__(self, model: nn.Module, scored: Mapping[str, nn.Parameter], given: Any) -> None:
        listed = list(given) if isinstance(given, (list, tuple)) else [given]
        self.given = [_inner_optimizer(one) for one in listed if one is not None]
        self._model, self._scored = model, scored
        self._other: str | None = None  # one that was not given, but took the step
        self._hook: Any = None
        self._check()

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return [group for one in self.given for group in one.param_groups]

    def _check(self) -> None:
        updated = [id(p) for group in self._groups for p in group["params"]]
        others = [name for name, p in self._scored.items() if id(p) not in updated]
        if self.given and others:
            raise GraddotError(
                f"the optimizer does not update {', '.join(others[:5])}{' …' if others[5:] else ''}"
                f" ({len(others)} of {len(self._scored)} scored parameters), so that values"
                " would leave them out; give attach() a list if there are several, exclude= what is not"
                " to count, or call attach() without one and make values of parameter_dots()"
            )
        if len(set(updated)) < len(updated):
            raise GraddotError(
                "a parameter is updated by several optimizers, so its lr is not known"
            )
        if foreign := len(set(updated) - {id(p) for p in self._model.parameters()}):
            raise GraddotError(
                f"the optimizer updates {foreign} parameters that are not in the engine's model, so"
                " neither scored nor kept free of validation rows; make them (a head, a criterion)"
                " part of the model's forward, or update them by an optimizer of their own and give"
                " directions instead of val_data"
            )
        self._sizes = self._group_sizes()

    def check_beside_validation(self) -> None:
        """Raise GraddotError if one goes by more than the gradients, which alone are of training rows."""
        if any(isinstance(one, torch.optim.LBFGS) for one in self.given):
            raise GraddotError(
                "LBFGS goes by the loss, too, which is that of training and validation rows together;"
                " leave val_data out and give directions (compute_directions), for training rows then run"
                " alone"
            )

    def _group_sizes(self) -> list[int]:
        return [len(group["params"]) for group in self._groups]

    def check_again(self) -> None:
        """The same as when they were given, if they have other parameters since."""
        if self._group_sizes() != self._sizes:
            self._check()

    def leaf_names(self, per_parameter: bool) -> dict[str, str]:
        """The leaf of every scored parameter: its own, or that of its group."""
        if per_parameter:
            return {name: name for name in self._scored}
        group_of = {id(p): str(i) for i, group in enumerate(self._groups) for p in group["params"]}
        return {name: group_of.get(id(p), "none") for name, p in self._scored.items()}

    # The step

    def watch(self, after_step: Callable[[torch.optim.Optimizer], None]) -> None:
        """Have this method called after every optimizer's step, for one that was not given may take it.
        It does not keep its object alive."""
        method = weakref.WeakMethod(after_step)

        def stepped(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            if (alive := method()) is not None:
                alive(optimizer)

        if self.given:
            self._hook = register_optimizer_step_post_hook(stepped)

    def unwatch(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._other = None

    def none_took_it(self) -> list[bool | Tensor]:
        """What a micro-batch has `applied` before the step; one that cannot say is taken to step."""
        return [not isinstance(one, torch.optim.Optimizer) for one in self.given]

    def versions(self) -> list[int]:
        """Which changes of the scored weights increase."""
        return [version(p) for p in self._scored.values()]

    def check_one_step(self, micros: Sequence[MicroBatch]) -> None:
        """Raise GraddotError if these and a micro-batch that begins now are not of one step."""
        if any(map(self._took_any, micros)):
            raise GraddotError(
                "the optimizer took a step with the batches before, whose values would be counted as"
                " of one step with this one's; call aggregate_and_log() after every optimizer.step()"
            )
        if micros and self.given and micros[0].versions != self.versions():
            raise GraddotError(
                "the weights have changed since the batch before, whose values would be counted as of one"
                " step with this one's. Where a step runs the model at several weights, as SAM's and LBFGS's"
                " do, call attach_train_batch only before the run whose gradient it takes; else call"
                " aggregate_and_log() after every step"
            )

    def _took_any(self, micro: MicroBatch) -> bool:
        """Whether one of them, that can say so, may have taken the micro-batch's step."""
        return any(
            taken is not before
            for taken, before in zip(micro.applied, self.none_took_it(), strict=True)
        )

    def note_step(self, optimizer: torch.optim.Optimizer, micros: Sequence[MicroBatch]) -> bool:
        """This one took the step of these micro-batches. Whether it was given."""
        k = next((k for k, one in enumerate(self.given) if one is optimizer), None)
        if k is None:
            scored = {id(p) for p in self._scored.values()}
            if micros and any(id(p) in scored for g in optimizer.param_groups for p in g["params"]):
                self._other = type(optimizer).__name__
            return False
        found_inf = getattr(optimizer, "found_inf", None)  # a GradScaler's, for fused optimizers
        for micro in micros:
            self.note_rates(micro, k)
            micro.applied[k] = True if found_inf is None else found_inf == 0
        return True

    def require_given(self, micros: Sequence[MicroBatch]) -> None:
        """Raise GraddotError if none of them took the step because another did."""
        if self._other is not None and any(x is False for micro in micros for x in micro.applied):
            raise GraddotError(
                f"the step was taken by an optimizer, {self._other}, that attach() was not given, so that"
                " values would be 0; detach() and attach(optimizer) after another one is made, or to the one"
                " inside of a wrapper"
            )

    def forget_step(self) -> None:
        self._other = None

    def note_rates(self, micro: MicroBatch, took_step: int | None = None) -> None:
        """The learning rates: those of one that took the step, for a loop may set them right before it,
        and what was not noted yet of the others. Of parameters that go up the gradient (`maximize`)
        they are negative."""
        if not self.given or (took_step is None and micro.leaf_lrs):
            return
        groups = [
            (k, group["params"], _rate(group["lr"]), -1 if group.get("maximize") else 1)
            for k, one in enumerate(self.given)
            for group in one.param_groups
        ]
        by_id = {id(p): (k, sign * rate) for k, owned, rate, sign in groups for p in owned}
        by_leaf = {
            leaf: by_id.get(id(self._scored[name]), (0, 0.0))
            for name, leaf in micro.leaf_of.items()
        }
        if took_step == 0 or not micro.leaf_lrs:
            micro.lr = groups[0][2]
        micro.optimizer_of = {leaf: k for leaf, (k, _) in by_leaf.items()}
        for leaf, (k, rate) in by_leaf.items():
            if k == took_step or leaf not in micro.leaf_lrs:
                micro.leaf_lrs[leaf] = rate


def _rate(lr: Number) -> Number:
    """As it is now: a scheduler changes a tensor in place."""
    return lr.detach().to(torch.float64, copy=True) if isinstance(lr, Tensor) else float(lr)


def _inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Without accelerate's wrapper. Raises GraddotError for what is none."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    if not hasattr(optimizer, "param_groups"):
        raise GraddotError(
            f"attach got a {type(optimizer).__name__}; expected an optimizer, or a list of them, whose"
            " learning rates the values are made of, or none, and then there are no values"
        )
    return optimizer  # type: ignore[no-any-return]
