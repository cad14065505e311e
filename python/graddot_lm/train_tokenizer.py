"""`graddot train-tokenizer`: a byte-level BPE of one's own text."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from graddot_lm.errors import GraddotError
from graddot_lm.files import write_atomic, writing
from graddot_lm.load_tokenizer import END_OF_TEXT
from graddot_lm.text_source import (
    INPUT_HELP,
    TEXT_HELP,
    BadRecordError,
    Source,
    check_apart,
    find_sources,
    parse,
    read_chunks,
)


def train_bpe(
    paths: list[str], vocab_size: int, out_path: str | Path, text_column: str = "text"
) -> int:
    """Train a byte-level BPE on the text of JSON-lines files and write it as a tokenizer.json.

    Every byte is a token, and `<|endoftext|>` is id 0, so `vocab_size` must be at least 257.
    Returns the size reached: less than `vocab_size` where the text has too few different pairs.
    Raises GraddotError for input that `graddot tokenize` would refuse.
    """
    if vocab_size < 257:
        raise GraddotError(f"--vocab_size {vocab_size}: must be at least 257 (all bytes, and eot)")
    check_apart(paths, str(out_path))
    sources = find_sources(paths)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(_texts(sources, text_column), trainer)
    out = Path(out_path)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, tokenizer.to_str(pretty=True).encode())
    return tokenizer.get_vocab_size()


def _texts(sources: list[Source], text_column: str) -> Iterator[str]:
    for chunk in read_chunks(sources, 0, 0):
        for line, record in chunk.records:
            try:
                yield parse(record, text_column, "", "any")[0]
            except BadRecordError as bad:
                raise BadRecordError(f"{chunk.name}:{line}: {bad}") from bad


def add_bpe_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `graddot train-tokenizer`."""
    size_help = f"tokens of the vocabulary; at least 257: every byte and {END_OF_TEXT} are in it"
    add = parser.add_argument
    add("--input", help=INPUT_HELP, nargs="+", required=True, metavar="PATH")
    add("--output", help="the tokenizer.json to write", required=True, metavar="FILE")
    add("--vocab_size", help=size_help, type=int, required=True, metavar="N")
    add("--text_column", help=TEXT_HELP, default="text", metavar="KEY")


def run_bpe(args: argparse.Namespace) -> int:
    """`graddot train-tokenizer`: write `args.output`; returns the exit status 0."""
    size = train_bpe(args.input, args.vocab_size, args.output, args.text_column)
    print(f"{args.output}: {size:,} tokens")
    return 0
