"""The compiled backward of layer and RMS norms, against autograd in float64, one sample at a time."""

import pytest
import torch
import torch.nn.functional as F

from graddot_kernels import cpu_kernels

pytestmark = pytest.mark.skipif(
    not cpu_kernels.available(torch.empty(0)), reason="no vector kernels for this processor"
)
SHAPES = [
    (1, 1, 3), (3, 128, 7), (2, 129, 64), (2, 300, 33), (4, 1, 768), (0, 3, 5), (2, 0, 5), (3, 4, 0),
]  # fmt: skip
EPS = 1e-3


def layer_norm(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def rms_norm(x, weight, bias):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * (1 + weight) + bias


def problem(shape):
    torch.manual_seed(sum(shape))
    x, grad = torch.randn(shape) * 3 + 1, torch.randn(shape)
    return x, grad, torch.randn(shape[2])


def by_autograd(norm, x, grad, weight):
    """The gradient of x, and each sample's of the weight and a bias, in float64."""
    parts = [[], [], []]
    for sample, g in zip(x.double(), grad.double(), strict=True):
        inputs = [sample, weight.double(), torch.zeros_like(weight).double()]
        inputs = [y.detach().requires_grad_() for y in inputs]
        found = torch.autograd.grad(norm(*inputs), inputs, g)
        for part, y in zip(parts, found, strict=True):
            part.append(y)
    empty = [x.double(), x.new_zeros(0, x.shape[2]).double()]
    return [torch.stack(p) if p else empty[min(i, 1)] for i, p in enumerate(parts)]


def run(norm, x, grad, weight, x_needed=True):
    scale = weight if x_needed else None
    if norm is rms_norm:
        return cpu_kernels.norm_backward(x, grad, scale, None, None, offset=1.0, eps=EPS)
    mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, None, EPS)[1:]
    return cpu_kernels.norm_backward(x, grad, scale, mean[..., 0], rstd[..., 0])


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(shape, norm, record_property):
    x, grad, weight = problem(shape)
    want = by_autograd(norm, x, grad, weight)
    for got, expected in zip(run(norm, x, grad, weight), want, strict=True):
        assert got.shape == expected.shape and got.dtype == torch.float32
        if expected.numel():
            error = (got - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
            record_property("relative_error", error.item())
            assert error <= 3e-6


def test_views_and_no_gradient_of_x():
    x, grad, weight = problem((3, 6, 20))
    x, grad = x.transpose(0, 1), grad.transpose(0, 1)  # (6, 3, 20)
    whole = run(rms_norm, x, grad, weight)
    contiguous = run(rms_norm, x.contiguous(), grad.contiguous(), weight)
    without = run(rms_norm, x, grad, weight, x_needed=False)
    for a, b in zip(whole, contiguous, strict=True):
        assert torch.equal(a, b)
    assert without[0] is None
    assert torch.equal(without[1], whole[1]) and torch.equal(without[2], whole[2])


def test_results_do_not_depend_on_the_number_of_threads():
    x, grad, weight = problem((1, 1000, 130))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(layer_norm, x, grad, weight)
        torch.set_num_threads(2)
        two = run(layer_norm, x, grad, weight)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "wrong",
    [
        {"grad": torch.zeros(2, 3, 5)},
        {"weight": torch.zeros(3)},
        {"mean": torch.zeros(2, 4)},
        {"rstd": torch.zeros(2, 3, dtype=torch.float64)},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_wrong_shapes_and_dtypes_are_refused(wrong):
    fine = {"grad": torch.zeros(2, 3, 4), "weight": torch.zeros(4)}
    fine |= {"mean": torch.zeros(2, 3), "rstd": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match="expected x and grad"):
        cpu_kernels.norm_backward(torch.zeros(2, 3, 4), **(fine | wrong))
