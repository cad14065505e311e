"""A transformers Trainer script that gains scores by one changed import and `val_dataset=`, and then trains
on what helped.

Three kinds of lines are trained on, and the validation set holds additions. Prints the mean score
of each kind: additions should come first. Then it trains anew on the third of these lines with
the highest summed values, and on a random third: the loss on other additions should be lower after the first.
"""

import argparse
import random
from collections.abc import Sequence

import torch
import transformers
from graddot_lm.hf import GradDotProdTrainer as Trainer
from graddot_lm.store import read_scores
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


def trainer(
    cls: type[transformers.Trainer],
    args: argparse.Namespace,
    train: Sequence[dict],
    test: Sequence[dict],
    **scoring: object,
) -> transformers.Trainer:
    """On a new model; the same one for the same --seed."""
    config = GPT2Config(
        vocab_size=len(CHARACTERS), n_positions=16, n_embd=args.width, n_layer=2, n_head=2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(args.seed)
    return cls(
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
        train_dataset=train,
        eval_dataset=test,
        **scoring,
    )


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", default="hf_trainer_run")
    parser.add_argument("--max_steps", type=int, default=200)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    kinds = [rng.choice(KINDS) for _ in range(3000)]
    lines = [example(kind, rng) for kind in kinds]
    val, test = ([example("addition", rng) for _ in range(n)] for n in (64, 256))
    trainer(Trainer, args, lines, test, val_dataset=val, val_interval=4).train()

    rows = read_scores(args.output_dir).to_pandas()
    dots = rows["dot"].groupby(rows["sample_id"].map(kinds.__getitem__))
    figures = {f"dot_{kind}": float(dots.mean()[kind]) for kind in KINDS}
    for kind in KINDS:
        print(f"{kind:12} {dots.size()[kind]:6,} rows   mean dot {dots.mean()[kind]:+.4f}")

    values = rows.groupby("sample_id")["value"].sum()
    best = values.nlargest(len(values) // 3).index
    of_best = sum(kinds[i] == "addition" for i in best)
    figures["additions_chosen"] = of_best / len(best)
    print(f"additions among the best {len(best):,} of {len(values):,} lines: {of_best:,}")
    for name, which in (("best", best), ("random", rng.sample(list(values.index), len(best)))):
        plain = trainer(transformers.Trainer, args, [lines[i] for i in which], test)
        plain.train()
        loss = figures[f"loss_{name}"] = plain.evaluate()["eval_loss"]
        print(f"loss on other additions after the {name} third: {loss:.3f}")
    return figures


if __name__ == "__main__":
    main()
