"""A backend of torch.compile that runs graphs as they are and holds our ops to what the compiler was told.

Code that an inductor makes reads an op's results by the dtype and strides that its fake gave at tracing
time, whatever they are; run operation by operation, as `aot_eager` does, a wrong fake goes unseen.
"""

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils._pytree import tree_leaves


class _Checked(torch.fx.Interpreter):
    def run_node(self, n):
        result = super().run_node(n)
        if getattr(n.target, "namespace", None) in ("graddot", "graddot_lm"):
            for got, told in zip(tree_leaves(result), tree_leaves(n.meta["val"]), strict=True):
                _check(n, got, told)
        return result


def _check(node, got, told):
    if not isinstance(told, Tensor):
        return
    for name in ("dtype", "device", "layout"):
        assert getattr(got, name) == getattr(told, name), (node.target, name, got, told)
    for name in ("shape", "stride"):
        sizes = [tuple(getattr(x, name)) if name == "shape" else x.stride() for x in (got, told)]
        assert len(sizes[0]) == len(sizes[1]), (node.target, name, got, told)
        for own, other in zip(*sizes, strict=True):  # those that vary are no numbers in the graph
            assert not isinstance(other, int) or own == other, (node.target, name, got, told)


def _run(graph, inputs):
    return make_boxed_func(_Checked(graph).run)


checked = aot_autograd(
    fw_compiler=_run,
    bw_compiler=_run,
    partition_fn=min_cut_rematerialization_partition,
    keep_inference_input_mutations=True,
)
