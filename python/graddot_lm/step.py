"""One micro-batch, as the layers see it: which rows run through them, and the dots that they leave.

What a step does for every layer is paid for in time of the host as much as of the device: a GPU
runs through a small layer faster than it can be told to. So dots are not added one by one, and those
of biases and norms, which are small, are made for many parameters at once.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import NoReturn

import torch
from torch import Tensor

from .autocast import no_autocast
from .errors import GraddotError
from .gathering import Gathering
from .shared_uses import SharedUses, vector_form

_DOTS_TOGETHER = 32  # dots of as many uses are added up at once
_ROWS_TOGETHER = 2**20  # elements of row gradients that wait to be dotted together


def refuse_backward(*_: object) -> NoReturn:
    """What comes to scored layers inside of the model's forward is not the gradient of its loss."""
    raise GraddotError(
        "a backward ran inside of the model's forward, as by torch.autograd.grad, and reached layers that"
        " are scored, which would take it for the step's; a model that differentiates its own layers"
        " cannot be scored"
    )


@dataclass
class Step:
    """One micro-batch: what the layers need to know about the rows that run through them.

    scale is M / n_train (0-dim): it turns the training rows' part of the joint loss's gradient
    into the gradient of the training loss. names has the layers' parameters by id(parameter), and
    leaf_of what their dots are collected for; a parameter without a leaf is trained but not scored.
    With given directions, (K, *shape) by id(parameter), there are no val_rows; with `tokens`, T,
    every token of a row is then scored as a sample of its own, and dots are (K, N·T); `packed` says
    that tokens are scored as parts of several samples in a row. With `norms`
    dots have one more row, ‖G_i‖², and with val_rows one more column, ‖D_k‖². layouts says by layer
    name how its input holds the rows, as `rows.find_layouts` saw it; first is True in the step that
    saw it; expands has the layers that return for all rows at once, in copies for each. A trial has
    no backward, and `moved` in it says in which rows what these layers return is moved a little, to
    see whom it reaches. buffers gives the model's, which are no rows, and counts has the rows' labelled
    tokens, if known. Of sharded weights a layer's backward may only use its own.
    """

    rows: int
    val_rows: list[int]
    scale: Tensor
    names: dict[int, str] = field(default_factory=dict)
    leaf_of: dict[int, str] = field(default_factory=dict)
    directions: dict[int, Tensor] = field(default_factory=dict)
    tokens: int | None = None
    packed: bool = False
    sharded: bool = False
    layouts: dict[str, str | int] = field(default_factory=dict)
    first: bool = False
    norms: bool = False
    trial: bool = False
    buffers: Callable[[], Iterable[Tensor]] = tuple
    moved: tuple[slice, Collection[str]] | None = None
    expands: set[str] = field(default_factory=set)
    counts: Tensor | None = None
    running: bool = False  # inside the model's forward
    in_backward: bool = False  # of which there were dots, and which is not through
    shared: dict[int, SharedUses] = field(default_factory=dict)
    _dots: dict[str, list[Tensor]] = field(default_factory=dict)
    _rows: dict[str, list[Tensor]] = field(default_factory=dict)
    _held: int = 0  # elements of _rows
    _scales: Tensor | None = None
    _buffers: dict[int, Tensor] | None = None  # which keeps them, so that no id is another's
    _gathering: Gathering = field(default_factory=Gathering, init=False)

    def is_buffer(self, x: Tensor) -> bool:
        """Whether a tensor was one of the model's buffers when this step first asked."""
        if self._buffers is None or self.trial:  # whose runs have copies, each its own
            self._buffers = {id(buffer): buffer for buffer in self.buffers()}
        return id(x) in self._buffers

    @property
    def train_rows(self) -> int:
        return self.rows - sum(self.val_rows)

    def scales(self, rows: int, dtype: torch.dtype) -> Tensor:
        """scale once a training row, (rows,): with it their scaled sum is one operation."""
        found = self._scales
        if found is None or found.shape[0] != rows or found.dtype != dtype:
            found = self._scales = self.scale.to(dtype).repeat(rows)
        return found

    def collect(self, leaf: str | None, dots: Tensor) -> None:
        """Dots of one use of a parameter."""
        self._note_backward()
        if leaf is not None:
            self.add(leaf, dots)

    def add(self, leaf: str, dots: Tensor) -> None:
        """Dots of a leaf, whose backward is through."""
        found = self._dots.setdefault(leaf, [])
        found.append(dots)
        if len(found) == _DOTS_TOGETHER:
            found[:] = [torch.stack(found).sum(0, dtype=torch.float64)]

    def collect_rows(self, leaf: str | None, row_grads: Tensor, *, borrowed: bool) -> None:
        """Row gradients (rows, d) of a vector, whose dots are made with those of others: copied if
        they are borrowed and somebody else may write there until then."""
        self._note_backward()
        if leaf is None:
            return
        if row_grads.numel() > _ROWS_TOGETHER:
            self._dot_rows(leaf, row_grads)
            return
        found = self._rows.setdefault(leaf, [])
        found.append(row_grads.clone() if borrowed else row_grads)
        self._held += row_grads.numel()
        if self._held > _ROWS_TOGETHER:
            self.dot_held_rows()

    def dot_held_rows(self) -> None:
        """Make the dots of all row gradients that wait for it."""
        for leaf, found in self._rows.items():
            self._dot_rows(leaf, found[0] if len(found) == 1 else torch.cat(found, 1))
        self._rows, self._held = {}, 0

    def _dot_rows(self, leaf: str, row_grads: Tensor) -> None:
        with no_autocast(row_grads.device.type):  # the caller may be in it, after the backward too
            self.add(leaf, vector_form(row_grads, row_grads, self.val_rows, self.norms))

    def _note_backward(self) -> None:
        """One that raises leaves a part of the dots behind, and `in_backward`."""
        if not self.in_backward:
            if self.running:
                refuse_backward()
            if torch.is_grad_enabled():
                raise GraddotError(
                    "a backward with create_graph=True reached layers that are scored: a loss made of the"
                    " model's derivatives (a gradient penalty, forces, score matching), or a step that takes"
                    " second derivatives, cannot be scored; attach the engine for steps without"
                )
            self.in_backward = True
            torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)

    def _end_backward(self) -> None:
        self.in_backward = False

    def collected(self, leaf: str) -> Tensor | None:
        """The sum of all dots collected for a leaf, fp64; None where there are none."""
        found = self._dots.get(leaf)
        if not found:
            return None
        return (
            found[0].double() if len(found) == 1 else torch.stack(found).sum(0, dtype=torch.float64)
        )

    @property
    def has_dots(self) -> bool:
        return bool(self._dots or self._rows)

    def of_tokens(self) -> "Step":
        """The same step to a layer that gets the tokens of the packed row as rows."""
        assert self.tokens is not None
        return replace(self, rows=self.tokens, tokens=None, packed=False, layouts={}, running=False)

    def as_samples(self, x: Tensor) -> Tensor:
        """(rows, ..., D) as (samples, T, D): a sample is a row, or with `tokens` a token."""
        if self.tokens is None:
            if x.dim() == 3 and x.shape[0] == self.rows:
                return x
        elif not self.packed:
            return x.reshape(-1, 1, x.shape[-1])
        else:
            # Where heads are, they may be behind the tokens or before.
            at = [k for k in (1, 2) if k < x.dim() - 1 and x.shape[k] == self.tokens]
            if x.shape[0] == 1 and len(at) == 1:
                return x.movedim(at[0], 0).reshape(self.tokens, -1, x.shape[-1])
        # Of a packed row in which that is no token, `check_samples` says so.
        return x.reshape(self.rows, -1, x.shape[-1])

    def check_samples(self, name: str, samples: int) -> None:
        if self.tokens is not None and samples != self.rows * self.tokens:
            if self.packed:
                raise GraddotError(
                    f"{name} is used otherwise than on the {self.tokens} tokens of the packed row, one"
                    " after the other, so that its samples have no parts of their own there; give"
                    " every sample a row of its own, or exclude the parameter"
                )
            raise GraddotError(
                f"{name} is used on {samples} tokens of {self.rows} rows; expected {self.tokens} a"
                " row, as there are labels. Scores by token need every layer to see every token;"
                " leave per_token out, or exclude the parameter"
            )

    def uses(self, parameter: Tensor) -> SharedUses:
        key = id(parameter)
        found = self.shared.get(key)
        if found is None:
            if key not in self.names:
                raise GraddotError(
                    f"a rule used a parameter of shape {tuple(parameter.shape)} that its layer does"
                    " not hold; a rule scores the parameters of its own module"
                )
            direction = self.directions.get(key)
            scored = bool(self.val_rows) or direction is not None
            found = self.shared[key] = SharedUses(
                self.names[key], self.val_rows, direction, self.norms and scored,
                self.leaf_of.get(key),
            )  # fmt: skip
        return found

    def direction(self, uses: SharedUses) -> Tensor:
        """The whole of what is given for a parameter, for as long as one layer's backward needs it."""
        assert uses.given is not None
        if not self.sharded:
            return uses.given
        return self._gathering.whole(uses.given, self._expected)

    def _expected(self) -> Iterable[Tensor]:
        """The directions that the backward will ask for."""
        given = (uses.given for uses in reversed(self.shared.values()))
        return (direction for direction in given if direction is not None)

    def end(self) -> None:
        """The backward is through: make what waits for it, and give up what it needed."""
        self.dot_held_rows()
        self._gathering.end()

    def row_tokens(self, name: str) -> int:
        """T of a layer whose input has the tokens of each row one after the other, else 0."""
        layout = self.layouts.get(name)
        return layout if isinstance(layout, int) else 0

    def _has_rows_first(self, name: str, x: Tensor, dims: int) -> bool:
        """A layer that was not judged is believed when its input has a dimension to spare."""
        layout = self.layouts.get(name, "unseen" if self.layouts else "rows")
        enough = dims if layout == "rows" else dims + 1
        known = layout in ("rows", "unseen")
        return known and x.dim() >= enough and x.shape[0] == self.rows

    def _is_same(self, name: str) -> bool:
        """Whether a layer's input is the same for every row, so that its output gets rows first."""
        same = self.layouts.get(name) == "same"
        if same and "second" in self.layouts.values():
            raise GraddotError(
                f"layer {name} got an input without rows, in a model that elsewhere has them as the"
                " second dimension; expand the input over the rows, as (T, rows)"
            )
        return same

    def as_rows(self, name: str, x: Tensor) -> Tensor:
        """A layer's input with the rows as its first dimension: (rows, ..., D).

        Takes (rows, ..., D); (T, rows, ..., D), or (rows·T, ..., D) with the rows one after the
        other, where they were seen to lie so; and (1, ..., D) or (T, D), the same for every row,
        which is expanded.
        """
        same = self._is_same(name)
        if self._has_rows_first(name, x, 2):
            return x
        tokens = self.row_tokens(name)
        if tokens and x.dim() >= 2 and x.shape[0] == self.rows * tokens:
            return x.unflatten(0, (self.rows, tokens))
        if self.layouts.get(name) == "second" and x.dim() >= 3 and x.shape[1] == self.rows:
            return x.transpose(0, 1)
        if same and x.dim() >= 2 and (x.shape[0] == 1 or x.dim() == 2):
            return x.expand(self.rows, *(x.shape[1:] if x.shape[0] == 1 else x.shape))
        raise GraddotError(
            f"layer {name} got an input of shape {tuple(x.shape)}; expected {self.rows} rows"
            " (training rows, then validation rows) as the first dimension. Layers that mix"
            " samples cannot be scored."
        )

    def id_rows(self, name: str, ids: Tensor) -> Tensor:
        """Ids of (rows, ...), or as `as_rows` takes them, or of (1, T) or (T,), the same for every
        row, as (rows, ...)."""
        same = self._is_same(name)
        if self.layouts.get(name) == "second" and ids.dim() >= 2 and ids.shape[1] == self.rows:
            return ids.transpose(0, 1)
        if ids.dim() == 2 and ids.shape[0] == 1:  # there are two rows at least
            return ids.expand(self.rows, ids.shape[1])
        if self._has_rows_first(name, ids, 1):
            return ids
        tokens = self.row_tokens(name)
        if tokens and ids.dim() >= 1 and ids.shape[0] == self.rows * tokens:
            return ids.unflatten(0, (self.rows, tokens))
        if same and ids.dim() == 1:
            return ids.expand(self.rows, ids.shape[0])
        raise GraddotError(
            f"embedding {name} got ids of shape {tuple(ids.shape)}"
            + (" that are the same for every row" if same else "")
            + f"; expected {self.rows} rows (training rows, then validation rows), or (1, T) or"
            " (T,) to be broadcast over them"
        )
