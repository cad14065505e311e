"""Which trainable parameters of a model can be scored."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from .errors import GraddotError
from .rules.table import refusal


@dataclass(frozen=True)
class Coverage:
    """Which trainable parameters the scores cover, and their share of all trainable elements."""

    covered: list[str]
    excluded: list[str]
    share: float

    def __str__(self) -> str:
        text = f"{len(self.covered)} parameters scored, {self.share:.1%} of the trainable elements"
        return text + (f"; excluded: {', '.join(self.excluded)}" if self.excluded else "")


def cover(model: nn.Module, exclude: Sequence[str]) -> tuple[dict[str, nn.Parameter], Coverage]:
    """The trainable parameters by name, all in layers with a rule; GraddotError otherwise."""
    if isinstance(exclude, str):
        raise GraddotError(f"exclude is {exclude!r}; expected a list of names")
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise GraddotError("the model has no trainable parameter")
    lazy = [n for n, p in trainable.items() if nn.parameter.is_lazy(p)]
    if lazy:
        raise GraddotError(
            f"{', '.join(lazy[:5])}: not there before the model has run; run it once on a batch before"
            " the engine is made"
        )
    unknown = set(exclude) - set(trainable)
    if unknown:
        raise GraddotError(f"exclude names no trainable parameter: {', '.join(sorted(unknown))}")
    names = {id(p): name for name, p in trainable.items()}
    total = sum(p.numel() for p in trainable.values())
    problems: dict[str, str] = {}
    for module in model.modules():
        reason = refusal(module)
        for p in module.parameters(recurse=False):
            if reason is not None and id(p) in names:
                problems[names[id(p)]] = reason
    if problems:
        share = sum(trainable[name].numel() for name in problems) / total
        listed = "\n".join(f"  {name}: {reason}" for name, reason in problems.items())
        raise GraddotError(
            f"{len(problems)} trainable parameters ({share:.1%} of the elements) cannot be scored;"
            f" freeze them or use a layer with a rule:\n{listed}"
        )
    covered = [name for name in trainable if name not in exclude]
    share = sum(trainable[name].numel() for name in covered) / total
    return trainable, Coverage(covered, sorted(exclude), share)
