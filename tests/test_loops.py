"""Loops as people write them: batches, accumulation, clipping, mixed precision, evaluation.

All against the float64 brute force, one backward a sample. Losses of transformers models are
computed in fp32 whatever the model's dtype, which bounds the tests that use them to 1e-5.
"""

import copy
import io
import pickle

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from brute_force import gradient, lm_loss, sample_dots, tiny_gpt2, token_batch, total
from graddot_lm import GraddotError, GradDotProdEngine
from loop_steps import (
    Store,
    attached,
    mapping_dots,
    mapping_gradient,
    padded,
    run,
    same_gradients,
)
from torch import nn

# Batches


def run_mapping(engine, train, labels_inside):
    x, y = dict(train), None
    if not labels_inside:
        y = x.pop("labels")
    engine.attach_train_batch(x, y, 0, None)
    inputs, labels = engine.prepare_forward_input(x, y)
    kwargs = inputs if labels_inside else {**inputs, "labels": labels}
    engine.model(**kwargs).loss.backward()
    engine.prepare_gradients()
    return engine.aggregate_and_log()


@pytest.mark.parametrize("labels_inside", [True, False], ids=["inside", "beside"])
def test_mappings_of_any_size_and_length(close, labels_inside):
    model = tiny_gpt2().double()
    val = padded(2, [9, 6], seed=2)
    fill = {"input_ids": 60, "attention_mask": 0}
    given = (
        val if labels_inside else ({k: v for k, v in val.items() if k != "labels"}, val["labels"])
    )
    engine = GradDotProdEngine(model, given, padding=fill)
    engine.attach()
    for seed, lengths in enumerate([[9, 5, 9], [4, 3], [15, 11, 7, 2], [9]]):
        train = padded(len(lengths), lengths, seed=seed)
        want, scale = mapping_dots(model, train, val)
        model.zero_grad()
        close(run_mapping(engine, train, labels_inside), want, 1e-5, scale)
        same_gradients(model, mapping_gradient(model, train), 1e-5)


def test_rows_of_another_length_are_refused_with_the_key_to_fill():
    engine = attached(tiny_gpt2(), token_batch(1, 6, seed=2))
    with pytest.raises(GraddotError, match="padding={key: value} for every key .*'inputs' for a t"):
        engine.attach_train_batch(*token_batch(2, 9, seed=1), 0, None)


def test_tensors_of_another_length_are_filled_up(close):
    model = tiny_gpt2().double()
    train, val = token_batch(3, 15, seed=1), token_batch(2, 9, seed=2)
    dots, scales = sample_dots(model, train, val)
    engine = attached(model, val, padding={"inputs": 0})
    run(engine, train)
    close(engine.aggregate_and_log(), total(dots), 1e-10, total(scales))


def test_batches_that_cannot_be_joined_are_refused():
    model, val = tiny_gpt2(), padded(2, [9, 6], seed=2)
    with pytest.raises(GraddotError, match="no labels"):
        GradDotProdEngine(model, {"a": {"input_ids": val["input_ids"]}})
    engine = GradDotProdEngine(model, val)
    engine.attach()
    train = padded(2, [5, 5], seed=1)
    with pytest.raises(GraddotError, match=r"of labels have shape \(5,\).*padding="):
        engine.attach_train_batch(train, None, 0, None)
    with pytest.raises(GraddotError, match="3 attention_mask and 2 labels"):
        mask = torch.ones(3, 5)
        engine.attach_train_batch({**train, "attention_mask": mask}, None, 0, None)
    engine.detach()
    engine = GradDotProdEngine(model, val, padding={"input_ids": 0})
    engine.attach()
    engine.attach_train_batch(train, None, 0, None)
    with pytest.raises(GraddotError, match=r"rows of attention_mask have shape \(5,\)"):
        engine.prepare_forward_input(train)
    with pytest.raises(GraddotError, match="training rows are a tensor, validation rows a mapping"):
        engine.prepare_forward_input(train["input_ids"], train["labels"])


def test_padding_without_a_mask_is_refused():
    model = tiny_gpt2()
    train, val = padded(2, [5, 5], seed=1), padded(2, [9, 6], seed=2)
    del train["attention_mask"], val["attention_mask"]
    engine = GradDotProdEngine(model, val, padding={"input_ids": 0})
    engine.attach()
    engine.attach_train_batch(train, None, 0, None)
    with pytest.raises(GraddotError, match="need an attention_mask"):
        engine.prepare_forward_input(train)


# Values


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


# Evaluation, attaching and detaching


def test_evaluation_in_the_midst_of_a_step(close):
    model = tiny_gpt2().double()
    train, val = token_batch(4, 15, seed=1), token_batch(2, 15, seed=2)
    dots, scales = sample_dots(model, train, val)
    other = token_batch(3, 20, seed=5)[0]
    want = copy.deepcopy(model)(other).logits
    engine = attached(model, val)

    def evaluate():
        model.eval()
        with torch.no_grad():
            assert torch.equal(model(other).logits, want)
            model.transformer(other)
            with pytest.raises(IndexError):
                model(other + 100)
        model.train()

    evaluate()
    engine.attach_train_batch(*train, 0, None)
    evaluate()
    x, y = engine.prepare_forward_input(*train)
    loss = engine.track_loss(lm_loss(model(x).logits, y))
    evaluate()
    loss.backward()
    evaluate()
    engine.prepare_gradients()
    evaluate()
    close(engine.aggregate_and_log(), total(dots), 1e-10, total(scales))
    same_gradients(model, gradient(model, *train), 1e-10)


def test_a_forward_that_failed_is_tried_again(close):
    model = tiny_gpt2().double()
    train, val = token_batch(4, 15, seed=1), token_batch(2, 15, seed=2)
    dots, scales = sample_dots(model, train, val)
    engine = attached(model, val)
    engine.attach_train_batch(*train, 0, None)
    x, y = engine.prepare_forward_input(*train)
    fail = model.transformer.ln_f.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x)
    fail.remove()
    engine.track_loss(lm_loss(model(x).logits, y)).backward()
    engine.prepare_gradients()
    close(engine.aggregate_and_log(), total(dots), 1e-10, total(scales))


def test_detached_and_attached_again_in_a_run(close):
    model = tiny_gpt2().double()
    train, val = token_batch(4, 15, seed=1), token_batch(2, 15, seed=2)
    dots, scales = sample_dots(model, train, val)
    want_grad = gradient(model, *train)
    engine = attached(model, val)
    run(engine, train)
    first = engine.aggregate_and_log()
    engine.attach_train_batch(*train, 1, None)
    x, y = engine.prepare_forward_input(*train)
    loss = lm_loss(model(x).logits, y)
    engine.detach()  # in the midst: no scores, but the training gradient
    model.zero_grad()
    loss.backward()
    same_gradients(model, want_grad, 1e-10)
    model.zero_grad()
    lm_loss(model(train[0]).logits, train[1]).backward()
    same_gradients(model, want_grad, 1e-10)
    engine.attach()
    model.zero_grad()
    run(engine, train)
    same_gradients(model, want_grad, 1e-10)
    close(engine.aggregate_and_log(), first, 1e-12)
    close(first, total(dots), 1e-10, total(scales))


# accelerate


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize("engine_first", [False, True], ids=["prepared first", "engine first"])
def test_a_loop_of_accelerate(close, mixed_precision, engine_first):
    """Two micro-batches a step, clipped: scores, values and the weights of a loop without us."""
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(
        cpu=True, mixed_precision=mixed_precision, gradient_accumulation_steps=2
    )
    model, store = tiny_gpt2(), Store()
    plain, optimizer = copy.deepcopy(model), torch.optim.SGD(model.parameters(), lr=0.5)
    ids, labels = token_batch(6, 15, seed=1, ragged=True)
    loader = torch.utils.data.DataLoader(
        [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)], batch_size=3
    )
    val = dict(zip(("input_ids", "labels"), token_batch(2, 15, seed=2), strict=True))
    make = lambda model: GradDotProdEngine(model, val, store=store)
    if engine_first:
        engine = make(model)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    else:
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        engine = make(model)
    engine.attach(optimizer)
    want, clip = [], 1.0
    for number, batch in enumerate(loader):
        with accelerator.accumulate(model):
            dots, scales = mapping_dots(plain, {**batch, "attention_mask": torch.ones(3, 15)}, val)
            want.append((dots, scales))
            engine.attach_train_batch(batch, None, number, torch.arange(3) + 3 * number)
            joint, _ = engine.prepare_forward_input(batch)
            accelerator.backward(model(**joint).loss)
            engine.prepare_gradients()
            if accelerator.sync_gradients:
                clip = min(1.0, 0.5 / float(accelerator.clip_grad_norm_(model.parameters(), 0.5)))
            optimizer.step()
            optimizer.zero_grad()
    scores = engine.aggregate_and_log(gradient_scale=clip)
    tolerance = 1e-5 if mixed_precision == "no" else 3e-2
    close(scores, torch.cat([dots for dots, _ in want]), tolerance,
          torch.cat([scales for _, scales in want]))  # fmt: skip
    assert clip < 1 and store.column("applied").all()

    for x, y in zip(ids.split(3), labels.split(3), strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision == "bf16"):
            loss = plain(input_ids=x, labels=y).loss / 2
        loss.backward()
    nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    torch.optim.SGD(plain.parameters(), lr=0.5).step()
    trained = accelerator.unwrap_model(model)
    for name, p in plain.named_parameters():
        assert (trained.get_parameter(name) - p).norm() <= tolerance * p.norm(), name


def test_a_pickled_attached_model_is_a_plain_model():
    model, val, train = tiny_gpt2(), token_batch(1, 9, seed=2), token_batch(2, 9, seed=1)
    engine = attached(model, val)
    run(engine, train)
    want = engine.aggregate_and_log()
    for kept in (model, copy.deepcopy(model), model.transformer):
        torch.save(kept, io.BytesIO())
        assert b"graddot" not in pickle.dumps(kept)
    loaded = pickle.loads(pickle.dumps(model))
    hooks = lambda m: [h for name, h in m.__dict__.items() if name.startswith("_forward") and h]
    assert not any(map(hooks, loaded.modules())) and any(map(hooks, model.modules()))
    with torch.no_grad():
        assert torch.equal(loaded(val[0]).logits, model(val[0]).logits)
        loaded.lm_head.weight.zero_()
        assert not loaded(val[0]).logits.any() and model.lm_head.weight.any()
    run(engine, train)  # as if nothing had been
    torch.testing.assert_close(engine.aggregate_and_log(), want)
