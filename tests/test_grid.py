"""Every kind of model in every kind of loop, all scores, gradients and steps against float64.

The brute force is one float64 backward a row, each row by itself and cut to its own length; whatever
a loop does with the rows, its scores are dots of those gradients and its `.grad` is their mean over
labelled tokens. Models run in fp32, and are called as their users call them: `model(**batch).loss`
for those of transformers, a loss on the outputs for the others.
"""

import copy
import functools
import tempfile
from pathlib import Path

import pytest
import torch
from brute_force import total
from checked_backend import checked
from grid_cells import (
    LONG,
    MORE,
    NOT_POSSIBLE,
    OTHER_VAL,
    SHORT,
    SHORT_VAL,
    SUBJECTS,
    TOLERANCE_16_BIT,
    TRAIN,
    VAL,
    BruteForce,
    Cell,
)
from loop_steps import Store
from process_group import on_processes
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel


def plain_step(cell):
    coverage = cell.attach(VAL).coverage()
    assert not coverage.excluded and coverage.share == 1
    cell.record("coverage", f"{len(coverage.covered)}, {coverage.share:.0%}")
    cell.step(TRAIN)
    cell.check_scores(VAL, TRAIN)
    cell.check_gradient(TRAIN)


def targets(cell):
    val = {"a": VAL, "b": OTHER_VAL}
    cell.attach(val)
    cell.step(TRAIN)
    cell.check_scores(val, TRAIN)
    cell.check_gradient(TRAIN)


def directions(cell):
    cell.attach()
    cell.direct(VAL + SHORT_VAL)
    cell.step(TRAIN)
    cell.check_scores(VAL + SHORT_VAL, TRAIN)
    cell.check_gradient(TRAIN)


def accumulation_riding(cell):
    cell.attach(VAL)
    micros = TRAIN, MORE
    for rows in micros:
        cell.step(rows, factor=0.5)
    cell.check_scores(VAL, TRAIN + MORE)
    parts = [cell.want.gradient(rows) for rows in micros]
    cell.check_gradient({n: 0.5 * (parts[0][n] + parts[1][n]) for n in parts[0]})


def accumulation_held(cell):
    cell.attach()
    cell.direct(VAL)
    micros = TRAIN, SHORT
    for rows in micros:
        cell.step(rows, factor=0.5)
    cell.check_scores(VAL, TRAIN + SHORT)
    parts = [cell.want.gradient(rows) for rows in micros]
    cell.check_gradient({n: 0.5 * (parts[0][n] + parts[1][n]) for n in parts[0]})


def autocast(cell, dtype):
    """With a GradScaler; validation rows riding along, then a given direction."""
    cell.tolerance = TOLERANCE_16_BIT
    for given in (False, True):
        cell.model.zero_grad()
        optimizer = torch.optim.SGD(cell.model.parameters(), lr=0.0)
        cell.attach(None if given else VAL, optimizer)
        scaler = torch.amp.GradScaler(cell.device, init_scale=1024.0)
        with torch.autocast(cell.device, dtype):
            if given:
                cell.direct(VAL, loss_scale=1024.0)
            loss = cell.loss(TRAIN)
        scaler.scale(loss).backward()
        cell.engine.prepare_gradients()
        scaler.unscale_(optimizer)
        cell.check_gradient(TRAIN)
        scaler.step(optimizer)
        cell.check_scores(VAL, TRAIN)


def checkpointing(cell, reentrant):
    kwargs = {"use_reentrant": reentrant}
    cell.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    if hasattr(cell.model, "peft_config"):  # its embeddings are frozen
        cell.model.enable_input_require_grads()
    for given in (False, True):
        cell.attach(None if given else VAL)
        if given:
            cell.direct(VAL)
        for _ in range(2):  # the first backward is checked, the second is not
            cell.model.zero_grad()
            cell.step(TRAIN)
            cell.check_scores(VAL, TRAIN)
            cell.check_gradient(TRAIN)


def padding(cell):
    """Rows of several lengths, in one batch and from step to step, with their masks."""
    for given in (False, True):
        val = VAL + SHORT_VAL
        cell.attach(None if given else val, mask=True)
        if given:
            cell.direct(val)
        for train in (TRAIN[:2] + SHORT[:2], SHORT, LONG + MORE):
            cell.model.zero_grad()
            cell.step(train, mask=True)
            cell.check_scores(val, train)
            cell.check_gradient(train)


def evaluation(cell):
    """eval(), a forward of other rows and train(), wherever a loop may have them."""
    plain, modes = copy.deepcopy(cell.model).eval(), [m.training for m in cell.model.modules()]
    x, y = cell.batch(SHORT)
    with torch.no_grad():
        want = cell.subject.loss(plain, x, y)

    def evaluate():
        cell.model.eval()
        with torch.no_grad():
            assert torch.equal(cell.subject.loss(cell.model, x, y), want)
        for module, mode in zip(cell.model.modules(), modes, strict=True):
            module.training = mode

    cell.attach(VAL)
    evaluate()
    loss = cell.loss(TRAIN)
    evaluate()
    loss.backward()
    evaluate()
    cell.engine.prepare_gradients()
    evaluate()
    cell.check_scores(VAL, TRAIN)
    cell.check_gradient(TRAIN)


def sizes(cell):
    """Other numbers of rows, and other lengths, from step to step."""
    cell.attach(VAL)
    for train in (TRAIN, MORE, TRAIN[:1], TRAIN + MORE):
        cell.model.zero_grad()
        cell.step(train)
        cell.check_scores(VAL, train)
        cell.check_gradient(train)
    cell.attach()
    cell.direct(VAL)
    for train in (TRAIN, SHORT, LONG, MORE):
        cell.model.zero_grad()
        cell.step(train)
        cell.check_scores(VAL, train)
        cell.check_gradient(train)


def clipped_step(cell):
    """The weights and values of a clipped SGD step, and the scores of the step after it."""
    lr, most, store = 0.5, 0.1, Store()
    optimizer = torch.optim.SGD(cell.model.parameters(), lr=lr)
    cell.attach(VAL, optimizer, store=store)
    want = cell.want.gradient(TRAIN)
    clip = most / (torch.cat([g.flatten() for g in want.values()]).norm().item() + 1e-6)
    assert clip < 1
    moved = {
        n: p.detach().double().cpu() - lr * clip * want[n]
        for n, p in cell.model.named_parameters()
        if p.requires_grad
    }
    cell.step(TRAIN)
    nn.utils.clip_grad_norm_(cell.model.parameters(), most)
    optimizer.step()
    cell.engine.aggregate_and_log(gradient_scale=clip)
    for n, p in cell.model.named_parameters():
        if p.requires_grad:
            assert (p.double().cpu() - moved[n]).norm() <= 1e-6 * moved[n].norm(), n
    counts = torch.tensor([cell.want.counts[i] for i in TRAIN], dtype=torch.float64)
    share = lr * clip * counts / counts.sum()
    dots, scales = (share * total(parts) for parts in cell.want.dots(VAL, TRAIN))
    cell.close(store.column("value"), dots, scales)
    optimizer.zero_grad()
    after = BruteForce(cell.subject, cell.model, MORE + VAL)
    cell.step(MORE)
    cell.check_gradient(after.gradient(MORE))
    cell.check_scores(VAL, MORE, after)


def attached_again(cell):
    """Scores, a step without the engine, and scores again."""
    forwards = [m.__dict__.get("forward") for m in cell.model.modules()]
    engine = cell.attach(VAL)
    cell.step(TRAIN)
    cell.check_scores(VAL, TRAIN)
    engine.detach()
    now = [m.__dict__.get("forward") for m in cell.model.modules()]
    assert all(a is b for a, b in zip(forwards, now, strict=True))
    cell.model.zero_grad()
    cell.subject.loss(cell.model, *cell.batch(SHORT)).backward()
    cell.check_gradient(SHORT)
    engine.attach()
    cell.model.zero_grad()
    cell.step(MORE)
    cell.check_scores(VAL, MORE)
    cell.check_gradient(MORE)


def norms(cell):
    """Gradient norms and cosines, with two targets' rows and with a given direction."""
    val = {"a": VAL, "b": OTHER_VAL}
    cell.attach(val, norms=True)
    cell.step(TRAIN, factor=8.0)
    cell.check_norms(list(val.values()), TRAIN)
    cell.check_scores(val, TRAIN)
    cell.attach(norms=True)
    cell.direct(VAL)
    cell.step(TRAIN)
    cell.check_norms([VAL], TRAIN)


def compiled(cell):
    """By torch.compile as a whole, from the second step on: the first is checked. Of batches of several
    sizes there is a second graph, which rows that ride along have."""
    for part in cell.model.modules():
        if hasattr(part, "config"):
            part.config.use_cache = False  # a cache is an object that no graph holds
    for given, batches in ((False, (TRAIN, MORE, TRAIN)), (True, (MORE, TRAIN))):
        torch.compiler.reset()
        counters.clear()
        cell.called = torch.compile(cell.model, backend=checked)
        cell.attach(None if given else VAL)
        if given:
            cell.direct(VAL)
        for rows in batches:
            cell.model.zero_grad()
            cell.step(rows)
            cell.check_scores(VAL, rows)
            cell.check_gradient(rows)
        assert counters["stats"]["calls_captured"] > 0
        ours = [reason for reason in counters["graph_break"] if "graddot" in reason]
        assert not ours, ours


def two_processes(cell):
    """Each with rows of its own, by DistributedDataParallel."""

    def part(rank, world):
        errors = []
        cell.record = lambda _, error: errors.append(error)
        # Experts that no row of a process uses have no gradient there.
        cell.called = DistributedDataParallel(cell.model, find_unused_parameters=True)
        cell.attach(VAL, global_mean=True)
        rows = TRAIN[rank::world]
        cell.step(rows)
        cell.check_scores(VAL, rows)
        cell.check_gradient(TRAIN)
        return errors

    with tempfile.TemporaryDirectory() as folder:
        for errors in on_processes(2, Path(folder), part):
            for error in errors:
                cell.record("relative_error", error)


LOOPS = {  # bench/exactness.py makes a table of them
    "step": plain_step,
    "targets": targets,
    "directions": directions,
    "accumulation-riding": accumulation_riding,
    "accumulation-held": accumulation_held,
    "bf16": functools.partial(autocast, dtype=torch.bfloat16),
    "fp16": functools.partial(autocast, dtype=torch.float16),
    "checkpointing": functools.partial(checkpointing, reentrant=False),
    "reentrant": functools.partial(checkpointing, reentrant=True),
    "padding": padding,
    "evaluation": evaluation,
    "sizes": sizes,
    "clipping": clipped_step,
    "attached-again": attached_again,
    "norms": norms,
    "compiled": compiled,
    "two-processes": two_processes,
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("model", SUBJECTS)
def test_grid(model, loop, record_property):
    record_property("cell", f"{model}/{loop}")
    if reason := NOT_POSSIBLE.get((model, loop)):
        record_property("not_possible", reason)
        pytest.skip(reason)
    LOOPS[loop](Cell(model, record_property))
