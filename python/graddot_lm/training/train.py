"""`graddot train`: GPT-2 on tokenized domains, with a score for every sample at every step.

Under torchrun each process trains on its part of the joint batch and writes its rows' scores;
process 0 alone writes everything else. What ends or stops one process is agreed on by all.
"""

import argparse
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..distributed import load_model
from ..errors import GraddotError
from ..files import reached
from .checkpoint import Checkpoint, damaged, latest_checkpoint, load_checkpoint
from .overhead import measure_overhead
from .processes import Processes
from .progress import Bar
from .run_directory import RunDirectory
from .settings import check_evaluation, recorded_config
from .train_options import describe
from .trainer import NotFinite, Trainer


class TrainingRun:
    """A run's directory, in which a trainer's scores, metrics and checkpoints are; its loop of steps."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.args, self.processes = trainer, trainer.args, trainer.processes
        self.run_dir: RunDirectory | None = None
        self.stop_signal = 0  # that all processes know of
        self._signals = [0]  # that this process got; the last counts

    # A step

    def _one_step(self) -> float:
        """Train on the next batch, log its scores; the mean training loss."""
        with self._until_not_finite():
            ids, last, losses = self.trainer.begin_step()
        report = self._report(losses)
        self.trainer.backward(last)
        loss = self._agreed(*report)
        if not math.isfinite(loss) and self.args.on_nan == "stop":
            message = self._nan_message(f"the training loss is {loss}")
            self.processes.fail(f"{message}; --on_nan continue goes on regardless")
        self.trainer.end_step(ids, losses)
        return loss

    def _report(self, losses: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        """What this process tells the others after a forward, summed; on the host once the event
        is over. Sent off before the backward, so that nobody waits for a GPU to finish that."""
        assert self.run_dir is not None
        rank, world = self.processes.rank, self.processes.world
        report = torch.zeros(2 + world, dtype=torch.float64, device=self.processes.device)
        report[0], report[1] = losses.mean() / world, self.run_dir.failed
        report[2 + rank] = self._signals[-1]
        report = self.processes.summed(report)
        if not report.is_cuda:
            return report, None
        copied = report.to("cpu", non_blocking=True)
        there = torch.cuda.Event(blocking=True)
        # Of the report's device: with --device cuda:1 the current one is another.
        there.record(torch.cuda.current_stream(report.device))
        return copied, there

    def _agreed(self, report: Tensor, there: torch.cuda.Event | None) -> float:
        """The mean loss over all processes, which at the same time learn of each other's signals,
        and whether one of them could not save its rows."""
        assert self.run_dir is not None
        if there is not None:
            there.synchronize()
        loss, failed, *signals = report.tolist()
        if failed:
            self.processes.together(self.run_dir.check)
        self.stop_signal = int(max(signals))
        return loss

    @contextmanager
    def _until_not_finite(self) -> Iterator[None]:
        """End all processes with what is kept, where the validation gradient is not finite."""
        try:
            yield
        except NotFinite as error:
            self.processes.fail(self._nan_message(str(error)))

    def _nan_message(self, problem: str) -> str:
        assert self.run_dir is not None
        step, path = self.trainer.step, self.run_dir.path
        rows = "Metrics" if self.trainer.engine is None else "Scores"
        latest = latest_checkpoint(path)
        kept = f"Nothing was saved in {path} yet"
        if step > 0:
            last = "no checkpoint yet" if latest is None else f"the checkpoint {latest.name}"
            kept = f"{rows} up to step {step - 1} and {last} are in {path}"
        return (
            f"{problem} at step {step}. {kept}. Lower --learning_rate or raise --warmup_step"
            " in a new run"
        )

    # Checkpoints and the directory

    @contextmanager
    def _fitting(self, checkpoint: Checkpoint) -> Iterator[dict[str, Any]]:
        """End all processes, which read the same state, if it is not this run's."""
        try:
            yield checkpoint.state
        except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            if self.processes.explained(error) is not None:
                raise
            path = self._path() / "checkpoints" / f"step-{checkpoint.step}"
            self.processes.fail(str(damaged(path, error)))

    def _path(self) -> Path:
        return Path(self.args.results_dir) / self.args.run_name

    def _open_run(self) -> None:
        """Process 0 makes the run or truncates it to its last checkpoint; then the others join."""
        first = self.processes.rank == 0
        made = self.processes.together(self._make_run if first else lambda: None)
        checkpoint = self.processes.together((lambda: made) if first else self._join_run)
        if checkpoint is not None:
            with self._fitting(checkpoint) as state:
                self.trainer.load_state(state)
            self.trainer.step = checkpoint.step + 1
        assert self.run_dir is not None
        if self.trainer.engine is not None:
            self.trainer.engine.store = self.run_dir.scores
            self.trainer.engine.attach(self.trainer.optimizer)

    def _make_run(self) -> Checkpoint | None:
        trainer, path, world = self.trainer, self._path(), self.processes.world
        targets = trainer.target_names()
        val_ids = [int(number) for ids in trainer.val_ids.values() for number in ids]
        config = describe(self.args, trainer.data, trainer.model, trainer.engine, world, val_ids)
        config["data_content"] = [data.content for data in (trainer.data, trainer.val_data)]
        if self.args.resume and reached(path / "config.json").exists():
            self.run_dir, checkpoint = RunDirectory.resume(
                path, config, self._may_differ(), targets, world
            )
            return checkpoint
        if self.args.resume:
            print(f"no run at {path} yet: starting one", file=sys.stderr)
        self.run_dir = RunDirectory.create(path, config, targets, world)
        return None

    def _join_run(self) -> Checkpoint | None:
        path = self._path()
        rank, world = self.processes.rank, self.processes.world
        self.run_dir = RunDirectory.join(path, rank, world, self.trainer.target_names())
        latest = latest_checkpoint(path)
        return None if latest is None else load_checkpoint(latest)

    def _save(self, step: int) -> None:
        """Rows of all processes first, then the checkpoint that counts on them."""
        assert self.run_dir is not None
        run_dir, state = self.run_dir, self.trainer.state()
        self.processes.together(run_dir.flush)
        if self.processes.rank == 0:
            run_dir.save(step, state)

    def _may_differ(self) -> list[str]:
        """Settings that a resumed run may change: none that its weights or scores depend on."""
        names = "resume eval_only results_dir run_name measure_overhead versions commit processes parallel"
        names += " eval_iter eval_bs eval_interval checkpoint_interval dot_prod_save_interval"
        # Where the data lies: what it is, the tokenizer with it, data_fingerprint says. The
        # validation samples follow from it and from settings, and older runs did not record them,
        # nor data_content.
        names += " device compile pile_data_dir data_dir tokenizer tokenizer_sha256 val_sample_ids"
        if "data_content" not in recorded_config(self._path()):
            names += " data_content"
        return names.split() + (["max_steps"] if self.args.lr_schedule == "constant" else [])

    # The run

    def evaluate_only(self) -> None:
        """Print the val loss of the run's last checkpoint, or of random weights; write nothing."""
        if self.args.resume:
            checkpoint = self.processes.together(self._checkpoint_to_evaluate)
            with self._fitting(checkpoint) as state:
                load_model(self.trainer.model, state["model"])
            self.trainer.step = checkpoint.step + 1
        loss = self.trainer.evaluate()
        if self.processes.rank == 0:
            print(f"val loss {loss:.4f} after {self.trainer.step} steps")

    def _checkpoint_to_evaluate(self) -> Checkpoint:
        """The run's last one, whose model must be this one and its tokens the data's."""
        path = self._path()
        settings = {
            "architecture": self.args.architecture,
            "block_size": self.args.block_size,
            "vocab_size": self.trainer.data.vocab_size,
            "tokenizer_sha256": self.trainer.data.meta["tokenizer"]["sha256"],
        }
        check_evaluation(path, settings)
        latest = latest_checkpoint(path)
        if latest is None:
            raise GraddotError(f"{path}: no checkpoint to evaluate")
        return load_checkpoint(latest)

    def train(self) -> None:
        """All steps that are left, with rows and checkpoints saved on the way."""
        self._open_run()
        assert self.run_dir is not None
        numbers, got = (signal.SIGINT, signal.SIGTERM), self._signals
        note = lambda number, frame: got.append(number)  # which outlives the model, and holds none
        before = {number: signal.signal(number, note) for number in numbers}
        bar = Bar(
            total=self.args.max_steps,
            initial=self.trainer.step,
            unit="step",
            disable=self.processes.rank > 0 or not sys.stderr.isatty(),
        )
        try:
            while self.trainer.step < self.args.max_steps and not self.stop_signal:
                self._step_and_save(bar)
        except (GraddotError, SystemExit):
            self.run_dir.flush()  # rows of finished steps; the last checkpoint stays as it is
            raise
        finally:
            bar.close()
        if self.trainer.step > 0:
            self._save(self.trainer.step - 1)
        if self.stop_signal:
            name = signal.Signals(self.stop_signal).name
            self.processes.fail(
                f"stopped by {name} after step {self.trainer.step - 1}; go on with --resume"
            )
        if self.args.measure_overhead:
            for number, handler in before.items():  # all is saved: nothing to finish first
                signal.signal(number, handler)
            with self._until_not_finite():
                measured = measure_overhead(self.trainer, self.args.measure_overhead)
            if self.processes.rank == 0:
                self.run_dir.record(**measured)

    def _step_and_save(self, bar: Bar) -> None:
        assert self.run_dir is not None
        run_dir = self.run_dir
        start = time.perf_counter()
        loss = self._one_step()
        tokens_per_s = self.args.batch_size * self.args.block_size / (time.perf_counter() - start)
        done = self.trainer.step + 1
        val_loss = None
        if done % self.args.eval_interval == 0 or done == self.args.max_steps:
            val_loss = self.trainer.evaluate()
            if self.processes.rank == 0:
                bar.write(f"step {self.trainer.step}: val loss {val_loss:.4f}", file=sys.stderr)
        row = {
            "train_loss": [loss],
            "val_loss": [val_loss],
            "lr": [self.trainer.optimizer.param_groups[0]["lr"]],
            "tokens_per_s": [tokens_per_s],
        }
        if self.processes.rank == 0:
            self.run_dir.metrics.append(row, self.trainer.step)
        if done % self.args.checkpoint_interval == 0:
            self._save(self.trainer.step)
        elif done % self.args.dot_prod_save_interval == 0:
            self.processes.together(lambda: run_dir.flush(wait=False))
        bar.set_postfix(loss=f"{loss:.3f}", tokens_per_s=f"{tokens_per_s:,.0f}", refresh=False)
        bar.update()
        self.trainer.step = done


def run(args: argparse.Namespace) -> int:
    """`graddot train` with arguments that were checked."""
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    processes = Processes.start(args.device)
    try:
        trainer = processes.together(lambda: Trainer(args, processes))
        trainer.distribute()
        training = TrainingRun(trainer)
        training.evaluate_only() if args.eval_only else training.train()
    except (GraddotError, RuntimeError, MemoryError) as error:
        explained = processes.explained(error)
        if explained is None:
            raise
        raise explained from error
    processes.end()
    if processes.rank == 0 and training.run_dir is not None:
        print(f"{trainer.step} steps are in {training.run_dir.path}")
        if trainer.engine is not None:
            print(f"see which data helped: graddot scores {training.run_dir.path}")
    return 0
