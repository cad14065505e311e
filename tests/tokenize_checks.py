"""Shared by the tests of tokenizing: documents, token folders, and the command on them."""

import argparse
import gzip
import json
from pathlib import Path

import numpy as np
import zstandard
from graddot_lm.text import tokenization
from graddot_lm.text.train_tokenizer import train_bpe
from tokenizers import Tokenizer

DOMAINS = ["Pile-CC", "Wikipedia (en)", "GitHub"]


def document(n: int) -> dict:
    text = f"Document {n}. " + "some words, déjà vu, and more 漢字\n" * (n % 7)
    return {"text": text, "meta": {"pile_set_name": DOMAINS[n % 3]}}


def jsonl(numbers) -> bytes:
    return b"".join(json.dumps(document(n)).encode() + b"\n" for n in numbers)


GOOD = json.dumps(document(0)).encode()


def parse_options(add_arguments, **given) -> argparse.Namespace:
    """The command's options with `given` ones; True is a flag, a list several values."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = []
    for key, value in given.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{key}"] if value is True else [f"--{key}", *map(str, values)]
    return parser.parse_args(words)


def tokenize(source, out, bpe, **given) -> dict:
    given = {"input": source, "output": out, "tokenizer": bpe, "workers": 2, **given}
    assert tokenization.run(parse_options(tokenization.add_arguments, **given)) == 0
    return json.loads((Path(out) / "meta.json").read_text())


def content(out) -> dict[str, bytes]:
    """Everything in a folder but meta.json's source names."""
    return {str(p.relative_to(out)): p.read_bytes() for p in Path(out).rglob("*.bin")}


def documents_in(path: Path, bpe, dtype="<u2") -> list[str]:
    tokenizer = Tokenizer.from_file(str(bpe))
    tokens = np.fromfile(path, dtype)
    ends = np.flatnonzero(tokens == tokenizer.token_to_id("<|endoftext|>"))
    assert not len(tokens) or ends[-1] == len(tokens) - 1
    return [tokenizer.decode(part[:-1].tolist()) for part in np.split(tokens, ends + 1)[:-1]]


def small_bpe(folder: Path) -> Path:
    """A tokenizer.json of at most 400 tokens."""
    (folder / "text.jsonl").write_bytes(jsonl(range(60)))
    assert train_bpe([str(folder / "text.jsonl")], 400, folder / "tokenizer.json") <= 400
    return folder / "tokenizer.json"


def small_pile(folder: Path) -> Path:
    """Three files, one of each compression, holding documents 0 to 299 in sorted order."""
    (folder / "sub").mkdir(parents=True)
    (folder / "a.jsonl").write_bytes(jsonl(range(100)))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(range(100, 200))))
    (folder / "sub" / "c.jsonl.zst").write_bytes(zstandard.compress(jsonl(range(200, 300))))
    (folder / "README.md").write_text("not text to read")
    return folder
