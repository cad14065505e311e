"""`graddot train` in several processes: one run, whichever of them dies and however many resume."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from graddot_lm import cli
from graddot_lm.results.score_figures import summarize
from graddot_lm.store import open_rows, read_scores
from graddot_lm.training.checkpoint import latest_checkpoint, load_checkpoint
from graddot_lm.training.processes import Processes
from graddot_lm.training.run_directory import RunDirectory
from graddot_lm.training.settings import read_config
from graddot_lm.training.train import TrainingRun
from process_group import PROCESSES, on_processes
from torch.nn.parallel import DistributedDataParallel
from train_runs import FP64, arguments, assert_same_run, poisoned, tokens, train

__all__ = ["tokens"]  # the fixture

TIMEOUT = 150
STEPS = 20


def _become(rank, world, port, output, command, before):
    """What torchrun does for a process, without importing everything anew."""
    with open(output / f"{rank}.txt", "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # pytest's are not these two
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        GLOO_SOCKET_IFNAME="lo",
    )
    if before is not None:
        before(rank)
    status = cli.main(command)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def launch(world, output, command, before=None):
    """Exit codes and outputs of `graddot train` on `world` processes; `before(rank)` in each."""
    output.mkdir(exist_ok=True)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    processes = [
        PROCESSES.Process(target=_become, args=(r, world, port, output, command, before))
        for r in range(world)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + TIMEOUT
    try:
        # Only now: its thread looks up the name of whoever connects, and a process forked meanwhile may
        # find a lock of the C library's taken, which nobody there gives back.
        store = dist.TCPStore(
            "127.0.0.1", port, is_master=True, wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )  # fmt: skip
        for process in processes:
            process.join(max(0, deadline - time.monotonic()))
        codes = [process.exitcode for process in processes]
        assert None not in codes, f"a process hangs: {codes}"
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
    del store
    return codes, [(output / f"{r}.txt").read_text() for r in range(world)]


def dies(rank, name, count):
    """Kill process `rank` as it calls a function of `os` for the count-th time."""

    def before(own):
        function, calls = getattr(os, name), 0

        def counted(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        if own == rank:
            setattr(os, name, counted)

    return before


def whole_steps(run):
    """The number of steps that a reader sees, none of which may lack or repeat a row."""
    steps = read_scores(run, ["step"])["step"].to_pylist()
    assert steps == [step for step in range(len(steps) // 4) for _ in range(4)]
    return len(steps) // 4


def relative_error(one, other):
    """Largest difference of any column, relative to its largest entry; ids must be equal."""
    a, b = read_scores(one / "run"), read_scores(other / "run")
    for name in ("step", "sample_id", "domain", "offset", "n_tokens"):
        assert a[name].to_pylist() == b[name].to_pylist(), name
    columns = [(a[name].to_numpy(), b[name].to_numpy()) for name in ("loss", "dot", "lr", "value")]
    return max(float(abs(x - y).max() / abs(x).max()) for x, y in columns)


def test_torchrun_needs_no_further_flags(tokens, tmp_path, record_property):
    """The real launcher, once; its run is that of one process, but for rounding."""
    assert train(tokens, tmp_path / "one") == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*torchrun, "-m", "graddot_lm.cli", *arguments(tokens, tmp_path / "two")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("8 steps are in") == 1 and done.stderr.count("val loss") == 2
    assert read_config(tmp_path / "two" / "run")["processes"] == 2
    error = relative_error(tmp_path / "one", tmp_path / "two")
    record_property("relative_error", error)
    assert error <= 1e-5
    losses = [
        open_rows(tmp_path / name / "run", "metrics").to_table().to_pydict()
        for name in ("one", "two")
    ]
    for name in ("train_loss", "val_loss", "lr", "step"):
        one, two = (
            [number for number in columns[name] if number is not None] for columns in losses
        )
        assert two == pytest.approx(one, rel=1e-6), name
    one, two = (summarize(tmp_path / name / "run") for name in ("one", "two"))
    for a, b in zip(one["domains"], two["domains"], strict=True):
        assert b.pop("domain") == a.pop("domain")
        assert b == pytest.approx(a, rel=1e-4), "a sum of dots that may cancel"
    assert [s["sample_id"] for s in two["best"]] == [s["sample_id"] for s in one["best"]]


@pytest.mark.parametrize("status", [0, 2])
def test_one_of_several_processes_waits_for_no_thread_at_its_end(status):
    """As those of gloo, which cannot let go of tensors while the interpreter is taken down."""
    code = f"""
import threading, time
from graddot_lm import cli
cli.main = lambda: print("said") or {status}
threading.Thread(target=time.sleep, args=({TIMEOUT},)).start()
cli.run_program()
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "RANK": "0"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT / 2,
        check=False,
    )
    assert (done.returncode, done.stdout) == (status, "said\n"), done.stderr


def test_killed_runs_resume_on_another_number_of_processes(tokens, tmp_path, record_property):
    """2 → 1 → 2 → 4 → 2 processes, each but the last killed while something was being saved.

    The model is sharded in some of them and copied in the others.
    """
    extra = f"--max_steps {STEPS} {FP64}"
    assert train(tokens, tmp_path / "whole", extra) == 0
    command = arguments(tokens, tmp_path / "killed", f"{extra} --resume")
    run = tmp_path / "killed" / "run"
    # world, who dies, at which call: of os.replace, a part (or, first, config.json); of os.rename,
    # a checkpoint (Path.rename calls it)
    deaths = [(2, 1, "replace", 4), (1, 0, "replace", 8), (2, 0, "rename", 2), (4, 3, "replace", 3)]
    seen = []
    for number, (world, rank, name, count) in enumerate(deaths):
        parallel = ["--parallel", "fsdp" if number % 2 == 0 else "ddp"]
        before = dies(rank, name, count)
        codes, outputs = launch(world, tmp_path / str(number), command + parallel, before)
        assert codes[rank] == -signal.SIGKILL
        for other in set(range(world)) - {rank}:
            assert codes[other] == 2 and "another process of the run has ended" in outputs[other]
        seen.append(whole_steps(run))
    assert seen == sorted(seen) and seen[0] >= 2 and seen[-1] < STEPS, seen
    codes, outputs = launch(2, tmp_path / "last", [*command, "--parallel", "fsdp"])
    assert codes == [0, 0], outputs
    error = relative_error(tmp_path / "whole", tmp_path / "killed")
    record_property("relative_error", error)
    assert error <= 1e-7  # the loss column is fp32
    states = [load_checkpoint(latest_checkpoint(p / "run")).state for p in tmp_path.glob("*ed")]
    whole = load_checkpoint(latest_checkpoint(tmp_path / "whole" / "run")).state
    for state in states:
        for name, tensor in whole["model"].items():
            assert (tensor - state["model"][name]).norm() <= 1e-9 * tensor.norm(), name


def test_dropout_resumes_bit_exactly_and_signals_stop_all(tokens, tmp_path):
    """A signal that one process gets stops both after the same step; then as if it had not."""
    extra = "--dropout 0.1 --resume"
    codes, outputs = launch(2, tmp_path / "a", arguments(tokens, tmp_path / "whole", extra))
    assert codes == [0, 0], outputs

    def before(rank):
        one_step = TrainingRun._one_step

        def interrupted(self):
            if rank == 1 and self.trainer.step == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return one_step(self)

        TrainingRun._one_step = interrupted

    command = arguments(tokens, tmp_path / "stopped", extra)
    codes, outputs = launch(2, tmp_path / "b", command, before)
    assert codes == [2, 2] and "stopped by SIGTERM after step 4" in outputs[0]
    assert "Traceback" not in "".join(outputs)
    codes, outputs = launch(2, tmp_path / "c", command)
    assert codes == [0, 0], outputs
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_three_processes_resume_bit_exactly(tokens, tmp_path, parallel):
    """Whose sums are rounded by the order in which they are added up."""
    extra = f"--batch_size 6 --parallel {parallel} --resume"
    codes, outputs = launch(3, tmp_path / "a", arguments(tokens, tmp_path / "whole", extra))
    assert codes == [0, 0, 0], outputs
    command = arguments(tokens, tmp_path / "killed", extra)
    codes, outputs = launch(3, tmp_path / "b", command, dies(0, "rename", 2))
    assert codes[0] == -signal.SIGKILL
    codes, outputs = launch(3, tmp_path / "c", command)
    assert codes == [0, 0, 0], outputs
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_regular_moves_the_weights_alike(tokens, tmp_path, record_property):
    assert train(tokens, tmp_path / "scored", f"{FP64} --max_steps 4") == 0
    command = arguments(
        tokens, tmp_path / "regular", f"{FP64} --max_steps 4 --method Regular --parallel fsdp"
    )
    codes, outputs = launch(2, tmp_path / "output", command)
    assert codes == [0, 0], outputs
    scored, regular = (
        load_checkpoint(latest_checkpoint(tmp_path / name / "run")).state["model"]
        for name in ("scored", "regular")
    )
    error = max(((t - regular[n]).norm() / t.norm()).item() for n, t in scored.items())
    record_property("relative_error", error)
    assert error <= 1e-9


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_accumulation_is_that_of_one_batch(tokens, tmp_path, record_property, parallel):
    """On two processes, beside one that runs the batch as a whole."""
    assert train(tokens, tmp_path / "whole", FP64) == 0
    extra = f"{FP64} --gradient_accumulation_steps 2 --parallel {parallel}"
    codes, outputs = launch(2, tmp_path / "o", arguments(tokens, tmp_path / "parts", extra))
    assert codes == [0, 0], outputs
    whole, parts = (
        load_checkpoint(latest_checkpoint(tmp_path / name / "run")).state["model"]
        for name in ("whole", "parts")
    )
    for name, tensor in whole.items():
        assert (tensor - parts[name]).norm() <= 1e-9 * tensor.norm(), name
    key = [("step", "ascending"), ("sample_id", "ascending")]
    one, other = (read_scores(tmp_path / n / "run").sort_by(key) for n in ("whole", "parts"))
    for name in ("dot", "value"):
        a, b = one[name].to_numpy(), other[name].to_numpy()
        error = float(abs(a - b).max() / abs(a).max())
        record_property("relative_error", error)
        assert error <= 1e-9, name


def test_overhead_is_recorded_once(tokens, tmp_path):
    command = arguments(tokens, tmp_path, "--max_steps 2 --measure_overhead 1")
    codes, outputs = launch(2, tmp_path / "output", command)
    assert codes == [0, 0], outputs
    assert read_config(tmp_path / "run")["measured"]["overhead"] > -1


def test_evaluation_is_that_of_one_process(tokens, tmp_path, capsys):
    extra = "--resume --eval_iter 3"  # which two processes cannot share evenly
    assert train(tokens, tmp_path) == 0
    capsys.readouterr()
    assert train(tokens, tmp_path, f"{extra} --eval_only") == 0
    alone = capsys.readouterr().out
    command = arguments(tokens, tmp_path, f"{extra} --eval_only --parallel fsdp")
    codes, outputs = launch(2, tmp_path / "output", command)
    assert codes == [0, 0] and outputs == [alone, ""] and "after 8 steps" in alone


def broken_flush(rank):
    """Process 1 cannot write its second part."""
    replace, calls = os.replace, []

    def full(*args):
        calls.append(args)
        if rank == 1 and len(calls) == 2:
            raise OSError(28, "No space left on device", str(args[1]))
        return replace(*args)

    os.replace = full


def broken_step(rank):
    """Process 1 finds damaged data at step 2."""
    one_step = TrainingRun._one_step

    def damaged(self):
        if rank == 1 and self.trainer.step == 2:
            self.trainer.data.get([10**9])
        return one_step(self)

    TrainingRun._one_step = damaged


def nan_step(rank):
    """The weights of all processes become NaN before step 5."""
    TrainingRun._one_step = poisoned(TrainingRun._one_step)


FAILURES = [
    ("", broken_flush, 0, "process 1: ", "No space left"),
    ("--checkpoint_interval 8", broken_flush, 0, "process 1: ", "No space left"),
    ("", broken_step, 1, "process 1 of 2: sample_id 1000000000", "the train split has ids"),
    ("", nan_step, 0, "graddot train: the training loss is nan at step 5", "Scores up to step 4"),
    ("--gradient_accumulation_steps 2", nan_step, 0, "the validation gradient of", "up to step 4"),
    ("--batch_size 5", None, 0, "--batch_size is 5; it must be a multiple of 2", "processes 2 x"),
    ("--val_set poems", None, 0, "poems", "unknown"),
]


@pytest.mark.parametrize(
    "extra, before, where, text, more",
    FAILURES,
    ids=["save", "flush", "data", "nan", "nan-direction", "batch", "option"],
)
def test_an_error_on_one_process_ends_all(tokens, tmp_path, extra, before, where, text, more):
    command = arguments(tokens, tmp_path / "results", extra)
    codes, outputs = launch(2, tmp_path / "output", command, before)
    begins = before is not None
    assert codes == [2, 2], outputs
    assert text in outputs[where] and more in outputs[where], outputs
    other = outputs[1 - where]
    assert "Traceback" not in "".join(outputs)
    assert other == "" if where == 0 else "another process of the run has ended" in other
    assert (tmp_path / "results").exists() == begins, "only a run that began is written"
    if begins:
        whole_steps(tmp_path / "results" / "run")


def test_a_run_is_not_resumed_while_a_process_of_it_lives(tokens, tmp_path, capsys):
    """Process 1 of an earlier start, stalled, would write a part that is no longer due."""
    assert train(tokens, tmp_path) == 0
    held = PROCESSES.Event(), PROCESSES.Event()

    def linger():
        RunDirectory.join(tmp_path / "run", rank=1, world=2)
        held[0].set()
        held[1].wait(TIMEOUT)

    process = PROCESSES.Process(target=linger)
    process.start()
    assert held[0].wait(TIMEOUT)
    assert train(tokens, tmp_path, "--resume") == 2
    assert "another process is writing this run" in capsys.readouterr().err
    held[1].set()
    process.join(TIMEOUT)
    assert train(tokens, tmp_path, "--resume") == 0


def test_no_thread_begins_before_the_last_fork(tokens, tmp_path, monkeypatch):
    """Of the tests' own way to start processes: see `launch`."""
    fork, threads = os.fork, []

    def counted():
        threads.append(len(os.listdir("/proc/self/task")))
        return fork()

    monkeypatch.setattr(os, "fork", counted)
    before = len(os.listdir("/proc/self/task"))
    codes, outputs = launch(2, tmp_path / "output", arguments(tokens, tmp_path, "--val_set poems"))
    assert codes == [2, 2], outputs
    assert len(threads) == 2 and max(threads) <= before


def _end_runs(rank, world, folder):
    """What a run does to its group, over and over: gather, end, then free the model."""
    dist.barrier()  # the other one may still be connecting
    dist.destroy_process_group()
    for number in range(30):
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/{number}", rank=rank, world_size=world
        )
        processes = Processes(rank, world, torch.device("cpu"))
        model = DistributedDataParallel(torch.nn.Linear(3, 3))
        processes.together(dist.get_rank)
        processes.end()
        del model
    return rank


def test_a_model_is_freed_after_its_processes(tmp_path):
    """It was the last to hold the group, which joined gloo's threads while they needed Python."""
    assert on_processes(2, tmp_path / "results", _end_runs, tmp_path) == [0, 1]
