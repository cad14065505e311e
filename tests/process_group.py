"""Run a function on several processes that can reach each other, for tests; a hang is an error."""

import multiprocessing
import os
from datetime import timedelta

import torch
import torch.distributed as dist

TIMEOUT = 120
PROCESSES = multiprocessing.get_context("fork")  # to import torch anew takes seconds


def _run(rank, world, folder, function, args):
    # The pool of threads that the parent has does not survive a fork: more would crash.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # or accelerate asks for more
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=TIMEOUT),
    )
    torch.save(function(rank, world, *args), folder / f"{rank}.pt")
    # The group is not freed here, where that may hang (see graddot_lm.training.processes): a fork ends
    # without it.


def on_processes(world, folder, function, *args):
    """What `function(rank, world, *args)` returns on each of `world` processes, in their order."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    folder.mkdir(exist_ok=True)
    processes = [
        PROCESSES.Process(target=_run, args=(rank, world, folder, function, args))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(TIMEOUT)
        assert [process.exitcode for process in processes] == [0] * world
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
