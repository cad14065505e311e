"""What processes may do differently from each other, and options of DDP and FSDP2, against float64."""

import random

import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as collectives
import torch.nn.functional as F
from brute_force import gradient, sample_dots, tiny_gpt2, token_batch, total
from graddot_lm import GraddotError, GradDotProdEngine, fuse_head
from graddot_lm.distributed import are_finite
from loop_steps import Store, attached, run
from model_zoo import causal
from process_group import on_processes
from torch import nn
from torch.distributed._functional_collectives import all_gather_tensor_autograd
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

TOLERANCE = 1e-9


def val_batch():
    return token_batch(2, 9, seed=99)


def given(model, loss_fn=None, **kwargs):
    engine = GradDotProdEngine(model, **kwargs)
    engine.set_directions(engine.compute_directions([val_batch()], loss_fn))
    engine.attach()
    return engine


def message(function, *args):
    """Of the GraddotError that it raises, if it does."""
    try:
        function(*args)
    except GraddotError as error:
        return str(error)
    return None


class Flat(nn.Module):
    """A layer in it sees tokens without their rows, which is learnt for each length."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.inner, self.head = nn.Embedding(61, 6), nn.Linear(6, 6), nn.Linear(6, 61)

    def forward(self, x):
        h = self.table(x)
        return self.head(torch.tanh(self.inner(h.flatten(0, 1)).view_as(h)))


def flat_loss(logits, y):
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


# Rows and tokens of each of two processes, by step; more rows take more runs of the model to check
UNEVEN = [((2, 9), (7, 9)), ((1, 9), (3, 7)), ((4, 6), (1, 7)), ((1, 3), (1, 4)), ((3, 7), (4, 4))]


def uneven_batch(step, rank, flat):
    """With at least two rows for a flat layer, whose layout is learnt anew for each length."""
    rows, tokens = UNEVEN[step][rank]
    return token_batch(rows + flat, tokens, seed=10 * step + rank)


def uneven_steps(rank, world, flat, begin, reshard):
    """Scores of a sharded model whose processes have other rows, and tokens, than each other."""
    model = (Flat() if flat else tiny_gpt2()).double()
    if not flat:
        for block in model.transformer.h:
            fully_shard(block)
    fully_shard(model, reshard_after_forward=reshard)
    engine = given(model, (lambda m, x, y: flat_loss(m(x), y)) if flat else None)
    scores = []

    def one_step(step):
        x, y = uneven_batch(step, rank, flat)
        engine.attach_train_batch(x, y, step, None)
        if flat:
            engine.track_loss(flat_loss(model(x), y)).backward()
        else:
            model(x, labels=y).loss.backward()
        scores.append(engine.aggregate_and_log())

    for step in range(begin, len(UNEVEN)):
        if (refusal := message(one_step, step)) is not None:
            return refusal
    return scores


@pytest.mark.parametrize("reshard", [None, True])
@pytest.mark.parametrize("flat", [False, True])
def test_sharded_processes_with_other_rows_than_each_other(tmp_path, flat, reshard):
    """Which all run the model equally often, for its shards are gathered in step."""
    got = on_processes(2, tmp_path, uneven_steps, flat, 0, reshard)
    model = (Flat() if flat else tiny_gpt2()).double()
    loss = {"loss": flat_loss} if flat else {}
    for rank, scores in enumerate(got):
        for step, found in enumerate(scores):
            train = uneven_batch(step, rank, flat)
            want, scale = (total(d) for d in sample_dots(model, train, val_batch(), **loss))
            # Hugging Face's loss is fp32.
            assert ((found - want).abs() / scale).max() <= (TOLERANCE if flat else 1e-6)


def test_what_takes_other_runs_is_refused_by_all_where_it_comes_first(tmp_path):
    got = on_processes(2, tmp_path, uneven_steps, False, 1, None)
    assert got[0] == got[1] and "1 of 2 processes have a batch of one row" in got[0], got
    got = on_processes(2, tmp_path / "square", uneven_steps, False, 4, None)
    assert got[0] == got[1] and " 1 one of as many tokens as rows" in got[0], got


def finite_of_shards(rank, world):
    """What all say of a sharded NaN, of a NaN that one process has alone, and of what has none; how
    often each asked the others."""
    model = Flat().double()
    fully_shard(model.inner)
    fully_shard(model)
    sharded = [p.detach().clone() for p in model.parameters()]
    sharded[1].to_local()[-1:] = float("nan") if rank == 1 else 0.0
    own = torch.full((2,), float("inf") if rank == 0 else 1.0)
    asked, all_reduce = [], dist.all_reduce

    def counted(*args, **kwargs):
        asked.append(args)
        return all_reduce(*args, **kwargs)

    dist.all_reduce = counted
    return are_finite([*sharded, own, torch.ones(())]), len(asked)


def test_processes_of_a_sharded_model_agree_on_what_is_finite(tmp_path):
    """Or one would run the model once more, with a lower scale, and wait for the others' shards."""
    finite = [True, False, True, True, True, False, True]
    assert on_processes(2, tmp_path, finite_of_shards) == [(finite, 1)] * 2


def static_steps(rank, world, reentrant):
    """Gradients of three steps behind the directions of a model that DDP takes for static."""
    model = tiny_gpt2().double()
    if reentrant:
        for block in model.transformer.h:
            plain = block.forward
            block.forward = lambda x, *_, plain=plain, **__: checkpoint(
                plain, x, use_reentrant=True
            )
    wrapper = DistributedDataParallel(model, static_graph=True)
    engine = given(wrapper)
    grads = []
    for step in range(3):
        x, y = token_batch(2, 9, seed=10 * step + rank)
        engine.attach_train_batch(x, y, step, None)
        if (refusal := message(lambda x=x, y=y: wrapper(x, labels=y).loss.backward())) is not None:
            return refusal
        engine.aggregate_and_log()
        grads.append({n: p.grad for n, p in model.named_parameters()})
        model.zero_grad()
    return grads


def test_directions_are_no_first_backward_of_a_static_graph(tmp_path):
    model = tiny_gpt2().double()
    got = on_processes(2, tmp_path / "plain", static_steps, False)
    for step in range(3):
        parts = [gradient(model, *token_batch(2, 9, seed=10 * step + rank)) for rank in range(2)]
        for grads in got:
            for name, grad in grads[step].items():
                want = (parts[0][name] + parts[1][name]) / 2
                assert (grad - want).norm() <= 1e-6 * want.norm(), (step, name)
    for refusal in on_processes(2, tmp_path / "reentrant", static_steps, True):
        assert "static_graph=True) with reentrant checkpoints" in refusal


def relearnt_steps(rank, world):
    """Scores where one process alone looks again how the rows lie, for 3 rows have 9 tokens."""
    model = causal("Llama")
    fuse_head(model)
    wrapper = DistributedDataParallel(model)
    engine = GradDotProdEngine(wrapper, val_batch(), global_mean=True)
    engine.attach()
    scores = []
    for step in range(2):
        x, y = token_batch(3 if step == 0 or rank == 0 else 1, 9, seed=10 * step + rank)
        engine.attach_train_batch(x, y, step, None)
        xx, yy = engine.prepare_forward_input(x, y)
        wrapper(xx, labels=yy).loss.backward()
        scores.append((x, y, engine.aggregate_and_log()))
        model.zero_grad()
    return scores


def test_a_process_that_looks_again_does_not_count_again_with_the_others(tmp_path):
    for scores in on_processes(2, tmp_path, relearnt_steps):
        for x, y, found in scores:
            want, scale = (total(d) for d in sample_dots(causal("Llama"), (x, y), val_batch()))
            assert ((found - want).abs() / scale).max() <= 1e-5  # fp32


class Jittery(Flat):
    """Adds what no loss sees to its logits, in one process a number of its own: noise to a check."""

    def forward(self, x):
        return super().forward(x) + self.size * random.random()


def jittery_step(rank, world):
    """Scores of a sharded model which one process has to run again to tell noise from mixed samples."""
    model = Jittery().double()
    model.size = 1.0 - rank
    for layer in model.children():
        fully_shard(layer)
    engine = attached(fully_shard(model), val_batch(), label_shift=0)
    x, y = token_batch(4, 9, seed=rank)
    engine.attach_train_batch(x, y, 0, None)
    xx, yy = engine.prepare_forward_input(x, y)
    engine.track_loss(flat_loss(model(xx), yy)).backward()
    return engine.aggregate_and_log()


def test_noise_in_one_process_costs_the_others_a_run_too(tmp_path):
    for rank, scores in enumerate(on_processes(2, tmp_path, jittery_step)):
        train = token_batch(4, 9, seed=rank)
        want, scale = (total(d) for d in sample_dots(Flat(), train, val_batch(), loss=flat_loss))
        assert ((scores - want).abs() / scale).max() <= TOLERANCE


def compiled_step(rank, world):
    """Scores of a compiled model whose shared weight has a sharded direction."""
    model = tiny_gpt2().double()
    for block in model.transformer.h:
        fully_shard(block)
    fully_shard(model)
    engine = given(model)
    model.compile(backend="eager")
    for _ in range(2):  # the first runs uncompiled
        x, y = token_batch(2, 9, seed=rank)
        engine.attach_train_batch(x, y, 0, None)
        model(x, labels=y).loss.backward()
        scores = engine.aggregate_and_log()
    return scores


def test_given_directions_of_a_compiled_sharded_model(tmp_path):
    for rank, scores in enumerate(on_processes(2, tmp_path, compiled_step)):
        train = token_batch(2, 9, seed=rank)
        want, scale = (total(d) for d in sample_dots(tiny_gpt2(), train, val_batch()))
        assert ((scores - want).abs() / scale).max() <= 1e-6


def unsynced(rank, world):
    """Messages where a sharded model's gradients stay where they are."""
    model = fully_shard(tiny_gpt2())
    engine = given(model)
    x, y = token_batch(2, 9, seed=rank)
    engine.attach_train_batch(x, y, 0, None)
    model(x, labels=y).loss.backward()
    engine.prepare_gradients()
    midst = message(engine.compute_directions, [val_batch()])
    engine.aggregate_and_log()
    model.set_requires_gradient_sync(False)
    return midst, message(engine.compute_directions, [val_batch()])


def own_validation(rank, world):
    """The message where each process of a sharded model has a validation batch of its own."""
    engine = GradDotProdEngine(fully_shard(tiny_gpt2()))
    return message(engine.compute_directions, [val_batch(), token_batch(2 + rank, 9, seed=rank)])


def test_directions_of_shards_need_the_same_batches(tmp_path):
    for refusal in on_processes(2, tmp_path, own_validation):
        assert "batch 1 has 16 labelled tokens in one process and 24 in another" in refusal


def test_directions_of_shards_need_their_gradients(tmp_path):
    for midst, refusal in on_processes(2, tmp_path, unsynced):
        assert "a step is under way" in midst
        assert "set_requires_gradient_sync(True)" in refusal


def sum_step(rank, world):
    """Values of a summed loss, of which this process has one row or three."""
    model = tiny_gpt2().double()
    wrapper, store = DistributedDataParallel(model), Store()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    engine = GradDotProdEngine(
        wrapper, val_batch(), loss_reduction="sum", label_shift=1, store=store
    )
    engine.attach(optimizer)
    x, y = token_batch(1 + 2 * rank, 9, seed=rank)
    engine.attach_train_batch(x, y, 0, torch.arange(len(x)))
    xx, yy = engine.prepare_forward_input(x, y)
    logits = wrapper(xx).logits[:, :-1].flatten(0, 1)
    engine.track_loss(F.cross_entropy(logits, yy[:, 1:].flatten(), reduction="sum")).backward()
    optimizer.step()
    engine.aggregate_and_log()
    return store.column("dot"), store.column("value")


def test_values_of_a_summed_loss_count_the_tokens_of_all_processes(tmp_path):
    for dots, values in on_processes(2, tmp_path, sum_step):
        assert torch.allclose(values, 0.5 / 4 * dots, rtol=1e-12)


def joined_steps(rank, world, global_mean, divide_by_initial_world_size):
    """Values over dots of a process that has one batch more than the other, and its lr·n_i/n_train."""
    model = tiny_gpt2().double()
    wrapper, store = DistributedDataParallel(model), Store()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    engine = GradDotProdEngine(wrapper, val_batch(), store=store, global_mean=global_mean)
    engine.attach(optimizer)

    def one_step(step):
        x, y = token_batch(2, 9, seed=10 * step + rank)
        engine.attach_train_batch(x, y, step, torch.arange(len(x)))
        xx, yy = engine.prepare_forward_input(x, y)
        wrapper(xx, labels=yy).loss.backward()
        optimizer.step()
        engine.aggregate_and_log()
        optimizer.zero_grad()

    with wrapper.join(divide_by_initial_world_size=divide_by_initial_world_size):
        for step in range(2 + rank):
            if (refusal := message(one_step, step)) is not None:
                return refusal
    return store.column("value") / store.column("dot")


def test_processes_that_have_no_more_data(tmp_path):
    for ratios in on_processes(2, tmp_path / "initial", joined_steps, False, True):
        assert torch.allclose(ratios, torch.full_like(ratios, 0.5 / 2 / 2), rtol=1e-9)
    for refusal in on_processes(2, tmp_path / "active", joined_steps, False, False):
        assert "divide_by_initial_world_size=False) divides gradients by" in refusal
    for refusal in on_processes(2, tmp_path / "global", joined_steps, True, True):
        assert "cannot be asked for their numbers of labelled tokens" in refusal


def gathered_rows(logits, labels):
    rows = logits.mean(1)
    negatives = torch.cat(collectives.all_gather(rows))
    return F.cross_entropy(rows @ negatives.T, torch.arange(len(rows)))


def functional_gather(logits, labels):
    rows = all_gather_tensor_autograd(logits.mean(1), 0, dist.group.WORLD)
    return F.cross_entropy(rows @ rows.T, torch.arange(len(rows)))


def averaged(logits, labels):
    return collectives.all_reduce(flat_loss(logits, labels)) / dist.get_world_size()


def losses_over_processes(rank, world):
    """Messages for losses made of other processes' rows, and the scores of a mean of their losses."""
    model = Flat().double()
    x, y = token_batch(3, 9, seed=rank)
    found = []
    for loss in (gathered_rows, functional_gather, averaged):
        engine = given(model, lambda m, x, y: flat_loss(m(x), y), label_shift=0)
        engine.attach_train_batch(x, y, 0, None)
        logits = model(x)
        refusal = message(lambda e=engine, z=logits, f=loss: e.track_loss(f(z, y)).backward())
        found.append(refusal or engine.aggregate_and_log())
        engine.detach()
        model.zero_grad()
    return found


def test_losses_made_of_other_processes_rows_are_refused(tmp_path):
    for rank, (*refusals, scores) in enumerate(on_processes(2, tmp_path, losses_over_processes)):
        for refusal in refusals:
            assert "made of what the model returned in other processes" in refusal
        train = token_batch(3, 9, seed=rank)
        want, scale = (total(d) for d in sample_dots(Flat(), train, val_batch(), loss=flat_loss))
        assert ((scores - want).abs() / scale).max() <= TOLERANCE


def test_a_first_batch_in_which_only_the_first_row_has_labels():
    """Position ids of shape (T,): the other rows' gradients are zero for want of labels."""
    model, x = tiny_gpt2().double(), token_batch(3, 9, seed=0)[0]
    y = x.clone()
    y[1:] = -100
    engine = attached(model, None)
    engine.detach()
    engine.set_directions(engine.compute_directions([val_batch()]))
    engine.attach()
    run(engine, (x, y))
    want, scale = (total(d) for d in sample_dots(model, (x[:1], y[:1]), val_batch()))
    got = engine.aggregate_and_log()
    assert ((got[:1] - want).abs() / scale).max() <= 1e-6 and not got[1:].any()


def test_a_first_batch_without_labels_has_scores_of_zero():
    """As one process of several may get."""
    model, x = tiny_gpt2(), token_batch(3, 9, seed=0)[0]
    engine = given(model)
    engine.attach_train_batch(x, torch.full_like(x, -100), 0, None)
    model(x, labels=torch.full_like(x, -100)).loss.backward()
    assert not engine.aggregate_and_log().any()
