"""Batches as loops have them: a tensor or a mapping of tensors, labels beside it or inside.

Validation rows ride behind the training rows in one forward, so batches are joined key by key.
"""

import inspect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import GraddotError

Inputs = Tensor | Mapping[str, Tensor]
# (inputs, labels), or a Hugging Face batch with "labels" among its tensors.
Batch = tuple[Inputs, Tensor] | Mapping[str, Tensor]

_ONE_TENSOR = "inputs"  # the key of inputs that are a tensor
_PROMPTS = {"PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING"}  # of peft
# Of the samples of a packed row, for FlashAttention: no tensors with rows first.
LENGTHS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}


@dataclass(frozen=True)
class Rows:
    """A batch in one form: inputs by key, labels apart, both with the rows first."""

    inputs: dict[str, Tensor]
    labels: Tensor
    is_tensor: bool = False
    labels_inside: bool = False
    lengths: Mapping[str, Any] = field(default_factory=dict)  # those of `LENGTHS`

    def __len__(self) -> int:
        return self.labels.shape[0]

    def beside(self, first: "Rows") -> "Rows":
        """The same rows, each tensor on the device of that of `first`."""
        inputs = {
            key: value.to(first.inputs[key].device) if key in first.inputs else value
            for key, value in self.inputs.items()
        }
        labels = self.labels.to(first.labels.device)
        return replace(self, inputs=inputs, labels=labels)

    def as_given(self) -> tuple[Any, Tensor]:
        """(inputs, labels) in the form in which the batch came."""
        if self.is_tensor:
            return self.inputs[_ONE_TENSOR], self.labels
        return {
            **self.inputs,
            **self.lengths,
            **({"labels": self.labels} if self.labels_inside else {}),
        }, self.labels


def is_batch(data: Any) -> bool:
    """Whether this is one batch rather than a mapping of target names to batches."""
    return not isinstance(data, Mapping) or isinstance(data.get("labels"), Tensor)


def read_batch(batch: Batch, what: str) -> Rows:
    """`read_rows` of a batch: a tuple (inputs, labels), or a mapping with "labels"."""
    if isinstance(batch, Mapping):
        return read_rows(batch, None, what)
    if not isinstance(batch, Sequence) or len(batch) != 2:
        raise GraddotError(
            f"{what} is a {type(batch).__name__}; expected (inputs, labels), or a mapping of"
            ' tensors with "labels"'
        )
    return read_rows(*batch, what)


def read_rows(inputs: Inputs, labels: Tensor | None, what: str) -> Rows:
    """Inputs and labels, or inputs with "labels" inside and None. Raises GraddotError."""
    is_tensor, inside = isinstance(inputs, Tensor), False
    if not is_tensor and not isinstance(inputs, Mapping):
        raise GraddotError(
            f"{what} has inputs of type {type(inputs).__name__}; expected a tensor, which torch.as_tensor"
            " makes of an array, or a mapping of tensors"
        )
    by_key = {_ONE_TENSOR: inputs} if isinstance(inputs, Tensor) else dict(inputs)
    lengths = {key: by_key.pop(key) for key in LENGTHS & by_key.keys()}
    if not is_tensor and "labels" in by_key:
        own = by_key.pop("labels")
        inside, labels = True, own if labels is None else labels
    if labels is None:
        raise GraddotError(
            f'{what} has no labels; expected them beside the inputs, or under "labels" in a mapping'
        )
    for key, value in {**by_key, "labels": labels}.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            is_array = hasattr(value, "__len__") and not isinstance(value, str)
            got = f"a {type(value).__name__}" if is_array else repr(value)
            raise GraddotError(f"{what} has {key} = {got}; expected a tensor with rows first")
    sizes = {key: value.shape[0] for key, value in by_key.items()}
    rows = labels.shape[0]
    if rows == 0 or not by_key or set(sizes.values()) != {rows}:
        listed = ", ".join(str(n) if is_tensor else f"{n} {key}" for key, n in sizes.items())
        raise GraddotError(
            f"{what} has {listed or 'no'}{' inputs' if is_tensor or not sizes else ''} and {rows}"
            " labels; expected the same number of rows, at least one"
        )
    return Rows(by_key, labels, is_tensor, inside, lengths)


def unlabelled(inputs: Inputs) -> Tensor:
    """Labels for rows that need none, in the shape of the first of the inputs, of which nothing is read."""
    tensors = [inputs] if isinstance(inputs, Tensor) else [*inputs.values()]
    first = next((x for x in tensors if isinstance(x, Tensor)), torch.zeros(0))
    return torch.zeros((), device=first.device).expand(first.shape)


def join(parts: Sequence[Rows], padding: Mapping[str, float], ignore_index: int) -> Rows:
    """The rows of all parts, key by key, in the form of the first, on its device.

    Rows of a key in `padding` are filled up on the right, dimension 1, to the longest of them;
    labels then with ignore_index. Raises GraddotError if parts differ in their keys or shapes.
    """
    first = parts[0]
    if first.lengths and len(parts) > 1:
        raise GraddotError(
            f"the training batch has {', '.join(sorted(first.lengths))}, of one packed row, behind which"
            " no validation rows can ride; leave val_data out and give directions"
        )
    for part in parts[1:]:
        if part.is_tensor != first.is_tensor or part.inputs.keys() != first.inputs.keys():
            raise GraddotError(
                f"training rows are {_form(first)}, validation rows {_form(part)}; rows that ride"
                " along in one forward must agree"
            )
    if padding and "input_ids" in first.inputs and "attention_mask" not in first.inputs:
        _check_mask_not_needed(parts)
    inputs = {
        key: _join_key(key, [part.inputs[key] for part in parts], padding.get(key))
        for key in first.inputs
    }
    fill = ignore_index if padding and not first.labels.is_floating_point() else None
    labels = _join_key("labels", [part.labels for part in parts], fill)
    return Rows(inputs, labels, first.is_tensor, first.labels_inside, first.lengths)


def _form(rows: Rows) -> str:
    return "a tensor" if rows.is_tensor else f"a mapping of {', '.join(sorted(rows.inputs))}"


def _check_mask_not_needed(parts: Sequence[Rows]) -> None:
    if len({part.inputs["input_ids"].shape[1:] for part in parts}) > 1:
        raise GraddotError(
            "rows of different length need an attention_mask, or the model would attend to the"
            ' padding; add "attention_mask" to the batches'
        )


def filled_rows(parts: Sequence[Rows]) -> list[tuple[list[int], int, int]]:
    """Of each part that `join` fills up: its rows in the joint batch, their own length and the
    longest part's."""
    lengths = [
        max((x.shape[1] for x in p.inputs.values() if x.dim() > 1), default=0) for p in parts
    ]
    ends = list(itertools.accumulate(map(len, parts), initial=0))
    return [
        (list(range(begin, end)), own, max(lengths))
        for begin, end, own in zip(ends, ends[1:], lengths, strict=False)
        if own < max(lengths)
    ]


def _join_key(key: str, parts: list[Tensor], fill: float | None) -> Tensor:
    shapes = [tuple(part.shape[1:]) for part in parts]
    if len(set(shapes)) > 1:
        if fill is None or any(len(s) == 0 for s in shapes) or len({s[1:] for s in shapes}) > 1:
            of_key = "" if key == _ONE_TENSOR else f" of {key}"
            given = f"{{{key!r}: value, ...}} for every key that differs"
            if key == "labels":  # which need none of their own
                given = f"{{key: value}} for every key of the inputs, {_ONE_TENSOR!r} for a tensor"
            raise GraddotError(
                f"training rows{of_key} have shape {shapes[0]}, validation rows {shapes[1:]}; rows"
                " that ride along in one forward must agree. To fill shorter ones up, give the"
                f" engine padding={given}"
            )
        longest = max(part.shape[1] for part in parts)
        parts = [
            F.pad(part, (0, 0) * (part.dim() - 2) + (0, longest - part.shape[1]), value=fill)
            for part in parts
        ]
    return torch.cat([part.to(parts[0].device) for part in parts])


@dataclass(frozen=True)
class LossForm:
    """How a loss is made of its labelled tokens, as the user says; see `GradDotProdEngine`."""

    reduction: Literal["mean", "sum"]
    label_shift: Literal["auto", 0, 1]
    ignore_index: int

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "sum"):
            raise GraddotError(f"loss_reduction is {self.reduction!r}; expected 'mean' or 'sum'")
        if self.label_shift not in ("auto", 0, 1):
            raise GraddotError(f"label_shift is {self.label_shift!r}; expected 'auto', 0 or 1")

    def count(self, labels: Tensor, shift: int | None = None) -> Tensor:
        """Labelled tokens of each row, (rows,); without a known shift "auto" means none."""
        if shift is None:
            shift = 1 if self.label_shift == 1 else 0
        return count_labels(labels, shift, self.ignore_index)

    def shift_by(self, model: nn.Module) -> int:
        """By how many tokens the model shifts labels that it is passed."""
        return label_shift_of(model) if self.label_shift == "auto" else self.label_shift

    def tells_shift(self, labels: Tensor) -> bool:
        """Whether more of these are counted if the loss does not shift them."""
        return labels.dim() > 1 and bool((self.count(labels, 0) != self.count(labels, 1)).any())


def label_shift_of(model: nn.Module) -> int:
    """By how many tokens a transformers model shifts the `labels` it is passed, 0 or 1."""
    if _has_virtual_tokens(model):  # the last of which predicts the first label
        return 0
    fused = getattr(model.__dict__.get("forward"), "label_shift", None)
    shifts = has_causal_lm_loss(model) or "shift_labels" in _own_loss(model)
    return int(shifts) if fused is None else fused


def _has_virtual_tokens(model: nn.Module) -> bool:
    """Whether peft puts trained tokens before those of a batch, as in prompt tuning; those of a prefix
    are in the cache of the layers' attention."""
    config = getattr(model, "active_peft_config", None)
    kind = str(getattr(getattr(config, "peft_type", None), "value", ""))
    return bool(getattr(config, "is_prompt_learning", False)) and kind in _PROMPTS


def has_causal_lm_loss(model: nn.Module) -> bool:
    """Whether a model's loss is transformers' ForCausalLMLoss, which shifts the labels and divides
    by num_items_in_batch. Encoder-decoders, decoders like Bart's and models for multiple choice go
    by its name, but have a loss of their own."""
    name = getattr(getattr(model, "loss_function", None), "__name__", "")
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return name == "ForCausalLMLoss" and not encoder_decoder and not _own_loss(model)


def _own_loss(model: nn.Module) -> tuple[str, ...]:
    """The variables of a forward that makes a cross-entropy by itself; none of any other."""
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    return code.co_varnames if code and "CrossEntropyLoss" in code.co_names else ()


def count_labels(labels: Tensor, shift: int, ignore_index: int) -> Tensor:
    """Labelled tokens of each row, (rows,). Labels of a regression all count; of one label a row none is
    shifted."""
    if labels.is_floating_point():
        return torch.full((labels.shape[0],), labels[0].numel(), device=labels.device)
    if shift and labels.dim() > 1:
        labels = labels[:, shift:]
    return (labels != ignore_index).reshape(labels.shape[0], -1).sum(1)
