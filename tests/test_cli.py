"""The command `graddot` itself: help, where its output goes, messages for people, scripts."""

import errno
import os
import subprocess
import sys
from math import nan
from pathlib import Path

import pytest
from graddot_lm import cli
from graddot_lm.results import report
from graddot_lm.store import PartWriter, scores_schema

ROOT = Path(__file__).parent.parent


def test_help_explains_every_option(capsys):
    for command in cli.COMMANDS:
        with pytest.raises(SystemExit) as end:
            cli.main([command, "--help"])
        assert end.value.code == 0
        for line in capsys.readouterr().out.splitlines():
            assert not line.startswith("  --") or len(line.split()) > 1, f"{command}: {line}"


def test_the_command_begins_without_torch():
    code = "import sys, graddot_lm.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "words",
    [
        ["train-tokenizer", "--help"],
        ["tokenize", "--help"],
        ["scores", "--help"],
        ["train", "--help"],
        ["train", "--batch_size", "0"],
    ],
    ids=" ".join,
)
def test_what_computes_nothing_does_without_torch(words):
    code = f"""
import sys
from graddot_lm import cli
try:
    cli.main({words!r})
finally:
    sys.exit("torch" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_output_that_nobody_reads_to_the_end_is_no_error(unbuffered):
    command = f"{sys.executable} -m graddot_lm.cli doctor | head -c 0; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(
        ["bash", "-c", command], check=False, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_output_that_there_is_no_room_for_is_one_line(unbuffered):
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "graddot_lm.cli", "doctor"],
            check=False,
            env=environment,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    message = "graddot doctor: the output cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, message)


@pytest.mark.parametrize(
    ("command", "status"),
    [("doctor >&-", 0), ("doctor >&- 2>&- <&-", 0), ("scores nowhere 2>&-", 2)],
)
def test_what_goes_to_a_closed_stream_goes_nowhere(command, status):
    words = f"{sys.executable} -m graddot_lm.cli {command}"
    done = subprocess.run(["bash", "-c", words], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")


@pytest.mark.parametrize("command", ["scores", "tokenize", "train"])
@pytest.mark.parametrize("fault", ["long", "forbidden"])
def test_a_path_that_there_is_no_getting_at_is_one_line(
    capsys, monkeypatch, tmp_path, command, fault
):
    place = str(tmp_path / ("a" * 300 if fault == "long" else "shut"))
    if fault == "forbidden":  # root, which tests may run as, is let in everywhere
        stat = os.stat

        def refuse(path, **how):
            if str(path).startswith(place):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return stat(path, **how)

        monkeypatch.setattr(os, "stat", refuse)
    words = {
        "scores": [place],
        "tokenize": ["--input", place, "--output", str(tmp_path / "out")],
        "train": ["--pile_data_dir", place],
    }[command]
    assert cli.main([command, *words]) == 2
    cause = "File name too long" if fault == "long" else "Permission denied"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"graddot {command}: {place}") and line.endswith(f": {cause}")


def test_text_that_the_terminal_cannot_show_is_no_error(tmp_path):
    writer = PartWriter(tmp_path / "scores", scores_schema())
    writer.append({"sample_id": [1], "domain": ["漢"], "dot": [1.0], "value": [1.0]}, 0)
    writer.flush()
    done = subprocess.run(
        [sys.executable, "-m", "graddot_lm.cli", "scores", str(tmp_path)],
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "") and r"\u6f22" in done.stdout


def test_names_do_not_write_to_the_terminal(tmp_path, capsys):
    names = ["\x1b[31mlaw", "co\rde"]
    columns = {f"{measure}_{name}": [1.0, nan] for name in names for measure in ("dot", "value")}
    writer = PartWriter(tmp_path / "run\x07" / "scores", scores_schema(names))
    writer.append({"sample_id": [1, 2], "domain": ["\x1b[2J"] * 2, **columns}, 0)
    writer.flush()
    run = str(tmp_path / "run\x07")
    for options in ([], ["--target", names[0]], ["--target", names[1]], ["--target", "art"]):
        assert cli.main(["scores", run, *options]) == 2 * (options[1:] == ["art"])
        shown = "".join(capsys.readouterr())
        assert shown and all(char.isprintable() or char == "\n" for char in shown)
        assert r"\x1b[31mlaw" in shown or options[1:] == names[1:]


@pytest.mark.parametrize("where", ["import_module", "report.run"])
def test_ctrl_c_is_one_line(monkeypatch, capsys, where):
    def interrupted(*args):
        raise KeyboardInterrupt

    owner, name = (report, "run") if where == "report.run" else (cli, where)
    monkeypatch.setattr(owner, name, interrupted)
    assert cli.main(["scores", "run"]) == 130
    assert capsys.readouterr().err == "graddot: interrupted\n"


@pytest.mark.parametrize(
    "command",
    [["bash", "python/train.sh", "--help"], [sys.executable, "python/examples/ghost_mlp.py"]],
)
def test_scripts_run(command):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        command,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "--dot_prod_save_interval" in done.stdout or "step 9: scores" in done.stdout
