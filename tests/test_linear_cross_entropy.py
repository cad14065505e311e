"""The fused head alone against float64 definitions: its loss and gradients, the direction and the
table that it is given or keeps, and the op below it."""

import pytest
import torch
import torch.nn.functional as F
from engine_steps import TOLERANCE, relative
from graddot_lm import (
    GraddotError,
    linear_cross_entropy,
)
from torch import Tensor, nn

from graddot_kernels import fused_head, reference


def problem(dtype=torch.float32, *, bias=True, rows=6, t=7, width=12, vocab=19):
    torch.manual_seed(0)
    head = nn.Linear(width, vocab, bias=bias)
    hidden = torch.randn(rows, t, width)
    labels = torch.randint(0, vocab, (rows, t))
    labels[0, 2:] = -100
    labels[rows - 2, :1] = -100
    return head.to(dtype), hidden.to(dtype).requires_grad_(), labels


def plain_loss(head, hidden, labels, *, label_smoothing=0.0, z_loss=0.0, reduction="mean"):
    """The same loss from whole logits in float64."""
    logits = F.linear(hidden.double(), head.weight.double(), head.bias.double()).flatten(0, 1)
    flat = labels.flatten()
    losses = F.cross_entropy(logits, flat, label_smoothing=label_smoothing, reduction="none")
    losses = losses + z_loss * torch.logsumexp(logits, 1).square() * (flat != -100)
    loss = losses.sum()
    return (loss / (flat != -100).sum() if reduction == "mean" else loss), losses.view(labels.shape)


@pytest.fixture(params=[2**24, 40, 170], ids=["one-chunk", "part-rows", "some-rows"])
def chunked(request, monkeypatch):
    """Everything at once, pieces of a row, one row at a time: 19 tokens of vocabulary."""
    monkeypatch.setitem(fused_head._CHUNK_ELEMENTS, "cpu", request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("extra", [{}, {"label_smoothing": 0.1, "z_loss": 1e-2}], ids=["", "extra"])
def test_loss_and_gradients(chunked, dtype, reduction, extra):
    head, hidden, labels = problem(dtype)
    want, want_losses = plain_loss(head, hidden, labels, reduction=reduction, **extra)
    inputs = hidden, head.weight, head.bias
    want_grads = torch.autograd.grad(3 * want, inputs)
    loss, losses = linear_cross_entropy(hidden, head, labels, reduction=reduction, **extra)
    assert relative(loss.detach(), want.detach()) <= TOLERANCE[dtype]
    assert relative(losses, want_losses.detach()) <= TOLERANCE[dtype]
    assert not losses.requires_grad
    for got, grad in zip(torch.autograd.grad(3 * loss, inputs), want_grads, strict=True):
        assert relative(got, grad) <= TOLERANCE[dtype]
    with torch.no_grad():
        loss, losses = linear_cross_entropy(hidden, head, labels, reduction=reduction, **extra)
    assert relative(loss, want.detach()) <= TOLERANCE[dtype]
    assert relative(losses, want_losses.detach()) <= TOLERANCE[dtype]


def test_frozen_parts_and_num_labels():
    head, hidden, labels = problem()
    want, _ = plain_loss(head, hidden, labels, reduction="sum")
    (grad,) = torch.autograd.grad(want / 100, hidden)
    head.requires_grad_(False)
    loss, _ = linear_cross_entropy(hidden, head, labels, num_labels=100)
    (got,) = torch.autograd.grad(loss, hidden)
    assert relative(got, grad) <= 1e-6
    head.requires_grad_(True)
    (want_weight,) = torch.autograd.grad(plain_loss(head, hidden, labels)[0], head.weight)
    loss, _ = linear_cross_entropy(hidden.detach(), head, labels)
    loss.backward(retain_graph=True)
    assert relative(head.weight.grad, want_weight) <= 1e-6
    with pytest.raises(GraddotError, match="second backward"):
        loss.backward()


def test_bf16():
    head, hidden, labels = problem(torch.bfloat16)
    want, _ = plain_loss(head, hidden, labels)
    want_grads = torch.autograd.grad(want, (hidden, head.weight))
    loss, _ = linear_cross_entropy(hidden, head, labels)
    for got, grad in zip(torch.autograd.grad(loss, (hidden, head.weight)), want_grads, strict=True):
        assert got.dtype == torch.bfloat16
        assert relative(got, grad.double()) <= 2e-2
    head, hidden, labels = problem()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = linear_cross_entropy(hidden, head, labels)
    loss.backward()
    assert head.weight.grad.dtype == torch.float32
    want, _ = plain_loss(head, hidden, labels)
    assert relative(head.weight.grad, torch.autograd.grad(want, head.weight)[0]) <= 2e-2


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_with_scores(chunked, dtype, compiled, monkeypatch):
    """Two targets with norms, own rows and tied rows; the op itself against float64."""
    if not compiled:
        monkeypatch.setattr("graddot_kernels.cpu_kernels.INSTRUCTION_SET", "")
    torch.manual_seed(0)
    act, weight = torch.randn(6, 5, 64).to(dtype), (torch.randn(19, 64) / 8).to(dtype)
    labels, ids = torch.randint(0, 19, (6, 5)), torch.tensor([1, 5, 18])
    labels[1, 3:] = -100
    scale = torch.tensor(0.5)
    rest = (labels, [1, 2], None, ids, ids, -100, 0.0, 0.0, scale, True, labels[:3] % 7, True)
    got = torch.ops.graddot.linear_cross_entropy(act, weight, None, *rest)
    want = torch.ops.graddot.linear_cross_entropy(act.double(), weight.double(), None, *rest)
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape
        if y.numel():
            assert relative(x, y) <= (1e-2 if dtype == torch.bfloat16 else 1e-3)
            of_sums = x.dtype == torch.float32
            assert of_sums or x.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_was_in_the_memory_before(dtype, monkeypatch):
    """Beside the logits, too, where products in bf16 of some processors read on, times 0."""
    nan = lambda x: x.fill_(torch.nan)
    monkeypatch.setattr(fused_head.cpu_kernels, "advise_huge_pages", nan)
    torch.manual_seed(0)
    act, weight = torch.randn(6, 11, 16).to(dtype), torch.randn(61, 16)
    labels, none = torch.randint(0, 61, (6, 11)), torch.empty(0, dtype=torch.int64)
    for val_rows, direction in (([2], None), ([], torch.randn(1, 61, 16))):
        results = torch.ops.graddot.linear_cross_entropy(
            act, weight, None, labels, val_rows, direction, none, none, -100, 0.0, 0.0, None, True,
            None, False,
        )  # fmt: skip
        assert all(x.isfinite().all() for x in results)


def test_fp16_keeps_small_probabilities():
    """Under autocast in fp16, the gradient of logits of 50,000 tokens, 2e-5 each and less."""
    head, hidden, labels = problem(vocab=50_000)
    inputs = hidden, head.weight
    want_grads = torch.autograd.grad(plain_loss(head, hidden, labels)[0], inputs)
    with torch.autocast("cpu", torch.float16):
        loss, _ = linear_cross_entropy(hidden, head, labels)
    for got, grad in zip(torch.autograd.grad(2.0**12 * loss, inputs), want_grads, strict=True):
        assert relative(got / 2.0**12, grad.double()) <= 2e-3
    rows = torch.arange(50_000)[~torch.isin(torch.arange(50_000), labels)]
    (weight_grad,) = torch.autograd.grad(plain_loss(head, hidden, labels)[0], head.weight)
    assert relative(got[rows] / 2.0**12, weight_grad[rows].double()) <= 2e-3


@pytest.mark.parametrize("compiled", [True, False])
def test_large_vocabulary_and_extreme_logits(compiled, monkeypatch):
    """128k tokens, logits beyond exp's range, one masked out."""
    if not compiled:
        monkeypatch.setattr("graddot_kernels.cpu_kernels.INSTRUCTION_SET", "")
    head, hidden, labels = problem(vocab=128_256, rows=2, t=3, width=4)
    with torch.no_grad():
        head.weight.mul_(300)
        head.bias[7] = -float("inf")
    labels[labels == 7] = 8
    want, _ = plain_loss(head, hidden, labels)
    inputs = hidden, head.weight
    want_grads = torch.autograd.grad(want, inputs)
    loss, _ = linear_cross_entropy(hidden, head, labels)
    assert relative(loss.detach(), want.detach()) <= 1e-5
    for got, grad in zip(torch.autograd.grad(loss, inputs), want_grads, strict=True):
        assert relative(got, grad) <= 1e-4  # fp32 logits of 1e3 are rounded to 6e-5


def test_bad_labels_and_shapes():
    head, hidden, labels = problem()
    with pytest.raises(GraddotError, match="label 19 at row 0, position 1 is no token of the head"):
        wrong = labels.clone()
        wrong[0, 1] = 19
        linear_cross_entropy(hidden, head, wrong)
    with pytest.raises(GraddotError, match=r"labels \(6, 3\); expected"):
        linear_cross_entropy(hidden, head, labels[:, :3])
    with pytest.raises(GraddotError, match="reduction is 'none'"):
        linear_cross_entropy(hidden, head, labels, reduction="none")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
@pytest.mark.parametrize("compiled", [True, False])
def test_labels_of_every_integer_dtype(dtype, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr("graddot_kernels.cpu_kernels.INSTRUCTION_SET", "")
    head, hidden, labels = problem()
    labels = labels.masked_fill(labels == -100, 100)
    inputs = hidden, head.weight
    want, want_losses = linear_cross_entropy(hidden, head, labels, ignore_index=100)
    want_grads = torch.autograd.grad(want, inputs)
    loss, losses = linear_cross_entropy(hidden, head, labels.to(dtype), ignore_index=100)
    assert torch.equal(losses, want_losses)
    for got, grad in zip(torch.autograd.grad(loss, inputs), want_grads, strict=True):
        assert torch.equal(got, grad)
    with torch.no_grad():
        losses = linear_cross_entropy(hidden, head, labels.to(dtype), ignore_index=100)[1]
    torch.testing.assert_close(losses, want_losses)


def op_of_head(hidden, head, labels, val_rows, direction=None):
    none = torch.empty(0, dtype=torch.long, device="cpu")
    return torch.ops.graddot.linear_cross_entropy(
        hidden, head.weight, None, labels, val_rows, direction, none, none, -100, 0.0, 0.0, None,
        True,
    )  # fmt: skip


def test_a_given_direction_outlives_a_batch_without_tokens():
    head, hidden, labels = problem()
    direction = torch.ones(2, 19, 12)
    dots = op_of_head(hidden[:, :0], head, labels[:, :0], [], direction)[4]
    assert torch.equal(dots, torch.zeros(2, 6))
    assert (direction == 1).all()


def test_inputs_that_require_grad_and_another_default_device(chunked, monkeypatch):
    monkeypatch.setattr(fused_head, "_kept", {})
    head, hidden, labels = problem()
    with torch.no_grad():
        want = op_of_head(hidden, head, labels, [1, 1])
    monkeypatch.setattr(fused_head, "_kept", {})
    torch.set_default_device("meta")
    try:
        got = op_of_head(hidden, head, labels, [1, 1])
    finally:
        torch.set_default_device(None)
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x.detach(), y)


@pytest.mark.parametrize("chunk", [40, 10**6], ids=["directions", "logits"])
def test_a_table_is_kept(chunk, monkeypatch):
    monkeypatch.setitem(fused_head._CHUNK_ELEMENTS, "cpu", chunk)
    monkeypatch.setattr(fused_head, "_kept", {})
    head, hidden, labels = problem()
    none, scale = torch.empty(0, dtype=torch.long), torch.ones(())

    def dots() -> Tensor:
        return torch.ops.graddot.linear_cross_entropy(
            hidden.detach(), head.weight.detach(), None, labels, [1, 1], None, none, none, -100, 0.0,
            0.0, scale, True, None, False,
        )[4]  # fmt: skip

    with torch.inference_mode():  # whose tensors nothing outside may write to
        want = dots().clone()
    table = fused_head._kept[torch.float32]
    table.fill_(float("nan"))
    assert torch.equal(dots(), want)
    assert fused_head._kept[torch.float32] is table


# The op below it


@pytest.mark.parametrize("needed", [True, False])
@pytest.mark.parametrize("val_rows", [[], [1, 2]], ids=["given", "riding"])
@pytest.mark.parametrize("count", [0, 3])
def test_opcheck_of_a_table_s_rows(count, val_rows, needed):
    head, hidden, labels = problem(bias=False)
    ids, none = labels[1, :count], labels.new_empty(0)
    direction = None if val_rows else torch.ones(2, 19, 12)
    args = (
        hidden.detach(), head.weight.detach(), None, labels, val_rows, direction, none, ids, -100,
        0.0, 0.0, None, needed,
    )  # fmt: skip
    op = torch.ops.graddot.linear_cross_entropy.default
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("given", [True, False])
def test_val_rows_that_do_not_fit(given):
    head, hidden, labels = problem()
    direction = torch.ones(1, 19, 12) if given else None
    for val_rows in ([1],) if given else ([1, 0], [2, -1], [7]):
        with pytest.raises(ValueError, match=r"val_rows has .*; expected positive row counts"):
            op_of_head(hidden, head, labels, val_rows, direction)


@pytest.mark.parametrize("smoothing, z_loss", [(0.0, 0.0), (0.2, 1e-3)])
@pytest.mark.parametrize("vocab", [1, 3, 8, 17, 1003])
@pytest.mark.parametrize("dtype", ["fp32", "fp64", "bf16", "fp16", "fp32-torch", "bf16-torch"])
@pytest.mark.parametrize("apart", [0, 5])
def test_cross_entropy_grad(apart, dtype, vocab, smoothing, z_loss, monkeypatch):
    if dtype.endswith("torch"):
        monkeypatch.setattr("graddot_kernels.cpu_kernels.INSTRUCTION_SET", "")
    kinds = {"fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
    kind = kinds.get(dtype[:4], torch.float32)
    torch.manual_seed(vocab)
    padded = (5 * torch.randn(9, vocab + apart)).to(kind)
    logits, between = padded[:, :vocab], padded[:, vocab:].clone()
    labels = torch.randint(0, vocab, (9,))
    labels[3] = -1
    want, want_grad = reference.cross_entropy_grad(logits.double(), labels, -1, smoothing, z_loss)
    size = logits.double().abs().max()  # a loss is a difference of logits
    losses = torch.ops.graddot.cross_entropy_grad(logits, labels, -1, smoothing, z_loss)
    tolerance = {torch.float64: 1e-13}.get(kind, 2e-6)
    rounding = torch.finfo(kind).eps / 2 * want_grad.abs()  # of the result
    assert (losses - want).abs().max() <= 5e-7 * size
    assert ((logits - want_grad).abs() <= rounding + tolerance).all()
    assert (logits[3] == 0).all()
    assert torch.equal(padded[:, vocab:], between)


@pytest.mark.parametrize("compiled", [True, False])
def test_labels_that_are_no_tokens(compiled, monkeypatch):
    """Named, and nothing written beside the logits."""
    if not compiled:
        monkeypatch.setattr("graddot_kernels.cpu_kernels.INSTRUCTION_SET", "")
    padded = torch.ones(4, 32)
    for wrong in (11, 13, -1, -2):
        labels = torch.tensor([1, -100, wrong, 3])
        message = rf"labels\[2\] is {wrong}, outside the vocabulary of 11; .* ignored is -100"
        with pytest.raises(IndexError, match=message):
            torch.ops.graddot.cross_entropy_grad(padded[:, :11], labels, -100, 0.0, 0.0)
    for labels, message in (
        (torch.zeros(3, dtype=torch.long), r"labels has shape \(3,\); expected \(4,\)"),
        (torch.zeros(4), "labels has dtype torch.float32; expected integers"),
    ):
        with pytest.raises(ValueError, match=message):
            torch.ops.graddot.cross_entropy_grad(padded[:, :11], labels, -100, 0.0, 0.0)
    with pytest.raises(RuntimeError, match="single memory location"):
        expanded = padded[:1, :11].expand(4, 11)
        torch.ops.graddot.cross_entropy_grad(expanded, torch.arange(4), -100, 0.0, 0.0)
    assert (padded == 1).all()


def test_a_backward_that_needs_the_logits_is_refused():
    x = torch.randn(4, 11, requires_grad=True)
    logits = x * 1
    loss = (logits * logits).sum()
    torch.ops.graddot.cross_entropy_grad(logits.detach(), torch.arange(4), -100, 0.0, 0.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
