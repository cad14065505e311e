"""Collect a small corpus of real text from the machine itself, for a demonstration without network.

Four domains, one JSON-lines file each, in the Pile's format: Python's own sources, its
documentation, the licences of what is installed, and generated arithmetic in the manner of
DeepMind Mathematics. The same machine and seed give the same files.
"""

import argparse
import json
import os
import pydoc_data.topics
import random
import sysconfig
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from graddot_lm.errors import GraddotError

DOCUMENT_CHARACTERS = 4000
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
LICENCE_NAMES = ("LICENSE", "LICENCE", "COPYING", "NOTICE")
COMMON_LICENCES = Path("/usr/share/common-licenses")


def python_source() -> Iterator[str]:
    """The standard library's modules, without their tests."""
    for folder, subfolders, files in os.walk(sysconfig.get_path("stdlib")):
        subfolders[:] = sorted(set(subfolders) - SKIPPED_FOLDERS)  # os.walk goes into what is left
        for name in sorted(files):
            if name.endswith(".py"):
                yield _read(Path(folder, name))


def python_docs() -> Iterator[str]:
    """The language reference's chapters that `help()` shows."""
    topics = pydoc_data.topics.topics
    yield from (topics[name] for name in sorted(topics))


def licences() -> Iterator[str]:
    """Licence texts of installed packages and of the system, each different text once."""
    paths = {
        Path(str(file.locate()))
        for package in metadata.distributions()
        for file in package.files or ()
        if file.name.upper().startswith(LICENCE_NAMES) and file.suffix not in (".py", ".pyc")
    }
    if COMMON_LICENCES.is_dir():
        paths.update(path for path in COMMON_LICENCES.iterdir() if not path.is_symlink())
    seen = set()
    for path in sorted(paths):
        text = _read(path)
        if text not in seen:
            seen.add(text)
            yield text


def _read(path: Path) -> str:
    """The text of a file; empty where there is none to be had, for a corpus can do without."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def arithmetic(seed: int) -> Iterator[str]:
    """Endless exercises with their answers, one kind a document."""
    rng = random.Random(seed)
    kinds = (_sum, _product, _division, _linear, _remainder, _divisor, _sequence)
    while True:
        kind = rng.choice(kinds)
        yield "".join("{}\n{}\n".format(*kind(rng)) for _ in range(60))


def _sum(rng: random.Random) -> tuple[str, str]:
    a, b, c = (rng.randint(-999, 999) for _ in range(3))
    return f"Calculate {a} + ({b}) - ({c}).", str(a + b - c)


def _product(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(-99, 99), rng.randint(2, 999)
    return f"Multiply {a} and {b}.", str(a * b)


def _division(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(-99, 99), rng.randint(2, 99)
    return f"Divide {a * b} by {b}.", str(a)


def _linear(rng: random.Random) -> tuple[str, str]:
    name, x = rng.choice("abcdfghjkmnpqrstuvwxyz"), rng.randint(-30, 30)
    a, b = rng.randint(2, 20), rng.randint(1, 200)
    return f"Solve {a}*{name} + {b} = {a * x + b} for {name}.", str(x)


def _remainder(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(10, 9999), rng.randint(2, 99)
    return f"What is the remainder when {a} is divided by {b}?", str(a % b)


def _divisor(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(2, 9999), rng.randint(2, 20)
    return f"Is {a} a multiple of {b}?", str(a % b == 0)


def _sequence(rng: random.Random) -> tuple[str, str]:
    start, step = rng.randint(-50, 50), rng.randint(-20, 20)
    terms = [start + step * n for n in range(5)]
    return f"What is next in {', '.join(map(str, terms[:4]))}?", str(terms[4])


def split_text(text: str, size: int = DOCUMENT_CHARACTERS) -> Iterator[str]:
    """Cut a text at blank lines into documents of about `size` characters, losing only the cuts.

    A paragraph is never cut, so one longer than `size` makes a document of its own length.
    """
    held: list[str] = []
    length = 0
    for paragraph in text.split("\n\n"):
        if held and length + len(paragraph) > size:
            yield "\n\n".join(held)
            held, length = [], 0
        held.append(paragraph)
        length += len(paragraph) + 2
    yield "\n\n".join(held)


def collect(out_dir: str | Path, max_mb_per_domain: float = 8.0, seed: int = 0) -> dict:
    """Write `<out_dir>/<domain>.jsonl` for every domain.

    Each file ends with the document that reaches `max_mb_per_domain` million bytes of text (UTF-8),
    or earlier where the machine has no more. Returns, by domain, `file`, `documents` and `bytes`.
    Raises GraddotError if a domain would be empty or `out_dir` cannot be written.
    """
    if not max_mb_per_domain > 0:
        raise GraddotError(f"max_mb_per_domain {max_mb_per_domain}: must be above 0")
    domains: dict[str, Callable[[], Iterator[str]]] = {
        "Python source": python_source,
        "Python docs": python_docs,
        "Licences": licences,
        "Arithmetic": lambda: arithmetic(seed),
    }
    written = {}
    for name, texts in domains.items():
        path = Path(out_dir) / f"{name.lower().replace(' ', '-')}.jsonl"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            documents, size = _write_domain(path, name, texts(), max_mb_per_domain * 1e6)
        except OSError as error:
            raise GraddotError(f"{path}: cannot be written: {error.strerror}") from error
        if not documents:
            raise GraddotError(f"domain {name!r}: no text found on this machine")
        written[name] = {"file": str(path), "documents": documents, "bytes": size}
    return written


def _write_domain(path: Path, name: str, texts: Iterator[str], limit: float) -> tuple[int, int]:
    documents = size = 0
    with open(path, "w", encoding="utf-8") as file:
        for text in texts:
            for part in split_text(text):
                if not part.strip():
                    continue
                if size >= limit:
                    return documents, size
                file.write(json.dumps({"text": part, "meta": {"pile_set_name": name}}) + "\n")
                documents += 1
                size += len(part.encode())
    return documents, size


def main(argv: list[str] | None = None) -> int:
    """`python -m graddot_lm.text.demo_corpus --output DIR`"""
    parser = argparse.ArgumentParser(prog="graddot_lm.text.demo_corpus", description=__doc__)
    add = parser.add_argument
    add("--output", required=True, metavar="DIR", help="folder for the JSON-lines files")
    add("--seed", type=int, default=0, help="of the arithmetic (default: %(default)s)")
    size_help = "stop a domain at this many million bytes of text (default: %(default)s)"
    add("--max_mb_per_domain", type=float, default=8.0, metavar="MB", help=size_help)
    args = parser.parse_args(argv)
    try:
        written = collect(args.output, args.max_mb_per_domain, args.seed)
    except GraddotError as error:
        parser.exit(2, f"{error}\n")
    for name, entry in written.items():
        size = f"{entry['bytes'] / 1e6:.2f} MB"
        print(f"{name}: {entry['documents']} documents, {size}, {entry['file']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
