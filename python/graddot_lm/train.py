"""`graddot train`: GPT-2 on tokenized domains, with a score for every sample at every step.

Under torchrun each process trains on its part of the joint batch and writes its rows' scores;
process 0 alone writes everything else. What ends or stops one process is agreed on by all.
"""

import argparse
import math
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from .checkpoint import Checkpoint, damaged, latest_checkpoint, load_checkpoint
from .data import MixtureSampler, TokenData, fixed_batch, parse_weights
from .distributed import gathered, load_model, load_optimizer, shard, whole
from .engine import GradDotProdEngine
from .errors import GraddotError
from .models import DTYPES, build_gpt2
from .processes import LESS_AN_EVALUATION, Processes, seed_step
from .run_directory import RunDirectory
from .scores import clip_factor
from .settings import check_evaluation, recorded_config
from .train_options import (
    add_arguments,  # noqa: F401 (the command line looks here)
    check,
    describe,
)

Batch = tuple[Tensor, Tensor]


def _optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW; only matrices decay, as GPT-2's recipes have it."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95))


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up over `warmup_step` steps, then constant, or a cosine to a tenth."""
    if step < args.warmup_step:
        return args.learning_rate * (step + 1) / args.warmup_step
    if args.lr_schedule == "constant":
        return args.learning_rate
    done = (step - args.warmup_step) / max(1, args.max_steps - args.warmup_step)
    return args.learning_rate * (0.55 + 0.45 * math.cos(math.pi * min(1.0, done)))


def _joined(batches: Sequence[Batch]) -> Batch:
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


class Trainer:
    """One run: model, data, optimizer, engine and the run's directory.

    `distribute` completes it, once all processes have made theirs.
    """

    wrapped: nn.Module  # what to call in training; `model`, or around it
    optimizer: torch.optim.Optimizer
    engine: GradDotProdEngine | None = None

    def __init__(self, args: argparse.Namespace, processes: Processes) -> None:
        self.args, self.processes = args, processes
        self.device = processes.device
        parts = processes.world * args.gradient_accumulation_steps
        if args.batch_size % parts:
            raise GraddotError(
                f"--batch_size is {args.batch_size}; it must be a multiple of {parts}: processes"
                f" {processes.world} x --gradient_accumulation_steps"
                f" {args.gradient_accumulation_steps}"
            )
        torch.manual_seed(args.seed)
        self.data = TokenData(args.pile_data_dir, "train", args.train_set, args.block_size)
        self.val_data = TokenData(args.pile_data_dir, "val", args.val_set, args.block_size)
        # Excerpts in the report are decoded with the folder's copy: it must be the data's own.
        self.data.check_tokenizer(str(Path(args.pile_data_dir) / "tokenizer.json"))
        weights = args.domain_weights
        weights = None if weights is None else parse_weights(weights)
        self.sampler = MixtureSampler(self.data, args.batch_size, args.seed, weights)
        count = min(args.eval_iter * args.eval_bs, len(self.val_data)) or 1
        self.eval_ids = MixtureSampler(self.val_data, count, args.seed).next_batch()
        self.val_ids = self._val_ids() if args.method == "GradDotProd" else {}
        self.val_batches = {
            target: self._to_device(self.val_data.get(ids)) for target, ids in self.val_ids.items()
        }
        vocab_size = self.data.vocab_size
        model = build_gpt2(args.architecture, vocab_size, args.block_size, args.dropout)
        self.model = model.to(self.device, DTYPES[args.model_dtype]).train()
        self.run_dir: RunDirectory | None = None
        self.step = 0  # the next to run
        self.stop_signal = 0  # that all processes know of
        self._signals = [0]  # that this process got; the last counts

    def distribute(self) -> None:
        """Copy or shard the model over the processes; then make the optimizer and the engine."""
        self.wrapped = self.model
        if self.processes.world > 1 and self.args.parallel == "fsdp":
            shard(self.model, self.model.get_submodule("transformer.h").children())
        elif self.processes.world > 1:
            self.wrapped = DistributedDataParallel(self.model)
            self._settle_buckets()
        self.optimizer = _optimizer(self.model, self.args)
        if self.val_batches:
            self.engine = GradDotProdEngine(
                self.model,
                self._by_target(self.val_batches) if self._val_rides else None,
                label_shift=0,
                norms=self.args.norms,
            )

    def _settle_buckets(self) -> None:
        """Have DistributedDataParallel's first backward behind us, after which it puts gradients in
        another order: of three processes or more that decides how their sum is rounded, and a resumed
        run is to round every step as one that goes on does."""
        x = torch.zeros(1, self.args.block_size, dtype=torch.int64, device=self.device)
        self._losses(x, x)[0].backward()
        self.model.zero_grad(set_to_none=True)

    # Targets

    def _val_ids(self) -> dict[str, np.ndarray]:
        """The validation samples of every target: of each domain, or of a single one, ""."""
        args, data = self.args, {"": self.val_data}
        if args.target_per_domain:
            split = lambda name: TokenData(args.pile_data_dir, "val", [name], args.block_size)
            data = {name: split(name) for name in self.val_data.domains}
        return {
            target: fixed_batch(own, args.val_batch_size, args.seed) for target, own in data.items()
        }

    def _by_target(self, values: Mapping[str, Any]) -> Any:
        """As the engine takes them: a single target has no name."""
        return values if self.args.target_per_domain else values[""]

    def _targets(self) -> list[str]:
        """Those that have a name, which the store wants."""
        return list(self.val_ids) if self.args.target_per_domain else []

    @property
    def _val_rides(self) -> bool:
        """Whether the validation rows are part of every forward, not run once for several."""
        return self.args.gradient_accumulation_steps == 1

    def _direct(self) -> None:
        """Give the engine the validation gradients at these weights, if the rows do not ride."""
        if self.engine is None or self._val_rides:
            return
        self.model.eval()
        try:
            with self._autocast():
                gradients = self.engine.compute_directions(
                    {target: [batch] for target, batch in self.val_batches.items()}
                )
        except GraddotError as error:  # not finite, in all processes alike; scores need it
            self.processes.fail(self._nan_message(str(error)))
        self.model.train()
        self.engine.set_directions(self._by_target(gradients))

    # Pieces of a step

    def _to_device(self, batch: Batch) -> Batch:
        x, y = batch
        if (
            self.device.type == "cuda"
        ):  # from other memory a copy waits for what the GPU does before
            x, y = x.pin_memory(), y.pin_memory()
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def _autocast(self) -> AbstractContextManager:
        dtype = DTYPES[self.args.train_dtype]
        enabled = dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(self.device.type, dtype if enabled else None, enabled=enabled)

    def _losses(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss over all rows, and that of each row, (rows,)."""
        with self._autocast():
            model = self.wrapped if self.model.training else self.model
            out = model(x, labels=y)
        return out.loss, out.token_losses.mean(1)

    def _forward(self, x: Tensor, y: Tensor, tag: Any) -> tuple[Tensor, Tensor]:
        """What to call `_backward` with, and the mean loss of each training row, (N,)."""
        n = len(x)
        if self.engine is not None:
            self.engine.attach_train_batch(x, y, self.step, tag)
            x, y = self.engine.prepare_forward_input(x, y)
        loss, losses = self._losses(x, y)
        return loss, losses[:n].detach()

    def _backward(self, loss: Tensor) -> None:
        loss.backward()
        if self.engine is not None:
            self.engine.prepare_gradients()

    def _accumulate(self, batches: Sequence[Batch], tags: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Forward and backward batch by batch, but for the last backward: what to call `_backward`
        with, and the mean loss of each training row of all, (N,)."""
        self._direct()
        losses = []
        for batch, tag in zip(batches[:-1], tags[:-1], strict=True):
            with self._unaveraged():
                loss, own = self._forward(*batch, tag)
                self._backward(loss / len(batches))
            losses.append(own)
        loss, own = self._forward(*batches[-1], tags[-1])
        return loss / len(batches), torch.cat([*losses, own])

    def _unaveraged(self) -> AbstractContextManager:
        """Gradients stay in their process, for the last batch's backward to average all. Sharded
        ones do not: nobody holds a whole model's."""
        if isinstance(self.wrapped, DistributedDataParallel):
            return self.wrapped.no_sync()
        return nullcontext()

    def _one_step(self) -> float:
        """Train on the next batch, log its scores; the mean training loss."""
        ids = self.processes.share(self.sampler.next_batch())
        seed_step(self.args.seed, self.step, self.processes.rank)
        lr = learning_rate(self.step, self.args)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        parts = np.split(ids, self.args.gradient_accumulation_steps)
        batches = [self._to_device(self.data.get(part)) for part in parts]
        last, losses = self._accumulate(batches, parts)
        report = self._report(losses)
        self._backward(last)
        loss = self._agreed(*report)
        if not math.isfinite(loss) and self.args.on_nan == "stop":
            message = self._nan_message(f"the training loss is {loss}")
            self.processes.fail(f"{message}; --on_nan continue goes on regardless")
        clipped = self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.engine is not None:
            columns = {
                "domain": self.data.domain_of(ids),
                "offset": self.data.offset_of(ids),
                "loss": losses.float(),
            }
            self.engine.aggregate_and_log(columns, gradient_scale=clipped)
        return loss

    def _clip(self) -> float | Tensor:
        """Clip the gradients; what they were multiplied by, where they are, so nobody waits."""
        if self.args.grad_clip == 0:
            return 1.0
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.args.grad_clip)
        return clip_factor(whole(norm), self.args.grad_clip)

    def _report(self, losses: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        """What this process tells the others after a forward, summed; on the host once the event
        is over. Sent off before the backward, so that nobody waits for a GPU to finish that."""
        assert self.run_dir is not None
        rank, world = self.processes.rank, self.processes.world
        report = torch.zeros(2 + world, dtype=torch.float64, device=self.device)
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

    def _nan_message(self, problem: str) -> str:
        assert self.run_dir is not None
        path, rows = self.run_dir.path, "Metrics" if self.engine is None else "Scores"
        latest = latest_checkpoint(path)
        kept = f"Nothing was saved in {path} yet"
        if self.step > 0:
            last = "no checkpoint yet" if latest is None else f"the checkpoint {latest.name}"
            kept = f"{rows} up to step {self.step - 1} and {last} are in {path}"
        return (
            f"{problem} at step {self.step}. {kept}. Lower --learning_rate or raise --warmup_step"
            " in a new run"
        )

    def evaluate_only(self) -> None:
        """Print the val loss of the run's last checkpoint, or of random weights; write nothing."""
        if self.args.resume:
            checkpoint = self.processes.together(self._checkpoint_to_evaluate)
            with self._fitting(checkpoint) as state:
                load_model(self.model, state["model"])
            self.step = checkpoint.step + 1
        loss = self.evaluate()
        if self.processes.rank == 0:
            print(f"val loss {loss:.4f} after {self.step} steps")

    def _checkpoint_to_evaluate(self) -> Checkpoint:
        """The run's last one, whose model must be this one and its tokens the data's."""
        path = self._path()
        settings = {
            "architecture": self.args.architecture,
            "block_size": self.args.block_size,
            "vocab_size": self.data.vocab_size,
            "tokenizer_sha256": self.data.meta["tokenizer"]["sha256"],
        }
        check_evaluation(path, settings)
        latest = latest_checkpoint(path)
        if latest is None:
            raise GraddotError(f"{path}: no checkpoint to evaluate")
        return load_checkpoint(latest)

    def evaluate(self) -> float:
        """Mean loss over eval_iter batches of eval_bs blocks of the val set, always the same; over
        each of its blocks once, where they are fewer."""
        try:
            return self._evaluate()
        except (RuntimeError, MemoryError) as error:
            explained = self.processes.explained(error, LESS_AN_EVALUATION)
            if explained is None:
                raise
            raise explained from error

    @torch.no_grad()
    def _evaluate(self) -> float:
        """The processes take turns at the batches, all as often, for shards are gathered in step."""
        self.model.eval()
        count, size = len(self.eval_ids), self.args.eval_bs
        batches = np.split(self.eval_ids, range(size, count, size))
        losses = torch.zeros(len(batches), dtype=torch.float64, device=self.device)
        for turn in range(0, len(batches), self.processes.world):
            i = turn + self.processes.rank
            x, y = self._to_device(self.val_data.get(batches[min(i, len(batches) - 1)]))
            loss, _ = self._losses(x, y)
            if i < len(batches):
                losses[i] = loss.double() * len(x) / count
        self.model.train()
        return self.processes.summed(losses).sum().item()

    # State

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds, which says nothing of processes; whole in the first of them."""
        first = self.processes.rank == 0
        return {
            # Parameters themselves, so that tied ones can be told.
            "model": gathered(self.model.state_dict(keep_vars=True), first),
            "optimizer": gathered(self.optimizer.state_dict(), first),
            "sampler": self.sampler.state_dict(),
        }

    def _load_state(self, checkpoint: Checkpoint) -> None:
        with self._fitting(checkpoint) as state:
            load_model(self.model, state["model"])
            load_optimizer(self.optimizer, state["optimizer"])
            self.sampler.load_state_dict(state["sampler"])

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
            self._load_state(checkpoint)
            self.step = checkpoint.step + 1
        assert self.run_dir is not None
        if self.engine is not None:
            self.engine.store = self.run_dir.scores
            self.engine.attach(self.optimizer)

    def _make_run(self) -> Checkpoint | None:
        path, world, targets = self._path(), self.processes.world, self._targets()
        val_ids = [int(number) for ids in self.val_ids.values() for number in ids]
        config = describe(self.args, self.data, self.model, self.engine, world, val_ids)
        config["data_content"] = [data.content for data in (self.data, self.val_data)]
        if self.args.resume and (path / "config.json").exists():
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
        self.run_dir = RunDirectory.join(path, rank, world, self._targets())
        latest = latest_checkpoint(path)
        return None if latest is None else load_checkpoint(latest)

    def _save(self, step: int) -> None:
        """Rows of all processes first, then the checkpoint that counts on them."""
        assert self.run_dir is not None
        run_dir, state = self.run_dir, self._state()
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
        names += " device pile_data_dir data_dir tokenizer tokenizer_sha256 val_sample_ids"
        if "data_content" not in recorded_config(self._path()):
            names += " data_content"
        return names.split() + (["max_steps"] if self.args.lr_schedule == "constant" else [])

    # The run

    def train(self) -> None:
        """All steps that are left, with rows and checkpoints saved on the way."""
        self._open_run()
        assert self.run_dir is not None
        numbers, got = (signal.SIGINT, signal.SIGTERM), self._signals
        note = lambda number, frame: got.append(number)  # which outlives the model, and holds none
        before = {number: signal.signal(number, note) for number in numbers}
        bar = tqdm(
            total=self.args.max_steps,
            initial=self.step,
            unit="step",
            disable=self.processes.rank > 0 or not sys.stderr.isatty(),
        )
        try:
            while self.step < self.args.max_steps and not self.stop_signal:
                self._step_and_save(bar)
        except (GraddotError, SystemExit):
            self.run_dir.flush()  # rows of finished steps; the last checkpoint stays as it is
            raise
        finally:
            bar.close()
        if self.step > 0:
            self._save(self.step - 1)
        if self.stop_signal:
            name = signal.Signals(self.stop_signal).name
            self.processes.fail(
                f"stopped by {name} after step {self.step - 1}; go on with --resume"
            )
        if self.args.measure_overhead:
            for number, handler in before.items():  # all is saved: nothing to finish first
                signal.signal(number, handler)
            self._measure_overhead()

    def _step_and_save(self, bar: tqdm) -> None:
        assert self.run_dir is not None
        run_dir = self.run_dir
        start = time.perf_counter()
        loss = self._one_step()
        tokens_per_s = self.args.batch_size * self.args.block_size / (time.perf_counter() - start)
        done = self.step + 1
        val_loss = None
        if done % self.args.eval_interval == 0 or done == self.args.max_steps:
            val_loss = self.evaluate()
            if self.processes.rank == 0:
                bar.write(f"step {self.step}: val loss {val_loss:.4f}", file=sys.stderr)
        row = {
            "train_loss": [loss],
            "val_loss": [val_loss],
            "lr": [self.optimizer.param_groups[0]["lr"]],
            "tokens_per_s": [tokens_per_s],
        }
        if self.processes.rank == 0:
            self.run_dir.metrics.append(row, self.step)
        if done % self.args.checkpoint_interval == 0:
            self._save(self.step)
        elif done % self.args.dot_prod_save_interval == 0:
            self.processes.together(lambda: run_dir.flush(wait=False))
        bar.set_postfix(loss=f"{loss:.3f}", tokens_per_s=f"{tokens_per_s:,.0f}", refresh=False)
        bar.update()
        self.step = done

    def _measure_overhead(self) -> None:
        """Time steps with and without scores on the trained model, interleaved; weights stay."""
        assert self.run_dir is not None and self.engine is not None
        engine, self.engine = self.engine, None
        engine.store = None
        ids = self.processes.share(self.sampler.next_batch())
        parts = np.split(ids, self.args.gradient_accumulation_steps)
        train = [self._to_device(self.data.get(part)) for part in parts]
        val = [*self.val_batches.values()]
        # The same rows in as many forwards: those that ride along with the only training batch.
        joint = [_joined([*train, *val])] if self._val_rides else [*train, *val]

        def step(batches: Sequence[Batch]) -> None:
            self._backward(self._accumulate(batches, [None] * len(batches))[0])

        def scored() -> None:
            self.engine = engine
            step(train)
            engine.aggregate_and_log()
            self.engine = None

        methods: dict[str, Callable[[], object]] = {
            "regular_n": lambda: step(train),
            "regular_nv": lambda: step(joint),
            "graddot": scored,
        }
        seconds: dict[str, list[float]] = {name: [] for name in methods}
        for _ in range(self.args.measure_overhead):
            for name, method in methods.items():
                start = time.perf_counter()
                method()
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                seconds[name].append(time.perf_counter() - start)
                self.optimizer.zero_grad(set_to_none=True)
        self.engine = engine
        if self.processes.rank:
            return
        median = {name: statistics.median(times) for name, times in seconds.items()}
        self.run_dir.record(
            overhead=median["graddot"] / median["regular_nv"] - 1,
            overhead_over_regular_n=median["graddot"] / median["regular_n"] - 1,
        )


def run(args: argparse.Namespace) -> int:
    """`graddot train` with parsed arguments."""
    check(args)
    processes = Processes.start(args.device)
    try:
        trainer = processes.together(lambda: Trainer(args, processes))
        trainer.distribute()
        trainer.evaluate_only() if args.eval_only else trainer.train()
    except (GraddotError, RuntimeError, MemoryError) as error:
        explained = processes.explained(error)
        if explained is None:
            raise
        raise explained from error
    processes.end()
    if processes.rank == 0 and trainer.run_dir is not None:
        print(f"{trainer.step} steps are in {trainer.run_dir.path}")
        if trainer.engine is not None:
            print(f"see which data helped: graddot scores {trainer.run_dir.path}")
    return 0
