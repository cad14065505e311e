"""`graddot train` from the command line: exact scores on disk, resumption, refused options."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from brute_force import gradient, norm, sample_dots, total
from graddot_lm import cli, train_options
from graddot_lm.checkpoint import latest_checkpoint, load_checkpoint
from graddot_lm.data import TokenData, fixed_batch
from graddot_lm.excerpts import escape
from graddot_lm.load_tokenizer import load_tokenizer, tokenizer_sha256
from graddot_lm.models import build_gpt2
from graddot_lm.settings import read_config, write_config
from graddot_lm.store import read_scores
from graddot_lm.train import TrainingRun
from graddot_lm.trainer import Trainer

ROOT = Path(__file__).parent.parent
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


def final_state(results):
    return load_checkpoint(latest_checkpoint(results / "run")).state


def assert_same_run(one, other):
    a, b = final_state(one), final_state(other)
    for name, tensor in a["model"].items():
        assert torch.equal(tensor, b["model"][name]), name
    assert read_scores(one / "run").equals(read_scores(other / "run"))


def test_stored_scores_equal_brute_force(tokens, tmp_path):
    assert train(tokens, tmp_path, "--val_set sums --learning_rate 0 --train_set prose,sums") == 0
    torch.manual_seed(7)
    model = build_gpt2("GPT2-Tiny", 300, 24, dropout=0.0)  # as it was: the learning rate is 0
    val_data = TokenData(tokens, "val", ["sums"], 24)
    val = val_data.get(fixed_batch(val_data, 2, seed=7))
    data = TokenData(tokens, "train", None, 24)
    rows = read_scores(tmp_path / "run").to_pylist()
    assert len(rows) == 8 * 4 and {row["domain"] for row in rows} == {"prose", "sums"}

    def loss(logits, labels):
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    ids = [row["sample_id"] for row in rows[:6]]
    want, scales = sample_dots(model, data.get(ids), val, loss=loss)
    got = torch.tensor([row["dot"] for row in rows[:6]])
    assert ((got - total(want)).abs() / total(scales)).max() <= 1e-6
    assert [row["offset"] for row in rows[:6]] == data.offset_of(ids).tolist()
    assert all(row["n_tokens"] == 24 and row["loss"] > 0 for row in rows)


def test_norms_are_written_and_resumed(tokens, tmp_path, capsys):
    """Columns norm and cosine; all else, and a run without, is as it was."""
    assert train(tokens, tmp_path / "plain", "--learning_rate 0") == 0
    assert "norms" not in read_config(tmp_path / "plain" / "run")
    assert train(tokens, tmp_path, "--norms --learning_rate 0") == 0
    rows = read_scores(tmp_path / "run").to_pylist()
    for row, other in zip(rows, read_scores(tmp_path / "plain" / "run").to_pylist(), strict=True):
        assert row["dot"] == pytest.approx(other["dot"], rel=1e-5, abs=1e-6)
    torch.manual_seed(7)
    model = build_gpt2("GPT2-Tiny", 300, 24, dropout=0.0)
    val_data, data = TokenData(tokens, "val", None, 24), TokenData(tokens, "train", None, 24)
    loss = lambda logits, labels: F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    val = gradient(model, *val_data.get(fixed_batch(val_data, 2, seed=7)), loss=loss)
    for row in rows[:3]:
        own = gradient(model, *data.get([row["sample_id"]]), loss=loss)
        dot = sum((val[n] * own[n]).sum() for n in val)
        assert row["norm"] == pytest.approx(norm(own).item(), rel=1e-5)
        assert row["cosine"] == pytest.approx((dot / norm(own) / norm(val)).item(), abs=1e-5)
    assert train(tokens, tmp_path, "--resume --learning_rate 0") == 2
    assert "norms: true before, not set now" in capsys.readouterr().err
    assert train(tokens, tmp_path, "--resume --norms --learning_rate 0") == 0
    assert len(read_scores(tmp_path / "run", ["norm"])) == len(rows)
    assert cli.main(["scores", str(tmp_path / "run")]) == 0


def test_each_domain_is_a_target_of_its_own(tokens, tmp_path, capsys):
    """Its scores are those of a run about it alone; the report compares them, or shows one."""
    fixed = f"--learning_rate 0 {FP64}"
    targets = "--target_per_domain --val_set prose,sums --norms"
    assert train(tokens, tmp_path, f"{fixed} {targets}") == 0
    both = read_scores(tmp_path / "run")
    for name in ("prose", "sums"):
        assert train(tokens, tmp_path / name, f"{fixed} --val_set {name} --norms") == 0
        alone = read_scores(tmp_path / name / "run")
        assert both["sample_id"].equals(alone["sample_id"])
        for column in ("dot", "value", "cosine"):
            got = both[f"{column}_{name}"].to_numpy()
            assert got == pytest.approx(alone[column].to_numpy(), rel=1e-10), column
    capsys.readouterr()
    run = str(tmp_path / "run")
    assert cli.main(["scores", run, "--by", "dot"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "for each of 2 targets" in lines[0]
    start = lines.index("mean dot ± standard error, by training domain (rows) and target:") + 1
    assert lines[start].split() == ["domain", "samples", "rows", "prose", "sums"]
    domains = both["domain"].to_numpy(zero_copy_only=False)
    for line, domain in zip(lines[start + 1 :], ("prose", "sums", "shout"), strict=False):
        assert line.split()[0] == domain
        for column, target in ((3, "prose"), (6, "sums")):
            mean = both[f"dot_{target}"].to_numpy()[domains == domain].mean()
            assert line.split()[column] == f"{mean:.3e}"
    assert cli.main(["scores", run, "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["targets"]) == ["prose", "sums"]
    assert cli.main(["scores", run, "--target", "sums"]) == 0
    shown = capsys.readouterr().out.split("validation sequences, which the scores are about")[1]
    assert shown.startswith(" (all 2)") and shown.count("sums ") == 2 and "prose" not in shown
    assert cli.main(["scores", run, "--csv", str(tmp_path / "all.csv")]) == 2
    assert "name one of prose, sums" in capsys.readouterr().err
    assert train(tokens, tmp_path, f"{fixed} --val_set prose,sums --norms --resume") == 2
    assert "target_per_domain: true before, not set now" in capsys.readouterr().err
    assert train(tokens, tmp_path, f"{fixed} {targets} --resume") == 0


@pytest.mark.parametrize("extra", ["", "--target_per_domain --norms --grad_clip 0.7"])
def test_accumulation_changes_neither_weights_nor_scores(tokens, tmp_path, extra):
    runs = []
    for steps in (1, 2, 4):
        runs.append(tmp_path / str(steps))
        command = f"{FP64} {extra} --gradient_accumulation_steps {steps}"
        assert train(tokens, runs[-1], command) == 0
    whole, rows = final_state(runs[0])["model"], read_scores(runs[0] / "run")
    for run in runs[1:]:
        for name, tensor in final_state(run)["model"].items():
            assert (tensor - whole[name]).norm() <= 1e-9 * whole[name].norm(), name
        found = read_scores(run / "run")
        assert found.schema == rows.schema
        for name in rows.column_names:
            if name in ("domain", "step", "sample_id", "offset", "n_tokens", "applied"):
                assert found[name].to_pylist() == rows[name].to_pylist(), name
            else:
                scale = abs(rows[name].to_numpy()).max()
                error = abs(found[name].to_numpy() - rows[name].to_numpy()).max()
                assert error <= (1e-6 if name == "loss" else 1e-9) * scale, name


def test_accumulating_run_resumes_bit_exactly_with_its_overhead(tokens, tmp_path, capsys):
    extra = "--gradient_accumulation_steps 2 --lr_schedule constant --dropout 0.1"
    assert train(tokens, tmp_path / "whole", f"{extra} --measure_overhead 1") == 0
    assert read_config(tmp_path / "whole" / "run")["measured"]["overhead"] > -1
    assert train(tokens, tmp_path / "parts", f"{extra} --max_steps 5") == 0
    assert train(tokens, tmp_path / "parts", f"{extra} --resume") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    capsys.readouterr()
    assert train(tokens, tmp_path / "parts", "--lr_schedule constant --dropout 0.1 --resume") == 2
    assert "gradient_accumulation_steps: 2 before, not set now" in capsys.readouterr().err


@pytest.mark.parametrize("parts", [1, 2])
def test_regular_moves_the_weights_alike(tokens, tmp_path, parts):
    for method in ("GradDotProd", "Regular"):
        extra = f"--method {method} {FP64} --gradient_accumulation_steps {parts}"
        assert train(tokens, tmp_path / method, extra) == 0
    scored, regular = (final_state(tmp_path / m)["model"] for m in ("GradDotProd", "Regular"))
    for name, tensor in scored.items():
        assert (tensor - regular[name]).norm() <= 1e-9 * tensor.norm(), name


@pytest.mark.parametrize("grad_clip", ["0", "0.7", "1000"])
def test_value_is_the_learning_rate_times_the_share_times_the_dot_as_clipped(
    tokens, tmp_path, monkeypatch, grad_clip
):
    """What clipping multiplied the gradient by is seen on the gradient itself."""
    factors, clip = [], torch.nn.utils.clip_grad_norm_

    def noted(parameters, *args):
        parameters = list(parameters)
        flat = lambda: torch.cat([p.grad.flatten() for p in parameters]).double()
        before = flat().norm()
        result = clip(parameters, *args)
        factors.append((flat().norm() / before).item())
        return result

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", noted)
    assert train(tokens, tmp_path, f"--grad_clip {grad_clip}") == 0
    factors = factors or [1.0] * 8
    assert len(factors) == 8 and all((f < 0.9) == (grad_clip == "0.7") for f in factors)
    for row in read_scores(tmp_path / "run").to_pylist():
        plain = row["lr"] * row["dot"] / 4
        assert row["value"] == pytest.approx(plain * factors[row["step"]], rel=1e-6)


def test_bfloat16(tokens, tmp_path):
    assert train(tokens, tmp_path / "exact", "--learning_rate 0") == 0
    want = read_scores(tmp_path / "exact" / "run")["dot"].to_numpy()
    autocast = "--train_dtype bfloat16"
    for extra in ("", "--model_dtype bfloat16", "--gradient_accumulation_steps 2"):
        extra = f"{autocast} {extra}"
        results = tmp_path / extra.replace(" ", "")
        assert train(tokens, results, f"--learning_rate 0 {extra}") == 0
        got = read_scores(results / "run")["dot"].to_numpy()
        assert abs(got - want).max() <= 2e-2 * abs(want).max()


def test_killed_run_resumes_bit_exactly(tokens, tmp_path):
    """SIGKILL at some instant after the first checkpoint, twice; then resume to the end."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    extra = "--dropout 0.1 --max_steps 40"
    for at in ("step-5", "step-17"):
        command = [sys.executable, "-m", "graddot_lm.cli", *arguments(tokens, killed, extra)]
        process = subprocess.Popen(
            [*command, "--resume"], env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        deadline = time.monotonic() + 120
        while not (killed / "run" / "checkpoints" / at).exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert train(tokens, killed, f"{extra} --resume") == 0
    assert train(tokens, whole, extra) == 0
    assert_same_run(whole, killed)
    steps = read_scores(killed / "run")["step"].to_pylist()
    assert steps == [step for step in range(40) for _ in range(4)]


def test_sigterm_saves_a_checkpoint_first(tokens, tmp_path, monkeypatch, capsys):
    one_step = TrainingRun._one_step

    def interrupted(self):
        if self.trainer.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return one_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "_one_step", interrupted)
        assert train(tokens, tmp_path / "stopped") == 2
    assert "stopped by SIGTERM after step 4; go on with --resume" in capsys.readouterr().err
    assert train(tokens, tmp_path / "stopped", "--resume") == 0
    assert train(tokens, tmp_path / "whole") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, -15)])
def test_the_overhead_is_not_waited_for(tokens, tmp_path, number, status):
    """All is saved before it is measured, so what asks the process to end ends it."""
    code = "import signal, sys; from graddot_lm import cli;"
    # Ignored in what a shell runs behind.
    code += "signal.signal(signal.SIGINT, signal.default_int_handler); sys.exit(cli.main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments(tokens, tmp_path, "--measure_overhead 1000000")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    try:
        while not (tmp_path / "run" / "checkpoints" / "step-7").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(1)
        process.send_signal(number)
        _, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == status and "Traceback" not in error, error
    assert train(tokens, tmp_path, "--resume") == 0
    assert set(read_scores(tmp_path / "run")["step"].to_pylist()) == set(range(8))


def test_a_report_is_awaited_on_its_own_device(monkeypatch):
    """With --device cuda:1 the current device is another, whose stream has no copy to wait for."""
    recorded = []
    event = SimpleNamespace(record=recorded.append)
    monkeypatch.setattr(torch.cuda, "Event", lambda blocking: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
    run = SimpleNamespace(
        processes=SimpleNamespace(rank=0, world=1, device=torch.device("cpu"), summed=lambda x: x),
        run_dir=SimpleNamespace(failed=False),
        _signals=[0],
    )
    report, there = TrainingRun._report(run, torch.tensor([1.0, 3.0]))
    assert report.tolist() == [2, 0, 0]
    assert there is event and recorded == [run.processes.device]


def test_the_smallest_block(tokens, tmp_path):
    assert train(tokens, tmp_path, "--block_size 8 --max_steps 1") == 0


def test_resume_with_other_settings_is_refused(tokens, tmp_path, capsys):
    assert train(tokens, tmp_path) == 0
    before = read_scores(tmp_path / "run")
    assert train(tokens, tmp_path, "--resume --learning_rate 0.1 --batch_size 3") == 2
    error = capsys.readouterr().err
    assert "learning_rate: 0.0006 before, 0.1 now" in error and "batch_size: 4 before" in error
    assert train(tokens, tmp_path) == 2  # without --resume
    assert "holds a run" in capsys.readouterr().err
    assert train(tokens, tmp_path, "--resume --max_steps 9") == 2
    assert "only a run with --lr_schedule constant can be extended" in capsys.readouterr().err
    assert train(tokens, tmp_path, "--resume --method Regular") == 2
    error = capsys.readouterr().err.splitlines()
    assert 'method: "GradDotProd" before, "Regular" now' in "\n".join(error[:4])
    assert max(map(len, error)) < 200, "a list of all parameters"
    assert read_scores(tmp_path / "run").equals(before)


def test_a_constant_run_is_extended_with_its_data_elsewhere(tokens, tmp_path, capsys, monkeypatch):
    """The data's fingerprint decides, not where it lies; an older config.json says less of it."""
    constant = "--lr_schedule constant"
    assert train(tokens, tmp_path / "whole", constant) == 0
    assert train(tokens, tmp_path / "moved", f"{constant} --max_steps 4 --resume") == 0
    assert f"no run at {tmp_path}/moved/run yet: starting one" in capsys.readouterr().err
    config = read_config(tmp_path / "moved" / "run")
    for name in ("tokenizer_sha256", "val_sample_ids", "data_content"):
        del config[name]
    write_config(tmp_path / "moved" / "run", {**config, "device": "cuda"})
    shutil.copytree(tokens, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    assert train("elsewhere", tmp_path / "moved", f"{constant} --resume") == 0
    assert "no run at" not in capsys.readouterr().err
    assert_same_run(tmp_path / "whole", tmp_path / "moved")
    config = read_config(tmp_path / "moved" / "run")
    assert config["data_dir"] == str(tmp_path / "elsewhere") and config["val_sample_ids"]
    for split in ("train", "val"):
        file = tmp_path / "elsewhere" / "sums" / f"{split}.bin"
        kept = file.read_bytes()
        file.write_bytes(kept[2:] + kept[:2])
        assert train("elsewhere", tmp_path / "moved", f"{constant} --resume") == 2
        assert "token files hold other tokens" in capsys.readouterr().err
        file.write_bytes(kept)
    (tmp_path / "moved" / "run").rename(tmp_path / "moved" / "of another name")
    (tmp_path / "moved" / "run").symlink_to("of another name")
    again = ["--run_name", "of another name", *f"{constant} --resume".split()]
    assert cli.main([*arguments("elsewhere", tmp_path / "moved"), *again]) == 0
    meta = json.loads((tmp_path / "elsewhere" / "meta.json").read_text())
    meta["domains"][0]["val"]["documents"] += 1
    (tmp_path / "elsewhere" / "meta.json").write_text(json.dumps(meta))
    assert train("elsewhere", tmp_path / "moved", f"{constant} --resume") == 2
    assert "data_fingerprint" in capsys.readouterr().err


def test_nan_loss_stops_and_keeps_what_is_saved(tokens, tmp_path, capsys, monkeypatch):
    one_step = TrainingRun._one_step

    def poisoned(self):
        if self.trainer.step == 5:
            with torch.no_grad():
                next(self.trainer.model.parameters()).fill_(float("nan"))
        return one_step(self)

    monkeypatch.setattr(TrainingRun, "_one_step", poisoned)
    assert train(tokens, tmp_path) == 2
    error = capsys.readouterr().err
    assert "training loss is nan at step 5" in error and "--on_nan continue" in error
    assert "Scores up to step 4 and the checkpoint step-2 are in" in error
    assert load_checkpoint(latest_checkpoint(tmp_path / "run")).step == 2
    assert set(read_scores(tmp_path / "run")["step"].to_pylist()) == set(range(5))
    assert train(tokens, tmp_path / "on", "--on_nan continue") == 0
    parts = "--gradient_accumulation_steps 2"
    assert train(tokens, tmp_path / "parts", parts) == 2
    error = capsys.readouterr().err
    assert "the validation gradient of transformer.wte.weight is not finite at step 5" in error
    assert "Scores up to step 4 and the checkpoint step-2 are in" in error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nProcess 7 has"),
        MemoryError("Unable to allocate 7.45 GiB for an array"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_too_little_memory_is_one_line(tokens, tmp_path, capsys, monkeypatch, error):
    def full(*_):
        raise type(error)(*error.args)  # another one, for its traceback holds the model

    monkeypatch.setattr(Trainer, "_losses", full)
    for extra, option in (("", "--batch_size"), ("--eval_only", "--eval_bs")):
        assert train(tokens, tmp_path, extra) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"out of memory ({str(error).splitlines()[0]})" in line
        assert f"a smaller {option} " in line


@pytest.mark.parametrize(
    "step, extra, words",
    [
        (0, "", "Nothing was saved in"),
        (2, "", "Scores up to step 1 and no checkpoint yet are in"),
        (1, "--method Regular", "Metrics up to step 0 and no checkpoint yet are in"),
    ],
)
def test_a_nan_loss_is_not_said_to_keep_what_there_is_not(
    tokens, tmp_path, capsys, monkeypatch, step, extra, words
):
    losses = Trainer._losses

    def poisoned(self, x, y):
        total, each = losses(self, x, y)
        return total, each * (float("nan") if self.step == step else 1)

    monkeypatch.setattr(Trainer, "_losses", poisoned)
    assert train(tokens, tmp_path, extra) == 2
    error = capsys.readouterr().err
    assert f"training loss is nan at step {step}. {words}" in error and "step -1" not in error


def test_a_part_that_cannot_be_saved_stops_the_run_at_the_next_step(
    tokens, tmp_path, capsys, monkeypatch
):
    """The thread's error, with its own message; the rows stay until the run ends, if they can."""
    replace, steps, one_step = os.replace, [], TrainingRun._one_step

    def full(source, target):
        if "00000006-00000006" in str(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        replace(source, target)

    def noted(self):
        if steps[-1:] == [6]:
            self.run_dir._thread._executor.submit(lambda: None).result()
        steps.append(self.trainer.step)
        return one_step(self)

    extra = "--dot_prod_save_interval 1 --checkpoint_interval 6"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        patch.setattr(TrainingRun, "_one_step", noted)
        assert train(tokens, tmp_path / "full", extra) == 2
    error = capsys.readouterr().err
    assert "part-00000006-00000006.parquet: cannot be written: No space left" in error
    assert steps[-1] == 7, "not at the next step"
    assert set(read_scores(tmp_path / "full" / "run")["step"].to_pylist()) == set(range(6))
    assert train(tokens, tmp_path / "full", f"{extra} --resume") == 0
    assert train(tokens, tmp_path / "whole", extra) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "full")


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


@pytest.mark.parametrize(
    "key, value", [("sampler", None), ("model", {"dict": []}), ("optimizer", 7)]
)
def test_a_checkpoint_of_another_shape_is_named(tokens, tmp_path, capsys, key, value):
    assert train(tokens, tmp_path) == 0
    path = latest_checkpoint(tmp_path / "run")
    content = json.loads((path / "state.json").read_text())
    content["state"][key] = value
    (path / "state.json").write_text(json.dumps(content))
    before = read_scores(tmp_path / "run")
    assert train(tokens, tmp_path, "--resume") == 2
    assert f"{path}: damaged: " in capsys.readouterr().err
    assert read_scores(tmp_path / "run").equals(before)
    if key == "model":
        assert train(tokens, tmp_path, "--resume --eval_only") == 2
        assert f"{path}: damaged: " in capsys.readouterr().err


SHAPES = [
    {"coverage": {"excluded": [1]}},
    {"measured": 7},
    {"val_sample_ids": ["a"]},
    {"data_dir": 1},
]


@pytest.mark.parametrize("change", [*SHAPES, []], ids=str)
def test_a_config_of_another_shape_is_named(tokens, tmp_path, capsys, change):
    assert train(tokens, tmp_path, "--max_steps 1") == 0
    config = read_config(tmp_path / "run") | change if change else []
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    for command in (["scores", str(tmp_path / "run")], arguments(tokens, tmp_path, "--resume")):
        assert cli.main(command) == 2
        assert f"{tmp_path}/run/config.json: cannot be read: " in capsys.readouterr().err


def test_the_report_shows_the_validation_sequences(tokens, tmp_path, capsys):
    assert train(tokens, tmp_path, "--max_steps 1 --val_set sums,prose") == 0
    data = TokenData(tokens, "val", ["sums", "prose"], 24)
    ids = fixed_batch(data, 2, seed=7).tolist()
    assert read_config(tmp_path / "run")["val_sample_ids"] == ids
    text = load_tokenizer(str(tokens)).decode(data.token_ids(ids[0]).tolist())
    place = f"{data.domain_of(ids)[0]:<6}  {data.offset_of(ids)[0]:>6}  "
    assert cli.main(["scores", str(tmp_path / "run"), "--top", "1"]) == 0
    out = capsys.readouterr().out
    assert "validation sequences, which the scores are about (the first 1 of 2):" in out
    assert place + escape(text) in out
    assert cli.main(["scores", str(tmp_path / "run")]) == 0
    assert "(all 2):" in capsys.readouterr().out
    meta = tokens / "meta.json"
    kept = meta.read_text()
    try:  # other data in the same place, whose training samples lie alike
        meta.write_text(kept.replace('"seed": 0', '"seed": 1'))
        assert cli.main(["scores", str(tmp_path / "run")]) == 0
    finally:
        meta.write_text(kept)
    assert "validation sequences" not in capsys.readouterr().out


def test_overhead_is_recorded(tokens, tmp_path, capsys):
    assert train(tokens, tmp_path, "--measure_overhead 1") == 0
    measured = read_config(tmp_path / "run")["measured"]
    assert measured["overhead"] > -1 and measured["overhead_over_regular_n"] > -1
    assert cli.main(["scores", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "prose" in out and "100.0% of the trainable elements" in out


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
