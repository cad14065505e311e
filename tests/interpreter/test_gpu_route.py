"""Steps of whole models as a GPU takes them: its ops, its Triton kernels in the interpreter, and the
branches that our code takes for tensors of a GPU. tests/gpu runs the same cells on one.

What the interpreter cannot do is left to a GPU: bf16, and 16-bit products with fp32 results.
"""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from brute_force import tiny_gpt2, token_batch
from graddot_lm import GradDotProdEngine, fuse_head
from grid_cells import SUBJECTS, Cell
from test_grid import LOOPS
from waits import SHAPES, VALUES, Waits

from graddot_kernels import cpu_kernels, ops, torch_impl, triton_kernels
from graddot_kernels.triton_kernels.config import TABLES

# Branches into what only a GPU has: its current device, and products with another result dtype.
ONLY_ON_A_GPU = {"on_device", "mm_fp32", "_add_product"}


def _seems_on_gpu(x: torch.Tensor) -> bool:
    caller = sys._getframe(1)
    ours = caller.f_globals["__name__"].startswith(("graddot_kernels", "graddot_lm"))
    return ours and caller.f_code.co_name not in ONLY_ON_A_GPU


@pytest.fixture
def gpu_route(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """A CPU's tensors are served as a GPU's; gives the names of the launchers that ran."""
    library, ran = torch.library.Library("graddot", "IMPL"), set()
    monkeypatch.setattr(triton_kernels, "_too_old", lambda device: False)
    # Of the models' 61 tokens one tile whole, one in part, and the odd ones: the fused head is most of the
    # time here, and every operation on a tile costs the same.
    tile = replace(TABLES["cross_entropy"]["interpreter", "any"], cols=32)
    monkeypatch.setitem(TABLES["cross_entropy"], ("interpreter", "any"), tile)
    monkeypatch.setattr(cpu_kernels, "INSTRUCTION_SET", "")
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(_seems_on_gpu))

    def serve(name, device_module):
        if "triton_kernels" in device_module:
            family, plain = device_module.rsplit(".", 1)[1], getattr(torch_impl, name)
            launcher = triton_kernels.gpu_implementation(family, name, plain)
        elif "embedding" in name:  # the form for a GPU without the compiled extension's part for it
            launcher = getattr(torch_impl, name)
        else:
            launcher = getattr(importlib.import_module(device_module), name)

        def run(*args):
            ran.add(name)
            # What a compiled extension does for embeddings is not to be looked into.
            watched = Waits.current if "embedding" not in name else None
            with watched or contextlib.nullcontext():
                return launcher(*args)

        library.impl(name, ops._without_modes(run), "CPU", allow_override=True)

    for name, devices in ops.routes.items():
        serve(name, devices["CUDA"])
    yield ran
    library._destroy()
    Waits.current = None


# Every kind of model, and the loops whose ops differ, for the models whose layers do: the whole
# grid takes the interpreter twenty minutes.
CELLS = [(model, "step") for model in SUBJECTS]
CELLS += [
    (model, loop)
    for model in ("gpt2", "gpt2-fused-head", "mixtral", "conv2d", "shared-layers")
    for loop in ("targets", "directions", "norms")
]
CELLS += [("gpt2", "fp16"), ("gpt2-fused-head", "fp16")]


@pytest.mark.parametrize("model, loop", CELLS, ids=["-".join(cell) for cell in CELLS])
def test_steps_of_a_gpu(model, loop, record_property, gpu_route):
    LOOPS[loop](Cell(model, record_property))
    assert any("wgrad" in name for name in gpu_route)


def test_waits_are_found():
    with Waits() as waits:
        x = torch.arange(3.0)
        x[x > 1], x.unique(), x.sum().item(), x[[0, 1]], x.nonzero()
    names = {"index by a mask", "_unique2", "_local_scalar_dense", "nonzero"}
    assert set(waits.waiting(VALUES | SHAPES)) == names


@pytest.mark.parametrize("form", ["untied", "tied", "fused", "given", "norms"])
def test_no_step_waits_for_a_gpu(form, gpu_route):
    """After the first step, which is checked."""
    model, val = tiny_gpt2(tied=form != "untied", layers=1), token_batch(2, 7, seed=9)
    if form in ("fused", "given"):
        fuse_head(model)
    given = form == "given"
    engine = GradDotProdEngine(model, None if given else val, norms=form == "norms")
    if given:
        engine.set_directions(engine.compute_directions([val]))
    engine.attach(torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1)))
    for step in range(2):
        x, y = token_batch(3, 7, seed=step)
        with Waits() as waits:
            engine.attach_train_batch(x, y, step, torch.arange(3))
            x, y = engine.prepare_forward_input(x, y)
            model(x, labels=y).loss.backward()
            engine.prepare_gradients()
            engine.aggregate_and_log()
        model.zero_grad()
    assert gpu_route and not waits.waiting(VALUES | SHAPES)
