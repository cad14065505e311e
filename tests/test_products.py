"""The compiled products of fp32, against float64: where the processor has AMX, by parts of bf16."""

import copy
import functools

import pytest
import torch
from graddot_lm import GradDotProdEngine
from transformers.pytorch_utils import Conv1D

from graddot_kernels import cpu_kernels, torch_impl

pytestmark = pytest.mark.skipif(
    not cpu_kernels.available(torch.empty(0)), reason="no vector kernels for this processor"
)
SHAPES = [
    (1, 1, 1), (5, 0, 7), (0, 3, 4), (33, 31, 65), (40, 1024, 50), (17, 2100, 19), (700, 70, 900),
]  # fmt: skip


def matrices(m: int, k: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(m + k + n)
    return torch.randn(m, k), torch.randn(k, n)


def relative_error(got: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> float:
    """Of every element, over the sum of its terms' sizes."""
    want, size = x.double() @ y.double(), x.double().abs() @ y.double().abs()
    return ((got - want).abs() / size).max().item() if got.numel() * x.shape[1] else 0.0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_strides(shape: tuple[int, int, int]) -> None:
    x, y = matrices(*shape)
    m, k, n = shape
    wide = torch.randn(m, 3 * k + 2)[:, 2::3].copy_(x)
    for left in (x, x.t().contiguous().t(), wide):
        for right in (y, y.t().contiguous().t(), y.expand(2, k, n)[1]):
            assert relative_error(cpu_kernels.product(left, right), x, y) < 3e-7
            memory = torch.full((m, n + 5), 7.0)
            cpu_kernels.product(left, right, memory[:, :n])
            assert relative_error(memory[:, :n], x, y) < 3e-7
            assert (memory[:, n:] == 7).all()


def test_result_of_other_strides() -> None:
    with pytest.raises(ValueError, match="of rows of unit stride"):
        cpu_kernels.product(*matrices(4, 5, 6), torch.empty(6, 4).t())


@pytest.mark.parametrize("terms", [64, 768, 5000])
def test_as_exact_as_pytorch(terms: int) -> None:
    x, y = matrices(64, terms, 96)
    error, pytorch = relative_error(cpu_kernels.product(x, y), x, y), relative_error(x @ y, x, y)
    assert error < 1.5 * pytorch < 1e-6


@pytest.mark.parametrize("terms", [1, 40])
def test_every_magnitude(terms: int) -> None:
    """Rows and columns from 1e-30 to 1e30, and one of both in each: nothing is lost beside the rest."""
    x, y = matrices(61, terms, 61)
    exponents = torch.linspace(-30, 30, 61)
    x, y = x * 10 ** exponents[:, None], y * 10**-exponents
    inside = (exponents[:, None] - exponents).abs() < 28
    size = x.double().abs() @ y.double().abs()
    error = (cpu_kernels.product(x, y) - x.double() @ y.double()).abs() / size
    assert error[inside].max() < 3e-7
    x[:, ::2] *= 1e-12
    size = x.double().abs() @ y.double().abs()
    error = (cpu_kernels.product(x, y) - x.double() @ y.double()).abs() / size
    assert error[inside & (exponents > -12)[:, None] & (exponents < 12)].max() < 3e-7


def test_extreme_numbers() -> None:
    """The largest numbers, as masks have them, stay finite; what is not finite stays so, where it is."""
    largest = torch.finfo(torch.float32).max
    x, y = matrices(40, 50, 60)
    x[3, 7], x[4, 8], y[7], y[8] = largest, -largest, 0.0, 0.5
    got = cpu_kernels.product(x, y)
    assert relative_error(got, x, y) < 3e-7
    for value in (float("nan"), float("inf"), -float("inf")):
        x[5, 9], y[11, 13] = value, value
        got = cpu_kernels.product(x, y)
        finite = torch.ones(40, 60, dtype=torch.bool)
        finite[5], finite[:, 13] = False, False
        assert (got.isfinite() == finite).all()


@pytest.mark.skipif(not cpu_kernels._PRODUCTS, reason="PyTorch's are faster on this processor")
def test_taken_where_faster(monkeypatch) -> None:
    """Not for a small result, nor for another dtype."""
    seen = []
    kernel = cpu_kernels.product
    monkeypatch.setattr(
        cpu_kernels, "product", lambda *a, **k: (seen.append(a[0].shape), kernel(*a, **k))[1]
    )
    big, small = torch.randn(400, 130), torch.randn(20, 130)
    weight, bias = torch.randn(130, 500), torch.randn(500)
    for x in (big, small, big.double(), big.bfloat16()):
        w, b = weight.to(x.dtype), bias.to(x.dtype)
        want = x.double() @ w.double()
        close = functools.partial(torch.testing.assert_close, rtol=2e-2, atol=0.2)
        close(torch_impl.mm(x, w).double(), want)
        close(torch_impl.linear(x, w.t()).double(), want)
        close(torch_impl.linear(x, w.t(), b).double(), want + b.double())
    assert seen == [(400, 130)] * 3
    monkeypatch.setattr(cpu_kernels, "_PRODUCTS", False)
    torch_impl.mm(big, weight)
    torch_impl.linear(big, weight.t())
    assert seen == [(400, 130)] * 3


@pytest.mark.parametrize("terms", [128, 3072])
def test_linear_is_as_exact_as_pytorch(terms: int) -> None:
    """With its bias, of which the sum may be mostly made."""
    x, y = matrices(400, terms, 400)
    for bias in (torch.randn(400), 1e3 * torch.randn(400)):
        want = x.double() @ y.double() + bias.double()
        size = x.double().abs() @ y.double().abs() + bias.double().abs()
        off = [
            (got - want).abs() / size
            for got in (torch_impl.linear(x, y.t(), bias), torch.addmm(bias, x, y))
        ]
        error, pytorch = (x.max().item() for x in off)
        assert error < 1.5 * pytorch < 1e-6


@pytest.mark.parametrize("layer", [torch.nn.Linear, Conv1D])
@pytest.mark.parametrize("rows", [(2, 200), (400,)], ids=["tokens", "rows"])
def test_input_gradients_of_scored_layers(layer, rows) -> None:
    """Of layers so large that they are taken; the first's weight gradient is made of the second's."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(layer(384, 384) for _ in range(2)))
    x, y = torch.randn(*rows, 384), torch.zeros(rows[0])

    def gradient(model, x):
        loss = model(x).flatten(1).square().mean(1).mean()
        return torch.autograd.grad(loss, model[0].weight)[0].double()

    want = gradient(copy.deepcopy(model).double(), x.double())
    plain = (gradient(model, x) - want).norm()
    engine = GradDotProdEngine(model, (x[:1], y[:1]), label_shift=0)
    engine.attach()
    engine.attach_train_batch(x, y, 0, None)
    inputs, _ = engine.prepare_forward_input(x, y)
    engine.track_loss(model(inputs).flatten(1).square().mean(1).mean()).backward()
    engine.prepare_gradients()
    error = (model[0].weight.grad - want).norm()
    assert error < 1.5 * plain < 1e-5 * want.norm()
    engine.detach()
