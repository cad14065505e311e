"""Steps of whole models as a GPU takes them: its ops, its Triton kernels in the interpreter, and the
branches that our code takes for tensors of a GPU. tests/gpu runs the same cells on one.

What the interpreter cannot do is left to a GPU: bf16, and 16-bit products with fp32 results.
"""

import sys
from collections.abc import Iterator

import pytest
import torch
from grid_cells import SUBJECTS, Cell
from test_grid import LOOPS

from graddot_kernels import cpu_kernels, ops, torch_impl, triton_kernels

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
    monkeypatch.setattr(cpu_kernels, "INSTRUCTION_SET", "")
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(_seems_on_gpu))

    def serve(name, module):
        launcher = getattr(torch_impl, name)
        if "triton_kernels" in module:
            family = module.rsplit(".", 1)[1]
            launcher = triton_kernels.gpu_implementation(family, name, launcher)

        def run(*args):
            ran.add(name)
            return launcher(*args)

        library.impl(name, ops._without_autocast(run), "CPU", allow_override=True)

    for name, devices in ops.routes.items():
        # Embeddings in the form for a GPU without the compiled extension's part for it.
        module = "graddot_kernels.torch_impl" if "embedding" in name else devices["CUDA"]
        if module != devices["CPU"]:
            serve(name, module)
    yield ran
    library._destroy()


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
