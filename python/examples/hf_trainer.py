"""A transformers Trainer script that gains scores by one changed import and `val_dataset=`.

Three kinds of lines are trained on, and the validation set holds additions. Prints the mean score
of each kind: additions should come first.
"""

import argparse
import random

import pyarrow.dataset
import torch
from graddot_lm.hf import GradDotProdTrainer as Trainer
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

CHARACTERS = "0123456789+-=. "
KINDS = ("addition", "subtraction", "noise")


def line(kind: str, rng: random.Random) -> str:
    a, b = rng.randrange(10, 100), rng.randrange(10, 100)
    if kind == "noise":
        return "".join(rng.choices(CHARACTERS, k=rng.randrange(6, 12)))
    return f"{a}+{b}={a + b}." if kind == "addition" else f"{a}-{b}={a - b}."


def example(kind: str, rng: random.Random) -> dict[str, list[int]]:
    return {"input_ids": [CHARACTERS.index(c) for c in line(kind, rng)]}


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Rows padded to the longest, with their attention mask; no label on the padding."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.full((len(rows), longest), CHARACTERS.index(" "))
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        ids[i, :n], mask[i, :n] = torch.tensor(row["input_ids"]), 1
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100),
    }


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", default="hf_trainer_run")
    parser.add_argument("--max_steps", type=int, default=200)
    parser.add_argument("--width", type=int, default=64)
    args = parser.parse_args(argv)
    rng = random.Random(0)
    kinds = [rng.choice(KINDS) for _ in range(3000)]
    config = GPT2Config(
        vocab_size=len(CHARACTERS), n_positions=16, n_embd=args.width, n_layer=2, n_head=2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    trainer = Trainer(
        model=GPT2LMHeadModel(config),
        args=TrainingArguments(
            output_dir=args.output_dir,
            max_steps=args.max_steps,
            per_device_train_batch_size=16,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        data_collator=collate,
        train_dataset=[example(kind, rng) for kind in kinds],
        val_dataset=[example("addition", rng) for _ in range(64)],
        val_interval=4,
    )
    trainer.train()
    rows = pyarrow.dataset.dataset(f"{args.output_dir}/scores").to_table().to_pydict()
    means = {}
    for kind in KINDS:
        dots = [
            dot
            for sample, dot in zip(rows["sample_id"], rows["dot"], strict=True)
            if kinds[sample] == kind
        ]
        means[kind] = sum(dots) / len(dots)
        print(f"{kind:12} {len(dots):6,} rows   mean dot {means[kind]:+.4f}")
    return means


if __name__ == "__main__":
    main()
