"""Samples of several rows, each with a loss of its own rows, against float64 with each sample alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from brute_force import tiny_gpt2, token_batch
from checked_backend import checked
from graddot_lm import GraddotError, GradDotProdEngine, fuse_head
from loop_steps import Store, same_gradients
from model_zoo import causal
from process_group import on_processes
from torch import nn
from torch.nn.parallel import DistributedDataParallel

LAYOUTS = {
    "pairs": [0, 1, 2, 3, 4, 0, 1, 2, 3, 4],
    "interleaved": [0, 0, 1, 1, 2, 2],
    "several": [2, 0, 1, 1, 0, 2, 2, 1, 2, 3],
    "one-pair": [0, 0],
    "one-row": [0, 1, 2],
}
MODELS = {
    "gpt2": tiny_gpt2,
    "llama": lambda: causal("Llama"),
    "untied": lambda: tiny_gpt2(tied=False),
}


def log_probs(model, ids):
    """Of every row, (rows,)."""
    each = model(ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    return each.gather(2, ids[:, 1:, None]).sum((1, 2))


def losses(scores, samples):
    """Of every sample: the first of its rows is to be preferred to the others, (N,)."""
    found = []
    for i in range(max(samples) + 1):
        own = torch.stack([scores[r] for r, sample in enumerate(samples) if sample == i])
        found.append(0.1 * own.sum() / 7 + torch.logsumexp(own - own[0], 0))
    return torch.stack(found)


def gradients(model, ids, samples):
    """Of every sample's loss, from its rows alone, fp64."""
    exact, found = copy.deepcopy(model).double(), []
    for i in range(max(samples) + 1):
        exact.zero_grad()
        rows = [r for r, sample in enumerate(samples) if sample == i]
        losses(log_probs(exact, ids[rows]), [0] * len(rows)).sum().backward()
        found.append({n: p.grad.clone() for n, p in exact.named_parameters()})
    return found


def mean_of(found):
    return {n: sum(g[n] for g in found) / len(found) for n in found[0]}


def dots_of(directions, found):
    """(K, N), and their Cauchy-Schwarz scales."""
    flat = lambda g: torch.cat([x.flatten() for x in g.values()])
    d, g = (torch.stack([flat(x) for x in own]) for own in (directions, found))
    return d @ g.T, d.norm(dim=1)[:, None] * g.norm(dim=1)


def step(engine, ids, samples, *, number=0, factor=1.0, model=None, sum_up=torch.mean):
    model = engine.model if model is None else model
    engine.attach_train_batch(ids, None, number, torch.arange(max(samples) + 1), samples=samples)
    loss = engine.track_loss(sum_up(losses(log_probs(model, ids), samples)))
    (factor * loss).backward()
    engine.prepare_gradients()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_scores_values_and_gradients(name, layout, dtype, close):
    if name == "llama" and dtype == torch.float64:
        pytest.skip("its norms and positions are of fp32")
    model, samples = MODELS[name]().to(dtype), LAYOUTS[layout]
    ids, _ = token_batch(len(samples), 9, seed=1)
    directions = {
        target: mean_of(gradients(model, token_batch(4, 7, seed=seed)[0], [0, 1, 1, 0]))
        for target, seed in (("a", 2), ("b", 3))
    }
    found = gradients(model, ids, samples)
    want, scales = dots_of(directions.values(), found)
    store, tolerance = Store(), 1e-5 if dtype == torch.float32 else 1e-10
    engine = GradDotProdEngine(model, store=store)
    engine.set_directions(directions)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    engine.attach(optimizer)
    for number in range(2):  # the first is checked
        optimizer.zero_grad()
        step(engine, ids, samples, number=number, factor=8.0)
        same_gradients(model, {n: 8 * g for n, g in mean_of(found).items()}, tolerance)
        close(engine.aggregate_and_log(), want, tolerance, scales)
        assert set(store.columns.pop("n_tokens")) == {1}
        store.columns.clear()

    optimizer.zero_grad()
    step(engine, ids, samples)
    with torch.no_grad():
        for group in optimizer.param_groups:
            group["lr"] = 1e-30  # a step that is taken, and moves nothing
    optimizer.step()
    engine.aggregate_and_log()
    close(1e30 * store.column("value_b"), want[1] / len(found), tolerance, scales[1] / len(found))


def test_accumulation_and_a_sum(close):
    model, parts = tiny_gpt2().double(), [LAYOUTS["pairs"], LAYOUTS["several"]]
    batches = [token_batch(len(samples), 6, seed=k)[0] for k, samples in enumerate(parts)]
    found = [gradients(model, *both) for both in zip(batches, parts, strict=True)]
    direction = mean_of(gradients(model, token_batch(2, 7, seed=9)[0], [0, 0]))
    want, scales = dots_of([direction], found[0] + found[1])
    for reduction, sum_up in (("mean", torch.mean), ("sum", torch.sum)):
        engine, store = GradDotProdEngine(model, loss_reduction=reduction), Store()
        engine.store = store
        engine.set_directions(direction)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-30)
        engine.attach(optimizer)
        for ids, samples in zip(batches, parts, strict=True):
            step(engine, ids, samples, factor=0.5, sum_up=sum_up)
        optimizer.step()
        close(engine.aggregate_and_log(), want[0], 1e-10, scales[0])
        weights = [1 / 10] * 5 + [1 / 8] * 4 if reduction == "mean" else [1 / 9] * 9
        weights = torch.tensor(weights, dtype=torch.float64)
        close(1e30 * store.column("value"), weights * want[0], 1e-10, weights * scales[0])
        engine.detach()
        optimizer.zero_grad()


def test_validation_pairs_give_the_direction(close):
    """By compute_directions, of batches of several sizes, for which each row has one label."""
    model = tiny_gpt2().double()
    batches = [(token_batch(n, 7, seed=n)[0], [*range(n // 2)] * 2) for n in (2, 6, 4)]
    want = [g for ids, samples in batches for g in gradients(model, ids, samples)]
    engine = GradDotProdEngine(model)
    loss = lambda model, ids, labels: losses(
        log_probs(model, ids), [*range(len(ids) // 2)] * 2
    ).mean()
    got = engine.compute_directions([(ids, torch.ones(len(ids))) for ids, _ in batches], loss)
    for name, g in mean_of(want).items():
        assert torch.allclose(got[name], g, rtol=1e-10, atol=1e-12), name


def test_compiled(close):
    model, samples = tiny_gpt2(), LAYOUTS["pairs"]
    ids, _ = token_batch(len(samples), 9, seed=1)
    direction = mean_of(gradients(model, token_batch(4, 7, seed=2)[0], [0, 1, 1, 0]))
    want, scales = dots_of([direction], gradients(model, ids, samples))
    engine = GradDotProdEngine(model)
    engine.set_directions(direction)
    engine.attach()
    compiled = torch.compile(model, backend=checked)
    for _ in range(3):
        model.zero_grad()
        step(engine, ids, samples, model=compiled)
        close(engine.aggregate_and_log(), want[0], 1e-5, scales[0])


def on_two(rank, world):
    model = tiny_gpt2()
    parts = [LAYOUTS["pairs"], LAYOUTS["several"]]
    batches = [token_batch(len(samples), 6, seed=k)[0] for k, samples in enumerate(parts)]
    direction = mean_of(gradients(model, token_batch(2, 7, seed=9)[0], [0, 0]))
    wrapped = DistributedDataParallel(model)
    engine = GradDotProdEngine(wrapped, global_mean=True, store=(store := Store()))
    engine.set_directions(direction)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-30)
    engine.attach(optimizer)
    step(engine, batches[rank], parts[rank], model=wrapped)
    optimizer.step()
    scores = engine.aggregate_and_log()
    found = [gradients(model, *both) for both in zip(batches, parts, strict=True)]
    want, scales = dots_of([direction], found[rank])
    same_gradients(model, mean_of(found[0] + found[1]), 1e-5)
    errors = [
        (scores - want[0]) / scales[0],
        9e30 * store.column("value") / scales[0] - want[0] / scales[0],
    ]
    return [float(x.abs().max()) for x in errors]


def test_processes_weigh_samples_alike(tmp_path):
    for errors in on_processes(2, tmp_path, on_two):
        assert max(errors) < 1e-6


def engine_for(model, samples=(0, 1, 0, 1), **kwargs):
    engine = GradDotProdEngine(model, **kwargs)
    engine.set_directions({n: torch.ones_like(p) for n, p in model.named_parameters()})
    engine.attach()
    ids, _ = token_batch(4, 7, seed=1)
    engine.attach_train_batch(ids, None, 0, None, samples=samples)
    return engine, ids


@pytest.mark.parametrize(
    "samples, reason",
    [
        ([0, 1, 0], "samples has 3 entries; expected one for each of the batch's 4 rows"),
        ([0, 2, 0, 2], r"numbered \[0, 2\]; expected 0 to N - 1"),
        ([-1, 0, -1, 0], r"numbered \[-1, 0\]; expected 0 to N - 1"),
        ([[0, 1], [0, 1]], r"samples have shape \(2, 2\)"),
        ([0.0, 1.0, 0.0, 1.0], "samples have .* dtype torch.float32; expected .* whole numbers"),
        ([], r"samples have shape \(0,\)"),
    ],
)
def test_wrong_numbers_are_refused(samples, reason):
    with pytest.raises(GraddotError, match=reason):
        engine_for(tiny_gpt2(), samples)


def test_what_cannot_be_had_is_refused():
    with pytest.raises(GraddotError, match="samples of several rows need norms=False"):
        engine_for(tiny_gpt2(), norms=True)
    with pytest.raises(GraddotError, match="samples of several rows need per_token=False"):
        engine_for(tiny_gpt2(), per_token=True)
    model = tiny_gpt2()
    ids, _ = token_batch(4, 7, seed=1)
    engine = GradDotProdEngine(model, (ids, ids))
    engine.attach()
    with pytest.raises(GraddotError, match="need given directions in place of val_data"):
        engine.attach_train_batch(ids, None, 0, None, samples=[0, 1, 0, 1])


def test_losses_that_are_not_the_samples_own_are_refused():
    model = tiny_gpt2()
    engine, ids = engine_for(model)
    scores = log_probs(model, ids)
    with pytest.raises(GraddotError, match="compares samples: .* some of the 4 rows"):
        engine.track_loss(losses(scores, [0, 0, 1, 1]).mean())
    engine.clear_gradients()

    model = tiny_gpt2()
    engine, ids = engine_for(model)
    with pytest.raises(GraddotError, match="model's loss .* Expected the mean"):
        out = model(
            ids, labels=ids.where(torch.arange(7) < torch.tensor([[2], [7], [6], [3]]), -100)
        )
        engine.track_loss(out.loss + losses(scores.detach(), [0, 1, 0, 1]).mean()).backward()
        engine.prepare_gradients()

    model = tiny_gpt2()
    fuse_head(model)
    engine, ids = engine_for(model)
    with pytest.raises(GraddotError, match="fused head's loss is a mean over tokens"):
        model(ids, labels=ids)


class Pairwise(nn.Module):
    """Computes the loss of its pairs in its forward, as older models of rewards do."""

    def __init__(self):
        super().__init__()
        self.model = tiny_gpt2()

    def forward(self, ids):
        chosen, rejected = log_probs(self.model, ids).chunk(2)
        return {"loss": -F.logsigmoid(chosen - rejected).mean()}


def test_a_model_may_return_the_loss_of_its_pairs(close):
    torch.manual_seed(0)
    model = Pairwise().double()
    ids, _ = token_batch(6, 7, seed=1)
    found = []
    for i in range(3):
        model.zero_grad()
        model(ids[[i, i + 3]])["loss"].backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters()})
    direction = mean_of(found[:2])
    want, scales = dots_of([direction], found)
    engine = GradDotProdEngine(model)
    engine.set_directions(direction)
    engine.attach()
    model.zero_grad()
    engine.attach_train_batch(ids, None, 0, None, samples=[0, 1, 2, 0, 1, 2])
    model(ids)["loss"].backward()
    engine.prepare_gradients()
    close(engine.aggregate_and_log(), want[0], 1e-10, scales[0])
