"""What scores add to a step of `graddot train`, measured on the trained model."""

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from .trainer import Batch, Trainer


def _joined(batches: Sequence[Batch]) -> Batch:
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def measure_overhead(trainer: Trainer, rounds: int) -> dict[str, float]:
    """The overhead of scores over regular steps on the same rows, and over those on the training rows
    alone. Times steps with and without scores, interleaved; weights stay."""
    assert trainer.engine is not None
    engine, trainer.engine = trainer.engine, None
    engine.store = None
    ids = trainer.processes.share(trainer.sampler.next_batch())
    parts = np.split(ids, trainer.args.gradient_accumulation_steps)
    train = [trainer.to_device(trainer.data.get(part)) for part in parts]
    val = [*trainer.val_batches.values()]
    # The same rows in as many forwards: those that ride along with the only training batch.
    joint = [_joined([*train, *val])] if trainer.val_rides else [*train, *val]

    def step(batches: Sequence[Batch]) -> None:
        trainer.backward(trainer.accumulate(batches, [None] * len(batches))[0])

    def scored() -> None:
        trainer.engine = engine
        step(train)
        engine.aggregate_and_log()
        trainer.engine = None

    methods: dict[str, Callable[[], object]] = {
        "regular_n": lambda: step(train),
        "regular_nv": lambda: step(joint),
        "graddot": scored,
    }
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    compiling = int(trainer.args.compile)  # in the first round, for steps without scores
    for _ in range(compiling + rounds):
        for name, method in methods.items():
            start = time.perf_counter()
            method()
            if trainer.device.type == "cuda":
                torch.cuda.synchronize(trainer.device)
            seconds[name].append(time.perf_counter() - start)
            trainer.optimizer.zero_grad(set_to_none=True)
    trainer.engine = engine
    median = {name: statistics.median(times[compiling:]) for name, times in seconds.items()}
    return {
        "overhead": median["graddot"] / median["regular_nv"] - 1,
        "overhead_over_regular_n": median["graddot"] / median["regular_n"] - 1,
    }
