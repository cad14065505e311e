"""The processes of one run, as torchrun starts them, and what they agree on.

A run in one process goes through the same calls, which then do nothing.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import GraddotError

Result = TypeVar("Result")
MEMORY = (MemoryError, torch.OutOfMemoryError)  # of numpy and of GPUs; torch on CPUs has none

LESS_A_STEP = (
    "a smaller --batch_size or --block_size needs less, and so does --gradient_accumulation_steps,"
    " which leaves weights and scores as they are"
)
LESS_AN_EVALUATION = "an evaluation needs less with a smaller --eval_bs or --block_size"

# Groups that are over, never freed. A group of gloo's waits for its threads as it goes, holding the
# interpreter that they need to let go of tensors (torch 2.13): the process would hang.
_ended: list[dist.ProcessGroup | None] = []


@dataclass(frozen=True)
class Processes:
    """This process's number among `world`, and its device."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def start(cls, device: str) -> "Processes":
        """Join the processes that torchrun's environment names: gloo on CPUs, nccl on GPUs.

        Raises GraddotError if there is no such device, if there are fewer GPUs than processes, and
        if the processes cannot reach each other.
        """
        world = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
        if world == 1:
            return cls(0, 1, _usable(device))
        rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
        kind = _named(device)
        if kind.type == "cuda":
            if kind.index is not None:
                raise GraddotError(f"--device is {device}; several processes need plain cuda")
            if local_rank >= torch.cuda.device_count():
                raise GraddotError(
                    f"{torch.cuda.device_count()} GPUs for {local_rank + 1} processes or more on"
                    " this machine; start one process a GPU"
                )
            kind = torch.device("cuda", local_rank)
            torch.cuda.set_device(kind)
        try:
            dist.init_process_group("nccl" if kind.type == "cuda" else "gloo")
        except (RuntimeError, ValueError) as error:
            raise GraddotError(f"the run's processes cannot reach each other: {error}") from error
        return cls(rank, world, kind)

    def end(self) -> None:
        if self.world > 1:
            _ended.append(dist.group.WORLD)
            dist.destroy_process_group()

    def share(self, sample_ids: np.ndarray) -> np.ndarray:
        """This process's part of a joint batch, whose length is a multiple of `world`."""
        count = len(sample_ids) // self.world
        return sample_ids[self.rank * count : (self.rank + 1) * count]

    def summed(self, values: Tensor) -> Tensor:
        """The elementwise sum over all processes."""
        if self.world > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values

    def together(self, function: Callable[[], Result]) -> Result:
        """Call `function` on every process and go on once all have; see `fail` if one cannot."""
        problem, result = None, None
        try:
            result = function()
        except GraddotError as error:
            problem = str(error)
        problems: list[str | None] = [problem]
        if self.world > 1:
            problems = [None] * self.world
            dist.all_gather_object(problems, problem)
        for rank, text in enumerate(problems):
            if text is not None:
                self.fail(text if rank == 0 else f"process {rank}: {text}")
        return result  # type: ignore[return-value]

    def fail(self, message: str) -> NoReturn:
        """End all processes, each of which must call this: the first with a GraddotError."""
        if self.rank == 0:
            raise GraddotError(message)
        raise SystemExit(2)

    def explained(self, error: Exception, remedy: str = LESS_A_STEP) -> GraddotError | None:
        """What to tell people of an error that ends this process alone; None to let it be.

        `remedy` is for where memory was short.
        """
        if isinstance(error, GraddotError):
            where = f"process {self.rank} of {self.world}: " if self.rank else ""
            return GraddotError(f"{where}{error}")
        if isinstance(error, MEMORY) or "DefaultCPUAllocator" in str(error):
            where = f"process {self.rank} of {self.world} is " if self.world > 1 else ""
            return GraddotError(
                f"{where}out of memory ({str(error).splitlines()[0][:200]}); {remedy}"
            )
        if self.world > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            return GraddotError(
                f"process {self.rank} of {self.world}: another process of the run has ended or"
                " cannot be reached, so this one ends too; if that one could say why, it did"
                f" ({str(error).splitlines()[0][:160]})"
            )
        return None


def _named(device: str) -> torch.device:
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise GraddotError(
            f"--device is {device!r}; it must be cpu, cuda, or one GPU as in cuda:0"
        ) from error


def _usable(device: str) -> torch.device:
    """The device of this name, once it has shown that it holds a number."""
    found = _named(device)
    try:
        torch.zeros(1, device=found).item()
    # A torch without CUDA asserts that it has it, and a backend's module may not be there.
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0][:120]
        raise GraddotError(
            f"--device is {device!r}, which cannot be used here ({reason}); --device cpu always can"
        ) from error
    return found


def seed_step(seed: int, step: int, rank: int) -> None:
    """Dropout's generators for one step: so a resumed run needs no state of theirs."""
    entropy = np.random.SeedSequence([abs(seed), step, rank]).generate_state(2)
    torch.manual_seed(int(entropy[0]) << 32 | int(entropy[1]))
