"""Samples that share one row, for tests, and their gradients in float64 with a row of their own."""

import copy

import torch
import torch.nn.functional as F
from brute_force import token_batch
from graddot_lm import segment_lengths
from model_zoo import VOCAB
from transformers import DataCollatorWithFlattening

LENGTHS, KEYS = [5, 1, 7, 2, 9, 4], ("input_ids", "labels")


def samples(lengths=LENGTHS, *, seed=1):
    """Of several lengths; the labels of the third are half a prompt, and the fourth has none."""
    ids, labels = token_batch(len(lengths), max(lengths), VOCAB, seed=seed)
    rows = [(ids[i, :n].clone(), labels[i, :n].clone()) for i, n in enumerate(lengths)]
    for i, (_, own) in enumerate(rows):
        own[: {2: 4, 3: 2}.get(i, 0)] = -100
    return [{"input_ids": x.tolist(), "labels": y.tolist()} for x, y in rows]


def batch_of(rows, **options):
    return DataCollatorWithFlattening(**options)(rows)


def gradients(model, rows):
    """Of every sample's own mean loss, fp64; zeros where it has no labelled token."""
    exact, found = copy.deepcopy(model).double(), []
    for row in rows:
        exact.zero_grad()
        x, y = (torch.tensor([row[k]]) for k in KEYS)
        total = F.cross_entropy(
            exact(x).logits[:, :-1].flatten(0, 1), y[:, 1:].flatten(), reduction="sum"
        )
        (total / max(1, labelled(row))).backward()
        grad = lambda p: torch.zeros_like(p) if p.grad is None else p.grad.clone()  # of experts
        found.append({n: grad(p) for n, p in exact.named_parameters() if p.requires_grad})
    return found


def labelled(row):
    return sum(y != -100 for y in row["labels"][1:])


def dot(direction, gradient):
    return sum((direction[n] * gradient[n]).sum() for n in direction)


def scale(direction, gradient):
    norm = lambda g: torch.stack([x.norm() for x in g.values()]).norm()
    return norm(direction) * norm(gradient)


def direction_of(model, seed=9):
    """A gradient of other rows."""
    own = gradients(model, samples([8, 6], seed=seed))
    return {n: (own[0][n] + own[1][n]) / 2 for n in own[0]}


def mean_of(rows, found):
    """The gradient of the mean over all labelled tokens."""
    counts = [labelled(row) for row in rows]
    parts = zip(counts, found, strict=True)
    whole = [{n: count * g for n, g in own.items()} for count, own in parts]
    return {n: sum(own[n] for own in whole) / sum(counts) for n in whole[0]}


def run(engine, batch, rows, *, factor=1.0, step=0, ids=None):
    ids = torch.arange(len(rows)) if ids is None else ids
    lengths = segment_lengths(batch["position_ids"])
    engine.attach_train_batch(batch, None, step, ids, segments=lengths)
    inputs, _ = engine.prepare_forward_input(batch)
    (engine.model(**inputs, use_cache=False).loss * factor).backward()
    engine.prepare_gradients()
