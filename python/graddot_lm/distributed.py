"""Models whose gradients are averaged over several processes: DDP and FSDP2 (`fully_shard`)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .errors import GraddotError


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, or the model itself.

    Raises GraddotError for DataParallel and FullyShardedDataParallel, under which a layer does not
    see the whole batch or its own parameters.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module
    for name, module in model.named_modules():
        if isinstance(module, (DataParallel, DistributedDataParallel, FullyShardedDataParallel)):
            raise GraddotError(
                f"{name or 'the model'} is a {type(module).__name__}, in which layers cannot be"
                " scored; wrap the whole model in DistributedDataParallel, or use"
                " torch.distributed.fsdp.fully_shard. Where a library has put its own wrapper around that,"
                " as Fabric's setup() does, give the engine the model inside"
            )
    return model


def layer_type(module: nn.Module) -> type:
    """A module's class, as it was before `fully_shard` made it a subclass."""
    return next(c for c in type(module).__mro__ if not issubclass(c, FSDPModule))


def is_sharded(parameters: Iterable[nn.Parameter]) -> bool:
    return any(isinstance(p, DTensor) for p in parameters)


def averaging_group(
    parameters: list[nn.Parameter], given: dist.ProcessGroup | None
) -> dist.ProcessGroup | None:
    """The processes over which the gradients of the forward under way will be averaged.

    `given` if there is one, else that of the DistributedDataParallel that runs, or that over which
    the parameters are sharded; None where gradients stay in one process.
    """
    wrapper = DistributedDataParallel._get_active_ddp_module()
    joined = wrapper is not None and wrapper._join_config.enable
    if joined and not wrapper._divide_by_initial_world_size:
        raise GraddotError(
            "DistributedDataParallel.join(divide_by_initial_world_size=False) divides gradients by the"
            " number of processes that still have data, which values do not know; leave the argument out"
        )
    if given is not None:
        return given
    if wrapper is not None:
        return wrapper.process_group
    mesh = next((p.device_mesh for p in parameters if isinstance(p, DTensor)), None)
    if mesh is None:
        return None
    if mesh.size() == dist.get_world_size():
        return dist.group.WORLD
    if mesh.ndim == 1:
        return mesh.get_group()
    raise GraddotError(
        f"the parameters are sharded over a mesh of {mesh.size()} of {dist.get_world_size()}"
        " processes in several dimensions; pass process_group, the group of all of them"
    )


def check_static_graph() -> None:
    """Raise GraddotError if the DistributedDataParallel that runs takes the first backward of the
    parameters for its own: with reentrant checkpoints that of compute_directions calls its hooks."""
    wrapper = DistributedDataParallel._get_active_ddp_module()
    if wrapper is not None and wrapper.static_graph:
        raise GraddotError(
            "DistributedDataParallel(static_graph=True) with reentrant checkpoints counts the backward"
            " of compute_directions as its first, and would give wrong gradients; pass"
            " use_reentrant=False to the checkpoints, or give val_data instead of directions"
        )


def check_all_answer() -> None:
    """Raise GraddotError if processes that have ended their loop may stand in for DDP's own
    communication alone, as inside of `join()`."""
    wrapper = DistributedDataParallel._get_active_ddp_module()
    if wrapper is not None and wrapper._join_config.enable:
        raise GraddotError(
            "inside DistributedDataParallel.join() processes that have no more data cannot be asked for"
            " their numbers of labelled tokens, as global_mean=True, loss_reduction='sum' and"
            " num_items_in_batch need; leave these out, or give every process equally many batches"
        )


def world_size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def summed(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over the processes of a group."""
    if group is None:
        return value
    value = value.detach().clone()
    dist.all_reduce(value, group=group)
    return value


def largest(value: int, group: dist.ProcessGroup | None, device: torch.device) -> int:
    """The largest over the processes of a group."""
    if group is None:
        return value
    most = torch.tensor(value, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    return int(most)


def check_same_counts(counts: Sequence[float], parameters: Iterable[nn.Parameter]) -> None:
    """Raise GraddotError unless all processes of a sharded model, whose gradients are averaged, had
    validation batches of as many labelled tokens each."""
    sharded = [p for p in parameters if isinstance(p, DTensor)]
    if not sharded or not counts:
        return
    own = torch.tensor(counts, dtype=torch.float64, device=own_part(sharded[0]).device)
    most = torch.stack([own, -own])
    for group in sharded[0].device_mesh.get_all_groups():
        dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    high, low = most[0], -most[1]
    if different := (high != low).nonzero().flatten().tolist():
        k = different[0]
        raise GraddotError(
            f"validation batch {k} has {int(low[k])} labelled tokens in one process and {int(high[k])} in"
            " another; a sharded model averages the gradients of its processes, so all of them have to"
            " pass compute_directions the same batches"
        )


def check_plain(name: str, parameter: Tensor | None, known: nn.Parameter) -> None:
    """Raise unless a layer sees, in its forward, the whole of the parameter `known` by this name.

    `fully_shard` puts the whole parameter in the place of the shard for the forward.
    """
    if isinstance(parameter, DTensor):
        raise GraddotError(
            f"{name} is a DTensor inside the forward, as under tensor parallelism, or in a block that is"
            " sharded by itself inside of a module with parameters of its own, which cannot be scored;"
            " of DTensors only those of fully_shard can. Give such parameters a module of their own"
        )
    if parameter is not known and not isinstance(known, DTensor):
        raise GraddotError(
            f"{name} was replaced since the engine was made; make the engine last, after"
            " fully_shard and whatever else replaces parameters. In a forward that runs layers with other"
            " weights (torch.func.functional_call) they cannot be scored"
        )


def check_not_sharded_itself(module: nn.Module) -> None:
    """Raise GraddotError for a module, followed through its forward, that cannot be copied."""
    if any(isinstance(part, FSDPModule) for part in module.modules()):
        own = ", ".join(name for name, _ in module.named_parameters(recurse=False))
        raise GraddotError(
            f"a {layer_type(module).__name__} has parameters of its own ({own or 'through its layers'}),"
            " which are followed through its forward and proven on a copy, but fully_shard was called on"
            " it; give these parameters a module of their own, on which it is not called"
        )


def unshard(model: nn.Module) -> None:
    """Put the whole parameters back for the forward under way, in whose midst another of the model
    may have given them up (as `fully_shard(model, reshard_after_forward=True)` asks)."""
    if isinstance(model, FSDPModule):
        model.unshard()


def reshard(module: nn.Module) -> None:
    """Give up the whole parameters of a module that is sharded by itself."""
    if isinstance(module, FSDPModule):
        module.reshard()


def plain_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are there whole at this moment, by name."""
    return {n: p for n, p in model.named_parameters() if not isinstance(p, DTensor)}


# Tensors of the parameters' shapes, sharded like them


def whole(x: Tensor) -> Tensor:
    """What the shards of all processes make, which all have to ask for; a plain tensor itself."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def own_part(x: Tensor) -> Tensor:
    """This process's shard; a plain tensor itself."""
    return x.to_local() if isinstance(x, DTensor) else x


def stacked(tensors: Sequence[Tensor], parameter: nn.Parameter, dtype: torch.dtype) -> Tensor:
    """(K, *shape) of K tensors of a parameter's shape, whole or sharded: sharded as it is."""
    if not isinstance(parameter, DTensor):
        parts = [whole(x).to(parameter.device, dtype) for x in tensors]
        return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)
    mesh, placements = parameter.device_mesh, parameter.placements
    shards = []
    for x in tensors:
        if isinstance(x, DTensor):
            shard = x.redistribute(mesh, placements)
        else:
            x = x.to(parameter.device)
            shard = distribute_tensor(x, mesh, placements, src_data_rank=None)
        shards.append(shard.to_local().to(dtype))
    shape = torch.Size((len(shards), *parameter.shape))
    behind = [Shard(p.dim + 1) if isinstance(p, Shard) else p for p in placements]
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(torch.stack(shards), mesh, behind, shape=shape, stride=stride)


def are_finite(tensors: Sequence[Tensor]) -> list[bool]:
    """Of each, whether all its elements are, on all processes. Asks them for all tensors at once, and
    waits for a device once."""
    norms = [torch.linalg.vector_norm(own_part(x), dtype=torch.float64) for x in tensors]
    finite = torch.isfinite(torch.stack([norm.to(norms[0].device) for norm in norms])).int()
    meshes = dict.fromkeys(x.device_mesh for x in tensors if isinstance(x, DTensor))
    for group in (group for mesh in meshes for group in mesh.get_all_groups()):
        dist.all_reduce(finite, dist.ReduceOp.MIN, group=group)
    return finite.bool().tolist()


def over_shards(sums: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sums over the whole of each tensor, given those over this process's parts. Asks the others for
    all tensors at once."""
    groups: dict[dist.ProcessGroup, list[int]] = {}
    for i, x in enumerate(tensors):
        if isinstance(x, DTensor):
            for k, placement in enumerate(x.placements):
                if not placement.is_replicate():
                    groups.setdefault(x.device_mesh.get_group(k), []).append(i)
    found = list(sums)
    for group, numbers in groups.items():
        together = torch.stack([found[i] for i in numbers])
        dist.all_reduce(together, group=group)
        for i, total in zip(numbers, together, strict=True):
            found[i] = total
    return found


# States of sharded models, as one process would have them


def shard(model: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """Shard a model that is the same in all processes: block by block, then what is left."""
    for block in blocks:
        fully_shard(block)
    fully_shard(model)


def _like(tensor: Any, parameter: Tensor) -> Any:
    """This process's shard of a tensor of a sharded parameter's shape; anything else as it is."""
    if not isinstance(parameter, DTensor) or getattr(tensor, "shape", None) != parameter.shape:
        return tensor
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(tensor.to(parameter.device), mesh, placements, src_data_rank=None)


def load_model(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load whole tensors, sharded or not as the model is."""
    own = model.state_dict(keep_vars=True)
    model.load_state_dict({name: _like(t, own[name]) for name, t in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load whole tensors, sharded or not as the parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    shards = {
        index: {key: _like(value, parameters[index]) for key, value in values.items()}
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": shards})
