"""torch.compile of a whole model with an engine attached: scores, gradients and the number of graphs;
evaluation, autocast and refusals."""

import pytest
import torch
import torch.nn.functional as F
from brute_force import gradient, lm_loss, norm, sample_dots, token_batch, total
from checked_backend import checked
from compiled_steps import (
    MLP,
    Norms,
    check,
    classify,
    compiled,
    fresh_compiler,
    gpt2,
    graphs,
    in_a_function,
    its_loss,
    points,
    step,
    unscored,
)
from graddot_lm import GraddotError, GradDotProdEngine, fuse_head
from model_zoo import causal, lora_of_experts
from transformers import LlamaConfig, LlamaForCausalLM

__all__ = ["fresh_compiler"]  # the fixture

VAL = token_batch(2, 11, seed=99)


def llama():
    return causal("Llama", num_hidden_layers=1)


@pytest.mark.parametrize("way", [compiled, in_a_function])
def test_gpt2(way, close):
    """One graph for a shape, one more for all others; the first step runs uncompiled, and the first
    with padding."""
    model = gpt2().double()
    call = way(model)
    engine = GradDotProdEngine(model, VAL, label_shift=1, padding={"inputs": 0})
    engine.attach()
    seen = []
    for i, shape in enumerate([(4, 11), (4, 11), (4, 11), (3, 13), (3, 13), (5, 12)]):
        train = token_batch(*shape, seed=i, ragged=True)
        step(engine, call, train, i)
        check(engine, close, train, VAL, 1e-10)
        seen.append(graphs())
    assert seen == [0, 1, 1, 1, 2, 2]


def test_fused_head_accumulation_and_targets(close):
    """The head's backward leaves its part of the tied weight to the embedding's."""
    model = fuse_head(gpt2().double())
    call = in_a_function(model)
    vals = {"a": VAL, "b": token_batch(1, 11, seed=98)}
    engine = GradDotProdEngine(model, vals)
    engine.attach()
    for i in range(2):
        batches = [token_batch(3, 11, seed=2 * i + k, ragged=True) for k in range(2)]
        for batch in batches:
            step(engine, call, batch, i, its_loss, factor=0.5)
        plain = unscored(model)
        got = engine.aggregate_and_log()
        for row, val in zip(got, vals.values(), strict=True):
            parts = [sample_dots(plain, batch, val) for batch in batches]
            want, scale = (torch.cat([total(p[k]) for p in parts]) for k in (0, 1))
            close(row, want, 1e-10, scale)
        want = [gradient(plain, *batch) for batch in batches]
        for name, p in model.named_parameters():
            mean = (want[0][name] + want[1][name]) / 2
            assert (p.grad - mean).norm() <= 1e-10 * mean.norm(), name
        model.zero_grad(set_to_none=True)
    assert graphs() == 1


@pytest.mark.parametrize(
    ("make", "dtype"), [(gpt2, torch.float32), (llama, torch.bfloat16)], ids=["fp32", "bf16"]
)
def test_default_backend(make, dtype, close):
    """Code that is made of the graph reads what an op of ours returns by the dtype that it was told."""
    model = fuse_head(make())
    call = compiled(model, "inductor")
    engine = GradDotProdEngine(model, VAL)
    engine.attach()
    for i in range(3):
        train = (
            VAL[0].repeat(2, 1),
            VAL[1].repeat(2, 1),
        )  # in bf16 only like samples' dots are exact
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            step(engine, call, train, i, its_loss)
        check(engine, close, train, VAL, 1e-5 if dtype == torch.float32 else 2e-2)
    assert graphs() == 1


@pytest.mark.parametrize("backend", [checked, "inductor"], ids=["checked", "inductor"])
def test_fused_head_without_scores(backend, close):
    """Regular training, evaluation in the midst of a scored step, and a label that is no token."""
    model = fuse_head(gpt2().double())
    call = compiled(model, backend)
    batches = [token_batch(rows, tokens, seed=rows) for rows, tokens in ((3, 11), (3, 11), (4, 12))]
    for ids, _ in batches:
        want = model(ids, labels=ids)
        (want.loss * 0.5).backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad(set_to_none=True)
        got = call(ids, labels=ids)
        (got.loss * 0.5).backward()
        torch.testing.assert_close(got.loss, want.loss)
        torch.testing.assert_close(got.token_losses, want.token_losses)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, grads[name])
        model.zero_grad(set_to_none=True)
    assert graphs() == 2
    engine = GradDotProdEngine(model, VAL)
    engine.attach()
    for i in range(2):
        train = token_batch(3, 11, seed=i, ragged=True)
        engine.attach_train_batch(*train, i, torch.arange(3))
        with torch.no_grad():
            loss = call(train[0], labels=train[0]).loss
            torch.testing.assert_close(loss, model(train[0], labels=train[0]).loss)
        its_loss(engine, call, *engine.prepare_forward_input(*train)).backward()
        engine.prepare_gradients()
        check(engine, close, train, VAL, 1e-10)
    engine.detach()
    wrong = batches[0][0].clone()
    wrong[1, 2] = 61
    with pytest.raises(RuntimeError, match="a label is no token of the fused head"):
        call(batches[0][0], labels=wrong)


def test_number_of_items(close):
    """Which a graph around the model makes a tensor of its own of."""
    model = llama()
    call = in_a_function(model)
    batch = lambda rows, seed: dict.fromkeys(
        ("input_ids", "labels"), token_batch(rows, 11, seed=seed)[0]
    )
    engine = GradDotProdEngine(model, batch(2, 99))
    engine.attach()
    for i, items in enumerate((40, 23, 31)):
        train = batch(3, i)
        engine.attach_train_batch(train, None, i, torch.arange(3))
        inputs, _ = engine.prepare_forward_input(train, None)
        call(**inputs, num_items_in_batch=items).loss.backward()
        engine.prepare_gradients()
        want, scales = sample_dots(unscored(model), tuple(train.values()), VAL)
        close(engine.aggregate_and_log(), total(want), 1e-5, total(scales))
        model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("fused", [False, True], ids=["own-head", "fused-head"])
def test_norms(fused, close):
    """Norms and cosines, cross terms of the tied weight among them."""
    model = gpt2().double()
    if fused:
        fuse_head(model)
    call = compiled(model)
    engine = GradDotProdEngine(model, VAL, norms=True)
    engine.attach()
    for i in range(2):
        train = token_batch(3, 11, seed=i, ragged=True)
        step(engine, call, train, i, its_loss)
        plain = unscored(model)
        dots, _ = sample_dots(plain, train, VAL)
        rows = [(train[0][k : k + 1], train[1][k : k + 1]) for k in range(3)]
        norms = torch.stack([norm(gradient(plain, *row)) for row in rows])
        # transformers computes the loss of its own head in fp32
        tolerance = 1e-10 if fused else 1e-6
        close(engine.gradient_norms(), norms, tolerance)
        cosines = total(dots) / norms / norm(gradient(plain, *VAL))
        close(engine.cosines(), cosines, tolerance, torch.full_like(cosines, 10))
        check(engine, close, train, VAL, tolerance)
    assert graphs() == 1


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config)


def test_llama_given_directions(close):
    """RMS norms; and the directions, of the plain model."""
    model = llama()
    call = compiled(model)
    engine = GradDotProdEngine(model, label_shift=1)
    engine.attach()
    loss = lambda model, inputs, labels: lm_loss(model(**inputs).logits, labels)
    for i in range(3):
        batch = {"input_ids": VAL[0]}, VAL[1]
        engine.set_directions(engine.compute_directions([batch], loss))
        train = token_batch(4, 11, seed=i)
        step(engine, call, train, i)
        check(engine, close, train, VAL, 1e-5)
    assert graphs() == 1


def test_lora_of_experts(close):
    """Adapters that set the experts' weights while a forward runs."""
    model = lora_of_experts(experts_implementation="grouped_mm")
    call, train = compiled(model), token_batch(4, 11, seed=1)
    want, scales = sample_dots(lora_of_experts(), train, VAL)
    engine = GradDotProdEngine(model, VAL, label_shift=1)
    engine.attach()
    for i in range(2):
        step(engine, call, train, i)
        close(engine.aggregate_and_log(), total(want), 1e-5, total(scales))
    assert graphs() == 1


def test_compiled_before_evaluation_within_and_detached_between(close):
    """None of these costs a graph a step, and without an engine all is as it was."""
    model, val = MLP().double(), points(2, 99)
    call = compiled(model)
    plain = gradient(model, *points(5, 0), loss=F.cross_entropy)
    seen = []
    engine = GradDotProdEngine(model, val)
    for i in range(4):
        F.cross_entropy(call(points(5, 0)[0]), points(5, 0)[1]).backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, plain[name])
        model.zero_grad(set_to_none=True)
        engine.reattach_after_evaluation()
        train = points(5, i)
        engine.attach_train_batch(*train, i, torch.arange(5))
        with torch.no_grad():
            torch.testing.assert_close(call(train[0]), unscored(model)(train[0]))
        classify(engine, call, *engine.prepare_forward_input(*train)).backward()
        engine.prepare_gradients()
        check(engine, close, train, val, 1e-10, loss=F.cross_entropy)
        engine.detach_for_evaluation()
        seen.append(graphs())
    assert seen[1] == seen[2] == seen[3] == seen[0] + 2  # with scores, and the evaluation


def test_autocast():
    """The graph is traced under autocast, and runs outside of it."""
    model, val = MLP(), points(2, 99)
    call = compiled(model)
    engine = GradDotProdEngine(model, (val[0].float(), val[1]))
    engine.attach()
    for i in range(2):
        train = points(5, i)
        want, scales = sample_dots(unscored(model), train, val, loss=F.cross_entropy)
        with torch.autocast("cpu", torch.bfloat16):
            step(engine, call, (train[0].float(), train[1]), i, classify)
        error = (engine.aggregate_and_log() - total(want)).abs() / total(scales)
        assert error.max() <= 2e-2
        model.zero_grad()
    assert graphs() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dots_are_not_rounded_where_autocast_is_left_open(dtype):
    """Around backward and prepare_gradients too: the same activations and gradients give the same
    scores, whether the dots are made in a graph, or after the backward for many vectors at once."""
    scores, val = [], (points(2, 99)[0].float(), points(2, 99)[1])
    for way in (lambda model: model, compiled):
        model = Norms()
        call = way(model)
        engine = GradDotProdEngine(model, val)
        engine.attach()
        for i in range(2):
            x, y = points(5, i)
            with torch.autocast("cpu", dtype):
                step(engine, call, (x.float(), y), i, classify)
            scores.append(engine.aggregate_and_log())
            model.zero_grad()
    torch.testing.assert_close(scores[3], scores[1], rtol=1e-5, atol=0)
    assert graphs() == 1


@pytest.mark.parametrize("way", [compiled, in_a_function])
def test_refusals(way):
    model = MLP().double()
    call = way(model)
    engine = GradDotProdEngine(model, points(2, 99))
    engine.attach()
    step(engine, call, points(5, 0), 0, classify)
    engine.aggregate_and_log()
    hook = model.conv.weight.register_hook(lambda grad: 2 * grad)
    with pytest.raises(GraddotError, match="layer conv has a parameter with a gradient hook"):
        step(engine, call, points(5, 1), 1, classify)
    hook.remove()
    engine.clear_gradients()
    train = points(5, 2)
    engine.attach_train_batch(*train, 2, torch.arange(5))
    x, _ = engine.prepare_forward_input(*train)
    call(x)
    with pytest.raises(GraddotError, match="the model ran twice since attach_train_batch"):
        call(x)


def test_a_first_step_that_is_given_up_keeps_nothing_uncompiled():
    """Without an engine any more; the model stays attached, as an exception leaves it."""
    model, other = MLP().double(), MLP().double()
    engine = GradDotProdEngine(model, points(2, 99))
    engine.attach()
    train = points(5, 0)
    engine.attach_train_batch(*train, 0, torch.arange(5))
    x, _ = engine.prepare_forward_input(*train)
    model(x)
    call = compiled(other)
    call(x)
    assert graphs() == 0, "the checks of a first step are of what runs uncompiled"
    del engine
    call(x)
    assert graphs() == 1
