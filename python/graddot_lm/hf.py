"""A Hugging Face Trainer whose run also leaves a score for every training sample at every step.

    from graddot_lm.hf import GradDotProdTrainer as Trainer
    Trainer(model=model, args=args, train_dataset=train, val_dataset=val, ...).train()

Every `val_interval` optimizer steps the gradient of the whole validation set becomes the direction
that every training sample's gradient is dotted with. Training rows run alone, exactly as without
scores. Needs the package `accelerate`, as transformers' Trainer does.
"""

import contextlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback, set_seed
from transformers.trainer_pt_utils import LabelSmoother
from transformers.utils import find_labels

from .background import BackgroundWriter
from .batches import label_shift_of
from .checks.digests import own_random
from .checks.item_loss import ItemLoss
from .directions import adamw_direction
from .distributed import unwrapped, whole
from .engine import GradDotProdEngine
from .errors import GraddotError
from .fused_head import fuse_head
from .indexed import (
    INDEX,
    LENGTHS,
    ColumnId,
    IndexCollator,
    Indexed,
    content_id,
    with_own_generators,
)
from .scores import Number, clip_factor
from .segments import Segments, flattened_lengths
from .store import PartWriter, scores_schema

_SAVED_EVERY = 100  # steps between saves of the rows, beside those at checkpoints


def _without_liger_head(args: Any) -> bool:
    """Have Liger leave head and loss alone, which are one function there, in which no layer can be
    scored. Returns whether it would not have: then the fused head stands in for that function."""
    if not getattr(args, "use_liger_kernel", False):
        return False
    config = dict(args.liger_kernel_config or {})
    if config.get("cross_entropy"):
        raise GraddotError(
            'GradDotProdTrainer cannot score with liger_kernel_config={"cross_entropy": True}, which'
            " overwrites the logits; leave it out, and the fused head (graddot_lm.fuse_head) stands in"
            " for it"
        )
    args.liger_kernel_config = {**config, "fused_linear_cross_entropy": False}
    return bool(config.get("fused_linear_cross_entropy", True))


class _ScoreCallback(TrainerCallback):
    def __init__(self, trainer: "GradDotProdTrainer") -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.begin_rows()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.write_scores()


class GradDotProdTrainer(Trainer):
    """transformers.Trainer with scores in `output_dir`/scores, Parquet parts of `store.SCORES`.

    Also to be mixed into another subclass of Trainer. That of TRL for supervised fine-tuning uses
    the head's weight in a function of its own, in which no layer can be scored; the model's loss is
    the same (loss_type="nll"):

        class ScoredSFTTrainer(GradDotProdTrainer, SFTTrainer):
            compute_loss = Trainer.compute_loss

    One row a training sample a step: step (from 0), sample_id (its index in train_dataset, or, where
    that is iterable, the `content_id` of it or the number in its id_column; collators have to keep
    the order of items), n_tokens, dot, lr, applied (not in a step that a GradScaler skipped) and
    value, which takes account of gradient accumulation, clipping and each parameter group's own
    learning rate, and is 0 in a step that was not taken. They are saved every 100 steps, at
    checkpoints and at the end.
    Where the collator makes one row of all items (DataCollatorWithFlattening, TRL's padding_free),
    each is scored as if it had a row of its own, without norms; where several texts are one item
    (TRL's packing), they are one sample.
    With several validation sets there is a dot_<name> and value_<name> of each. A run that resumes
    from a checkpoint drops the rows of later steps. Several processes (torchrun,
    DistributedDataParallel or FSDP of version 2) each write the rows of their own samples, into one folder that all of
    them see; scores are those of one process with the joint batch.

    Weights move as under Trainer, and values are those of its steps: where it adds up the mean losses
    of micro-batches and processes instead of averaging them (it does so for models that take
    num_items_in_batch and ignore it, as many classifiers), samples weigh as much more.

    Args, beside those of Trainer:
        val_dataset: what scores are about: a dataset as train_dataset is, collated alike in batches
            of the evaluation batch size, or a dict {target name: dataset}. It is run in
            evaluation mode, without dropout or label smoothing, and not used for training. By
            default eval_dataset, as the trainer has prepared it.
        val_interval: optimizer steps between two computations of the validation gradient; a run that
            resumes computes it at once.
        mean_of_items: the loss that `compute_loss` returns, of whatever class, is the mean over the
            batch's dataset items of a loss of each item's own, which may have several rows: a row of
            every item, then another of every item. So are those of preference pairs:

                class ScoredDPOTrainer(GradDotProdTrainer, DPOTrainer): pass
                ScoredDPOTrainer(..., mean_of_items=True)

            Each item is then one sample, with n_tokens 1. Checked steps, and the first of items of
            several lengths, raise GraddotError if the loss, or its gradient, of parts of the batch
            shows something else.
        adamw: score for the step that AdamW will take rather than SGD's, by `adamw_direction`
            around a gradient of zero. The first step, before which there is no state, leaves no
            rows.
        id_column: of an iterable training set, the column whose integers are the sample_ids.
        engine_options: further arguments of `GradDotProdEngine`, such as exclude, or norms=True for
            the columns norm and cosine.

    With use_liger_kernel=True Liger's kernels run, but for the one of head and loss: a causal language
    model gets the fused head of `graddot_lm.fuse_head` in its place, but in evaluations.

    Raises GraddotError, naming it, for what cannot be scored exactly: layers without a rule,
    several GPUs in one process, DeepSpeed, FSDP of version 1, with cpu_offload or torch_compile,
    parallelism_config, a `compute_loss` other than Trainer's without mean_of_items, `compute_loss_func`,
    auto_find_batch_size, and batches whose targets are not in "labels" alone.
    """

    def __init__(
        self,
        *args: Any,
        val_dataset: Any = None,
        val_interval: int = 1,
        adamw: bool = False,
        mean_of_items: bool = False,
        id_column: str | None = None,
        engine_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        fuses = _without_liger_head(kwargs.get("args", args[1] if len(args) > 1 else None))
        super().__init__(*args, **kwargs)
        if fuses:
            with contextlib.suppress(GraddotError):  # then it has the head and loss of its own
                fuse_head(unwrapped(self.model), in_evaluation=False)  # type: ignore[arg-type]
        self._id_column = id_column
        val_dataset = self.eval_dataset if val_dataset is None else val_dataset
        if val_dataset is None or val_interval < 1:
            raise GraddotError(
                f"val_dataset is {val_dataset!r} and val_interval {val_interval}; expected a"
                " dataset, or a dict of datasets, and at least 1"
            )
        self._mean_of_items = mean_of_items
        self._refuse()
        named = isinstance(val_dataset, Mapping)
        self._val_sets = dict(val_dataset) if named else {"val": val_dataset}
        self._val_batches: dict[str, list[Any]] = {}
        self._val_collator = with_own_generators(self.data_collator)
        self._val_interval, self._val_named, self._adamw = val_interval, named, adamw
        self._directions: dict[str, dict[str, Tensor]] = {}  # by target
        assert self.model is not None and self.args.output_dir is not None
        self._options, smoother = dict(engine_options or {}), self.label_smoother
        if smoother is not None:  # which gets the labels in the model's place
            self._set_label_shift()
        self.engine = GradDotProdEngine(self.model, **self._options)
        self._item_loss = ItemLoss(self) if mean_of_items else None
        if smoother is not None:
            self.label_smoother = lambda *a, **k: self.engine.track_loss(smoother(*a, **k))  # type: ignore[assignment]
        whole_model: Any = self.model
        of_peft = hasattr(whole_model, "get_base_model")
        self._targets = find_labels(type(whole_model.get_base_model() if of_peft else whole_model))
        self.scores = self._writer()
        self._training = False
        self._step: int | None = None
        self._scoring = False
        self._clip: Number = 1.0
        self.add_callback(_ScoreCallback(self))

    def _refuse(self) -> None:
        args, fsdp = self.args, self._fsdp()
        reasons = {
            "several GPUs in one process": args.n_gpu > 1,
            "DeepSpeed": bool(getattr(self, "is_deepspeed_enabled", False)),
            'FSDP of version 1; pass fsdp_config={"version": 2}': fsdp and fsdp.fsdp_version == 1,
            "FSDP and cpu_offload": isinstance(
                getattr(fsdp, "cpu_offload", None), CPUOffloadPolicy
            ),
            "FSDP and torch_compile": fsdp and args.torch_compile,
            "parallelism_config": getattr(args, "parallelism_config", None) is not None,
            "label_smoothing_factor in this version of transformers": self._smooths_otherwise(),
            # Of TRL, which compute_loss = Trainer.compute_loss would pass over.
            'loss_type="dft"': getattr(args, "loss_type", None) == "dft",
            "mean_of_items=True and label_smoothing_factor": self._mean_of_items
            and self.label_smoother is not None,
            "compute_loss_func": getattr(self, "compute_loss_func", None) is not None,
            "auto_find_batch_size": args.auto_find_batch_size,
            "id_column and a training set whose samples have an index": self._id_column is not None
            and not isinstance(self.train_dataset, IterableDataset),
        }
        found = [name for name, is_so in reasons.items() if is_so]
        if found:
            raise GraddotError(f"GradDotProdTrainer cannot score with {', '.join(found)}")
        # Of a loss of the user's own nothing tells how it is made of the samples' losses.
        own = getattr(self.compute_loss, "__func__", None) is not Trainer.compute_loss
        if own and not self._mean_of_items:
            name = getattr(self.compute_loss, "__qualname__", type(self.compute_loss).__name__)
            raise GraddotError(
                f"GradDotProdTrainer cannot score with a compute_loss of its own, {name}: it scores"
                " the loss that the model returns. Pass mean_of_items=True if it is the mean over the"
                " batch's items of a loss of each one's own, as of preference pairs. Else compute the loss in the model's forward, write"
                " compute_loss = transformers.Trainer.compute_loss in the class if the model's own"
                " loss is the same, or use GradDotProdEngine in a loop of your own"
            )

    def _set_label_shift(self) -> None:
        """Of the smoothed loss, and of the model's own for validation: one that both go by."""
        own = label_shift_of(unwrapped(self.model))  # type: ignore[arg-type]
        given = self._options.get("label_shift", "auto")
        if given not in ("auto", own):
            raise GraddotError(
                f"label_shift is {given}, but the model's own loss shifts the labels by {own}: with"
                " label_smoothing_factor the validation loss is the model's, and tokens of both are"
                " counted alike. Trainer smooths the loss of shifted labels for the classes in"
                " MODEL_FOR_CAUSAL_LM_MAPPING_NAMES of transformers alone"
            )
        self._options["label_shift"] = own

    def _fsdp(self) -> Any:
        """accelerate's plugin, if the model is or will be sharded."""
        return getattr(self.accelerator.state, "fsdp_plugin", None)

    def _smooths_otherwise(self) -> bool:
        """Whether a smoothed loss is no sum over num_items_in_batch, as the values take it to be."""
        takes = inspect.signature(LabelSmoother.__call__).parameters
        return self.label_smoother is not None and "num_items_in_batch" not in takes

    @property
    def _folder(self) -> Path:
        """Of the run at hand, which may be a trial of a search."""
        return Path(self._get_output_dir(getattr(self, "_trial", None))) / "scores"

    def _writer(self) -> BackgroundWriter:
        """Of this process's rows."""
        schema = scores_schema(list(self._val_sets) if self._val_named else (), self.engine.norms)
        rank, world = self.args.process_index, self.args.world_size
        return BackgroundWriter(PartWriter(self._folder, schema, rank, world))

    # Data

    def get_train_dataloader(self) -> DataLoader:
        """Trainer's, with every sample's index in the batch, or what `id_column` and `content_id` give a
        stream's: it is loaded as it is, for accelerate goes by its type."""
        dataset, collator = self.train_dataset, self.data_collator
        main = getattr(self.model, "main_input_name", "input_ids")
        id_of: Callable[[Any], int] | None = None
        if isinstance(dataset, IterableDataset):
            id_of = content_id if self._id_column is None else ColumnId(self._id_column)
        else:
            self.train_dataset = Indexed(dataset)
        self.data_collator = IndexCollator(self._own_collator("training", collator), main, id_of)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset, self.data_collator = dataset, collator

    def _own_collator(self, description: str, collator: Any) -> Callable[[list[Any]], Any]:
        return self._get_collator_with_removed_columns(collator, description=description)

    def _get_collator_with_removed_columns(
        self, data_collator: Any, description: Any = None
    ) -> Any:
        """Trainer's; that with the sample_ids removes columns itself, once they are read."""
        if isinstance(data_collator, IndexCollator):
            return data_collator
        return super()._get_collator_with_removed_columns(data_collator, description)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        given = self.train_dataset if train_dataset is None else train_dataset
        return super()._get_train_sampler(given.dataset if isinstance(given, Indexed) else given)

    def _validation_batches(self, target: str) -> list[Any]:
        if target not in self._val_batches:
            own, lengths = self._own_collator("validation", self._val_collator), []

            def collate(items: list[Any]) -> Any:
                batch = own(items)
                lengths.append(flattened_lengths(items, batch))
                return batch

            loader = DataLoader(
                self._val_sets[target], batch_size=self.args.eval_batch_size, collate_fn=collate
            )
            # Nothing drawn here, by the loader and by collators that mask at random, moves what
            # dropout and samplers draw in training; and a run that resumes has the same batches.
            with own_random():
                set_seed(self.args.seed)
                try:
                    batches = list(loader)
                except KeyError as error:
                    raise GraddotError(
                        f"the collator finds no {error} in the validation set: prepare val_dataset as"
                        " the training set is, or pass it as eval_dataset, which TRL prepares"
                    ) from error
            self._check_validation(batches, lengths)
            self._val_batches[target] = batches
        return self._val_batches[target]

    def _check_validation(self, batches: list[Any], lengths: list[list[int] | None]) -> None:
        """That its samples are kept apart where they share a row; those of training may not."""
        for batch, own in zip(batches, lengths, strict=True):
            own = [n for n in own or () if n]
            if len(own) > 1:
                inputs = self._prepare_inputs(batch)
                packed = Segments(own, inputs["input_ids"].shape[1])
                self.engine._forward.check_packed((), inputs, packed)
                return

    # Training

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, after the rows that a run resumed from it counts on."""
        if self._training:
            self.scores.flush()
            self.accelerator.wait_for_everyone()  # for the checkpoint counts on the rows of all
        return super()._save_checkpoint(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's; leaves the model as it was, without the scored layers, and saves all rows."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._training:
                self._training = False
                self.engine.detach()
                self.accelerator.clip_grad_norm_ = self._clip_grad_norm_of_accelerator
                self.scores.flush()

    def begin_rows(self) -> None:
        """Drop the rows of steps that are to come, also where none does any more."""
        self._folder.mkdir(parents=True, exist_ok=True)
        if self.state.global_step == 0 and any(self._folder.glob("part-*")):
            raise GraddotError(
                f"{self._folder} holds the scores of an earlier run; remove them, choose another"
                " output_dir, or resume from a checkpoint"
            )
        if self.args.process_index == 0:
            self._writer().truncate_after(self.state.global_step - 1)
        self.accelerator.wait_for_everyone()
        self.scores = self._writer()

    def _begin(self) -> None:
        # FSDP's parameters have taken the place of others, and model_init makes a model for every run.
        if self._fsdp() is not None or self.model_init is not None:
            self.engine = GradDotProdEngine(self.model, **self._options)  # type: ignore[arg-type]
        self.engine.store = self.scores
        self.engine.attach(self.optimizer)
        self._clip_grad_norm_of_accelerator = self.accelerator.clip_grad_norm_
        self.accelerator.clip_grad_norm_ = self._clip_and_note
        self._training, self._step = True, None
        self._clip, self._directions = 1.0, {}  # of a step that an exception cut off

    def _clip_and_note(self, parameters: Any, max_norm: float, *args: Any, **kwargs: Any) -> Any:
        norm = self._clip_grad_norm_of_accelerator(parameters, max_norm, *args, **kwargs)
        if norm is not None:
            self._clip = self._clip * clip_factor(whole(torch.as_tensor(norm)), float(max_norm))
        return norm

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Trainer's, with the batch's scores taken from its backward."""
        self._refuse()  # what was set since
        if INDEX not in inputs:
            raise GraddotError(
                "the batch does not say which samples it holds. A get_train_dataloader of your own has to"
                " be in a class that the trainer inherits after GradDotProdTrainer, and use"
                " self.train_dataset and self.data_collator; and a batch is for one training_step"
            )
        index, lengths = inputs.pop(INDEX).flatten(), inputs.pop(LENGTHS, None)
        if isinstance(lengths, Tensor):
            lengths = lengths.flatten()
        if self._item_loss is None:
            self._check_rows(inputs, len(index) if lengths is None else 1)
        if not self._training:
            self._begin()
        step = self.state.global_step
        if step != self._step:
            # An evaluation may have left a schedule-free optimizer's other weights in the model.
            if callable(train := getattr(self.optimizer, "train", None)):
                train()
            self._step, self._scoring = step, self._direct(step)
        if not self._scoring:
            return super().training_step(model, inputs, num_items_in_batch)
        inputs = self._prepare_inputs(inputs)
        if self._item_loss is None:
            self.engine.attach_train_batch(inputs, None, step, index, segments=lengths)
        else:
            self._item_loss.attach_train_batch(inputs, step, index, num_items_in_batch)
        micro = self.engine._forward.micro
        if micro is not None:  # without waiting for a device, as get_scale() would
            one = torch.ones((), dtype=torch.float64, device=self.args.device)
            scaler = getattr(self.accelerator, "scaler", None)
            micro.unit = one if scaler is None else scaler.scale(one)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if micro is not None and not micro.loss_scale.factors():  # its scaling would be taken for 1
            raise GraddotError(
                'the loss trained on is not one that the model returned as a mapping\'s "loss" or'
                " a tuple's first item; let the model's forward return it there"
            )
        self.engine.prepare_gradients()
        return loss

    def _check_rows(self, inputs: Mapping[str, Any], items: int) -> None:
        """Raise GraddotError unless each of the batch's items has a row of labels."""
        labels, others = inputs.get("labels"), self._other_targets(inputs)
        if labels is None:
            raise GraddotError(
                f'the batch has no "labels", but {", ".join(others or inputs)}; they are needed to'
                " count the terms that each sample has in the loss. Targets under other names, as"
                " start_positions and end_positions, cannot be scored: let the collator put them"
                ' into "labels", with the samples first, and the model compute its loss from them'
            )
        if others:
            raise GraddotError(
                f'the batch has {", ".join(others)} beside "labels", which alone are counted: a loss made'
                " of several means is no mean over samples, each by its own labels. Leave them out"
            )
        if isinstance(labels, Tensor) and labels.dim() and len(labels) != items:
            raise GraddotError(
                f"the collator made {len(labels)} rows of {items} dataset items, and not one in which"
                " their input_ids lie one after the other, with position_ids; batches in which an item"
                " is not one row cannot be scored otherwise: use a collator that pads"
            )

    def _other_targets(self, inputs: Mapping[str, Any]) -> list[str]:
        """What else of the batch the model, or the user, takes for targets."""
        names = [*self._targets, *([] if "labels" in inputs else self.label_names or ())]
        return [name for name in dict.fromkeys(names) if name != "labels" and name in inputs]

    def _direct(self, step: int) -> bool:
        """Give the engine its directions for this step; whether there are any."""
        if not self._directions or step % self._val_interval == 0:
            self._directions = self._validation_gradients()
        directions: Mapping[str, Mapping[str, Tensor]] = self._directions
        if self._adamw:
            optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)
            if not optimizer.state and isinstance(optimizer, torch.optim.Adam):
                return False
            parameters = dict(self.engine.model.named_parameters())
            directions = {
                target: adamw_direction(optimizer, parameters, direction)
                for target, direction in directions.items()
            }
        self.engine.set_directions(directions if self._val_named else directions["val"])
        return True

    def _validation_gradients(self) -> dict[str, dict[str, Tensor]]:
        model, scaler = self.engine.model, getattr(self.accelerator, "scaler", None)
        loss_scale = 1.0 if scaler is None else scaler.get_scale()
        compute = (self._item_loss or self.engine).compute_directions
        was_training = model.training
        if isinstance(model, FSDPModule):  # Trainer may have told it to reduce no gradients yet
            model.set_requires_gradient_sync(True)
        model.eval()
        try:
            with own_random():
                return {
                    target: compute(
                        map(self._prepare_inputs, self._validation_batches(target)),
                        loss_scale=loss_scale,
                    )
                    for target in self._val_sets
                }
        finally:
            model.train(was_training)

    def write_scores(self) -> None:
        """Append the scores of the optimizer step that has just been taken."""
        scale, self._clip = self._clip, 1.0
        if self._scoring:
            self.engine.aggregate_and_log(gradient_scale=scale)
        if self.state.global_step % _SAVED_EVERY == 0:
            self.scores.flush(wait=False)
