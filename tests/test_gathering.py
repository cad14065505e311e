"""How often the processes of a sharded model ask each other, and the whole tensors they then have."""

import pytest
import torch
from brute_force import tiny_gpt2, token_batch
from graddot_lm import GradDotProdEngine, adamw_direction, fuse_head, gathering
from process_group import on_processes
from test_distributed import fully_sharded
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Collectives(TorchDispatchMode):
    """The names of the collective operations that run inside of it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it is made of comes here, too
        is_one = op.namespace in ("c10d", "_c10d_functional")
        if is_one and not any(part in op.name() for part in ("wait", "wrap")):
            self.names.append(op.name())
        return op(*args, **(kwargs or {}))


def counted(function, *args):
    """What it returns, and how many collective operations it took."""
    with Collectives() as collectives:
        result = function(*args)
    return result, len(collectives.names)


def sharded(fused):
    model = tiny_gpt2()
    if fused:
        fuse_head(model)
    fully_sharded(model)
    return model, torch.optim.AdamW(model.parameters())


def one_step(model, optimizer, engine, rank):
    x, y = token_batch(2, 9, seed=rank)
    if engine is not None:
        engine.attach_train_batch(x, y, 0, None)
        x, y = engine.prepare_forward_input(x, y)
    model(x, labels=y).loss.backward()
    if engine is not None:
        engine.prepare_gradients()
    optimizer.step()
    optimizer.zero_grad()
    if engine is not None:
        engine.aggregate_and_log()


def counts_of(rank, world, together, fused):
    """How many operations the parts of a loop take, steps without those that are checked; and how many
    parameters there are."""
    gathering.TOGETHER = together
    val, found = token_batch(2, 9, seed=99), {}
    model, optimizer = sharded(fused)
    _, found["regular"] = counted(one_step, model, optimizer, None, rank)
    for method in ("riding", "given"):
        model, optimizer = sharded(fused)
        engine = GradDotProdEngine(model, val if method == "riding" else None, norms=True)
        engine.attach(optimizer)
        if method == "given":
            gradient, found["compute"] = counted(engine.compute_directions, [val])
            _, found["set"] = counted(engine.set_directions, gradient)
        one_step(model, optimizer, engine, rank)
        _, found[method] = counted(one_step, model, optimizer, engine, rank)
    parameters = dict(model.named_parameters())
    _, found["adamw"] = counted(adamw_direction, optimizer, parameters, gradient)
    state = {"model": model.state_dict(keep_vars=True), "optimizer": optimizer.state_dict()}
    _, found["checkpoint"] = counted(gathering.gathered, state, rank == 0)
    return found, len(parameters)


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused-head"])
def test_operations_of_a_step_do_not_grow_with_the_parameters(tmp_path, fused):
    for found, parameters in on_processes(2, tmp_path, counts_of, 2**26, fused):
        assert parameters == 28
        assert found["riding"] == found["regular"]
        # The head's weight is the embedding's: the fused one asks for it in the forward, before the
        # backward does for what is left.
        assert found["given"] <= found["regular"] + 2
        assert found["compute"] <= found["regular"] + 2
        assert found["set"] <= 2 and found["adamw"] == 0 and found["checkpoint"] == 1
    for small, _ in on_processes(2, tmp_path / "small", counts_of, 2**11, fused):
        assert small["given"] > found["given"] and small["checkpoint"] > 3


SHAPES = [(7, 5), (3,), (1, 4), (2, 3, 4), (66, 8), (5,), (6, 6), (9, 2)]


def tensors_of(mesh, placements):
    """Some whole tensors, of two dtypes, and their shards."""
    torch.manual_seed(0)
    whole = [torch.randn(shape) for shape in SHAPES]
    whole += [torch.randn(shape).double() for shape in SHAPES]
    shards = []
    for x in whole:
        at = max(x.dim() - 2, 0)  # uneven ones, of fewer rows than processes among them
        own = [Shard(at) if p == "shard" else Replicate() for p in placements]
        shards.append(distribute_tensor(x, mesh, own))
    return whole, shards


def gathered_again(rank, world, dims):
    """Whether each is whole, asked for in turn, in another order, and twice; and the operations and the
    largest buffer that this took."""
    gathering.TOGETHER = 2**10
    names = ["replicate", "shard"][-len(dims) :]
    whole, shards = tensors_of(init_device_mesh("cpu", dims), names)
    orders = [range(16), [*range(0, 16, 2), *range(15, 0, -2)], [*range(16), *range(16)]]
    right, counts, largest = [], [], 0
    for order in orders:
        one, operations = gathering.Gathering(), 0
        for i in order:
            got, count = counted(one.whole, shards[i], lambda: shards)
            operations += count
            alone = got.is_contiguous() and got.untyped_storage().nbytes() == got.nbytes
            right.append(torch.equal(got, whole[i]) and alone)
            if one._bucket is not None:
                largest = max(largest, one._bucket._shards.nbytes)
        one.end()
        counts.append(operations)
        right.append(one._bucket is None)
    return all(right), counts, largest


@pytest.mark.parametrize("dims", [(2,), (3,), (2, 2)], ids=["2", "3", "2x2"])
def test_tensors_gathered_together_are_whole(tmp_path, dims):
    world = 1
    for size in dims:
        world *= size
    for right, counts, largest in on_processes(world, tmp_path, gathered_again, dims):
        assert right
        # The larger ones of either dtype by themselves, the others in as many as hold them.
        assert counts[0] <= 8 and max(counts) <= 2 * 16, counts
        assert largest <= 1.5 * 2**10  # with what fills up uneven shards
