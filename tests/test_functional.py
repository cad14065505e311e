"""The linear and norm functions against the float64 definitions, by every route on the CPU.

`kernel_checks` states the error model: fp32 sums of exact products, so about 16 roundings (1e-6)
of the sum of the terms' magnitudes, and the same number of fp64 roundings for fp64 inputs. 16-bit
inputs are exact in fp64, so their results are held to fp32's error too.
"""

import math
import subprocess
import sys

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from kernel_checks import (
    assert_within,
    check_direction,
    check_gram,
    check_squares,
    check_wgrad,
    inputs,
    random,
    token_norms,
)
from linear_problems import DTYPES, LAYOUTS, Problem, each_count, joint, make, rows
from torch import Tensor

import graddot_kernels as gk
from graddot_kernels import cpu_kernels, reference, torch_impl

__all__ = ["each_count"]  # the fixture

VAL_ROWS = [[1], [1, 2], [2, 1, 2]]
CASES: dict[str, dict] = {name: {"dtype": name} for name in DTYPES}
CASES |= {f"{name}-long": {"dtype": name, "t": 41} for name in DTYPES}
CASES |= {layout: {"layout": layout} for layout in LAYOUTS[1:]}
CASES |= {f"{layout}-long": {"layout": layout, "t": 41} for layout in LAYOUTS[1:]}
CASES |= {
    "two-dim": {"layout": "two-dim", "t": 1},
    "n=1": {"n": 1},
    "n=1-v=1-t=1": {"n": 1, "v": 1, "t": 1},
    "empty-n": {"n": 0},
    "empty-n-long": {"n": 0, "t": 41},
    "empty-t": {"t": 0},
    "s!=t": {"s": 4},
    "narrow": {"d_in": 1, "d_out": 3, "t": 50},
    "tall": {"d_in": 40, "d_out": 3},
    "bf16-sliced": {"dtype": "bf16", "layout": "sliced"},
    "mixed-layouts": {"layout": "transposed", "grad_layout": "expanded"},
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def check_ghost(p: Problem) -> None:
    args = p.val_act, p.val_grad, p.act, p.grad
    for pairwise in (False, True):
        for method in ("auto", "gram", "direction"):
            got = gk.linear_ghost_dot(*args, pairwise=pairwise, method=method)  # type: ignore[arg-type]
            check_gram(got, *map(rows, args), pairwise, p.tolerance)


def check_given_direction(p: Problem) -> None:
    act, grad = rows(p.act), rows(p.grad)
    for per_token in (False, True):
        got = gk.linear_direction_dot(p.direction, p.act, p.grad, per_token=per_token)
        check_direction(got, p.direction, act, grad, per_token, p.tolerance)
        single = gk.linear_direction_dot(p.direction[0], p.act, p.grad, per_token=per_token)
        check_direction(single[None], p.direction[:1], act, grad, per_token, p.tolerance)


def check_wgrad_dot(p: Problem) -> None:
    for scale in (None, torch.tensor(0.3), torch.tensor(-3.0, dtype=torch.float64)):
        got, dots = gk.linear_wgrad_dot(p.direction, p.act, p.grad, scale=scale)
        act, grad, tolerance = rows(p.act), rows(p.grad), p.tolerance
        check_wgrad(got, dots, p.direction, act, grad, scale, tolerance=tolerance)
        got, dots = gk.linear_wgrad_dot(p.direction[0], p.act, p.grad, scale=scale)
        check_wgrad(got, dots[None], p.direction[:1], act, grad, scale, tolerance=tolerance)


def check_joint(p: Problem, val_rows: list[int]) -> None:
    act, grad, scale = rows(p.act), rows(p.grad), torch.tensor(0.3)
    got, dots = gk.linear_joint_wgrad_dot(*joint(p), val_rows, scale=scale)
    want, want_dots = reference.linear_joint_wgrad_dot(
        *(rows(x).double() for x in joint(p)), val_rows, scale.double()
    )
    magnitude = torch.einsum("nto,nti->oi", grad.double().abs(), act.double().abs())
    assert_within(got, want, magnitude, p.tolerance)
    val_norms = token_norms(rows(p.val_act), rows(p.val_grad)).sum(1).split(val_rows)
    bound = torch.stack([x.sum() for x in val_norms])[:, None] * token_norms(act, grad).sum(1)
    assert_within(dots, want_dots, bound, p.tolerance)


def check_norms(p: Problem, val_rows: list[int]) -> None:
    """The row ‖G_i‖² and the column ‖D_k‖²; all else is bitwise what it is without them."""
    act, grad, tolerance, scale = rows(p.act), rows(p.grad), p.tolerance, torch.tensor(0.3)
    plain, plain_dots = gk.linear_wgrad_dot(p.direction, p.act, p.grad, scale=scale)
    got, dots = gk.linear_wgrad_dot(p.direction, p.act, p.grad, scale=scale, norms=True)
    assert torch.equal(got, plain) and torch.equal(dots[:-1], plain_dots)
    check_squares(dots[-1], act, grad, tolerance)
    plain, plain_dots = gk.linear_joint_wgrad_dot(*joint(p), val_rows, scale=scale)
    got, dots = gk.linear_joint_wgrad_dot(*joint(p), val_rows, scale=scale, norms=True)
    assert torch.equal(got, plain) and torch.equal(dots[:-1, :-1], plain_dots)
    check_squares(dots[-1, :-1], act, grad, tolerance)
    val = rows(p.val_act), rows(p.val_grad)
    grads = reference.linear_sample_grads(*(x.double() for x in val)).split(val_rows)
    column = torch.stack([g.sum(0).square().sum() for g in grads])
    norms = token_norms(*val).sum(1).split(val_rows)
    bound = torch.stack([x.sum().square() for x in norms])
    assert_within(dots[:-1, -1], column, bound, tolerance)
    assert dots[-1, -1] == 0


@every_case
def test_ghost_dot_by_both_methods(case: dict) -> None:
    check_ghost(make(**case))


@every_case
def test_direction_dot(case: dict) -> None:
    check_given_direction(make(**case))


@pytest.mark.usefixtures("each_count")
@every_case
def test_wgrad_dot(case: dict) -> None:
    check_wgrad_dot(make(**case))


@pytest.mark.usefixtures("each_count")
@pytest.mark.parametrize("t", [3, 41])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_directions_of_fp32_with_16_bit_samples(dtype: str, t: int) -> None:
    p = make(dtype=dtype, t=t)
    p = p._replace(direction=p.direction.float() * 1.001)
    check_given_direction(p)
    check_wgrad_dot(p)


@pytest.mark.usefixtures("each_count")
@every_case
def test_joint_wgrad_dot_of_one_and_several_targets(case: dict) -> None:
    for val_rows in VAL_ROWS:
        check_joint(make(**(case | {"v": sum(val_rows), "s": None})), val_rows)


@pytest.mark.usefixtures("each_count")
@every_case
def test_squared_norms(case: dict) -> None:
    for val_rows in VAL_ROWS:
        check_norms(make(**(case | {"v": sum(val_rows), "s": None})), val_rows)


@every_case
def test_norms(case: dict) -> None:
    p = make(**(case | {"d_out": case.get("d_in", 13)}))
    tolerance = p.tolerance
    (weight, bias), val = (
        [x.double() for x in reference.norm_sample_grads(rows(a).double(), rows(b).double())]
        for a, b in ((p.act, p.grad), (p.val_act, p.val_grad))
    )
    sizes, val_sizes = (  # the terms' magnitudes
        reference.norm_sample_grads(rows(a).double().abs(), rows(b).double().abs())
        for a, b in ((p.act, p.grad), (p.val_act, p.val_grad))
    )
    for got, want, size in zip(
        gk.norm_sample_grads(p.act, p.grad), (weight, bias), sizes, strict=True
    ):
        assert_within(got, want, size, tolerance)
    high = torch.promote_types(p.act.dtype, torch.float32)
    mean, rstd = p.act.to(high).mean(-1), p.act.to(high).square().mean(-1).add(1).rsqrt()
    rows_of = lambda x: rows(x.double())
    statistics = [y.reshape(rows(p.act).shape[:2]).double() for y in (mean, rstd)]
    got = gk.norm_sample_grads(p.act, p.grad, mean=mean, rstd=rstd)
    want = reference.norm_sample_grads(rows_of(p.act), rows_of(p.grad), *statistics)
    sizes = reference.norm_sample_grads(
        rows_of(p.act).abs(), rows_of(p.grad).abs(), -statistics[0].abs(), statistics[1]
    )
    for one, exact, size in zip(got, want, sizes, strict=True):
        assert_within(one, exact, size, tolerance)
    weight_dots, bias_dots = weight @ val[0].sum(0), bias @ val[1].sum(0)
    bound = sum(x @ y.sum(0) for x, y in zip(sizes, val_sizes, strict=True))
    args = p.val_act, p.val_grad, p.act, p.grad
    assert_within(gk.norm_ghost_dot(*args), weight_dots + bias_dots, bound, tolerance)
    assert_within(gk.norm_ghost_dot(*args, bias=False), weight_dots, bound, tolerance)
    d, e = p.direction[:, 0], p.direction[:, -1]
    total, bias_total, dots = gk.norm_wgrad_dot(d, p.act, p.grad, bias_direction=e)
    assert_within(total, weight.sum(0), sizes[0].sum(0), tolerance)
    assert_within(bias_total, bias.sum(0), sizes[1].sum(0), tolerance)
    d, e = d.double(), e.double()
    bound = d.abs() @ sizes[0].t() + e.abs() @ sizes[1].t()
    assert_within(dots, d @ weight.t() + e @ bias.t(), bound, tolerance)
    one = gk.norm_wgrad_dot(p.direction[0, 0], p.act, p.grad)[2]
    assert_within(one, d[0] @ weight.t(), bound[0], tolerance)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_drawn_shapes(data: st.DataObject) -> None:
    size = st.integers(1, 33)
    sizes = {name: data.draw(size, name) for name in ("t", "s", "d_in", "d_out")}
    sizes |= {"n": data.draw(st.integers(0, 4), "n"), "k": data.draw(st.integers(1, 3), "k")}
    layouts = st.sampled_from(LAYOUTS)
    kind = {"layout": data.draw(layouts), "grad_layout": data.draw(layouts)}
    p = make(**sizes, **kind, dtype=data.draw(st.sampled_from(list(DTYPES))))
    check_ghost(p)
    check_given_direction(p)
    check_wgrad_dot(p)
    val_rows = data.draw(st.sampled_from(VAL_ROWS))
    check_joint(make(**(sizes | {"s": sizes["t"], "v": sum(val_rows)}), **kind), val_rows)


@pytest.mark.parametrize("t", [1, 41])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "fp64"])
@pytest.mark.parametrize("empty", ["d_in", "d_out"])
def test_no_width(empty: str, dtype: str, t: int) -> None:
    p = make(t=t, dtype=dtype, **{empty: 0})
    check_ghost(p)
    check_given_direction(p)
    check_wgrad_dot(p)
    check_joint(p, [1, 2])
    check_norms(p, [1, 2])
    none = torch.zeros(2, 3, 0)
    total, bias, dots = gk.norm_wgrad_dot(torch.zeros(0), none, none)
    assert total.shape == bias.shape == (0,) and torch.equal(dots, torch.zeros(2))


@pytest.mark.parametrize("empty", ["d_in", "d_out"])
def test_nothing_is_written_beside_the_dots(empty: str, monkeypatch) -> None:
    """Directions without an element have no address; with norms they were taken for val rows."""
    beside = []

    def new_empty(x: Tensor, *shape: int) -> Tensor:
        memory = torch.full([math.prod(shape) + 64], 7.0)
        beside.append(memory[-64:])
        return memory[:-64].view(shape)

    p = make(t=41, **{empty: 0})
    monkeypatch.setattr(Tensor, "new_empty", new_empty)
    _, dots = gk.linear_wgrad_dot(p.direction, p.act, p.grad, norms=True)
    assert beside and all((x == 7).all() for x in beside)
    assert torch.equal(dots, torch.zeros(3, 5))


OUT_OF_MEMORY = """
import resource, torch, graddot_kernels as gk
torch.set_num_threads(1)
act = torch.randn(1, 1_000_000, 16)
grad, direction = torch.randn(1, 1_000_000, 3), torch.randn(3, 16)
ids = torch.zeros(1, 3, dtype=torch.long)
gk.linear_wgrad_dot(direction, act[:, :50], grad[:, :50])
with open("/proc/self/statm") as file:
    limit = int(file.read().split()[0]) * resource.getpagesize() + 50 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for call in (
    lambda: gk.linear_wgrad_dot(direction, act, grad),
    lambda: gk.embedding_joint_wgrad_dot(ids, grad[:, :3], [1], 10**8),
):
    try:
        call()
    except Exception as error:
        print(type(error).__name__, error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_out_of_memory() -> None:
    """An error that says so, not the end of the process."""
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True, check=True
    )
    *packed, table = done.stdout.splitlines()
    if cpu_kernels.INSTRUCTION_SET:
        assert packed[0].startswith("MemoryError no memory to pack samples of 1000000 tokens")
    assert table == "RuntimeError no result of shape (100000000, 3) could be made: out of memory?"


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Names of torch_impl's inner functions, in the order of their calls."""
    seen: list[str] = []

    def spy(name: str) -> None:
        inner = getattr(torch_impl, name)
        monkeypatch.setattr(
            torch_impl, name, lambda *a, **k: (seen.append(name), inner(*a, **k))[1]
        )

    for name in ("_fused_wgrad_dot", "linear_direction_dot", "linear_gram_dot", "_scaled_"):
        spy(name)
    return seen


@pytest.fixture
def plain(monkeypatch) -> None:
    """As on a processor that the compiled kernels have no code for."""
    monkeypatch.setattr(cpu_kernels, "INSTRUCTION_SET", "")


@every_case
def test_without_compiled_kernels(case: dict, plain) -> None:
    p = make(**case)
    check_wgrad_dot(p)
    if p.val_act.shape[1:] == p.act.shape[1:]:
        val_rows = [1] if p.val_act.shape[0] == 1 else [1, 2]
        check_joint(p, val_rows)
        check_norms(p, val_rows)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "shape", [(3, 60, 200, 300), (2, 300, 1100, 1700), (4, 20, 40, 3), (3, 521, 70, 700)], ids=str
)
def test_compiled_tiles(shape: tuple[int, ...], dtype: str, threads: int) -> None:
    """More than one tile, panel, part of the tokens and thread, and their ragged ends."""
    n, t, d_in, d_out = shape
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        p = make(dtype=dtype, n=n, t=t, d_in=d_in, d_out=d_out)
        check_wgrad_dot(p)
        check_joint(p, [1, 2])
        check_norms(p, [1, 2])
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not cpu_kernels.INSTRUCTION_SET, reason="no vector kernels for this processor")
@pytest.mark.parametrize("t", [2, 41])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_are_not_widened(dtype: torch.dtype, t: int, monkeypatch) -> None:
    """Of no route is there a copy in fp32 of the samples whose weight gradient is made."""
    seen = []
    kernel = cpu_kernels.linear_wgrad_dot
    spy = lambda *args: (seen.append(args[3].dtype), kernel(*args))[1]
    monkeypatch.setattr(cpu_kernels, "linear_wgrad_dot", spy)
    monkeypatch.setattr(torch_impl, "_MACS_OF_CALLS", 0)
    act, grad = inputs(3, t, 13, 17, dtype=dtype)
    direction = random(1, 17, 13, dtype=torch.float32)
    torch.ops.graddot.linear_wgrad_dot(direction, act, grad, None, False)
    torch.ops.graddot.linear_joint_wgrad_dot(act, grad, [1], None, False)
    total = torch.empty(17, 13)
    torch.ops.graddot.linear_wgrad_dot_into(total, None, direction, act, grad, None, False, False)
    assert seen == [dtype] * 3


def test_products_of_bf16_in_between() -> None:
    """PyTorch's own may run on the same matrix unit, whose state is the thread's, and rely on it."""
    act, grad = inputs(3, 70, 96, 130, dtype=torch.bfloat16)
    for size in (32, 17, 96):
        x = random(40, size, dtype=torch.bfloat16)
        want = x @ x.t()
        for _ in range(3):
            torch.ops.graddot.linear_joint_wgrad_dot(act, grad, [1], None, False)
            assert torch.equal(x @ x.t(), want)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("t", [300, 4096, 20_000])
def test_long_samples_of_one_sign(t: int, dtype: str) -> None:
    """Where every rounding goes the same way, one fp32 sum of all tokens would lose digits."""
    p = make(dtype=dtype, n=2, t=t, d_in=40, d_out=30)
    p = p._replace(act=p.act.abs() + 1, grad=p.grad.abs() + 1)
    check_wgrad_dot(p)
    check_norms(p._replace(val_act=p.act, val_grad=p.grad), [1, 1])


@pytest.mark.parametrize("tile_rows", [1, 4, 17])
def test_fused_route_by_tiles(tile_rows: int, calls: list[str], plain, monkeypatch) -> None:
    tiles = ["_scaled_"] * -(-17 // tile_rows)
    monkeypatch.setattr(torch_impl, "_TILE_ELEMENTS", 2 * 13 * tile_rows + 1)
    p = make(t=41)  # t·k at least 40, V·t²·(Din + Dout) at least 40·Din·Dout
    gk.linear_wgrad_dot(p.direction, p.act, p.grad)
    gk.linear_joint_wgrad_dot(*joint(p), [1, 2])
    assert calls == ["_fused_wgrad_dot", *tiles] * 2
    check_wgrad_dot(p)
    check_joint(p, [1, 2])
    check_norms(p, [1, 2])


@pytest.mark.parametrize("elements", [1, 5 * 5 * 2, 5 * 5 * 3 * 2, 10**6])
def test_gram_route_by_blocks(elements: int, calls: list[str], monkeypatch) -> None:
    blocks = {1: 3 * (1 + 5), 50: 2 * (1 + 5), 150: 1 + 3, 10**6: 1 + 1}[elements]
    monkeypatch.setattr(torch_impl, "_GRAM_ELEMENTS", elements)
    flattened = []
    tokens = torch_impl._tokens
    monkeypatch.setattr(torch_impl, "_tokens", lambda x: (flattened.append(x), tokens(x))[1])
    monkeypatch.setattr(torch_impl, "_MACS_OF_CALLS", 0)
    p = make(t=5)
    gk.linear_ghost_dot(p.val_act, p.val_grad, p.act, p.grad, method="gram")
    assert len(flattened) == 2 * blocks  # act and grad of every block of samples and of val rows
    gk.linear_joint_wgrad_dot(*joint(p), [1, 2])
    gk.linear_wgrad_dot(p.direction, p.act, p.grad)
    assert calls == ["linear_gram_dot", "_scaled_", "linear_direction_dot", "_scaled_"]
    check_ghost(p)
    check_joint(p, [1, 2])
