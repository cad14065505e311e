"""Scores for preference pairs: TRL's trainers of rewards and of DPO, each pair one sample."""

import copy

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from graddot_lm import GraddotError
from graddot_lm.checks.item_loss import items_in_rows, unseen
from graddot_lm.hf import GradDotProdTrainer
from hf_runs import (
    TRAIN,
    VAL,
    arguments,
    clipping,
    collate,
    flat,
    rows_of,
    trained_alike,
    without_own_forwards,
)
from model_zoo import causal
from process_group import on_processes
from test_hf_processes import as_by_torchrun, weights
from test_trl import PROMPTS, tokenizer
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import SequentialSampler
from transformers import Trainer

trl = pytest.importorskip("trl", minversion="1.0")
__all__ = ["tokenizer"]  # the fixture


class ScoredReward(GradDotProdTrainer, trl.RewardTrainer):
    pass


SETTINGS = {
    "max_steps": 3, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2,
    "per_device_eval_batch_size": 4, "learning_rate": 0.05, "optim": "sgd", "max_grad_norm": 0.3,
    "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False,
    "logging_steps": 1, "gradient_checkpointing": False,
}  # fmt: skip


def pairs(margins):
    rows = [
        {
            "prompt": prompt,
            "chosen": right + " yes" * (k // 7 * k % 3),
            "rejected": f" {7 * k % 11} is wrong"[: 3 + k % 9],
        }
        | ({"margin": 0.1 * k} if margins else {})
        for k, (prompt, right) in enumerate(PROMPTS)
    ]
    return Dataset.from_list(rows[:18]), Dataset.from_list(rows[18:])


# Of a head, GPT-2's tied, with more elements than may have a gradient of every row.
WIDE = {"vocab_size": 33000, "pad_token_id": 0}
LARGE = {
    "dpo-large": lambda: causal("Llama", hidden_size=128, head_dim=64, num_hidden_layers=1, **WIDE),
    "dpo-large-tied": lambda: causal(
        "GPT2", "LMHeadModel", n_embd=128, n_layer=1, n_head=2, **WIDE
    ),
}


def trainer(base, folder, tokenizer, kind, cls=None, **settings):
    """One of TRL's, or cls made of it and ours."""
    train, val = pairs("margin" in kind)
    given = {"processing_class": tokenizer, "train_dataset": train, "eval_dataset": val}
    config = trl.RewardConfig if base is trl.RewardTrainer else trl.DPOConfig
    if base is trl.RewardTrainer:
        model = causal("Llama", head="ForSequenceClassification", num_labels=1,
                       vocab_size=len(tokenizer), pad_token_id=0)  # fmt: skip
    else:
        model = (
            LARGE[kind]()
            if kind in LARGE
            else causal("Llama", vocab_size=len(tokenizer), pad_token_id=0)
        )
        given["ref_model"] = None if "lora" in kind else copy.deepcopy(model)
    if "lora" in kind:
        peft = pytest.importorskip("peft")
        given["peft_config"] = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    if cls is not None:
        given["mean_of_items"] = True
    args = config(output_dir=str(folder), **{**SETTINGS, **settings})
    return (cls or base)(model=model, args=args, **given)


def reward_loss(model, batch):
    out = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    )
    chosen, rejected = out.logits.squeeze(-1).chunk(2)
    return -F.logsigmoid(chosen - rejected - batch.get("margin", 0.0)).mean()


def log_probs(model, batch):
    """Of every row's completion, (rows,)."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    each = logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    return (each * batch["completion_mask"][:, 1:]).sum(1)


def dpo_loss(model, reference, batch, kind):
    with torch.no_grad():
        known = log_probs(reference, batch)
    chosen, rejected = (log_probs(model, batch) - known).chunk(2)
    if "ipo" in kind:
        lengths = batch["completion_mask"].sum(1).chunk(2)
        return ((chosen / lengths[0] - rejected / lengths[1] - 5) ** 2).mean()
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("reward", {}), ("reward-margin-lora", {"gradient_checkpointing": True}),
        ("dpo", {}), ("dpo-lora", {}), ("dpo-ipo-lora", {"loss_type": ["ipo"]}),
        ("dpo-lora-known", {"precompute_ref_log_probs": True, "gradient_checkpointing": True}),
        ("dpo-picked", {"gradient_checkpointing": True}),
        ("dpo-large", {"max_steps": 2}),
        (
            "dpo-large-tied",
            {"max_steps": 2, "precompute_ref_log_probs": True, "gradient_checkpointing": True},
        ),
    ],
)  # fmt: skip
def test_every_pair_and_the_weights(tmp_path, tokenizer, kind, settings, close, monkeypatch):
    if "picked" in kind:  # the tokens of the completions alone go into the head, as on a GPU
        monkeypatch.setattr("trl.trainer.utils._use_triton", lambda device: True)
    base = trl.RewardTrainer if "reward" in kind else trl.DPOTrainer
    make = lambda name, cls=None: trainer(base, tmp_path / name, tokenizer, kind, cls, **settings)
    regular = make("regular")
    scored = make("scored", type("Scored", (GradDotProdTrainer, base), {}))
    snapshots = trained_alike(scored, regular)
    logs = [
        {k: x for row in run.state.log_history for k, x in row.items() if "runtime" not in k}
        for run in (scored, regular)
    ]
    for key in logs[1].keys() - {"train_samples_per_second", "train_steps_per_second"}:
        assert logs[0][key] == pytest.approx(logs[1][key], rel=1e-3, abs=1e-5), key

    rows = rows_of(tmp_path / "scored" / "scores")
    steps = scored.args.max_steps
    assert [row["step"] for row in rows] == [step for step in range(steps) for _ in range(6)]
    ids = {row["sample_id"] for row in rows}
    assert len(ids) == 6 * steps and ids <= set(range(18))
    reference = None
    if "dpo" in kind:
        reference = snapshots.models[0] if "lora" in kind else regular.ref_model
        reference = without_own_forwards(reference).double()

    def gradient(model, data, which):
        model = without_own_forwards(model)
        batch = scored.data_collator([data[i] for i in which])
        batch = {k: x.double() if x.is_floating_point() else x for k, x in batch.items()}
        if reference is None:
            loss = reward_loss(model, batch)
        else:
            loss = dpo_loss(model, reference, batch, kind)
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        return {
            n: torch.zeros_like(p) if g is None else g
            for (n, p), g in zip(named.items(), grads, strict=True)
        }

    for step, model in enumerate(snapshots.models):
        at = [row for row in rows if row["step"] == step]
        direction = flat(gradient(model, scored.eval_dataset, range(6)))
        own = [flat(gradient(model, scored.train_dataset, [row["sample_id"]])) for row in at]
        want = torch.stack([direction @ g for g in own])
        scales = torch.stack([direction.norm() * g.norm() for g in own])
        close(torch.tensor([row["dot"] for row in at], dtype=torch.float64), want, 1e-5, scales)
        factor = at[0]["lr"] / 6 * clipping(own, [1 / 6] * 6)
        values = torch.tensor([row["value"] for row in at], dtype=torch.float64)
        close(values, factor * want, 1e-5, factor * scales)
        assert {row["n_tokens"] for row in at} == {1}


class ScoredDPO(GradDotProdTrainer, trl.DPOTrainer):
    pass


ON_TWO = {
    "reward": (trl.RewardTrainer, ScoredReward), "dpo": (trl.DPOTrainer, ScoredDPO),
}  # fmt: skip


def of_kind(kind, folder, tokenizer, **settings):
    base, cls = ON_TWO[kind]
    return trainer(base, folder, tokenizer, kind, cls, **settings)


def on_two(rank, world, kind, folder, tokenizer, settings):
    as_by_torchrun(rank, world)
    run = of_kind(kind, folder, tokenizer, **settings)
    run.train()
    assert isinstance(run.model, FSDPModule) == ("fsdp" in settings)
    return list(weights(run.model).values())


SHARDED = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
}


@pytest.mark.parametrize(
    "kind, settings",
    [("reward", {}), ("reward", SHARDED), ("dpo", {})],
    ids=["ddp", "fsdp", "dpo-ddp"],
)
def test_two_processes(tmp_path, tokenizer, close, kind, settings):
    given = kind, tmp_path / "two", tokenizer, settings
    found = on_processes(2, tmp_path / "processes", on_two, *given)
    one = of_kind(kind, tmp_path / "one", tokenizer, per_device_train_batch_size=6)
    one.train()
    for mine, other, p in zip(*found, one.model.parameters(), strict=True):
        assert torch.equal(mine, other)
        assert torch.allclose(mine, p, rtol=1e-4, atol=1e-6)
    both = [
        {(row["step"], row["sample_id"]): row for row in rows_of(tmp_path / name / "scores")}
        for name in ("two", "one")
    ]
    assert both[0].keys() == both[1].keys()
    for column in ("dot", "value"):
        got, want = (
            torch.tensor([rows[key][column] for key in sorted(rows)], dtype=torch.float64)
            for rows in both
        )
        close(got, want, 1e-5, want.norm() / len(want) ** 0.5)


def test_losses_that_are_no_mean_of_items_are_refused(tmp_path, tokenizer):
    peft = pytest.importorskip("peft")

    class Scored(GradDotProdTrainer, trl.DPOTrainer):
        pass

    with pytest.raises(GraddotError, match="Pass mean_of_items=True if it is"):
        train, val = pairs(False)
        model = causal("Llama", vocab_size=len(tokenizer), pad_token_id=0)
        Scored(
            model=model, ref_model=copy.deepcopy(model), train_dataset=train, eval_dataset=val,
            processing_class=tokenizer, args=trl.DPOConfig(output_dir=str(tmp_path), **SETTINGS),
        )  # fmt: skip
    for loss_type in (["aot"], ["sigmoid", "sft"]):
        settings = {"loss_type": loss_type, "per_device_train_batch_size": 8}
        run = trainer(trl.DPOTrainer, tmp_path, tokenizer, "dpo-lora", Scored, **settings)
        with pytest.raises(GraddotError, match="Expected with mean_of_items=True the mean over"):
            run.train()

    class InOrder(Scored):
        def _get_train_sampler(self, *args):
            return SequentialSampler(self.train_dataset)

    # The first six chosen texts have as many tokens each, of which a mean is that of items.
    run = trainer(
        trl.DPOTrainer,
        tmp_path / "late",
        tokenizer,
        "dpo-lora",
        InOrder,
        loss_type=["sigmoid", "sft"],
    )
    with pytest.raises(GraddotError, match="Expected with mean_of_items=True the mean over"):
        run.train()
    assert run.state.global_step == 1

    class OfOneBaseline(GradDotProdTrainer, trl.KTOTrainer):
        """Each completion alone, but for a mean of the batch that is no part of the gradient."""

    rows = [{"prompt": p, "completion": c, "label": k % 2 == 0} for k, (p, c) in enumerate(PROMPTS)]
    run = OfOneBaseline(
        model=causal("Llama", vocab_size=len(tokenizer), pad_token_id=0),
        peft_config=peft.LoraConfig(r=4, target_modules=["q_proj"]), processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows[:18]), eval_dataset=Dataset.from_list(rows[18:]),
        args=trl.KTOConfig(output_dir=str(tmp_path / "kto"), **SETTINGS), mean_of_items=True,
    )  # fmt: skip
    with pytest.raises(GraddotError, match="Expected with mean_of_items=True the mean over"):
        run.train()
    assert run.state.global_step == 0

    class InBatch(GradDotProdTrainer, trl.RewardTrainer):
        """Every chosen text against every rejected one."""

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            chosen, rejected = model(**inputs).logits.squeeze(-1).chunk(2)
            return -F.logsigmoid(chosen[:, None] - rejected).mean()

    run = trainer(trl.RewardTrainer, tmp_path, tokenizer, "reward", InBatch)
    with pytest.raises(GraddotError, match="Expected with mean_of_items=True the mean over"):
        run.train()

    class OfTokens(InBatch):
        compute_loss = Trainer.compute_loss

    smoothed = {"label_smoothing_factor": 0.1}
    with pytest.raises(GraddotError, match="mean_of_items=True and label_smoothing_factor"):
        trainer(trl.RewardTrainer, tmp_path, tokenizer, "reward", OfTokens, **smoothed)


def of_pairs(folder, loss_of, collator=None, train=TRAIN, **settings):
    """A trainer of each text and its beginning, as two rows; loss_of(model, inputs, num_items)."""

    class OfPairs(GradDotProdTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return loss_of(model, inputs, num_items_in_batch)

        def _get_train_sampler(self, *args):
            return SequentialSampler(train)

    def of_both(items):
        return collate([*items, *({"input_ids": x["input_ids"][:-2]} for x in items)])

    return OfPairs(
        model=causal("Llama"), args=arguments(folder, remove_unused_columns=False, **settings),
        data_collator=collator or of_both, train_dataset=train, val_dataset=VAL, mean_of_items=True,
    )  # fmt: skip


def logits_of(model, inputs, rows=slice(None)):
    given = {k: inputs[k][rows] for k in ("input_ids", "attention_mask")}
    return model(**given, use_cache=False).logits


def losses_of(logits):
    chosen, rejected = logits.log_softmax(-1)[:, :, 3].mean(1).chunk(2)
    return F.softplus(rejected - chosen)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_division_by_num_items_in_batch_is_refused(tmp_path, rows):
    loss = lambda model, inputs, num_items: (
        losses_of(logits_of(model, inputs)).sum() / (2 * rows if num_items is None else num_items)
    )
    run = of_pairs(tmp_path, loss, per_device_train_batch_size=rows)
    with pytest.raises(GraddotError, match="where compute_loss gets num_items_in_batch"):
        run.train()


def test_a_forward_for_each_text_is_refused(tmp_path):
    def loss(model, inputs, num_items):
        n = len(inputs["input_ids"]) // 2
        halves = [logits_of(model, inputs, rows) for rows in (slice(n), slice(n, None))]
        return losses_of(torch.cat(halves)).mean()

    with pytest.raises(GraddotError, match="the loss runs the model more than once with a"):
        of_pairs(tmp_path, loss).train()

    named = lambda items: {f"chosen_{k}": x for k, x in collate(items).items()}
    with pytest.raises(
        GraddotError, match="no input_ids, in which every item has its rows, but chosen_"
    ):
        of_pairs(tmp_path, loss, named).train()


def test_a_loss_may_change_what_the_model_returns_in_place(tmp_path, close):
    def in_place(model, inputs, num_items):
        logits = logits_of(model, inputs)
        logits /= 2.0
        return losses_of(logits).mean()

    of_pairs(tmp_path / "in", in_place).train()
    copied = lambda model, inputs, num_items: losses_of(logits_of(model, inputs) / 2.0).mean()
    of_pairs(tmp_path / "out", copied).train()
    dots = [
        torch.tensor([row["dot"] for row in rows_of(tmp_path / name / "scores")])
        for name in ("in", "out")
    ]
    close(*dots, 1e-5, dots[1].norm() / len(dots[1]) ** 0.5)


def test_weights_by_tokens_are_refused_once_their_labels_show_them(tmp_path):
    """Rows of one length, of which later items have fewer labels."""
    items = [{"input_ids": [*range(k + 1, k + 9)]} for k in range(18)]

    def collator(rows):
        batch = collate([*rows, *rows])
        batch["labels"][batch["input_ids"][:, :1].gt(8) & (batch["input_ids"] % 7 > 2)] = -100
        return batch

    def loss(model, inputs, num_items):
        logits = logits_of(model, inputs)[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), inputs["labels"][:, 1:].flatten())

    run = of_pairs(tmp_path, loss, collator, items)
    with pytest.raises(GraddotError, match="Expected with mean_of_items=True the mean over"):
        run.train()
    assert run.state.global_step == 1


def test_what_a_batch_has_that_none_had():
    """Checked again: several items, and lengths that differ in one of their rows."""
    one, two = items_in_rows(2, 1), items_in_rows(4, 2)
    assert not unseen({"attention_mask": torch.ones(2, 3)}, one, set())
    equal = {"attention_mask": torch.ones(4, 3), "input_ids": torch.arange(12).view(4, 3)}
    assert unseen(equal, two, set()) == {("items", 0)}
    mask = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 1]])  # the second items' rows
    labels = torch.tensor([[1, -100], [-100, -100], [1, 1], [2, 2]])
    found = {("items", 0), ("attention_mask", 1), ("labels", 0)}
    ragged = {"attention_mask": mask, "labels": labels}
    assert unseen(ragged, two, set()) == found
    assert unseen(ragged, two, {("labels", 0)}) == found - {("labels", 0)}
    assert not unseen(ragged, two, found)
