"""The engine against brute force: scores, gradients, and what they may not depend on."""

import copy
import ctypes
import functools
import mmap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from brute_force import gradient, lm_loss, sample_dots, tiny_gpt2, token_batch, total
from engine_steps import (
    MLP,
    SharedEverything,
    check_against_brute_force,
    close,
    run_step,
)
from graddot_lm import GradDotProdEngine
from graddot_lm.checks import first_step
from torch import nn


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("v", [1, 2, 4])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_gpt2(tied, v, n, ragged, dtype):
    train, val = (
        token_batch(n, 17, seed=1, ragged=ragged),
        token_batch(v, 17, seed=2, ragged=ragged),
    )
    check_against_brute_force(tiny_gpt2(tied=tied), train, val, dtype)


@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("v", [1, 2, 4])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_gpt2_of_common_tokens_to_the_digit(tied, v, n, ragged):
    """Where samples have tokens in common, as text has, no dot is nearly orthogonal: in fp32 every
    one, by parameter and total, is within 1e-5 of itself."""
    model = tiny_gpt2(tied=tied)
    train = common_tokens(*token_batch(n, 17, seed=1, ragged=ragged), seed=101)
    val = common_tokens(*token_batch(v, 17, seed=2, ragged=ragged), seed=102)
    want, _ = sample_dots(model, train, val)
    scores, dots = run_step(model, train, val)
    close(scores, total(want), 1e-5)
    assert dots.keys() == want.keys()
    for name, dot in dots.items():
        close(dot, want[name], 1e-5)


@pytest.mark.parametrize("power", [2, 4])
@pytest.mark.parametrize("autocast", [False, True], ids=["parameters", "autocast"])
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("v", [1, 2, 4])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_gpt2_of_common_tokens_in_bf16(tied, v, n, ragged, autocast, power):
    """Total scores, and in norm each sample's dots by parameter, within 2e-2 of themselves; single
    ones of their Cauchy-Schwarz scale, as those of PyTorch's own bf16 gradients are. Where samples
    share most of their tokens, every single one is within 2e-2 of itself."""
    model = tiny_gpt2(tied=tied)
    train = common_tokens(*token_batch(n, 17, seed=1, ragged=ragged), seed=101, power=power)
    val = common_tokens(*token_batch(v, 17, seed=2, ragged=ragged), seed=102, power=power)
    want, scales = sample_dots(model, train, val)
    stepped = model if autocast else copy.deepcopy(model).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        scores, dots = run_step(stepped, train, val)
    close(scores, total(want), 2e-2)
    got, exact = (torch.stack([d[name].double() for name in want]) for d in (dots, want))
    assert ((got - exact).norm(dim=0) <= 2e-2 * exact.norm(dim=0)).all()
    for name, dot in dots.items():
        if power == 4:
            close(dot, want[name], 2e-2)
        else:
            assert ((dot - want[name]).abs() <= 2e-2 * scales[name]).all(), name


def common_tokens(ids, labels, *, seed, power=2):
    """Ids drawn by rank^-power in place of uniform ones, with their labels where there were any."""
    weights = torch.arange(1.0, 62) ** -power
    g = torch.Generator().manual_seed(seed)
    drawn = weights.expand(len(ids), -1).multinomial(ids.shape[1], True, generator=g)
    return drawn, torch.where(labels == -100, labels, drawn)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_errors_are_those_of_fp32_gradients(tied):
    """Relative to each dot itself, however small: no worse than dots, taken in float64, of the
    gradients that fp32 autograd gives one sample at a time."""
    model, errors, fp32_errors = tiny_gpt2(tied=tied), [], []
    for v in (1, 2, 4):
        train, val = (token_batch(rows, 17, seed=rows, ragged=True) for rows in (5, v))
        want, _ = sample_dots(model, train, val)
        gradients = functools.partial(gradient, model, dtype=torch.float32)
        val_grad = gradients(*val)
        samples = [gradients(x[None], y[None]) for x, y in zip(*train, strict=True)]
        _, dots = run_step(model, train, val)
        for name, exact in want.items():
            plain = [(val_grad[name].double() * s[name].double()).sum() for s in samples]
            some = exact != 0
            errors.append(((dots[name] - exact).abs() / exact.abs())[some])
            fp32_errors.append(((torch.stack(plain) - exact).abs() / exact.abs())[some])
    for quantile in (0.5, 0.9, 0.98):
        ours, theirs = (torch.cat(e).quantile(quantile) for e in (errors, fp32_errors))
        assert ours <= 2 * theirs, f"quantile {quantile}: {ours:.1e}, fp32 autograd {theirs:.1e}"


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_gpt2_bf16(tied):
    """Autocast and bf16 parameters: scores within 2e-2 of their Cauchy-Schwarz scale."""
    train, val = token_batch(5, 31, seed=1, ragged=True), token_batch(2, 31, seed=2)
    model = tiny_gpt2(tied=tied)
    dots, scales = sample_dots(model, train, val)
    want, scale = total(dots), total(scales)
    scores, _ = run_step(copy.deepcopy(model).bfloat16(), train, val)
    assert ((scores - want).abs() / scale).max() <= 2e-2
    with torch.autocast("cpu", torch.bfloat16):
        scores, _ = run_step(copy.deepcopy(model), train, val)
    assert ((scores - want).abs() / scale).max() <= 2e-2


def test_huggingface_labels():
    """`model(X, labels=Y).loss`: the shift is found, and the loss's own scaling is undone."""
    model = tiny_gpt2()
    train, val = token_batch(4, 13, seed=3, ragged=True), token_batch(2, 13, seed=4, ragged=True)
    want = total(sample_dots(model, train, val)[0])
    for factor in (1.0, 1024.0):
        engine = GradDotProdEngine(model, val)
        engine.attach(torch.optim.SGD(model.parameters(), lr=0.1))
        engine.attach_train_batch(*train, 0, torch.arange(4))
        x, y = engine.prepare_forward_input(*train)
        (model(x, labels=y).loss * factor).backward()
        engine.prepare_gradients()
        close(engine.aggregate_and_log(), want, 1e-5)
        engine.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
def test_mlp_classification(conv1d, dtype):
    g = torch.Generator().manual_seed(5)
    x, y = torch.randn(8, 12, generator=g), torch.randint(0, 7, (8,), generator=g)
    train, val = (x[:6], y[:6]), (x[6:], y[6:])
    check_against_brute_force(MLP(conv1d), train, val, dtype, loss=F.cross_entropy, label_shift=0)


def test_mlp_regression():
    g = torch.Generator().manual_seed(5)
    x, y = torch.randn(8, 12, generator=g), torch.randn(8, 7, generator=g)
    loss = lambda out, y: F.mse_loss(out, y.to(out.dtype))
    check_against_brute_force(
        MLP(), (x[:6], y[:6]), (x[6:], y[6:]), torch.float64, loss=loss, label_shift=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_parameters_with_several_uses(dtype):
    train, val = token_batch(5, 11, 30, seed=6), token_batch(2, 11, 30, seed=7)
    assert (train[0] == 3).any() and (val[0] == 3).any(), "padding ids must occur"
    check_against_brute_force(SharedEverything(), train, val, dtype)


@pytest.mark.parametrize("most", [0, 200], ids=["each by itself", "a few at a time"])
def test_gradients_of_vectors_that_do_not_wait_for_others(most, monkeypatch):
    """Of large ones dots are made at once, and of those that wait before they are too many."""
    monkeypatch.setattr("graddot_lm.step._ROWS_TOGETHER", most)
    train, val = token_batch(3, 7, seed=1), token_batch(2, 7, seed=2)
    check_against_brute_force(tiny_gpt2().double(), train, val, torch.float64)


def test_several_targets_equal_each_alone():
    model = tiny_gpt2().double()
    train = token_batch(4, 15, seed=1, ragged=True)
    vals = {"a": token_batch(1, 15, seed=2), "b": token_batch(3, 15, seed=3, ragged=True)}
    together, _ = run_step(model, train, vals)
    for row, val in zip(together, vals.values(), strict=True):
        close(run_step(model, train, val)[0], row, 1e-12)


def test_score_depends_on_nothing_else_in_the_batch():
    model = tiny_gpt2().double()
    x, y = token_batch(7, 15, seed=1, ragged=True)
    val = token_batch(2, 15, seed=2)
    first = run_step(model, (x[:5], y[:5]), val)[0][2]
    alone = run_step(model, (x[2:3], y[2:3]), val)[0][0]
    others = run_step(model, (x[[5, 6, 2]], y[[5, 6, 2]]), val)[0][2]
    scaled = run_step(model, (x[:5], y[:5]), val, factor=4096.0)[0][2]
    for other in (alone, others, scaled):
        close(other, first, 1e-12)


@pytest.mark.parametrize("where", [0, 2, 4])
def test_outlier(where):
    """One sample's gradient 1e4 times the others': the others' dots keep their digits."""
    model = MLP()
    g = torch.Generator().manual_seed(8)
    x, y = torch.randn(6, 24, 12, generator=g), torch.randn(6, 24, 7, generator=g)
    y[where] *= 1e4
    loss = lambda out, y: F.mse_loss(out, y.to(out.dtype))
    train, val = (x[:5], y[:5]), (x[5:], y[5:])
    want, scales = sample_dots(model, train, val, loss=loss)
    _, dots = run_step(model, train, val, loss=loss, label_shift=0)
    others = [i for i in range(5) if i != where]
    for name, dot in dots.items():
        error = (dot - want[name]).abs() / scales[name]
        assert error[others].max() <= 1e-5, name


def test_zero_labelled_sample_scores_zero():
    model = tiny_gpt2().double()
    x, y = token_batch(3, 9, seed=1)
    y[1] = -100
    scores, _ = run_step(model, (x, y), token_batch(1, 9, seed=2))
    assert scores[1] == 0 and torch.isfinite(scores).all() and scores[0] != 0


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_twenty_adamw_steps_equal_regular(dtype, bound):
    scored, regular = tiny_gpt2().to(dtype), tiny_gpt2().to(dtype)
    val = token_batch(2, 15, seed=99)
    engine = GradDotProdEngine(scored, val, label_shift=1)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (scored, regular)]
    engine.attach(optimizers[0])
    for step in range(20):
        x, y = token_batch(4, 15, seed=step, ragged=step % 2 == 0)
        engine.attach_train_batch(x, y, step, torch.arange(4))
        xx, yy = engine.prepare_forward_input(x, y)
        engine.track_loss(lm_loss(scored(xx).logits, yy)).backward()
        engine.prepare_gradients()
        lm_loss(regular(x).logits, y).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        engine.aggregate_and_log()
    # The gradient of GPT-2's key biases is zero but for rounding (softmax ignores a shift), and
    # Adam turns noise of any size into full steps: they are random in both runs in fp32.
    width = scored.config.n_embd
    for (name, a), b in zip(scored.named_parameters(), regular.parameters(), strict=True):
        keep = torch.ones(a.shape[-1], dtype=torch.bool)
        if name.endswith("c_attn.bias") and dtype == torch.float32:
            keep[width : 2 * width] = False
        assert (a - b)[..., keep].norm() <= bound * b[..., keep].norm(), name


def test_score_predicts_the_loss_without_the_sample():
    """Removing sample i from an SGD step changes the val loss by lr·(n_i/n_train)·dot_i."""
    model = tiny_gpt2().double()
    x, y = token_batch(4, 15, seed=1, ragged=True)
    val = token_batch(2, 15, seed=2)
    scores, _ = run_step(model, (x, y), val)
    counts = (y[:, 1:] != -100).sum(1)
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    for i in range(4):
        share = (counts[i] / counts.sum()).item()
        own = gradient(model, x[i : i + 1], y[i : i + 1])

        def change(lr, share=share, own=own):
            losses = []
            for keep in (0.0, share):
                moved = copy.deepcopy(model)
                with torch.no_grad():
                    for n, p in moved.named_parameters():
                        p -= lr * (grads[n] - keep * own[n])
                    losses.append(lm_loss(moved(val[0]).logits, val[1]).item())
            return (losses[1] - losses[0]) / lr

        # Richardson: the error of one-sided differences is linear in lr.
        slope = 2 * change(5e-5) - change(1e-4)
        assert slope == pytest.approx(share * scores[i].item(), rel=1e-5)


def test_accumulated_micro_batches():
    model = tiny_gpt2().double()
    x, y = token_batch(6, 15, seed=1)
    val = token_batch(2, 15, seed=2)
    want, _ = run_step(model, (x, y), val)
    want_grad = gradient(model, x, y)
    engine = GradDotProdEngine(model, val)
    engine.attach()
    model.zero_grad(set_to_none=True)
    for at in (0, 3):
        part = x[at : at + 3], y[at : at + 3]
        engine.attach_train_batch(*part, 0, torch.arange(3))
        xx, yy = engine.prepare_forward_input(*part)
        (model(xx, labels=yy).loss / 2).backward()
        engine.prepare_gradients()
    close(engine.aggregate_and_log(), want, 1e-6)  # transformers computes the loss in fp32
    for name, p in model.named_parameters():
        assert (p.grad - want_grad[name]).norm() <= 1e-6 * want_grad[name].norm()


def test_frozen_and_excluded_parameters():
    model = tiny_gpt2(tied=False)
    for name, p in model.named_parameters():
        p.requires_grad_("c_fc" not in name and "wpe" not in name and "ln_1.bias" not in name)
    train, val = token_batch(3, 15, seed=1), token_batch(1, 15, seed=2)
    (want, _), want_grad = sample_dots(model, train, val), gradient(model, *train)
    scores, dots = run_step(model, train, val, exclude=["lm_head.weight"])
    assert "lm_head.weight" not in dots and not any("c_fc" in name for name in dots)
    close(scores, total({n: want[n] for n in dots}), 1e-5)
    for name, p in model.named_parameters():
        assert (p.grad is None) == (not p.requires_grad)
        if p.grad is not None:
            assert (p.grad - want_grad[name]).norm() <= 1e-5 * want_grad[name].norm()


class Borrowed(nn.Module):
    """Reads a layer's weight behind its back."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) @ self.linear.weight


def test_a_weight_used_behind_the_layers_back():
    train, val = ((torch.randn(n, 4), torch.randint(0, 4, (n,))) for n in (3, 2))
    model = Borrowed()
    check_against_brute_force(model, train, val, torch.float32, loss=F.cross_entropy, label_shift=0)


def test_a_loss_that_is_tracked_by_the_model_and_the_caller_counts_once():
    """A model's .loss is tracked already; were its scale to count twice, scores would be quartered."""
    model = tiny_gpt2().double()
    train, val = token_batch(3, 9, seed=1), token_batch(2, 9, seed=2)
    dots, scales = sample_dots(model, train, val)
    engine = GradDotProdEngine(model, val)
    engine.attach()
    engine.attach_train_batch(*train, 0, None)
    x, y = engine.prepare_forward_input(*train)
    (engine.track_loss(model(x, labels=y).loss) / 2).backward()
    engine.prepare_gradients()
    close(engine.aggregate_and_log(), total(dots), 1e-6, total(scales))


def test_memory_freed_by_checks_goes_back(monkeypatch):
    """Of the process's memory, and where the C library has no function for that, nothing is asked."""
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("not of this C library")
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    for _ in range(2):  # blocks once freed teach glibc to keep those of their size
        blocks = [torch.ones(2**18) for _ in range(200)]
        last = blocks.pop()
        del blocks
    before = resident()
    first_step._give_back_freed()
    assert resident() < before - 100 * 2**20 and last.all()
    given_back = []
    monkeypatch.setattr(first_step, "_give_back_freed", lambda: given_back.append(1))
    x = torch.randint(0, 61, (3, 9))
    engine = GradDotProdEngine(model := tiny_gpt2(), (x[:1], x[:1]))
    engine.attach(torch.optim.SGD(model.parameters(), lr=0.0))
    for step in range(3):  # the first is checked
        engine.attach_train_batch(x, x, step, torch.arange(3))
        inputs, labels = engine.prepare_forward_input(x, x)
        model(inputs, labels=labels).loss.backward()
        engine.prepare_gradients()
        engine.aggregate_and_log()
    assert given_back == [1]
    monkeypatch.undo()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    first_step._give_back_freed()
