"""What a step's rows say of it: values under accumulation, clipping and several optimizers, and
whether the step was applied."""

import copy
import functools

import pytest
import torch
from brute_force import gradient, lm_loss, sample_dots, tiny_gpt2, token_batch, total
from graddot_lm import GraddotError, GradDotProdEngine
from loop_steps import (
    Store,
    attached,
    run,
    same_gradients,
)
from torch import nn


@pytest.mark.parametrize("weighting", ["tokens", "equal"])
def test_values_of_accumulated_clipped_steps(close, weighting):
    """What the val loss gains if the sample's gradient is left out of the SGD step, two lrs."""
    model = tiny_gpt2().double()
    micros = [token_batch(n, 15, seed=n, ragged=True) for n in (3, 2)]
    val, store = token_batch(2, 15, seed=9), Store()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    groups = [
        {"params": matrices, "lr": 1e-5},
        {"params": [p for p in model.parameters() if p.dim() == 1], "lr": 4e-5},
    ]
    optimizer = torch.optim.SGD(groups)
    tokens = [(y[:, 1:] != -100).sum(1) for _, y in micros]
    counts = [int(n.sum()) for n in tokens]
    factors = [n / sum(counts) if weighting == "tokens" else 0.5 for n in counts]
    engine, before = attached(model, val, optimizer, store=store), copy.deepcopy(model)
    for micro, factor in zip(micros, factors, strict=True):
        run(engine, micro, factor=factor)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    clip = min(1.0, 0.5 / (norm.item() + 1e-6))
    assert clip < 1
    lrs = {n: 1e-5 if p.dim() > 1 else 4e-5 for n, p in model.named_parameters()}
    optimizer.step()
    engine.aggregate_and_log(gradient_scale=clip)
    after, changes = copy.deepcopy(model), []
    reached = lm_loss(after(val[0]).logits, val[1]).item()
    for (x, y), factor, n, own_tokens in zip(micros, factors, counts, tokens, strict=True):
        for i in range(len(x)):
            own = gradient(before, x[i : i + 1], y[i : i + 1])
            weight = clip * factor * own_tokens[i].item() / n
            with torch.no_grad():
                for name, p in after.named_parameters():
                    p.copy_(model.get_parameter(name) + lrs[name] * weight * own[name])
            changes.append(lm_loss(after(val[0]).logits, val[1]).item() - reached)
    close(store.column("value"), torch.tensor(changes, dtype=torch.float64), 2e-3)


RISING = {
    "maximize": ((1.0, 1.0), True, (-0.5, -0.5)),
    "negated": ((-1.0, -1.0), False, (-0.5, -0.5)),
    "negated-maximize": ((-1.0, -1.0), True, (0.5, 0.5)),
    "forgets-and-retains": ((-0.25, 0.75), False, (-0.25, 0.75)),
}


@pytest.mark.parametrize("name", RISING)
def test_values_of_a_step_in_which_a_loss_rises(close, name):
    """As in unlearning: what the step takes from the val loss has the other sign."""
    factors, maximize, weights = RISING[name]
    model = tiny_gpt2().double()
    micros = [token_batch(n, 15, seed=n) for n in (3, 2)]
    val, store = token_batch(2, 15, seed=9), Store()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, maximize=maximize)
    want = [
        1e-6 * weight / len(batch[0]) * total(sample_dots(model, batch, val)[0])
        for batch, weight in zip(micros, weights, strict=True)
    ]
    before = lm_loss(model(val[0]).logits, val[1]).item()
    engine = attached(model, val, optimizer, store=store)
    for micro, factor in zip(micros, factors, strict=True):
        run(engine, micro, factor=factor)
    optimizer.step()
    engine.aggregate_and_log()
    got = store.column("value")
    close(got, torch.cat(want), 1e-9)
    assert set(store.column("lr").tolist()) == {1e-6}
    fell = before - lm_loss(model(val[0]).logits, val[1]).item()
    close(got.sum() * sum(map(abs, factors)), torch.tensor(fell).double(), 1e-2)


def test_value_with_num_items_in_batch(close):
    """transformers' sum over the tokens of all micro-batches: gradient, scores and weights."""
    model, store = tiny_gpt2(), Store()
    micros = [token_batch(n, 15, seed=n, ragged=True) for n in (3, 2)]
    val = token_batch(2, 15, seed=9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    items = sum((y[:, 1:] != -100).sum() for _, y in micros)
    want = [sample_dots(model, micro, val) for micro in micros]
    dots, scales = (torch.cat([total(w[k]) for w in want]) for k in (0, 1))
    train = torch.cat([x for x, _ in micros]), torch.cat([y for _, y in micros])
    want_grad, share = gradient(model, *train), (train[1][:, 1:] != -100).sum(1) / items
    engine = GradDotProdEngine(model, val, store=store)
    engine.attach(optimizer)
    for x, y in micros:
        engine.attach_train_batch(x, y, 0, torch.arange(len(x)))
        x, y = engine.prepare_forward_input(x, y)
        (model(x, labels=y, num_items_in_batch=items).loss * 8).backward()
        engine.prepare_gradients()
    for p in model.parameters():
        p.grad /= 8
    same_gradients(model, want_grad, 1e-5)
    optimizer.step()
    close(engine.aggregate_and_log(), dots, 1e-5, scales)
    close(store.column("value"), 0.5 * share * dots, 1e-5, 0.5 * share * scales)


def test_losses_of_several_forms_in_a_step_are_refused():
    model, val, batch = (
        tiny_gpt2(),
        token_batch(1, 9, seed=2),
        token_batch(2, 9, seed=1),
    )
    engine = attached(model, val, store=Store(), label_shift="auto")
    for items in ({}, {"num_items_in_batch": torch.tensor(30)}):
        engine.attach_train_batch(*batch, 0, torch.arange(2))
        x, y = engine.prepare_forward_input(*batch)
        model(x, labels=y, **items).loss.backward()
        engine.prepare_gradients()
    with pytest.raises(GraddotError, match="were divided by num_items_in_batch, of others not"):
        engine.aggregate_and_log()


def test_a_step_after_its_values_is_refused():
    model, val = tiny_gpt2(), token_batch(1, 9, seed=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    engine = attached(model, val, optimizer, store=Store())
    run(engine, token_batch(2, 9, seed=1))
    engine.aggregate_and_log()
    with pytest.raises(GraddotError, match="came after aggregate_and_log"):
        optimizer.step()
    optimizer.zero_grad()
    run(engine, token_batch(2, 9, seed=1))
    engine.aggregate_and_log()  # as if a GradScaler had skipped the step
    lm_loss(model(val[0]).logits, val[1]).backward()
    optimizer.step()  # of a step without scores
    with pytest.raises(GraddotError, match="optimizer does not update .* scored parameters"):
        GradDotProdEngine(tiny_gpt2(), val).attach(optimizer)


def test_steps_without_their_scores_between_are_refused():
    """Their values would be those of micro-batches of one step, with half the weight each."""
    model, val = tiny_gpt2(), token_batch(1, 9, seed=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    engine = attached(model, val, optimizer, store=Store())
    run(engine, token_batch(2, 9, seed=1))
    optimizer.step()
    with pytest.raises(GraddotError, match=r"aggregate_and_log\(\) after every optimizer.step"):
        run(engine, token_batch(2, 9, seed=3), 1)
    engine.aggregate_and_log()
    run(engine, token_batch(2, 9, seed=3), 1)


@pytest.mark.parametrize("both", [True, False], ids=["both runs", "the one that counts"])
def test_a_step_that_runs_the_model_at_two_weights(close, both):
    """As sharpness-aware minimisation's: the step takes the gradient of the second run alone."""
    model, val, store = tiny_gpt2().double(), token_batch(1, 9, seed=2), Store()
    train = token_batch(2, 9, seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    engine = attached(model, val, optimizer, store=store)
    if both:
        run(engine, train)
    else:
        lm_loss(model(train[0]).logits, train[1]).backward()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * p.grad)
    optimizer.zero_grad()
    if both:
        with pytest.raises(GraddotError, match="the weights have changed since the batch before"):
            run(engine, train)
        return
    dots, scales = sample_dots(model, train, val)
    run(engine, train)
    optimizer.step()
    close(engine.aggregate_and_log(), total(dots), 1e-10, total(scales))
    torch.testing.assert_close(store.column("value"), 0.5 / 2 * total(dots))


def test_an_optimizer_that_goes_by_the_loss(close):
    """Its line search would see the validation rows' loss, too; given directions, it is the training's."""
    model, val, train = tiny_gpt2().double(), token_batch(1, 9, seed=2), token_batch(2, 9, seed=1)
    plain, make = (
        copy.deepcopy(model),
        functools.partial(torch.optim.LBFGS, line_search_fn="strong_wolfe"),
    )
    with pytest.raises(GraddotError, match="LBFGS goes by the loss, too"):
        attached(model, val, make(model.parameters()))
    engine = GradDotProdEngine(model, label_shift=1)
    engine.set_directions(gradient(model, *val))
    want = total(sample_dots(model, train, val)[0])
    optimizers = [make(m.parameters(), max_iter=3) for m in (model, plain)]
    engine.attach(optimizers[0])
    scores = []

    def scored():
        optimizers[0].zero_grad()
        engine.attach_train_batch(*train, 0, None)
        loss = engine.track_loss(lm_loss(model(train[0]).logits, train[1]))
        loss.backward()
        scores.append(engine.aggregate_and_log())
        return loss

    def regular():
        optimizers[1].zero_grad()
        loss = lm_loss(plain(train[0]).logits, train[1])
        loss.backward()
        return loss

    optimizers[0].step(scored)
    optimizers[1].step(regular)
    close(scores[0], want, 1e-10)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("ids", [torch.arange(3), 7, torch.zeros(2, 1)])
def test_ids_that_are_not_one_a_sample_are_refused(ids):
    engine = attached(tiny_gpt2(), token_batch(1, 9, seed=2))
    with pytest.raises(GraddotError, match="batch_idx has shape .* each of the 2 samples"):
        engine.attach_train_batch(*token_batch(2, 9, seed=1), 0, ids)


@pytest.mark.parametrize(
    "columns, problem",
    [
        ({"loss": [0.0] * 3}, "column loss has 3 entries; expected 2"),  # of the joint batch
        ({"dot": [0.0] * 2}, r"\['dot'\] are the engine's own"),
        ({"step": [0] * 2}, r"\['step'\] are the engine's own"),
    ],
)
def test_columns_that_are_not_of_the_samples_are_refused(columns, problem):
    engine = attached(tiny_gpt2(), token_batch(1, 9, seed=2), store=Store())
    run(engine, token_batch(2, 9, seed=1))
    with pytest.raises(GraddotError, match=problem):
        engine.aggregate_and_log(columns)
    assert engine.aggregate_and_log({"loss": [0.0] * 2}).shape == (2,)


def two_optimizers(model, kind=torch.optim.SGD, **options):
    """One for the matrices of the blocks, which get no lr of their own here, one for the rest."""
    matrices = [p for p in model.transformer.h.parameters() if p.dim() == 2]
    ids = set(map(id, matrices))
    rest = [p for p in model.parameters() if id(p) not in ids]
    return [kind(matrices, lr=0.25, **options), torch.optim.SGD(rest, lr=0.5)]


@pytest.mark.parametrize("per_parameter", [False, True])
def test_several_optimizers(close, per_parameter):
    """The rows of one optimizer with as many groups; in any order of their steps."""
    train, val, rows = token_batch(3, 9, seed=1), token_batch(1, 9, seed=2), []
    for single in (True, False):
        model, store = tiny_gpt2(), Store()
        optimizers = two_optimizers(model)
        if single:
            groups = [
                dict(g, lr=one.defaults["lr"]) for one in optimizers for g in one.param_groups
            ]
            optimizers = [torch.optim.SGD([{k: g[k] for k in ("params", "lr")} for g in groups])]
        engine = attached(model, val, optimizers, store=store, per_parameter=per_parameter)
        for step in range(2):
            run(engine, train, step)
            for one in reversed(optimizers):
                one.step()
                one.zero_grad()
            engine.aggregate_and_log()
        engine.detach_for_evaluation()
        engine.reattach_after_evaluation()
        rows.append(store.columns)
    for name, want in rows[0].items():
        assert rows[1][name] == pytest.approx(want, rel=1e-6), name
    assert all(rows[1]["applied"])


def test_muon_beside_another_optimizer():
    model, val, store = tiny_gpt2(), token_batch(1, 9, seed=2), Store()
    optimizers = two_optimizers(model, torch.optim.Muon)
    engine = attached(model, val, optimizers, store=store, per_parameter=True)
    run(engine, token_batch(3, 9, seed=1))
    dots = engine.parameter_dots()
    for one in optimizers:
        one.step()
    engine.aggregate_and_log()
    muons = {id(p) for p in optimizers[0].param_groups[0]["params"]}
    lr = {n: 0.25 if id(p) in muons else 0.5 for n, p in model.named_parameters()}
    want = sum(lr[n] * d for n, d in dots.items()) / 3
    torch.testing.assert_close(store.column("value"), want)


def test_learning_rates_that_are_set_right_before_the_step():
    """After prepare_gradients, as loops with a schedule of their own do, each optimizer's by itself;
    what is set after the step is the next one's."""
    model, val, store = tiny_gpt2(), token_batch(1, 9, seed=2), Store()
    optimizers = two_optimizers(model)
    engine = attached(model, val, optimizers, store=store, per_parameter=True)
    for seed in (1, 3):  # micro-batches
        run(engine, token_batch(3, 9, seed=seed))
    dots, lr = engine.parameter_dots(), {}
    for rate, one in zip((0.125, 2.0), optimizers, strict=True):
        one.param_groups[0]["lr"] = rate
        lr |= {id(p): rate for p in one.param_groups[0]["params"]}
        one.step()
        one.param_groups[0]["lr"] = 100.0
    engine.aggregate_and_log()
    want = sum(lr[id(p)] * dots[n] for n, p in model.named_parameters()) / 6
    torch.testing.assert_close(store.column("value"), want)
    assert set(store.columns["lr"]) == {0.125}


@pytest.mark.parametrize("skipped", [0, 1])
def test_one_of_several_optimizers_skips_the_step(skipped):
    """A GradScaler looks at each optimizer's own gradients: values are of those that moved."""
    model, val, store = tiny_gpt2(), token_batch(1, 9, seed=2), Store()
    optimizers = two_optimizers(model)
    engine = attached(model, val, optimizers, store=store, per_parameter=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    train = token_batch(3, 9, seed=1)
    engine.attach_train_batch(*train, 0, torch.arange(3))
    x, y = engine.prepare_forward_input(*train)
    scaler.scale(engine.track_loss(lm_loss(model(x).logits, y))).backward()
    engine.prepare_gradients()
    dots = engine.parameter_dots()
    optimizers[skipped].param_groups[0]["params"][0].grad[0] = torch.inf
    for one in optimizers:
        scaler.step(one)
    scaler.update()
    engine.aggregate_and_log()
    other = optimizers[1 - skipped]
    moved = {id(p) for p in other.param_groups[0]["params"]}
    own = [dots[n] for n, p in model.named_parameters() if id(p) in moved]
    want = sum(own) * other.defaults["lr"] / 3
    torch.testing.assert_close(store.column("value"), want)
    assert not any(store.column("applied"))


def test_a_parameter_in_two_optimizers_is_refused():
    model = tiny_gpt2()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1), *two_optimizers(model)]
    with pytest.raises(GraddotError, match="updated by several optimizers"):
        attached(model, token_batch(1, 9, seed=2), optimizers)


def test_a_step_of_another_optimizer_is_refused():
    """As one that is made anew in a run: the one given would never take a step, and values be 0."""
    model, val, store = tiny_gpt2(), token_batch(1, 9, seed=2), Store()
    engine = attached(model, val, torch.optim.SGD(model.parameters(), lr=0.5), store=store)
    other = torch.optim.Adam(model.parameters(), lr=0.5)
    run(engine, token_batch(2, 9, seed=1))
    other.step()
    with pytest.raises(GraddotError, match="was taken by an optimizer, Adam, that attach"):
        engine.aggregate_and_log()
    engine.detach()
    engine.attach(other)
    other.zero_grad()
    run(engine, token_batch(2, 9, seed=1))
    other.step()
    torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.5).step()  # of another model
    engine.aggregate_and_log()
    assert all(store.columns["applied"])


# Mixed precision


@pytest.mark.parametrize("fused", [False, True], ids=["hook", "fused"])
def test_a_skipped_step_is_recorded_as_not_applied(fused):
    model, val, store = tiny_gpt2(), token_batch(1, 9, seed=2), Store()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    engine = attached(model, val, optimizer, store=store)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for step, factor in enumerate([1.0, float("inf"), 1.0]):
        before = model.lm_head.weight.clone()
        engine.attach_train_batch(*token_batch(2, 9, seed=step), step, torch.arange(2))
        x, y = engine.prepare_forward_input(*token_batch(2, 9, seed=step))
        scaler.scale(engine.track_loss(lm_loss(model(x).logits, y)) * factor).backward()
        engine.prepare_gradients()
        scaler.step(optimizer)
        scaler.update()
        engine.aggregate_and_log()
        optimizer.zero_grad()
        applied = not torch.equal(before, model.lm_head.weight)
        assert applied == (step != 1)
        values = store.column("value")
        assert store.column("applied").tolist() == [float(applied)] * 2
        assert (values != 0).all() if applied else (values == 0).all()
