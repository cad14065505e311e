"""Samples that lie one after the other in one row, as padding-free and packed batches have them.

The layers score every token of the row by itself, and a sample's part is the sum over its tokens: so
no layer has to know where samples end. That is the sample's score, as if it had a row of its own, if
no sample's tokens reach another's, which is checked here.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .batches import LENGTHS
from .checks.digests import OUTPUTS, ROUGH, Digest, NoDropout, close, digests, must_run, own_random
from .checks.parts import splits_of
from .errors import GraddotError


def segment_lengths(position_ids: Tensor) -> list[int]:
    """The lengths of the samples of a row (1, T) or (T,): one begins wherever the position is not
    that of the token before and one, as in the attention masks of transformers."""
    if position_ids.numel() != max(position_ids.shape, default=0) or not position_ids.numel():
        raise GraddotError(
            f"position_ids have shape {tuple(position_ids.shape)}; expected one row, (1, T) or (T,):"
            " several rows are one after reshape(1, -1)"
        )
    steps = position_ids.detach().flatten().cpu().diff()
    begins = [0, *(1 + (steps != 1).nonzero().flatten()).tolist(), position_ids.numel()]
    return [end - begin for begin, end in itertools.pairwise(begins)]


def flattened_lengths(items: Sequence[Any], batch: Mapping[str, Any]) -> list[int] | None:
    """How many tokens each item of a dataset has in the one row that a collator made of them: None
    if it is not their input_ids, one after the other, or has no position_ids."""
    row = batch.get("input_ids")
    if not isinstance(row, Tensor) or row.dim() != 2 or len(row) != 1:
        return None
    have_ids = all(isinstance(item, Mapping) and "input_ids" in item for item in items)
    if not have_ids or "position_ids" not in batch:
        return None
    parts = [torch.as_tensor(item["input_ids"], dtype=torch.long).flatten() for item in items]
    joined = torch.cat(parts)
    same = len(joined) <= row.shape[1] and torch.equal(joined.to(row), row[0, : len(joined)])
    return [len(part) for part in parts] if same else None


@dataclass(frozen=True)
class Segments:
    """The lengths of the samples in a row of `tokens` tokens; what is left at its end is padding."""

    lengths: Sequence[int]
    tokens: int

    def __post_init__(self) -> None:
        wrong = [i for i, n in enumerate(self.lengths) if not isinstance(n, int) or n < 1]
        if wrong:
            raise GraddotError(
                f"segments are the lengths of samples, and that of sample {wrong[0]} is"
                f" {self.lengths[wrong[0]]!r}; expected whole numbers of at least 1"
            )
        if not self.lengths or sum(self.lengths) > self.tokens:
            raise GraddotError(
                f"segments are {len(self.lengths)} lengths with the sum {sum(self.lengths)}; expected at"
                f" least one, and no more tokens than the row's {self.tokens}"
            )

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def begins(self) -> list[int]:
        """The first token of every sample."""
        return list(itertools.accumulate(self.lengths[:-1], initial=0))

    @functools.cached_property
    def _sample_of(self) -> Tensor:
        """By token, (T,); N for the padding."""
        padding = self.tokens - sum(self.lengths)
        return torch.arange(len(self) + 1, device="cpu").repeat_interleave(
            torch.tensor([*self.lengths, padding], device="cpu")
        )

    def sum(self, by_token: Tensor) -> Tensor:
        """(..., T) summed over the tokens of each sample, (..., N)."""
        sums = by_token.new_zeros(*by_token.shape[:-1], len(self) + 1)
        return sums.index_add(-1, self._sample_of.to(by_token.device), by_token)[..., :-1]

    def count(self, labels: Tensor, shift: int, ignore_index: int) -> Tensor:
        """Labelled tokens of every sample, (N,), of labels (1, T). Raises GraddotError where a loss
        that shifts them would take a sample's first token for the target of the one before, and for
        labels of no sample. On a GPU this waits for the labels."""
        used, firsts = labels[0] != ignore_index, torch.tensor(self.begins, device=labels.device)
        padding = torch.arange(sum(self.lengths), self.tokens, device=labels.device)
        others = torch.cat([firsts[1:], padding]) if shift else padding
        if bool(used[others].any()):
            token = int(others[used[others]][0])
            where, why = "which is of no sample", "which would be in the loss"
            if token in self.begins:
                where = f"with which sample {self.begins.index(token)} begins"
                why = "which the loss shifts to the last token of the sample before"
            raise GraddotError(
                f"token {token} of the packed row, {where}, has the label {int(labels[0, token])}, {why};"
                f" make it {ignore_index}, as DataCollatorWithFlattening does"
            )
        if shift:
            used = used.index_fill(0, firsts, False)
        return self.sum(used.long())

    def token_index(self, which: Sequence[int]) -> list[int]:
        """The tokens of some of the samples."""
        begins = self.begins
        return [t for i in which for t in range(begins[i], begins[i] + self.lengths[i])]

    def take(self, arguments: Any, which: Sequence[int]) -> Any:
        """A model's (args, kwargs) for some of the samples alone, one after the other."""
        index = self.token_index(which)

        def one(x: Tensor) -> Tensor:
            for dim in self._token_dims(x):
                x = x.index_select(dim, torch.tensor(index, device=x.device))
            return x

        args, kwargs = tree_map_only(Tensor, one, arguments)
        lengths = [self.lengths[i] for i in which]
        ends = list(itertools.accumulate(lengths, initial=0))
        for name in kwargs.keys() & LENGTHS:
            own = kwargs[name]
            is_longest = name.startswith("max")
            kwargs[name] = max(lengths) if is_longest else torch.tensor(ends, device="cpu").to(own)
            if is_longest and isinstance(own, Tensor):
                kwargs[name] = torch.tensor(max(lengths), device="cpu").to(own)
        return args, kwargs

    def _token_dims(self, x: Tensor) -> list[int]:
        if x.shape[:2] == (1, self.tokens):
            return [1]
        if x.dim() == 4 and x.shape[2:] == (self.tokens, self.tokens):  # a mask
            return [2, 3]
        if x.dim() and x.shape[-1] == self.tokens and not x.is_floating_point():
            return [x.dim() - 1]  # positions, (T,) or (3, 1, T)
        return []

    def others_changed(self, arguments: Any, which: Sequence[int]) -> Any:
        """(args, kwargs) in which all samples but these have other tokens, taken from the row."""
        args, kwargs = arguments
        names = [name for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None]
        kept = torch.zeros(self.tokens, dtype=torch.bool, device="cpu")
        kept[self.token_index(which)] = True

        def changed(x: Any) -> Any:
            if not isinstance(x, Tensor) or x.shape[:2] != (1, self.tokens):
                return x
            here = kept.to(x.device).view(1, -1, *[1] * (x.dim() - 2))
            return torch.where(here, x, x.flip(1))

        if names:
            return args, {**kwargs, names[0]: changed(kwargs[names[0]])}
        if args:
            return (changed(args[0]), *args[1:]), kwargs
        first = next((name for name, x in kwargs.items() if isinstance(x, Tensor)), None)
        return args, {name: changed(x) if name == first else x for name, x in kwargs.items()}


def check_apart(
    model: nn.Module, layers: Mapping[str, nn.Module], args: Any, kwargs: Any, segments: Segments
) -> None:
    """Raise GraddotError unless every layer's input, and what the model returns, has for each sample
    of the row what it has where the sample is a row of its own.

    Each is run alone. What then differs by no more than rounding may still be of other samples: so
    the row is also run with the tokens of some of them changed, in so many ways that any two are
    apart in one, and nothing at all may change at the others'.
    """
    with torch.no_grad(), own_random(), NoDropout():
        whole = digests(model, layers, args, kwargs)
        dims = [_token_dim(x, segments.tokens) for x in whole[OUTPUTS]]
        with_tokens = [dim in (0, 1) for dim in dims]  # of attention's weights two are

        def run(changed: Any) -> dict[str, list[Digest]]:
            found = digests(model, layers, *changed)
            found[OUTPUTS] = list(itertools.compress(found[OUTPUTS], with_tokens))
            return found

        whole[OUTPUTS] = list(itertools.compress(whole[OUTPUTS], with_tokens))
        alone = []
        for i in range(len(segments)):
            fails = (
                f"runs on the packed row of {len(segments)} samples, but not on sample {i} alone"
            )
            with must_run(fails, "keep samples apart"):
                alone.append(run(segments.take((args, kwargs), [i])))
        for name, calls in whole.items():
            if not _same_alone(calls, [own.get(name, []) for own in alone], segments):
                raise GraddotError(_mixed(name, calls, "samples run alone give something else"))
        for split in splits_of(len(segments)):
            for kept in split:
                moved = run(segments.others_changed((args, kwargs), kept))
                for name, calls in whole.items():
                    if not _unmoved(calls, moved.get(name, []), kept, segments):
                        raise GraddotError(
                            _mixed(name, calls, "it changes with the tokens of other samples")
                        )


def _mixed(name: str, calls: list[Digest], why: str) -> str:
    what = "the model has an output" if name == OUTPUTS else f"layer {name} gets an input"
    shapes = ", ".join(str(tuple(x.shape)) for x in calls)
    return (
        f"{what} (of shape {shapes}) that does not hold the samples of the packed row apart, one after"
        f" the other: {why}. Transformers' attention heeds position_ids that begin anew only without an"
        " attention_mask and with use_cache=False; convolutions and states may run on through the"
        " row: then give every sample a row of its own"
    )


def _token_dim(x: Digest, tokens: int) -> int | None:
    """Which dimension of a digest's values is that of the row's tokens: (1, T, ...), (T, ...), or by
    heads (1, heads, T, ...)."""
    shape = x.values.shape
    for at in (1, 2):
        if shape[:1] == (1,) and shape[at : at + 1] == (tokens,):
            return at
    return 0 if shape[:1] == (tokens,) and x.shape[:1] == (tokens,) else None


def _same_alone(whole: list[Digest], alone: list[list[Digest]], segments: Segments) -> bool:
    if any(len(own) != len(whole) for own in alone):
        return False
    for k, x in enumerate(whole):
        at = _token_dim(x, segments.tokens)
        parts = [own[k].values for own in alone]
        lengths = [part.shape[at] if at is not None and part.dim() > at else 0 for part in parts]
        if at is None or lengths != list(segments.lengths):
            return False
        joined, ours = torch.cat(parts, at), x.values.narrow(at, 0, sum(lengths))
        if joined.shape != ours.shape or not close(ours, joined, x.tolerance):
            return False
    return True


def _unmoved(whole: list[Digest], moved: list[Digest], kept: list[int], segments: Segments) -> bool:
    """Whether nothing changed at the tokens of the samples that were kept, token by token: a
    convolution reaches the first ones of a long sample only."""
    index = torch.tensor(segments.token_index(kept), device="cpu")
    for x, y in itertools.zip_longest(whole, moved):
        if x is None or y is None or x.shape != y.shape:
            return False
        at = _token_dim(x, segments.tokens)
        assert at is not None
        a, b = (d.values.index_select(at, index.to(d.values.device)) for d in (x, y))
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return False
            continue
        # The same shapes on the same device: but for tokens sorted otherwise nothing is rounded anew.
        tolerance = (
            5e-2 if x.tolerance > ROUGH else 1e-5 if x.values.dtype == torch.float32 else 1e-8
        )
        if not (a - b).abs().max() <= tolerance * a.norm() / a.numel() ** 0.5:
            return False
    return True
