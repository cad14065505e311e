"""Runs of `graddot train` for tests: made text, tokenized, and small settings."""

import json
from pathlib import Path

import pytest
import torch
from graddot_lm import cli
from graddot_lm.store import read_scores
from graddot_lm.training.checkpoint import latest_checkpoint, load_checkpoint

SIZES = "--architecture GPT2-Tiny --block_size 24 --batch_size 4 --val_batch_size 2 --max_steps 8"
STEPS = "--warmup_step 2 --eval_interval 4 --eval_iter 2 --eval_bs 2"
SAVES = "--dot_prod_save_interval 2 --checkpoint_interval 3 --seed 7"
FP64 = "--model_dtype float64 --train_dtype float64"


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """Three domains of made text, tokenized with a small BPE by the real commands."""
    root = tmp_path_factory.mktemp("data")
    words = [
        "the",
        "cat",
        "sat",
        "on",
        "a",
        "mat",
        "while",
        "seven",
        "large",
        "dogs",
        "ran",
        "far",
        "away",
    ]
    with (root / "text.jsonl").open("w") as file:
        for i in range(120):
            name = ("prose", "sums", "shout")[i % 3]
            text = [words[(i * 7 + j * j) % len(words)] for j in range(60)]
            if name == "sums":
                text = [f"{i + j}+{j}={i + 2 * j}" for j in range(40)]
            line = " ".join(text).upper() if name == "shout" else " ".join(text)
            file.write(json.dumps({"text": line, "meta": {"pile_set_name": name}}) + "\n")
    tokenizer, out = str(root / "tokenizer.json"), str(root / "tokens")
    source = ["--input", str(root / "text.jsonl")]
    assert cli.main(["train-tokenizer", *source, "--vocab_size", "300", "--output", tokenizer]) == 0
    command = ["tokenize", *source, "--tokenizer", tokenizer, "--output", out, "--workers", "1"]
    assert cli.main([*command, "--val_fraction", "0.2"]) == 0
    return Path(out)


def arguments(tokens, results, extra=""):
    places = ["--pile_data_dir", str(tokens), "--results_dir", str(results), "--run_name", "run"]
    return ["train", *places, *f"{SIZES} {STEPS} {SAVES} {extra}".split()]


def train(tokens, results, extra=""):
    return cli.main(arguments(tokens, results, extra))


def poisoned(one_step):
    """`TrainingRun._one_step` with weights that become NaN before step 5."""

    def step(self):
        if self.trainer.step == 5:
            with torch.no_grad():
                next(self.trainer.model.parameters()).fill_(float("nan"))
        return one_step(self)

    return step


def final_state(results):
    return load_checkpoint(latest_checkpoint(results / "run")).state


def assert_same_run(one, other):
    a, b = final_state(one), final_state(other)
    for name, tensor in a["model"].items():
        assert torch.equal(tensor, b["model"][name]), name
    assert read_scores(one / "run").equals(read_scores(other / "run"))
