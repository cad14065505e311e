"""`graddot train` that ends before its last step, killed, stopped or failed, and goes on exactly;
what it does not go on with."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from graddot_lm import cli
from graddot_lm.store import read_scores
from graddot_lm.training.checkpoint import latest_checkpoint, load_checkpoint
from graddot_lm.training.settings import read_config, write_config
from graddot_lm.training.train import TrainingRun
from graddot_lm.training.trainer import Trainer
from train_runs import arguments, assert_same_run, poisoned, tokens, train

__all__ = ["tokens"]  # the fixture


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
    monkeypatch.setattr(TrainingRun, "_one_step", poisoned(TrainingRun._one_step))
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

    def with_nan(self, x, y):
        total, each = losses(self, x, y)
        return total, each * (float("nan") if self.step == step else 1)

    monkeypatch.setattr(Trainer, "_losses", with_nan)
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
