"""What `graddot train` trains, on each of its processes, and what one step of that is.

Nothing here knows of the run's directory, of other steps or of signals: see train.py.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..distributed import load_model, load_optimizer, shard, whole
from ..engine import GradDotProdEngine
from ..errors import GraddotError
from ..gathering import gathered
from ..scores import clip_factor
from ..text.data import MixtureSampler, TokenData, fixed_batch, parse_weights
from .models import build_gpt2
from .processes import LESS_AN_EVALUATION, Processes, seed_step

Batch = tuple[Tensor, Tensor]


class NotFinite(GraddotError):
    """The validation gradient is not, in all processes alike; scores need it."""


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


class Trainer:
    """Model, data, optimizer and engine.

    `distribute` completes it, once all processes have made theirs. A step is `begin_step`, `backward`
    and `end_step`; whoever calls them counts up `step`.
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
            target: self.to_device(self.val_data.get(ids)) for target, ids in self.val_ids.items()
        }
        vocab_size = self.data.vocab_size
        model = build_gpt2(args.architecture, vocab_size, args.block_size, args.dropout)
        self.model = model.to(self.device, getattr(torch, args.model_dtype)).train()
        self.step = 0  # the next to run

    def distribute(self) -> None:
        """Copy or shard the model over the processes; then make the optimizer and the engine."""
        self.wrapped = self.model
        if self.processes.world > 1 and self.args.parallel == "fsdp":
            shard(self.model, self.model.get_submodule("transformer.h").children())
        elif self.processes.world > 1:
            self.wrapped = DistributedDataParallel(self.model)
            self._settle_buckets()
        if self.args.compile:
            self.model.compile()
        self.optimizer = _optimizer(self.model, self.args)
        if self.val_batches:
            self.engine = GradDotProdEngine(
                self.model,
                self._by_target(self.val_batches) if self.val_rides else None,
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

    def target_names(self) -> list[str]:
        """Those that have a name, which the store wants."""
        return list(self.val_ids) if self.args.target_per_domain else []

    @property
    def val_rides(self) -> bool:
        """Whether the validation rows are part of every forward, not run once for several."""
        return self.args.gradient_accumulation_steps == 1

    def _direct(self) -> None:
        """Give the engine the validation gradients at these weights, if the rows do not ride."""
        if self.engine is None or self.val_rides:
            return
        self.model.eval()
        try:
            with self._autocast():
                gradients = self.engine.compute_directions(
                    {target: [batch] for target, batch in self.val_batches.items()}
                )
        except GraddotError as error:
            raise NotFinite(str(error)) from error
        self.model.train()
        self.engine.set_directions(self._by_target(gradients))

    # A step

    def begin_step(self) -> tuple[np.ndarray, Tensor, Tensor]:
        """Forward of the next batch: its samples' ids; what to call `backward` with; and the mean loss
        of each row, (N,). Raises NotFinite."""
        ids = self.processes.share(self.sampler.next_batch())
        seed_step(self.args.seed, self.step, self.processes.rank)
        lr = learning_rate(self.step, self.args)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        parts = np.split(ids, self.args.gradient_accumulation_steps)
        batches = [self.to_device(self.data.get(part)) for part in parts]
        return ids, *self.accumulate(batches, parts)

    def to_device(self, batch: Batch) -> Batch:
        x, y = batch
        if self.device.type == "cuda":
            # From other memory a copy waits for what the GPU does before.
            x, y = x.pin_memory(), y.pin_memory()
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def _autocast(self) -> AbstractContextManager:
        dtype = getattr(torch, self.args.train_dtype)
        enabled = dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(self.device.type, dtype if enabled else None, enabled=enabled)

    def _losses(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss over all rows, and that of each row, (rows,)."""
        with self._autocast():
            model = self.wrapped if self.model.training else self.model
            out = model(x, labels=y)
        return out.loss, out.token_losses.mean(1)

    def _forward(self, x: Tensor, y: Tensor, tag: Any) -> tuple[Tensor, Tensor]:
        """What to call `backward` with, and the mean loss of each training row, (N,)."""
        n = len(x)
        if self.engine is not None:
            self.engine.attach_train_batch(x, y, self.step, tag)
            x, y = self.engine.prepare_forward_input(x, y)
        loss, losses = self._losses(x, y)
        return loss, losses[:n].detach()

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        if self.engine is not None:
            self.engine.prepare_gradients()

    def accumulate(self, batches: Sequence[Batch], tags: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Forward and backward batch by batch, but for the last backward: what to call `backward`
        with, and the mean loss of each training row of all, (N,)."""
        self._direct()
        losses = []
        for batch, tag in zip(batches[:-1], tags[:-1], strict=True):
            with self._unaveraged():
                loss, own = self._forward(*batch, tag)
                self.backward(loss / len(batches))
            losses.append(own)
        loss, own = self._forward(*batches[-1], tags[-1])
        return loss / len(batches), torch.cat([*losses, own])

    def _unaveraged(self) -> AbstractContextManager:
        """Gradients stay in their process, for the last batch's backward to average all. Sharded
        ones do not: nobody holds a whole model's."""
        if isinstance(self.wrapped, DistributedDataParallel):
            return self.wrapped.no_sync()
        return nullcontext()

    def end_step(self, ids: np.ndarray, losses: Tensor) -> None:
        """After the backward: clip the gradients, move the weights, log the scores."""
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

    def _clip(self) -> float | Tensor:
        """Clip the gradients; what they were multiplied by, where they are, so nobody waits."""
        if self.args.grad_clip == 0:
            return 1.0
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.args.grad_clip)
        return clip_factor(whole(norm), self.args.grad_clip)

    # Evaluation and state

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
            x, y = self.to_device(self.val_data.get(batches[min(i, len(batches) - 1)]))
            loss, _ = self._losses(x, y)
            if i < len(batches):
                losses[i] = loss.double() * len(x) / count
        self.model.train()
        return self.processes.summed(losses).sum().item()

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds, which says nothing of processes; whole in the first of them."""
        first = self.processes.rank == 0
        return {
            # Parameters themselves, so that tied ones can be told.
            "model": gathered(self.model.state_dict(keep_vars=True), first),
            "optimizer": gathered(self.optimizer.state_dict(), first),
            "sampler": self.sampler.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        load_model(self.model, state["model"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.sampler.load_state_dict(state["sampler"])
