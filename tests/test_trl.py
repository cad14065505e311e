"""Scores for TRL's SFTTrainer: chats and prompts, tokenized by it, whole models and adapters."""

import copy

import pytest
import torch
from datasets import Dataset
from graddot_lm import GraddotError
from graddot_lm.hf import GradDotProdTrainer
from model_zoo import causal
from test_hf import Snapshots, flat, rows_of
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Trainer

trl = pytest.importorskip("trl")

PROMPTS = [(f"{a} plus {b} is", f" {a + b}") for a in range(4) for b in range(6)]
CHAT = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<end>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


class ScoredSFTTrainer(GradDotProdTrainer, trl.SFTTrainer):
    compute_loss = Trainer.compute_loss


@pytest.fixture(scope="module")
def tokenizer():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel()
    special = ["<pad>", "<end>", "<user>", "<assistant>"]
    text = [prompt + completion for prompt, completion in PROMPTS]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<end>", pad_token="<pad>", chat_template=CHAT
    )


def data(kind):
    turn = lambda role, text: [{"role": role, "content": text}]
    rows = {
        "text": [{"text": p + c} for p, c in PROMPTS],
        "prompts": [{"prompt": p, "completion": c} for p, c in PROMPTS],
        "chats": [
            {"prompt": turn("user", p), "completion": turn("assistant", c)} for p, c in PROMPTS
        ],
    }[kind]
    return Dataset.from_list(rows[:18]), Dataset.from_list(rows[18:])


def trainer(cls, folder, tokenizer, kind, *, lora=False, **kwargs):
    peft = pytest.importorskip("peft")
    train, val = data(kind)
    config = trl.SFTConfig(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=3,
        gradient_accumulation_steps=2, learning_rate=0.02, optim="sgd", max_grad_norm=0.3,
        report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True, bf16=False,
        logging_steps=1, per_device_eval_batch_size=4, gradient_checkpointing=False, **kwargs,
    )  # fmt: skip
    adapters = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]) if lora else None
    return cls(
        model=causal("Llama", vocab_size=len(tokenizer), pad_token_id=0), args=config,
        train_dataset=train, eval_dataset=val, processing_class=tokenizer, peft_config=adapters,
    )  # fmt: skip


def gradient(model, row):
    """One collated row's, in float64."""
    model = copy.deepcopy(model).double()
    for part in model.modules():  # TRL's forward is that of the model it was put on
        part.__dict__.pop("forward", None)
    model.zero_grad()
    model(input_ids=row["input_ids"], labels=row["labels"]).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def labelled(row):
    return (row["labels"][0, 1:] != -100).sum().item()


@pytest.mark.parametrize("lora", [False, True], ids=["", "lora"])
@pytest.mark.parametrize("kind", ["text", "prompts", "chats"])
def test_every_row_and_the_weights(tmp_path, tokenizer, kind, lora, close):
    regular = trainer(trl.SFTTrainer, tmp_path / "regular", tokenizer, kind, lora=lora)
    regular.train()
    scored = trainer(ScoredSFTTrainer, tmp_path / "scored", tokenizer, kind, lora=lora)
    snapshots = Snapshots()
    scored.add_callback(snapshots)
    scored.train()
    pairs = zip(scored.model.named_parameters(), regular.model.parameters(), strict=True)
    for (name, p), q in pairs:
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6), name

    rows = rows_of(tmp_path / "scored" / "scores")
    assert [row["step"] for row in rows] == [0] * 6 + [1] * 6 + [2] * 6
    # Older TRL makes the labels as it collates.
    train, val = (
        [regular.data_collator([row]) for row in data]
        for data in (scored.train_dataset, scored.eval_dataset)
    )
    assert (labelled(train[0]) < train[0]["input_ids"].numel() - 1) == (kind != "text")
    weights = torch.tensor([labelled(row) for row in val], dtype=torch.float64)
    for step, model in enumerate(snapshots.models):
        at = [row for row in rows if row["step"] == step]
        own = torch.stack([flat(gradient(model, row)) for row in val])
        direction = (weights / weights.sum()) @ own
        samples = [flat(gradient(model, train[row["sample_id"]])) for row in at]
        assert [row["n_tokens"] for row in at] == [labelled(train[row["sample_id"]]) for row in at]
        scales = torch.stack([direction.norm() * g.norm() for g in samples])
        dots = torch.tensor([row["dot"] for row in at], dtype=torch.float64)
        close(dots, torch.stack([direction @ g for g in samples]), 1e-5, scales)


def test_what_cannot_be_scored_is_refused(tmp_path, tokenizer):
    class OwnLoss(GradDotProdTrainer, trl.SFTTrainer):
        pass

    with pytest.raises(GraddotError, match="compute_loss of its own, SFTTrainer.compute_loss"):
        trainer(OwnLoss, tmp_path / "own", tokenizer, "text")
    with pytest.raises(GraddotError, match="1 rows of 3 dataset items; padding-free"):
        trainer(
            ScoredSFTTrainer,
            tmp_path / "packed",
            tokenizer,
            "text",
            padding_free=True,
            max_length=None,
        ).train()
