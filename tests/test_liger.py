"""Models whose head and loss are one function, as Liger's kernels make them, which need a GPU: a function
of the same form in their place."""

from types import MethodType

import pytest
import torch
import torch.nn.functional as F
import transformers.trainer
from brute_force import sample_dots, tiny_gpt2, token_batch, total
from datasets import Dataset
from engine_steps import close
from graddot_lm import GraddotError, GradDotProdEngine, fuse_head
from graddot_lm.hf import GradDotProdTrainer
from hf_runs import TRAIN, VAL, arguments, brute_force, collate, rows_of, trained_alike
from peft import LoraConfig, get_peft_model
from transformers import Trainer
from transformers.modeling_outputs import CausalLMOutput


class HeadAndLoss(torch.autograd.Function):
    """The sum of the tokens' losses; gradients are made in the forward, without all logits at once."""

    @staticmethod
    def forward(ctx, hidden, weight, labels):
        logits = hidden @ weight.t()
        grad = logits.softmax(-1)
        labelled = labels != -100
        grad[labelled, labels[labelled]] -= 1
        grad[~labelled] = 0
        ctx.save_for_backward(grad @ weight, grad.t() @ hidden)
        return F.cross_entropy(logits, labels, reduction="sum")

    @staticmethod
    def backward(ctx, grad_out):
        return *(grad_out * g for g in ctx.saved_tensors), None


def forward(
    self, input_ids, attention_mask=None, labels=None, num_items_in_batch=None, skip_logits=None
):
    hidden = self.base_model(input_ids, attention_mask=attention_mask).last_hidden_state
    if labels is None or not (self.training if skip_logits is None else skip_logits):
        logits = self.lm_head(hidden)
        loss = (
            None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        )
        return CausalLMOutput(loss=loss, logits=logits)
    labels = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()
    total = HeadAndLoss.apply(hidden.flatten(0, 1), self.lm_head.weight, labels)
    divisor = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return CausalLMOutput(loss=total / divisor)


def liger(model, config):
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    if (config or {}).get("fused_linear_cross_entropy", True):
        model.forward = MethodType(forward, model)


def step(model, train, val):
    engine = GradDotProdEngine(model, val)
    engine.attach()
    engine.attach_train_batch(*train, 0, None)
    x, y = engine.prepare_forward_input(*train)
    model(x, labels=y).loss.backward()
    engine.prepare_gradients()
    return engine.aggregate_and_log()


def test_an_engine_says_what_to_do():
    train, val = token_batch(3, 9, seed=1), token_batch(2, 9, seed=2)
    model = tiny_gpt2()
    want, _ = sample_dots(model, train, val)
    liger(model, None)
    with pytest.raises(
        GraddotError, match=r"HeadAndLossBackward.*call graddot_lm.fuse_head\(model\)"
    ):
        step(model, train, val)
    model = tiny_gpt2().double()
    liger(model, None)
    close(step(fuse_head(model), train, val), total(want), 1e-10)


def lora():
    torch.manual_seed(0)
    config = LoraConfig(
        target_modules=["c_attn"], r=2, fan_in_fan_out=True, init_lora_weights=False
    )
    return get_peft_model(tiny_gpt2(), config)


@pytest.mark.parametrize("make", [tiny_gpt2, lora])
def test_a_trainer_with_use_liger_kernel(make, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.trainer, "apply_liger_kernel", liger, raising=False)
    seen = {"ours": [], "theirs": []}

    def metrics(logits):
        def of(prediction):
            logits.append(torch.as_tensor(prediction.predictions))
            return {}

        return of

    def trainer(cls, name, **kwargs):
        evaluation = {"eval_strategy": "steps", "eval_steps": 2}
        return cls(
            model=make(),
            args=arguments(tmp_path / name, **evaluation, use_liger_kernel=True),
            data_collator=lambda items: collate(items),
            train_dataset=Dataset.from_list(
                TRAIN
            ),  # whose columns are chosen by the forward's names
            eval_dataset=Dataset.from_list(VAL),
            compute_metrics=metrics(seen[name]),
            **kwargs,
        )

    ours = trainer(GradDotProdTrainer, "ours")
    theirs = trainer(Trainer, "theirs")
    snapshots = trained_alike(ours, theirs)
    assert "fused_linear_cross_entropy" not in (theirs.args.liger_kernel_config or {})
    for x, y in zip(seen["ours"], seen["theirs"], strict=True):
        assert x.shape[:2] == y.shape[:2] and torch.allclose(x, y, atol=1e-5)
    rows = [row for row in rows_of(tmp_path / "ours" / "scores") if row["step"] == 0]
    model = make().double()
    dots, scales, _ = brute_force(model, TRAIN, VAL, [row["sample_id"] for row in rows])
    got = torch.tensor([row["dot"] for row in rows])
    assert len(rows) == 6 and (got - dots).abs().max() <= 1e-5 * scales.max()
    assert len(snapshots.models) == 3
    ours.args.prediction_loss_only = True  # Trainer says that logits are not wanted
    assert ours.evaluate()["eval_loss"] == pytest.approx(theirs.evaluate()["eval_loss"], rel=1e-5)


def test_a_loss_that_overwrites_the_logits_is_refused(tmp_path):
    args = arguments(tmp_path, use_liger_kernel=True, liger_kernel_config={"cross_entropy": True})
    with pytest.raises(GraddotError, match="which overwrites the logits; leave it out"):
        GradDotProdTrainer(model=tiny_gpt2(), args=args, train_dataset=TRAIN, val_dataset=VAL)
