"""The command `graddot`."""

import argparse
import errno
import os
import select
import sys
from importlib import import_module
from typing import NoReturn

from .errors import GraddotError, printable

# name -> module, its two functions, one line of help. Modules are imported only when used, so
# that `graddot --help` does not wait for torch.
COMMANDS = {
    "train-tokenizer": (
        "text.train_tokenizer",
        "add_bpe_arguments",
        "run_bpe",
        "train a byte-level BPE",
    ),
    "tokenize": (
        "text.tokenization",
        "add_arguments",
        "run",
        "turn text by domain into token files",
    ),
    "train": (
        "training.train_options",
        "add_arguments",
        "run",
        "train GPT-2, with a score for every sample",
    ),
    "scores": (
        "results.report",
        "add_arguments",
        "run",
        "show which data helped, from a run's folder",
    ),
    "doctor": ("doctor", "add_arguments", "run", "show what was built and what runs where"),
}


# What says of a write that there is no room for it, or no device under it.
NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
# What says of a path that people gave that there is no getting at it.
NOT_REACHED = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; 2 with a message for people if the input or environment is at fault."""
    try:
        return _main(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        print("graddot: interrupted", file=sys.stderr)
        return 128 + 2  # as a shell reports SIGINT


def _main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="graddot",
        description="Which training data helps and which hurts, while the model trains.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, add, run, text) in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        if argv[:1] == [name]:
            try:
                imported = import_module(f"graddot_lm.{module}")
            except ImportError as error:  # of what was not built, or is not there
                print(f"graddot {name}: {error}", file=sys.stderr)
                return 2
            getattr(imported, add)(sub)
            sub.set_defaults(function=getattr(imported, run))
    args = parser.parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):  # not every encoding has each name and text there is
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = args.function(args)
        sys.stdout.flush()
        return status
    except GraddotError as error:
        print(printable(f"graddot {args.command}: {error}"), file=sys.stderr)
        return 2
    except BrokenPipeError:
        output = select.poll()
        output.register(sys.stdout, 0)
        if not output.poll(0):  # an error in its place means that nobody reads
            raise
        # Whoever read the output has seen enough (`graddot scores … | head`).
        _discard_output()
        return 128 + 13  # as a shell reports SIGPIPE
    except OSError as error:
        if error.errno in NOT_REACHED and error.filename is not None:
            print(f"graddot {args.command}: {error.filename}: {error.strerror}", file=sys.stderr)
            return 2
        # Files are opened by name, and what goes wrong with those of ours is a GraddotError.
        if error.errno not in NOT_WRITTEN or error.filename is not None:
            raise
        print(
            f"graddot {args.command}: the output cannot be written: {error.strerror}",
            file=sys.stderr,
        )
        _discard_output()
        return 1


def _discard_output() -> None:
    """Have what is left of it go nowhere, or Python would complain of it as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_streams() -> None:
    """What is closed as we start (`>&-`) goes nowhere: Python has no stream for it then, and the
    next file opened would get its number, and with it what libraries print."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def run_program() -> NoReturn:
    """`main` as a program, which ends with it."""
    _open_streams()
    try:
        status = main()
    except SystemExit as end:  # argparse's, or that of a process whose first one says why
        status = 0 if end.code is None else int(end.code)
    if "RANK" in os.environ:
        # One of several processes, where gloo's threads may still hold tensors of what the last
        # collective gathered. They need the interpreter to let go of them, and the whole process is
        # aborted if there is none any more (torch 2.13), so we leave without taking it down.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    run_program()
