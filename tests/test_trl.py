"""Scores for TRL's SFTTrainer: chats and prompts, tokenized by it, whole models and adapters."""

import itertools

import pytest
import torch
from datasets import Dataset
from graddot_lm import GraddotError
from graddot_lm.hf import GradDotProdTrainer, content_id
from hf_runs import flat, rows_of, trained_alike, without_own_forwards
from model_zoo import causal
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
        "stream": [{"text": p + c} for p, c in PROMPTS],
        "prompts": [{"prompt": p, "completion": c} for p, c in PROMPTS],
        "chats": [
            {"prompt": turn("user", p), "completion": turn("assistant", c)} for p, c in PROMPTS
        ],
    }[kind]
    train, val = Dataset.from_list(rows[:18]), Dataset.from_list(rows[18:])
    return train.to_iterable_dataset() if kind == "stream" else train, val


def trainer(cls, folder, tokenizer, kind, *, lora=False, **kwargs):
    peft = pytest.importorskip("peft")
    train, val = data(kind)
    kwargs = {"per_device_train_batch_size": 3, **kwargs}
    config = trl.SFTConfig(
        output_dir=str(folder), max_steps=3, gradient_accumulation_steps=2, learning_rate=0.02,
        optim="sgd", max_grad_norm=0.3, report_to="none", save_strategy="no", disable_tqdm=True,
        use_cpu=True, bf16=False, logging_steps=1, per_device_eval_batch_size=4,
        gradient_checkpointing=False, **kwargs,
    )  # fmt: skip
    adapters = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]) if lora else None
    return cls(
        model=causal("Llama", vocab_size=len(tokenizer), pad_token_id=0), args=config,
        train_dataset=train, eval_dataset=val, processing_class=tokenizer, peft_config=adapters,
    )  # fmt: skip


def gradient(model, row):
    """One collated row's; of texts packed into it, each in a row of its own."""
    model.zero_grad()
    lengths = [row["input_ids"].shape[1]]
    if "position_ids" in row:
        ends = (row["position_ids"][0] == 0).nonzero().flatten().tolist()
        ends.append(lengths[0])
        lengths = [end - begin for begin, end in itertools.pairwise(ends)]
    parts = zip(*(row[k].split(lengths, 1) for k in ("input_ids", "labels")), strict=True)
    for ids, labels in parts:
        if (own := labelled({"labels": labels})) > 0:
            loss = model(input_ids=ids, labels=labels).loss
            (loss * own / labelled(row)).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def labelled(row):
    return (row["labels"][0, 1:] != -100).sum().item()


PLAIN, FREE = {}, {"padding_free": True, "max_length": None}
PACKED = {"packing": True, "max_length": 30, "eval_packing": True}


@pytest.mark.parametrize("lora", [False, True], ids=["", "lora"])
@pytest.mark.parametrize(
    "kind, options",
    [
        ("text", PLAIN), ("prompts", PLAIN), ("chats", PLAIN), ("text", FREE), ("prompts", FREE),
        ("chats", PACKED), ("text", {**PACKED, "per_device_train_batch_size": 1}),
        ("text", {**PACKED, "packing_strategy": "wrapped"}),
        ("stream", FREE), ("stream", PACKED),
    ],
    ids=[
        "text", "prompts", "chats", "text-free", "prompts-free", "packed", "one-packed", "wrapped",
        "stream-free", "stream-packed",
    ],
)  # fmt: skip
def test_every_row_and_the_weights(tmp_path, tokenizer, kind, options, lora, close):
    if options and int(trl.__version__.split(".")[0]) < 1:
        pytest.skip("tried with TRL 1.16")
    make = lambda cls, name: trainer(cls, tmp_path / name, tokenizer, kind, lora=lora, **options)
    regular = make(trl.SFTTrainer, "regular")
    scored = make(ScoredSFTTrainer, "scored")
    snapshots = trained_alike(scored, regular)

    rows = rows_of(tmp_path / "scored" / "scores")
    if not options.get("packing"):  # which makes a few rows of all
        assert [row["step"] for row in rows] == [0] * 6 + [1] * 6 + [2] * 6
    # Older TRL makes the labels as it collates.
    collate = regular.data_collator
    train = {
        content_id(row) if kind == "stream" else i: collate([row])
        for i, row in enumerate(scored.train_dataset)
    }
    val = [collate([row]) for row in scored.eval_dataset]
    if not options.get("packing"):
        first = next(iter(train.values()))
        prompted = labelled(first) < first["input_ids"].numel() - 1
        assert prompted == (kind not in ("text", "stream"))
    weights = torch.tensor([labelled(row) for row in val], dtype=torch.float64)
    for step, model in enumerate(snapshots.models):
        at = [row for row in rows if row["step"] == step]
        model = without_own_forwards(model).double()
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
    with pytest.raises(GraddotError, match="cannot score with .*(loss_type|compute_loss_func)"):
        trainer(ScoredSFTTrainer, tmp_path / "dft", tokenizer, "text", loss_type="dft")
