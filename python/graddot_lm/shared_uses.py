"""Cross terms of a parameter that is used more than once in a step.

A parameter's gradient is the sum over its uses, G_i = Σ_p G_i^p, so its dot product has a term for
every pair of uses: ⟨Σ_p D^p, Σ_q G_i^q⟩. Each use's backward adds its own ⟨D^q, G_i^q⟩; whichever
of two uses runs later in the backward pass adds ⟨D^p, G_i^q⟩ + ⟨D^q, G_i^p⟩ for the pair. GPT-2's
`wte` and `lm_head` are the common case: the head runs first, and leaves behind only what the
embedding will need, never the head's logit gradient.

Squared norms go the same way: ‖Σ_p G_i^p‖² has a term 2⟨G_i^p, G_i^q⟩ for every pair of uses. With
`norms`, "dots" have one more row for them, and where there are val rows one more column, for those of
the Σ_p D^p: (K + 1, N + 1), as graddot_kernels.functional has it. A pair of uses adds the form
(D^p, G_i^q) and its mirror image, and a single use the form of itself.

Rows are the step's joint batch throughout: N training rows, then val_rows[k] rows of target k.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graddot_kernels import (
    embedding_direction_dot,
    embedding_ghost_dot,
    linear_direction_dot,
    linear_ghost_dot,
    linear_wgrad_dot,
)
from graddot_kernels.sample_dots import (
    bordered,
    embedding_sample_dot,
    linear_sample_dot,
    linear_sample_rows,
)

from .checkpointing import recomputing
from .errors import GraddotError

_NO_TERMS = (
    "cross terms of such uses are not known; leave val_data out and give directions (compute_directions),"
    " without norms, for which there are none"
)
_TOGETHER = 2**16  # elements of row gradients that are multiplied and added up at once
_SIDE_BY_SIDE = (
    256  # tokens of uses, as of a recurrent cell's, that the others are paired with at once
)


@dataclass
class _Table:
    """The ids of some tokens, (U,), and where among them each token's own is: U for the padding's.

    On a CPU distinct ids. To find those of a GPU's would wait for it: there one a token, in order.
    """

    ids: Tensor
    slots: Tensor

    @classmethod
    def of(cls, tokens: Tensor, padding_idx: int | None) -> "_Table":
        if tokens.is_cuda:
            ids = tokens.flatten()
            slots = torch.arange(ids.numel(), device=ids.device).view(tokens.shape)
        else:
            ids, slots = torch.unique(tokens, return_inverse=True)
        if padding_idx is not None:
            slots = slots.masked_fill(tokens == padding_idx, ids.numel())
        return cls(ids.long(), slots)


@dataclass
class _LinearPart:
    """What a linear use leaves for one embedding use of the same weight (Dout = num_embeddings).

    The head gradient's rows matter only at ids that the embedding saw: those of the val rows, with
    the training rows' logit gradients there, (N, T, U), and those of the training rows, with the
    val rows' head gradient there, (K, U', d). For norms the latter are the val rows' too, and
    own_rows, (N, T, d), is each training sample's head gradient at its own ids.
    """

    act: Tensor
    val: _Table
    train_grad: Tensor
    train: _Table
    val_head_grad: Tensor
    own_rows: Tensor | None = None


@dataclass
class RowParts:
    """What is kept for one embedding use of the same weight, that with these ids, of a use whose row
    gradients, (Dout, Din), are there one at a time: each training row's at the val rows' ids, and for
    norms at its own."""

    index: int
    ids: Tensor
    val: _Table
    train: _Table
    norms: bool
    at_val: list[Tensor] = field(default_factory=list)
    own: list[Tensor] = field(default_factory=list)

    def keep(self, i: int, gradient: Tensor) -> None:
        """Of training row i."""
        self.at_val.append(gradient[self.val.ids])
        if self.norms:
            self.own.append(gradient[self.ids[i]])

    def for_embedding(self, direction: Tensor | None) -> _LinearPart:
        """The same as of a linear use that has these gradients: with a token for each of the val rows' ids,
        and a logit of each. direction is the val rows', (K, Dout, Din)."""
        act = torch.stack(self.at_val)
        logits = torch.eye(act.shape[1], dtype=act.dtype, device=act.device)
        return _LinearPart(
            act=act,
            val=self.val,
            train_grad=logits.expand(len(act), -1, -1),
            train=self.train,
            val_head_grad=act.new_empty(0) if direction is None else direction[:, self.train.ids],
            own_rows=torch.stack(self.own) if self.norms else None,
        )


@dataclass(slots=True)
class SharedUses:
    """The uses of one parameter in one step: counted in the forward, paired in the backward.

    A forward that activation checkpointing runs once more is not another use. With a `given`
    direction, (K, *shape), every use dots with the whole of it: cross terms are those of norms only.
    It is sharded where the parameter is.

    There is one of a parameter and step, so that it is slotted and begins with few containers.
    """

    name: str
    val_rows: list[int]
    given: Tensor | None = None
    norms: bool = False
    leaf: str | None = None  # of the step, which collects the dots for it; None: not scored
    paddings: frozenset[int | None] = frozenset()  # padding_idx of every embedding
    num_embeddings: int = 0
    linear_calls: int = 0
    held: Tensor | None = None
    head_tables: tuple[_Table, _Table] | None = None
    vector_calls: int = 0
    row_calls: int = 0
    expert_calls: int = 0
    embedding_ids: tuple[Tensor, ...] = ()
    _linears: tuple[tuple[Tensor, Tensor], ...] = ()
    _linears_done: int = 0
    _embeddings_done: int = 0
    _embeddings_before_head: int = 0
    _vectors_done: int = 0
    _rows_done: int = 0
    _embeddings: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _parts: dict[int, list[_LinearPart]] = field(default_factory=dict)
    _vectors: Tensor | None = None  # the sum of their row gradients

    @property
    def calls(self) -> int:
        """How often the forward used it."""
        plain = self.linear_calls + self.vector_calls + self.row_calls + self.expert_calls
        return plain + len(self.embedding_ids)

    @property
    def holds(self) -> bool:
        """Whether one use keeps tensors of its own for another."""
        kept = self.embedding_ids or self._linears or self._embeddings or self._parts
        others = self._vectors, self.held, self.head_tables
        return bool(kept) or any(x is not None for x in others)

    def count_linear(self) -> None:
        self.linear_calls += not recomputing()

    def count_vector(self) -> None:
        self.vector_calls += not recomputing()

    def count_rows(self) -> None:
        self.row_calls += not recomputing()

    def count_embedding(self, ids: Tensor, padding_idx: int | None) -> None:
        self.paddings |= {padding_idx}
        if not recomputing():
            self.embedding_ids += (ids,)

    @property
    def padding_idx(self) -> int | None:
        """That of all embeddings of the weight; where they differ, their gradients come without
        the rows of their own."""
        return next(iter(self.paddings)) if len(self.paddings) == 1 else None

    def _check_count(self, backward: int, forward: int) -> None:
        if backward > forward:
            raise GraddotError(
                f"{self.name} had {backward} backward passes in this step, but {forward} forward"
                " passes; call backward() once a batch, on the sum of all losses"
            )

    @property
    def paired(self) -> bool:
        """Whether there are cross terms between uses of the weight."""
        if not self._has_pairs:
            return False
        uses = self.linear_calls + len(self.embedding_ids) + self.row_calls
        if self.row_calls and uses - len(self.embedding_ids) > 1:
            raise GraddotError(
                f"{self.name} is used several times, in a function that takes it whole among them; the"
                f" {_NO_TERMS}"
            )
        if self.vector_calls and uses:
            raise GraddotError(
                f"{self.name} is shared by a linear layer or embedding and by a layer of another"
                f" kind; the {_NO_TERMS}"
            )
        return uses > 1

    @property
    def _has_pairs(self) -> bool:
        return bool(self.val_rows) or self.norms

    def _targets(self, x: Tensor) -> list[Tensor]:
        n = x.shape[0] - sum(self.val_rows)
        return list(torch.split(x[n:], self.val_rows)) if self.val_rows else []

    def _train(self, x: Tensor) -> Tensor:
        return x[: x.shape[0] - sum(self.val_rows)]

    def _stacked(self, dots: list[Tensor], like: Tensor) -> Tensor:
        """(K, N) of what each target has; where there are none, zeros of `like`'s N and dtype."""
        if dots:
            return torch.stack(dots)
        assert self.given is not None
        return _accumulated(like.new_zeros(len(self.given), like.shape[0]))

    def hold(self, weight_grad: Tensor) -> bool:
        """Keep a head's weight gradient for the embedding of the same weight to add its rows to.

        Saves a second gradient of the table's size, its zeros and a sum. Not on a GPU, where
        adding rows in place would need atomics and not repeat bitwise.
        """
        pending = len(self.embedding_ids) == 1 and self._embeddings_done == 0
        if weight_grad.is_cuda or not pending or self.linear_calls != 1:
            return False
        self.held = weight_grad
        return True

    def add_rows(self, ids: Tensor, grad: Tensor, scale: Tensor) -> Tensor:
        """The held gradient with the embedding's training rows added."""
        assert self.held is not None
        weight_grad, self.held = _accumulated(self.held), None  # of excluded ones in 16 bits
        train_ids, train_grad = self._train(ids), self._train(grad)
        rows = _accumulated(train_grad).flatten(0, 1) * scale
        if self.padding_idx is not None:
            rows = rows.masked_fill((train_ids.flatten() == self.padding_idx)[:, None], 0)
        weight_grad.index_add_(0, train_ids.flatten(), rows)
        return weight_grad

    def embedding_dots(self, ids: Tensor, grad: Tensor, given: Tensor | None) -> Tensor | None:
        """An embedding use's own dots, (K, N), with the whole of what is given; None without a
        direction."""
        if self.val_rows:
            return self._embedding_form(ids, grad, ids, grad)
        if given is None:
            return None
        padding = self.padding_idx
        rows = _accumulated(grad)
        dots = embedding_direction_dot(given, ids, rows, padding_idx=padding)
        return self.with_embedding_norms(dots, ids, grad)

    def with_embedding_norms(self, dots: Tensor, ids: Tensor, grad: Tensor) -> Tensor:
        """An embedding use's own dots, (K, N), with its own norms if they are wanted."""
        return self._embedding_border(dots, ids, grad, ids, grad) if self.norms else dots

    def linear_terms(self, act: Tensor, grad: Tensor) -> Tensor | None:
        """Cross terms of a linear use with the uses whose backward ran before, (K, N)."""
        self._linears_done += 1
        self._check_count(self._linears_done, self.linear_calls)
        if not self.paired:
            return None
        terms = [self._linear_pair(act, grad, *other) for other in self._linears]
        for ids, emb_grad in self._embeddings.values():
            terms.append(self._mixed_pair(self._part(act, grad, ids), ids, emb_grad))
        if self.linear_calls > 1:
            self._linears = _side_by_side(*self._linears, (act, grad))
        for i, ids in enumerate(self.embedding_ids):
            if i not in self._embeddings:
                self._parts.setdefault(i, []).append(self._part(act, grad, ids))
        return sum(terms[1:], terms[0]) if terms else None

    def head_ids(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """What the fused head has to keep for an embedding of the same weight: the val rows' and
        the training rows' ids."""
        self._embeddings_before_head = len(self.embedding_ids)
        if len(self.embedding_ids) > 1 and self._has_pairs:
            raise GraddotError(
                f"{self.name} is shared by a fused head and several embeddings; unfuse the head"
            )
        if not self.embedding_ids or not self.val_rows:
            none = torch.empty(0, dtype=torch.long, device=device)
            return none, none
        val, train = self.head_tables = self._tables(self.embedding_ids[0])
        return val.ids, train.ids

    def _tables(self, ids: Tensor) -> tuple[_Table, _Table]:
        """Of the val rows, and of the training rows, for norms of all rows."""
        n = ids.shape[0] - sum(self.val_rows)
        parts = ids[n:], ids if self.norms else ids[:n]
        return _Table.of(parts[0], self.padding_idx), _Table.of(parts[1], self.padding_idx)

    def own_ids(self) -> Tensor | None:
        """For norms: the training rows' ids, at which the head has to keep each row's gradient."""
        return self._train(self.embedding_ids[0]) if self.norms and self.embedding_ids else None

    def head_terms(self, act: Tensor, columns: Tensor, head_rows: Tensor, own_rows: Tensor) -> None:
        """What the fused head leaves for the embedding, from its backward; see `_LinearPart`."""
        self._linears_done += 1
        self._check_count(self._linears_done, self.linear_calls)
        if not self.paired:
            return
        after = len(self.embedding_ids) - self._embeddings_before_head
        if self.linear_calls > 1 or self._embeddings or after:
            raise GraddotError(
                f"{self.name} is used by layers besides the fused head and one embedding before it;"
                " unfuse the head"
            )
        val, train = self.head_tables or self._tables(self.embedding_ids[0])
        part = _LinearPart(act, val, columns, train, head_rows, own_rows)
        self._parts.setdefault(0, []).append(part)

    def embedding_terms(self, ids: Tensor, grad: Tensor) -> Tensor | None:
        """Cross terms of an embedding use, (K, N)."""
        self._embeddings_done += 1
        self._check_count(self._embeddings_done, len(self.embedding_ids))
        if not self.paired:
            return None
        index = self._index(ids)
        parts = self._parts.pop(index, [])
        terms = [self._mixed_pair(part, ids, grad) for part in parts]
        terms += [self._embedding_pair(ids, grad, *other) for other in self._embeddings.values()]
        self._embeddings[index] = (ids, grad)
        return sum(terms[1:], terms[0]) if terms else None

    def row_parts(self) -> list[RowParts]:
        """Of a use whose row gradients are about to come, one at a time."""
        self._rows_done += 1
        self._check_count(self._rows_done, self.row_calls)
        if not self.paired:
            return []
        tables = ((i, ids, *self._tables(ids)) for i, ids in enumerate(self.embedding_ids))
        return [RowParts(*table, self.norms) for table in tables]

    def row_terms(self, parts: list[RowParts], direction: Tensor) -> Tensor | None:
        """Cross terms of such a use, (K, N); see `linear_terms`."""
        terms = []
        for part in parts:
            linear = part.for_embedding(direction if self.val_rows else None)
            if part.index in self._embeddings:
                terms.append(self._mixed_pair(linear, *self._embeddings[part.index]))
            else:
                self._parts.setdefault(part.index, []).append(linear)
        return sum(terms[1:], terms[0]) if terms else None

    def _index(self, ids: Tensor) -> int:
        """Which embedding use this is. A recomputed one has its own copy of the ids; uses of equal
        ids are interchangeable, for only the ids matter until their backward."""
        open_uses = [i for i in range(len(self.embedding_ids)) if i not in self._embeddings]
        for same in (_same_memory, torch.equal):  # the second is a synchronisation on a GPU
            for i in open_uses:
                if same(self.embedding_ids[i], ids):
                    return i
        raise GraddotError(
            f"{self.name}: the backward reached an embedding that the forward did not run; keep"
            " what the embedding is called with the same when its forward is recomputed"
        )

    def vector_terms(self, row_grads: Tensor) -> Tensor | None:
        """Cross terms of a bias or norm use, given its per-row gradients (N + ΣV, d); (K, N)."""
        self._vectors_done += 1
        self._check_count(self._vectors_done, self.vector_calls)
        if not self._has_pairs or (not self.paired and self.vector_calls == 1):
            return None
        other = self._vectors
        if other is None:
            self._vectors = row_grads
            return None
        self._vectors = other + row_grads
        return self._vector_form(other, row_grads) + self._vector_form(row_grads, other)

    def _vector_form(self, direction_rows: Tensor, sample_rows: Tensor) -> Tensor:
        if self.val_rows:
            return vector_form(direction_rows, sample_rows, self.val_rows, self.norms)
        dots = self._stacked([], sample_rows)
        return bordered(dots, (direction_rows * sample_rows).sum(1))

    def _linear_pair(
        self, act: Tensor, grad: Tensor, other_act: Tensor, other_grad: Tensor
    ) -> Tensor:
        one, other = (act, grad), (other_act, other_grad)
        return self._linear_form(*one, *other) + self._linear_form(*other, *one)

    def _linear_form(self, val_act: Tensor, val_grad: Tensor, act: Tensor, grad: Tensor) -> Tensor:
        """As `vector_form`, of a linear weight; without val rows the dots are 0."""
        train = self._train(act), self._train(grad)
        vals = list(zip(self._targets(val_act), self._targets(val_grad), strict=True))
        dots = self._stacked([linear_ghost_dot(*val, *train) for val in vals], train[0])
        if not self.norms:
            return dots
        row = linear_sample_dot(self._train(val_act), self._train(val_grad), *train)
        others = zip(self._targets(act), self._targets(grad), strict=True)
        column = [linear_ghost_dot(*v, *o).sum() for v, o in zip(vals, others, strict=True)]
        return bordered(dots, row, _column(column))

    def _embedding_pair(
        self, ids: Tensor, grad: Tensor, other_ids: Tensor, other_grad: Tensor
    ) -> Tensor:
        one, other = (ids, grad), (other_ids, other_grad)
        return self._embedding_form(*one, *other) + self._embedding_form(*other, *one)

    def _embedding_dot(self, val: tuple[Tensor, Tensor], train: tuple[Tensor, Tensor]) -> Tensor:
        table = self.num_embeddings
        return embedding_ghost_dot(*val, *train, table, padding_idx=self.padding_idx)

    def _embedding_form(
        self, val_ids: Tensor, val_grad: Tensor, ids: Tensor, grad: Tensor
    ) -> Tensor:
        """The same of a table."""
        train = self._train(ids), self._train(grad)
        vals = zip(self._targets(val_ids), self._targets(val_grad), strict=True)
        dots = self._stacked([self._embedding_dot(val, train) for val in vals], train[1])
        return self._embedding_border(dots, val_ids, val_grad, ids, grad) if self.norms else dots

    def _embedding_border(
        self, dots: Tensor, val_ids: Tensor, val_grad: Tensor, ids: Tensor, grad: Tensor
    ) -> Tensor:
        train = self._train(ids), self._train(grad)
        own = train if val_ids is ids else (self._train(val_ids), self._train(val_grad))
        row = embedding_sample_dot(*own, *train, self.padding_idx)
        vals = zip(self._targets(val_ids), self._targets(val_grad), strict=True)
        others = zip(self._targets(ids), self._targets(grad), strict=True)
        column = [self._embedding_dot(v, o).sum() for v, o in zip(vals, others, strict=True)]
        return bordered(dots, row, _column(column))

    def _part(self, act: Tensor, grad: Tensor, ids: Tensor) -> _LinearPart:
        n = ids.shape[0] - sum(self.val_rows)
        val, train = self._tables(ids)
        head_grads = [
            (b[..., train.ids].flatten(0, 1).t() @ a.flatten(0, 1))
            for a, b in zip(self._targets(act), self._targets(grad), strict=True)
        ]
        return _LinearPart(
            act=act[:n],
            val=val,
            train_grad=grad[:n][..., val.ids],
            train=train,
            val_head_grad=torch.stack(head_grads) if head_grads else act.new_empty(0),
            own_rows=linear_sample_rows(act[:n], grad[:n], ids[:n]) if self.norms else None,
        )

    def _mixed_pair(self, part: _LinearPart, ids: Tensor, grad: Tensor) -> Tensor:
        """⟨D^emb, G_i^head⟩ + ⟨D^head, G_i^emb⟩: both on compact tables of ids."""
        dots = self._mixed_dots(part, ids, grad) if self.val_rows else self._stacked([], grad)
        if not self.norms:
            return dots
        assert part.own_rows is not None
        tokens = (part.own_rows * _accumulated(self._train(grad))).sum(2)
        if self.padding_idx is not None:
            tokens = tokens.masked_fill(self._train(ids) == self.padding_idx, 0)
        missing, column = part.train.ids.numel(), []
        vals = zip(self._targets(part.train.slots), self._targets(grad), strict=True)
        for k, (slots, v_grad) in enumerate(vals):
            rows = _padded(part.val_head_grad[k])
            terms = embedding_direction_dot(rows, slots, _accumulated(v_grad), padding_idx=missing)
            column.append(2 * terms.sum())
        return bordered(dots, 2 * tokens.sum(1), _column(column))

    def _head_dots(
        self, part: _LinearPart, columns: Tensor, slots: Tensor, val_grad: Tensor
    ) -> Tensor:
        """⟨D^emb, G_i^head⟩ of one target, (N,), given its slots in `part.val`, (V, S)."""
        act, missing = part.act, part.val.ids.numel()
        slots, rows = slots.flatten(), val_grad.flatten(0, 1)
        here = None if self.padding_idx is None else slots < missing
        if columns.is_cuda:  # its columns are its tokens
            rows = rows if here is None else rows.masked_fill(~here[:, None], 0)
            # Matrix products of 16 bits, but dots with rows of fp32.
            return linear_wgrad_dot(rows, act, columns)[1]
        act, columns = _accumulated(act), _accumulated(columns)
        if len(self.val_rows) == 1:
            direction = rows.new_zeros(missing + 1, rows.shape[1])
            direction = direction.index_add_(0, slots, rows)[:-1]
        else:  # token by token, and only this target's
            if here is not None:
                slots, rows = slots[here], rows[here]
            columns, direction = columns[..., slots], rows
        return linear_direction_dot(direction, act, columns)

    def _mixed_dots(self, part: _LinearPart, ids: Tensor, grad: Tensor) -> Tensor:
        n = ids.shape[0] - sum(self.val_rows)
        grad = _accumulated(grad)
        slots, columns = torch.split(part.val.slots, self.val_rows), [part.train_grad]
        if grad.is_cuda:
            columns = list(torch.split(part.train_grad, [x.numel() for x in slots], 2))
        else:
            columns *= len(slots)
        of_targets = zip(columns, slots, self._targets(grad), strict=True)
        head_terms = torch.stack([self._head_dots(part, *target) for target in of_targets])
        rows, missing = _padded(part.val_head_grad), part.train.ids.numel()
        return head_terms + embedding_direction_dot(
            rows, part.train.slots[:n], grad[:n], padding_idx=missing
        )


def _side_by_side(*uses: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor, Tensor], ...]:
    """Linear uses, (rows, T, Din) and (rows, T, Dout) each, the last two of them as one of 2T tokens where
    they are of one small T, and so on: of many uses there are few, and each token is copied few times."""
    kept = list(uses)
    while len(kept) > 1:
        (a, b), (c, d) = kept[-2:]
        small = a.shape == c.shape and 2 * a.shape[1] <= _SIDE_BY_SIDE
        if not (small and a.dtype == c.dtype and b.dtype == d.dtype):
            break
        kept[-2:] = [(torch.cat([a, c], 1), torch.cat([b, d], 1))]
    return tuple(kept)


def products(direction: Tensor, samples: Tensor) -> Tensor:
    """direction @ samples.T of (K, d) and (N, d), in pieces of d: one long fp32 sum loses digits."""
    if samples.shape[1] <= _TOGETHER:
        return direction @ samples.t()
    pieces = zip(direction.split(_TOGETHER, 1), samples.split(_TOGETHER, 1), strict=True)
    return torch.stack([a @ b.t() for a, b in pieces]).sum(0)


def vector_form(
    direction_rows: Tensor,
    sample_rows: Tensor,
    val_rows: list[int],
    norms: bool,
    multiply: Callable[[Tensor, Tensor], Tensor] = products,
) -> Tensor:
    """Dots of one use's val rows with another's (or the same's) training rows, (K, N), with norms'
    border. Of row gradients (N + ΣV, d) of one vector, or of several side by side, multiplied as
    `products` multiplies."""
    n = sample_rows.shape[0] - sum(val_rows)

    def summed(x: Tensor) -> Tensor:  # (K, d)
        groups = [x[n:]] if len(val_rows) == 1 else torch.split(x[n:], val_rows)
        sums = [rows.sum(0, keepdim=True) if len(rows) > 1 else rows for rows in groups]
        return sums[0] if len(sums) == 1 else torch.cat(sums)

    samples, direction = sample_rows[:n], summed(direction_rows)
    dots = multiply(direction, samples)
    if not norms:
        return dots
    row = (direction_rows[:n] * samples).sum(1)
    column = (direction * summed(sample_rows)).sum(1)
    return bordered(dots, row, column)


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _accumulated(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _padded(rows: Tensor) -> Tensor:
    """One more row of zeros, for ids that are not there."""
    return torch.nn.functional.pad(_accumulated(rows), (0, 0, 0, 1))


def _column(dots: list[Tensor]) -> Tensor | None:
    """(K,); None without val rows."""
    return torch.stack(dots) if dots else None
