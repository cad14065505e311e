"""Runs of GradDotProdTrainer on small data, and what their rows should say, in float64."""

import copy
import itertools
import random

import pyarrow.dataset
import torch
import torch.nn.functional as F
from graddot_lm.hf import GradDotProdTrainer
from loop_steps import mapping_gradient
from torch import nn
from torch.nn.utils import parameters_to_vector
from torch.utils.data import IterableDataset, get_worker_info
from transformers import (
    TrainerCallback,
    TrainingArguments,
)


def samples(n, *, seed, vocab=61, classes=0):
    """Token ids of several lengths; labels are the ids, or a class."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 12, (n,), generator=g).tolist()
    ids = [torch.randint(1, vocab, (length,), generator=g).tolist() for length in lengths]
    return [{"input_ids": x, **({"label": sum(x) % classes} if classes else {})} for x in ids]


def collate(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        ids[i, :n], mask[i, :n] = torch.tensor(row["input_ids"]), 1
    labels = ids.masked_fill(mask == 0, -100)
    if "label" in rows[0]:
        labels = torch.tensor([row["label"] for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Stream(IterableDataset):
    """In another order in every epoch; every worker reads its own part."""

    def __init__(self, items):
        self.items, self.epoch = items, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        items = random.Random(self.epoch).sample(self.items, len(self.items))
        worker = get_worker_info()
        return iter(items if worker is None else items[worker.id :: worker.num_workers])


class Snapshots(TrainerCallback):
    """The weights at which each optimizer step's gradients were taken."""

    def __init__(self):
        self.models, self.states = [], []

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        named = model.named_parameters()
        self.states.append({n: copy.deepcopy(optimizer.state.get(p)) for n, p in named})
        plain = copy.deepcopy(model)
        plain.__dict__.pop("forward", None)  # accelerate's, under autocast
        if hasattr(plain, "gradient_checkpointing_disable"):
            plain.gradient_checkpointing_disable()
        self.models.append(plain.double().train())


def arguments(folder, **kwargs):
    defaults = {
        "max_steps": 3,
        "per_device_train_batch_size": 3,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.02,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 0.3,
        "optim": "sgd",
        "weight_decay": 0.0,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 1,
    }
    return TrainingArguments(output_dir=str(folder), **{**defaults, **kwargs})


# Transformers 5 has a strategy for what was a flag.
BY_LENGTH = {"group_by_length": True}
if "group_by_length" not in TrainingArguments.__dataclass_fields__:
    BY_LENGTH = {"train_sampling_strategy": "group_by_length"}

TRAIN, VAL = samples(20, seed=1), samples(5, seed=2)


def train(
    folder,
    model,
    data=TRAIN,
    val=VAL,
    *,
    resume=None,
    val_interval=1,
    adamw=False,
    collator=collate,
    id_column=None,
    **kwargs,
):
    snapshots = Snapshots()
    trainer = GradDotProdTrainer(
        model=model,
        args=arguments(folder, **kwargs),
        data_collator=collator,
        train_dataset=data,
        val_dataset=val,
        val_interval=val_interval,
        adamw=adamw,
        id_column=id_column,
        callbacks=[snapshots],
    )
    trainer.train(resume_from_checkpoint=resume)
    assert not any("forward" in m.__dict__ for m in list(model.modules())[1:])
    if adamw:
        return snapshots.models, snapshots.states, rows_of(folder / "scores")
    return snapshots.models, rows_of(folder / "scores")


def trained_alike(scored, regular):
    """Train both, Trainer's own and ours; the weights are the same. Returns the snapshots of ours."""
    regular.train()
    snapshots = Snapshots()
    scored.add_callback(snapshots)
    scored.train()
    both = zip(scored.model.named_parameters(), regular.model.parameters(), strict=True)
    for (name, p), q in both:
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6), name
    return snapshots


def without_own_forwards(model):
    """A copy: TRL's forward is that of the model it was put on."""
    model = copy.deepcopy(model)
    for part in model.modules():
        part.__dict__.pop("forward", None)
    return model


def rows_of(path):
    return pyarrow.dataset.dataset(path).to_table().to_pylist()


def sample_gradient(model, data, i):
    return mapping_gradient(model, collate([data[i]]))


def flat(gradient):
    return torch.cat([g.flatten() for g in gradient.values()])


def tokens(data, i):
    return 1 if "label" in data[i] else len(data[i]["input_ids"]) - 1


def brute_force(model, data, val, ids, direction_model=None):
    """Dots, (N,), their scales, and what clipping to 0.3 multiplies the step's gradient by."""
    direction = flat(mapping_gradient(direction_model or model, collate(val)))
    own = [flat(sample_gradient(model, data, i)) for i in ids]
    dots = torch.stack([direction @ g for g in own])
    scales = torch.stack([direction.norm() * g.norm() for g in own])
    return dots, scales, own


def clipping(own, weights):
    norm = torch.stack([w * g for w, g in zip(weights, own, strict=True)]).sum(0).norm().item()
    return min(1.0, 0.3 / norm)


def check_steps(models, rows, data, val, close):
    """Of a run of SGD that had these weights as a step began, or went on, and at its end: the dots of its
    rows, and that each step's samples, by their weights, are all that moved the model. A value is lr times
    a weight times the dot. Returns the number of steps."""
    weights = [parameters_to_vector(m.parameters()).detach() for m in models]
    begun = [i for i, w in enumerate(weights[:-1]) if i == 0 or not torch.equal(w, weights[i - 1])]
    for step, (i, j) in enumerate(itertools.pairwise([*begun, -1])):
        at = [row for row in rows if row["step"] == step]
        ids = [row["sample_id"] for row in at]
        assert [row["n_tokens"] for row in at] == [tokens(data, i) for i in ids]
        dots, scales, own = brute_force(models[i], data, val, ids)
        column = lambda key, at=at: torch.tensor([row[key] for row in at], dtype=torch.float64)
        close(column("dot"), dots, 1e-5, scales)
        factors = column("value") / column("dot")
        moved = sum(factor * gradient for factor, gradient in zip(factors, own, strict=True))
        rounding = 2**-23 * weights[i].norm()  # of the weights, which are fp32
        error = (weights[i] - weights[j] - moved).norm()
        assert error <= 1e-4 * moved.norm() + rounding, step
    return len(begun)


def scored(folder, model, *, cls=GradDotProdTrainer, collator=collate, options=None, **kwargs):
    """A trainer of TRAIN and VAL."""
    return cls(
        model=model,
        args=arguments(folder, **{"remove_unused_columns": False, **kwargs}),
        data_collator=collator,
        train_dataset=TRAIN,
        val_dataset=VAL,
        engine_options=options,
    )


class Own(nn.Module):
    """What it returns is made of (loss, logits)."""

    def __init__(self, form):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head, self.form = nn.Embedding(61, 8), nn.Linear(8, 61), form

    def forward(self, input_ids, attention_mask, labels):
        logits = self.head(self.embedding(input_ids).tanh())
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return self.form(loss, logits)


OUTPUTS = {
    "tuple": lambda loss, logits: (loss, logits),
    "list": lambda loss, logits: [loss, logits],
    "dict": lambda loss, logits: {"logits": logits, "loss": loss},
}
