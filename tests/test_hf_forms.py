"""Losses, batches and what models return, under GradDotProdTrainer: exact, or refused with the reason."""

import re
from contextlib import nullcontext
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from brute_force import tiny_gpt2
from graddot_lm import GraddotError
from graddot_lm.hf import GradDotProdTrainer
from graddot_lm.indexed import IndexCollator
from hf_runs import (
    OUTPUTS,
    TRAIN,
    VAL,
    Own,
    Snapshots,
    arguments,
    brute_force,
    clipping,
    collate,
    rows_of,
    scored,
    tokens,
    train,
)
from loop_steps import tiny_bert
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import (
    BertForPreTraining,
    BertForQuestionAnswering,
    DataCollatorWithFlattening,
    GPT2LMHeadModel,
    Trainer,
)
from transformers.trainer_pt_utils import LabelSmoother


def test_refusals(tmp_path, monkeypatch):
    def make(data=TRAIN, val=VAL, model=None, **kwargs):
        own = {k: kwargs.pop(k) for k in ("compute_loss_func",) if k in kwargs}
        args = arguments(tmp_path, **kwargs)
        model = model or tiny_gpt2()
        return GradDotProdTrainer(
            model=model, args=args, train_dataset=data, val_dataset=val, **own
        )

    with pytest.raises(GraddotError, match="val_dataset is None"):
        make(val=None)
    with monkeypatch.context() as patch:
        patch.setattr(LabelSmoother, "__call__", lambda self, output, labels: None)
        with pytest.raises(GraddotError, match="label_smoothing_factor in this version"):
            make(label_smoothing_factor=0.1)
    with pytest.raises(GraddotError, match="compute_loss_func"):
        make(compute_loss_func=lambda *args, **kwargs: None)
    for version, offload, reason in [
        (1, None, 'FSDP of version 1; pass fsdp_config={"version": 2}'),
        (2, CPUOffloadPolicy(), "FSDP and cpu_offload"),
        (2, None, "FSDP and torch_compile"),
    ]:
        plugin = SimpleNamespace(fsdp_version=version, cpu_offload=offload)
        with monkeypatch.context() as patch, pytest.raises(GraddotError, match=re.escape(reason)):
            patch.setattr(GradDotProdTrainer, "_fsdp", lambda self, plugin=plugin: plugin)
            make(torch_compile="compile" in reason, torch_compile_backend="eager")
    with pytest.raises(GraddotError, match="finds no 'input_ids' in the validation set"):
        train(tmp_path, tiny_gpt2(), val=[{"text": "not tokenized"}])
    with pytest.raises(GraddotError, match="optimizer is a SGD"):  # which never has a state
        train(tmp_path, tiny_gpt2(), adamw=True)


class HalfLoss(GradDotProdTrainer):
    def compute_loss(self, model, inputs, **kwargs):
        return 0.5 * super().compute_loss(model, inputs, **kwargs)


class FromLogits(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class MixedIn(GradDotProdTrainer, FromLogits):
    pass


class OwnLossAgain(GradDotProdTrainer, FromLogits):
    compute_loss = Trainer.compute_loss


def test_a_loss_of_the_users_own_is_refused(tmp_path):
    with pytest.raises(GraddotError, match="compute_loss of its own, HalfLoss.compute_loss"):
        scored(tmp_path, tiny_gpt2(), cls=HalfLoss)
    with pytest.raises(GraddotError, match="compute_loss of its own, FromLogits.compute_loss"):
        scored(tmp_path, tiny_gpt2(), cls=MixedIn)
    trainer = scored(tmp_path, tiny_gpt2())
    trainer.compute_loss = lambda model, inputs, **kwargs: 0.5 * model(**inputs).loss
    with pytest.raises(GraddotError, match="compute_loss of its own, .*lambda"):
        trainer.train()
    trainer = scored(tmp_path, tiny_gpt2())
    trainer.compute_loss_func = lambda outputs, labels, **kwargs: 0.5 * outputs.loss
    with pytest.raises(GraddotError, match="compute_loss_func"):
        trainer.train()
    assert not any((tmp_path / "scores").glob("part-*"))


def test_the_models_loss_in_place_of_the_users_own(tmp_path, close):
    scored(tmp_path, tiny_gpt2(), cls=OwnLossAgain, max_steps=1).train()
    rows = rows_of(tmp_path / "scores")
    dots, scales, _ = brute_force(tiny_gpt2(), TRAIN, VAL, [row["sample_id"] for row in rows])
    close(torch.tensor([row["dot"] for row in rows], dtype=torch.float64), dots, 1e-5, scales)


class HeadByHand(Own):
    """Reads the head's weight behind its layer's back, so that its own forward is followed."""

    def forward(self, input_ids, attention_mask, labels):
        hidden = F.dropout(self.embedding(input_ids).tanh(), 0.2, self.training)
        logits = F.linear(hidden, self.head.weight)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return loss, logits


def test_a_model_that_is_followed_draws_once(tmp_path):
    """Its first step, whose forward runs outside of the step and again, has the same dropout."""
    options = {"remove_unused_columns": False, "max_steps": 2}
    model, regular = (HeadByHand(None) for _ in range(2))
    scored(tmp_path / "scored", model, options={"label_shift": 1}, **options).train()
    args = arguments(tmp_path / "regular", **options)
    Trainer(model=regular, args=args, data_collator=collate, train_dataset=TRAIN).train()
    for (name, p), q in zip(model.named_parameters(), regular.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("form", OUTPUTS)
def test_models_that_return_other_forms(tmp_path, close, form, accumulation):
    model, snapshots = Own(OUTPUTS[form]), Snapshots()
    trainer = scored(
        tmp_path,
        model,
        max_steps=2,
        options={"label_shift": 1},
        gradient_accumulation_steps=accumulation,
    )
    trainer.add_callback(snapshots)
    trainer.train()
    rows = rows_of(tmp_path / "scores")
    for step, snapshot in enumerate(snapshots.models):
        at = [row for row in rows if row["step"] == step]
        assert len(at) == 3 * accumulation
        plain = snapshot.double()
        plain.form = lambda loss, _: loss

        def own(data, plain=plain):
            return torch.autograd.grad(plain(**collate(data)), list(plain.parameters()))

        direction = torch.cat([g.flatten() for g in own(VAL)])
        samples = [torch.cat([g.flatten() for g in own([TRAIN[row["sample_id"]]])]) for row in at]
        scales = torch.stack([direction.norm() * g.norm() for g in samples])
        dots = torch.stack([direction @ g for g in samples])
        got = torch.tensor([row["dot"] for row in at], dtype=torch.float64)
        close(got, dots, 1e-5, scales)


class LossLast(NamedTuple):
    total: torch.Tensor
    loss: torch.Tensor


def test_models_without_a_loss_are_refused(tmp_path):
    forms = {
        "tuple without a loss": lambda loss, logits: (logits, loss),
        "dict without a loss": lambda loss, logits: {"logits": logits},
        "Tensor without a loss": lambda loss, logits: logits,
        "LossLast whose loss is not its first item": lambda loss, _: LossLast(2 * loss, loss),
    }
    for message, form in forms.items():
        with pytest.raises(GraddotError, match=message):
            scored(tmp_path, Own(form), options={"label_shift": 1}).train()


def test_a_loss_that_is_not_tracked_is_refused(tmp_path, monkeypatch):
    """Under accumulation it would halve every dot."""
    trainer = scored(tmp_path, tiny_gpt2())
    monkeypatch.setattr("graddot_lm.loss_scale.LossScale.factors", lambda self: [])
    with pytest.raises(GraddotError, match="loss trained on is not one that the model returned"):
        trainer.train()


@pytest.mark.parametrize("flash", [False, True], ids=["", "flash-lengths"])
def test_padding_free_batches(tmp_path, close, flash):
    """Rows and weights as if each sample had a row; an epoch ends in a batch of one, an ordinary
    row. A sample without tokens is in no batch."""
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=flash, return_seq_idx=flash)
    data = [*TRAIN[:3], {"input_ids": []}, *TRAIN[3:10]]
    options = {"max_steps": 4, "remove_unused_columns": False, "bf16": False}
    model, regular = tiny_gpt2(), tiny_gpt2()
    models, rows = train(
        tmp_path / "scored",
        model,
        data,
        collator=collator,
        per_device_train_batch_size=5,
        **options,
    )
    Trainer(
        model=regular,
        args=arguments(tmp_path / "regular", per_device_train_batch_size=5, **options),
        data_collator=collator,
        train_dataset=data,
    ).train()
    for (name, p), q in zip(model.named_parameters(), regular.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6), name
    for step, snapshot in enumerate(models):
        at = [row for row in rows if row["step"] == step]
        ids = [row["sample_id"] for row in at]
        assert 3 not in ids and [row["n_tokens"] for row in at] == [tokens(data, i) for i in ids]
        dots, scales, own = brute_force(snapshot, data, VAL, ids)
        column = lambda name, at=at: torch.tensor([row[name] for row in at], dtype=torch.float64)
        close(column("dot"), dots, 1e-5, scales)
        weights = torch.tensor([tokens(data, i) for i in ids], dtype=torch.float64)
        weights /= weights.sum()
        factor = column("lr") * clipping(own, weights) * weights
        close(column("value"), factor * dots, 1e-4, factor * scales)
    assert len(rows) == 20  # two epochs of all samples that have tokens


class Reversed(DataCollatorWithFlattening):
    def __call__(self, features, **kwargs):
        return super().__call__(features[::-1], **kwargs)


def with_mask(rows):
    batch = DataCollatorWithFlattening()(rows)
    return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


def test_padding_free_batches_that_cannot_be_scored_are_refused(tmp_path):
    def refused(message, collator, **kwargs):
        with pytest.raises(GraddotError, match=message):
            scored(tmp_path, tiny_gpt2(), collator=collator, **kwargs).train()

    message = "1 rows of 3 dataset items, and not one in which their input_ids lie one after"
    refused(message, DataCollatorWithFlattening(return_position_ids=False))
    refused(message, Reversed())
    refused("need norms=False", DataCollatorWithFlattening(), options={"norms": True})
    refused("gets an input .* only without an attention_mask", with_mask)
    # The validation batches alone
    refused("gets an input .* only without", with_mask, per_device_train_batch_size=1)


def test_targets_that_are_not_in_labels_are_refused(tmp_path):
    def spans(rows):
        batch = collate(rows)
        ends = batch.pop("labels")[:, 0] % 4
        return {**batch, "start_positions": ends - ends % 2, "end_positions": ends}

    config = tiny_bert().config
    config.num_labels = 2  # a span's start and end
    trainer = scored(tmp_path, BertForQuestionAnswering(config), collator=spans)
    with pytest.raises(GraddotError, match='no "labels", but start_positions, end_positions'):
        trainer.train()


def test_targets_beside_labels_are_refused(tmp_path):
    """Rows of as many labels each, as in a first batch, would not show that the loss is two means."""

    def two(rows):
        batch = collate(rows)
        return {**batch, "next_sentence_label": batch["labels"][:, 0] % 2}

    model = BertForPreTraining(tiny_bert().config)
    with pytest.raises(GraddotError, match='next_sentence_label beside "labels"'):
        scored(tmp_path, model, collator=two).train()


class Epochs(Dataset):
    """Other tokens in every epoch."""

    def __init__(self):
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(TRAIN)

    def __getitem__(self, i):
        return {"input_ids": [(t + 7 * self.epoch) % 60 + 1 for t in TRAIN[i]["input_ids"]]}


@pytest.mark.parametrize("workers", [0, 1])
def test_datasets_are_told_the_epoch(tmp_path, workers):
    options = {"max_steps": -1, "num_train_epochs": 2, "dataloader_num_workers": workers}
    models = [tiny_gpt2(), tiny_gpt2()]
    train(tmp_path / "scored", models[0], Epochs(), **options)
    args = arguments(tmp_path / "regular", **options)
    Trainer(model=models[1], args=args, data_collator=collate, train_dataset=Epochs()).train()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)


def left_padded(rows):
    batch = collate(rows)
    lengths = batch["attention_mask"].sum(1).tolist()
    for key, value in batch.items():
        batch[key] = torch.stack([x.roll(-n) for x, n in zip(value, lengths, strict=True)])
    return batch


def truncated(rows):
    return {key: value[:, :5] for key, value in collate(rows).items()}


def changed(rows):
    """As those that mask tokens: no row is an item's."""
    batch = collate(rows)
    batch["input_ids"][:, 1] = 0
    return batch


def by_length(rows):
    return collate(sorted(rows, key=lambda row: -len(row["input_ids"])))


@pytest.mark.parametrize("collator", [collate, left_padded, truncated, changed, by_length])
def test_the_order_of_items_is_kept(collator):
    """Or rows would go by the ids of others."""
    items, refused = list(enumerate(TRAIN[:6])), collator is by_length
    with (
        pytest.raises(GraddotError, match="row 0 of its input_ids is that of item 4")
        if refused
        else nullcontext()
    ):
        batch = IndexCollator(collator)(items)
        assert batch["graddot_index"].tolist() == [0, 1, 2, 3, 4, 5]


def test_a_run_whose_collator_sorts_is_refused(tmp_path):
    with pytest.raises(GraddotError, match="the collator changes the order of the items"):
        scored(tmp_path, tiny_gpt2(), collator=by_length).train()


class OwnLoader(GradDotProdTrainer):
    def get_train_dataloader(self):
        return DataLoader(self.train_dataset, batch_size=3, collate_fn=self.data_collator)


class PartLoader(Trainer):
    def get_train_dataloader(self):
        part = Subset(self.train_dataset, [7, 3, 11, 5])
        return DataLoader(part, batch_size=2, collate_fn=self.data_collator)


class Part(GradDotProdTrainer, PartLoader):
    pass


class Twice(GradDotProdTrainer):
    def training_step(self, model, inputs, *args):
        super().training_step(model, inputs, *args)
        return super().training_step(model, inputs, *args)


def test_loaders_of_the_users_own(tmp_path):
    """Samples keep their index, or it is said what hides it."""
    for cls in (OwnLoader, Twice):
        with pytest.raises(GraddotError, match="does not say which samples it holds"):
            scored(tmp_path / "refused", tiny_gpt2(), cls=cls).train()
    scored(tmp_path, tiny_gpt2(), cls=Part, max_steps=1).train()
    assert [row["sample_id"] for row in rows_of(tmp_path / "scores")] == [7, 3, 11, 5]


class Named(GPT2LMHeadModel):
    """For which Trainer does not shift the labels whose loss it smooths."""


@pytest.mark.parametrize("shift", [0, "auto"])
def test_a_smoothed_loss_shifts_labels_as_the_models(tmp_path, shift):
    model = tiny_gpt2()
    model.__class__ = Named
    match = "label_shift is 0, but .* by 1" if shift == 0 else "4 labelled tokens .* used 5"
    with pytest.raises(GraddotError, match=match):
        options = {"label_smoothing_factor": 0.1, "options": {"label_shift": shift}}
        scored(tmp_path, model, **options).train()
