"""DDP and FSDP2 against one float64 process that has all the rows."""

import functools

import pytest
import torch
import torch.nn.functional as F
from brute_force import gradient, sample_dots, tiny_gpt2, token_batch, total
from graddot_lm import GraddotError, GradDotProdEngine, adamw_direction, fuse_head
from graddot_lm.distributed import shard
from process_group import on_processes
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

ROWS, STEPS, LR, MOMENTUM = 8, 10, 0.1, 0.9
# fp32 against float64, over ten steps; the rule for dots is that of engine_steps.py.
TOLERANCE = 1e-5


def batch(step, ragged):
    return token_batch(ROWS, 17, seed=step, ragged=ragged)


def val_batch():
    return token_batch(2, 17, seed=99, ragged=True)


def own(rows, rank, world):
    """The part of a joint batch that a process has."""
    return rows[rank * ROWS // world : (rank + 1) * ROWS // world]


class Rows:
    """A store that keeps the values."""

    def __init__(self):
        self.values = []

    def append(self, rows, step):
        self.values.append(torch.as_tensor(rows["value"]))


def fully_sharded(model):
    """As is usual: block by block, layers that are large on their own, then what is left."""
    for block in model.transformer.h:
        fully_shard(block)
    if not model.config.tie_word_embeddings:
        fully_shard(model.lm_head)
    return fully_shard(model)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def ten_steps(rank, world, kind, tied, ragged, global_mean):
    """Scores (STEPS, rows), values and weights of a run in which this process has its own rows."""
    inner = model = tiny_gpt2(tied=tied)
    if kind in ("ddp", "ddp-wrapper"):
        model = DistributedDataParallel(inner)
    if kind == "fsdp-fused":
        fuse_head(inner)
    if kind.startswith("fsdp"):
        fully_sharded(inner)
    store = Rows()
    engine = GradDotProdEngine(
        model if kind == "ddp-wrapper" else inner, val_batch(), store=store, global_mean=global_mean
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    engine.attach(optimizer)
    scores = []
    for step in range(STEPS):
        x, y = (own(rows, rank, world) for rows in batch(step, ragged))
        engine.attach_train_batch(x, y, step, torch.arange(len(x)))
        xx, yy = engine.prepare_forward_input(x, y)
        model(xx, labels=yy).loss.backward()
        engine.prepare_gradients()
        optimizer.step()
        optimizer.zero_grad()
        scores.append(engine.aggregate_and_log())
        with torch.no_grad():  # an evaluation leaves the model as the optimizer knows it
            model(xx, labels=yy)
    weights = {name: whole(p.detach()) for name, p in inner.named_parameters()}
    return torch.stack(scores), torch.stack(store.values), weights


@functools.cache
def reference(tied, ragged, groups):
    """The same in float64 with all rows, `groups` of which weigh alike by their mean losses."""
    model = tiny_gpt2(tied=tied).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    scores, scales, values = [], [], []
    for step in range(STEPS):
        x, y = batch(step, ragged)
        dots, scale = (total(d) for d in sample_dots(model, (x, y), val_batch()))
        parts = [(own(x, g, groups), own(y, g, groups)) for g in range(groups)]
        grads = [gradient(model, *part) for part in parts]
        counts = [(part[1][:, 1:] != -100).sum(1) for part in parts]
        share = torch.cat([c / c.sum().double() / groups for c in counts])
        scores.append(dots)
        scales.append(scale)
        values.append(LR * share * dots)
        for name, p in model.named_parameters():
            p.grad = sum(g[name] for g in grads) / groups
        optimizer.step()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return torch.stack(scores), torch.stack(scales), torch.stack(values), weights


def errors(got, want):
    """Largest relative errors of scores, values and weights."""
    scores, values = (torch.cat([result[i] for result in got], 1) for i in (0, 1))
    want_scores, scales, want_values, want_weights = want
    allowed = torch.maximum(want_scores.abs(), 0.1 * scales)
    yield ((scores - want_scores).abs() / allowed).max().item()
    yield ((values - want_values).abs() / (allowed * (want_values / want_scores))).max().item()
    for _, _, weights in got:
        yield max(
            ((weights[name] - w).norm() / w.norm()).item() for name, w in want_weights.items()
        )


CASES = [
    # kind, processes, tied, ragged, global_mean
    ("ddp", 2, True, False, False),
    ("ddp", 2, True, True, False),
    ("ddp", 2, False, True, True),
    ("ddp-wrapper", 4, True, True, True),
    ("ddp-wrapper", 4, False, False, False),
    ("fsdp", 2, True, True, False),
    ("fsdp", 2, False, True, True),
    ("fsdp", 4, True, True, True),
    ("fsdp-fused", 2, False, True, True),
    ("fsdp-fused", 2, True, True, False),
    ("fsdp", 4, False, False, False),
]


@pytest.mark.parametrize(
    "kind, world, tied, ragged, global_mean",
    CASES,
    ids=[
        f"{kind}-{world}-{'tied' if tied else 'untied'}-{'ragged' if ragged else 'full'}"
        + ("-global" if global_mean else "")
        for kind, world, tied, ragged, global_mean in CASES
    ],
)
def test_several_processes_equal_one(
    tmp_path, record_property, kind, world, tied, ragged, global_mean
):
    got = on_processes(world, tmp_path, ten_steps, kind, tied, ragged, global_mean)
    want = reference(tied, ragged, world if ragged and not global_mean else 1)
    found = list(errors(got, want))
    record_property("relative_error", max(found))
    assert max(found) <= TOLERANCE, found


def given_step(rank, world, kind, tied):
    """Scores and norms of own rows with two given directions, and the part of the directions that
    this process holds."""
    inner = model = tiny_gpt2(tied=tied)
    if kind == "ddp":
        model = DistributedDataParallel(inner)
    elif kind == "fsdp":
        fully_sharded(inner)
    else:
        fuse_head(inner)
        shard(inner, inner.transformer.h)
    engine = GradDotProdEngine(inner, norms=True)
    x, y = val_batch()
    engine.set_directions(
        engine.compute_directions(
            {"first": [(x[:1], y[:1])], "both": [(x[:1], y[:1]), (x[1:], y[1:])]}
        )
    )
    engine.attach()
    x, y = (own(rows, rank, world) for rows in batch(0, True))
    engine.attach_train_batch(x, y, 0, None)
    model(x, labels=y).loss.backward()
    scores = engine.aggregate_and_log()
    held = engine._forward.directions.values()
    local = sum(d.to_local().numel() if isinstance(d, DTensor) else d.numel() for d in held)
    grads = {name: whole(p.grad) for name, p in inner.named_parameters()}
    return (
        scores,
        engine.gradient_norms(),
        engine.target_norms(),
        grads,
        local / sum(d.numel() for d in held),
    )


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind, world", [("ddp", 2), ("fsdp", 2), ("fsdp", 4), ("fsdp-fused", 2)])
def test_given_directions_on_several_processes(tmp_path, record_property, kind, world, tied):
    """Sharded like the weights under FSDP, and the scores of one process."""
    got = on_processes(world, tmp_path, given_step, kind, tied)
    model = tiny_gpt2(tied=tied).double()
    x, y = val_batch()
    found = []
    for k, rows in enumerate((1, 2)):
        dots, scale = (total(d) for d in sample_dots(model, batch(0, True), (x[:rows], y[:rows])))
        scores = torch.cat([scores[k] for scores, *_ in got])
        found.append(((scores - dots).abs() / torch.maximum(dots.abs(), 0.1 * scale)).max().item())
    x, y = batch(0, True)
    samples = [gradient(model, x[i : i + 1], y[i : i + 1]) for i in range(ROWS)]
    norms = torch.stack([torch.cat([g.flatten() for g in one.values()]).norm() for one in samples])
    found.append(((torch.cat([one[1] for one in got]) - norms).abs() / norms).max().item())
    parts = [gradient(model, own(x, r, world), own(y, r, world)) for r in range(world)]
    for name, grad in got[0][3].items():
        want = sum(part[name] for part in parts) / world
        found.append(((grad - want).norm() / want.norm()).item())
    record_property("relative_error", max(found))
    assert max(found) <= TOLERANCE, found
    for *_, share in got:
        assert share <= (1 if kind == "ddp" else 1.2 / world)


def adamw_step(rank, world, sharded):
    """The direction of AdamW's second step, in one process or with the model sharded."""
    model = tiny_gpt2()
    if sharded:
        fully_sharded(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    engine = GradDotProdEngine(model)
    model(batch(0, True)[0], labels=batch(0, True)[1]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    direction = engine.compute_directions([val_batch()])
    gradient = engine.compute_directions([batch(1, True)])
    found = adamw_direction(optimizer, dict(model.named_parameters()), direction, gradient)
    return {name: whole(x) for name, x in found.items()}


def test_directions_for_adamw_are_sharded_like_the_weights(tmp_path):
    (alone,) = on_processes(1, tmp_path / "one", adamw_step, False)
    for got in on_processes(2, tmp_path / "two", adamw_step, True):
        for name, want in alone.items():
            assert (got[name] - want).norm() <= TOLERANCE * want.norm(), name


class Borrowed(nn.Module):
    """Reads the weight of one layer behind its back, in another that runs."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return F.linear(self.second(x), self.first.weight)


class Scaled(nn.Module):
    """Has a parameter of its own beside a layer."""

    def __init__(self):
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.ones(4)), nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x * self.scale)


def nested():
    """A model with a parameter of its own, and a block that is sharded by itself."""
    model = Scaled()
    fully_shard(model.inner)
    return fully_shard(model)


def one_step(model, x, y):
    engine = GradDotProdEngine(model, (x, y), label_shift=0)
    engine.attach()
    engine.attach_train_batch(x, y, 0, None)
    F.cross_entropy(model(engine.prepare_forward_input(x, y)[0]), torch.cat([y, y])).backward()


def refused(rank, world):
    """Messages for what cannot be scored under several processes."""
    x, y = torch.randn(2, 4), torch.zeros(2, dtype=torch.long)
    mesh = torch.distributed.init_device_mesh("cpu", (world,))
    parallel, late = nn.Linear(4, 4), nn.Linear(4, 4)
    parallel.weight = nn.Parameter(distribute_tensor(parallel.weight.detach(), mesh, [Shard(0)]))
    engine = GradDotProdEngine(late, (x, y))
    engine.attach()
    fully_shard(late)
    attempts = {
        "borrowed": lambda: one_step(fully_shard(Borrowed()), x, y),
        "tensor-parallel": lambda: one_step(parallel, x, y),
        "own": lambda: one_step(fully_shard(Scaled()), x, y),
        "nested": lambda: one_step(nested(), x, y),
        "late": lambda: engine.attach_train_batch(x, y, 0, None),
        "parallel": lambda: one_step(nn.DataParallel(nn.Linear(4, 4)), x, y),
        "fused": lambda: fuse_head(fully_sharded(tiny_gpt2(tied=False))),
        "inside": lambda: one_step(nn.Sequential(DistributedDataParallel(nn.Linear(4, 4))), x, y),
    }
    messages = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            messages[name] = "not refused"
        except GraddotError as error:
            messages[name] = str(error)
    return messages


def test_refusals(tmp_path):
    for messages in on_processes(2, tmp_path, refused):
        assert "first.weight (by " in messages["borrowed"], messages
        assert "weight is a DTensor inside the forward" in messages["tensor-parallel"], messages
        assert "a Scaled has parameters of its own (scale)" in messages["own"], messages
        assert "Give such parameters a module of their own" in messages["nested"], messages
        assert "weight, bias: not a trainable parameter of the model when" in messages["late"], (
            messages
        )
        assert "the model is a DataParallel" in messages["parallel"], messages
        assert "call fuse_head before fully_shard" in messages["fused"], messages
        assert "0 is a DistributedDataParallel" in messages["inside"], messages
