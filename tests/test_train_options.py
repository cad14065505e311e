"""`graddot train`: evaluation alone; options, data and tokenizers that are refused."""

import json
import shutil
import subprocess

import pytest
import torch
import torch.nn.functional as F
from graddot_lm.text.data import TokenData
from graddot_lm.text.load_tokenizer import load_tokenizer, tokenizer_sha256
from graddot_lm.training import train_options
from graddot_lm.training.models import build_gpt2
from graddot_lm.training.settings import read_config, write_config
from train_runs import FP64, tokens, train

__all__ = ["tokens"]  # the fixture


def test_eval_only_writes_nothing(tokens, tmp_path, capsys):
    assert train(tokens, tmp_path, "--eval_only") == 0
    assert "after 0 steps" in capsys.readouterr().out and not any(tmp_path.iterdir())
    assert train(tokens, tmp_path) == 0
    assert train(tokens, tmp_path, "--eval_only --resume") == 0
    assert "after 8 steps" in capsys.readouterr().out
    options = "--train_set sums --val_set sums --batch_size 2 --method Regular"
    assert train(tokens, tmp_path, f"--eval_only --resume {options}") == 0, "free to differ"


def test_an_evaluation_takes_each_block_once_where_they_are_few(tokens, tmp_path, capsys):
    """However many batches are asked for: the mean over all blocks of the set."""
    data = TokenData(tokens, "val", ["prose"], 24)
    extra = f"--val_set prose --eval_iter {2**31 - 1} --eval_bs 7 --eval_only {FP64}"
    assert len(data) % 7 and train(tokens, tmp_path, extra) == 0
    torch.manual_seed(7)
    model = build_gpt2("GPT2-Tiny", data.vocab_size, 24, 0.0).double().eval()
    x, y = data.get(range(len(data)))
    with torch.no_grad():
        want = F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten())
    assert capsys.readouterr().out == f"val loss {want:.4f} after 0 steps\n"


def test_regular_training_that_could_not_be_evaluated_is_refused(tokens, tmp_path, capsys):
    shutil.copytree(tokens, tmp_path / "tokens")
    meta = json.loads((tokens / "meta.json").read_text())
    for domain in meta["domains"]:
        domain["val"] = {"tokens": 0, "documents": 0}
        (tmp_path / "tokens" / domain["slug"] / "val.bin").write_bytes(b"")
    (tmp_path / "tokens" / "meta.json").write_text(json.dumps(meta))
    assert train(tmp_path / "tokens", tmp_path / "results", "--method Regular") == 2
    assert "no block of 24 tokens in the val split" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_eval_only_wants_the_model_and_the_tokenizer_of_the_run(tokens, tmp_path, capsys):
    assert train(tokens, tmp_path, "--max_steps 1") == 0
    other = tmp_path / "other"
    shutil.copytree(tokens, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    meta = json.loads((other / "meta.json").read_text())
    meta["tokenizer"]["sha256"] = tokenizer_sha256(load_tokenizer(str(other)))
    (other / "meta.json").write_text(json.dumps(meta))
    cases = [
        (other, "", "tokenizer_sha256: "),
        (tokens, "--block_size 16", "block_size: 24 before, 16 now"),
        (tokens, "--architecture GPT2-Small", 'architecture: "GPT2-Tiny" before, "GPT2-Small" now'),
    ]
    for data, extra, words in cases:
        assert train(data, tmp_path, f"--eval_only --resume {extra}") == 2
        assert words in capsys.readouterr().err
    config = read_config(tmp_path / "run")
    del config["tokenizer_sha256"]  # as older runs have it
    write_config(tmp_path / "run", config)
    assert train(tokens, tmp_path, "--eval_only --resume") == 0
    assert train(tokens, tmp_path / "no", "--eval_only --resume") == 2
    assert "not a run's directory" in capsys.readouterr().err


BAD = [
    ("--architecture GPT3", "'GPT3'; it must be one of GPT2-Tiny"),
    ("--train_set prose,poems", "poems"),
    ("--val_batch_size 0", "--val_batch_size is 0"),
    ("--val_batch_size 100000", "100000"),
    (
        "--val_batch_size 100000",
        "--val_batch_size asks for fewer, a smaller --block_size makes more",
    ),
    ("--block_size 100000", "100000"),
    ("--block_size 100000", "a smaller --block_size makes more"),
    ("--batch_size 0", "--batch_size is 0"),
    ("--dropout 1", "--dropout is 1.0"),
    ("--domain_weights prose=x", "prose"),
    ("--domain_weights=", "weights: '': must be like NAME=NUMBER"),
    ("--run_name=", "--run_name is empty"),
    ("--block_size 7", "--block_size is 7; it must be at least 8"),
    (f"--seed {2**64}", f"--seed is {2**64}; it must be from -2**63 up to 2**64 - 1"),
    (f"--seed -{2**63 + 1}", f"--seed is -{2**63 + 1}; it must be from"),
    ("--train_dtype float64", "dtype of the parameters, float32; add --model_dtype float64"),
    ("--domain_weights poems=1", "poems"),
    ("--method Regular --measure_overhead 3", "needs --method GradDotProd"),
    ("--method Regular --norms", "--norms needs --method GradDotProd"),
    ("--weight_decay -0.1", "--weight_decay is -0.1; it must be a number of at least 0"),
    ("--grad_clip nan", "--grad_clip is nan"),
    ("--learning_rate -1", "--learning_rate is -1.0"),
    ("--learning_rate inf", "--learning_rate is inf"),
    ("--warmup_step -1", "--warmup_step is -1; it must be at least 0"),
    (f"--warmup_step 1{'0' * 400}", "it must be below 2**31"),
    (f"--eval_bs {2**70}", f"--eval_bs is {2**70}; it must be below 2**31"),
    ("--learning_rate 1e308", "--learning_rate is 1e+308; it must be at most 1e30"),
    ("--measure_overhead -2", "--measure_overhead is -2"),
    ("--train_set ,", "--train_set names no domain"),
    ("--val_set ,", "--val_set names no domain"),
    ("--device foo", "--device is 'foo'; it must be cpu, cuda, or one GPU"),
    ("--device cuda:99", "--device is 'cuda:99', which cannot be used here"),
    ("--device meta", "--device is 'meta', which cannot be used here"),
    ("--device privateuseone", "--device is 'privateuseone', which cannot be used here"),
]


@pytest.mark.parametrize("extra, message", BAD, ids=[extra[:40] for extra, _ in BAD])
def test_bad_option(tokens, tmp_path, capsys, extra, message):
    assert train(tokens, tmp_path / "results", extra) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "results").exists(), "nothing is written for a run that cannot begin"


def test_bad_places(tokens, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train(tokens, tmp_path / "file") == 2
    assert "file" in capsys.readouterr().err
    assert train(tmp_path / "nowhere", tmp_path) == 2
    assert "nowhere" in capsys.readouterr().err
    broken = tmp_path / "broken"
    shutil.copytree(tokens, broken)
    part = broken / "prose" / "train.bin"
    part.write_bytes(part.read_bytes()[:-2])
    assert train(broken, tmp_path / "results") == 2
    assert "train.bin" in capsys.readouterr().err


def test_foreign_tokenizer_is_refused(tokens, tmp_path, capsys):
    foreign = tmp_path / "foreign"
    shutil.copytree(tokens, foreign)
    tokenizer = json.loads((foreign / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (foreign / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert train(foreign, tmp_path / "results") == 2
    assert "not the tokenizer that" in capsys.readouterr().err


def test_the_commit_is_not_that_of_a_checkout_around_the_environment(tmp_path, monkeypatch):
    git = ["git", "-C", tmp_path, "-c", "user.name=n", "-c", "user.email=e"]
    source = tmp_path / "env" / "train_options.py"
    source.parent.mkdir()
    source.write_text("")
    monkeypatch.setattr(train_options, "__file__", str(source))
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    assert train_options._commit() is None
    subprocess.run([*git, "add", "env"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "ours"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    assert train_options._commit() == head.stdout.strip()
