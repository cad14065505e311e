"""`graddot train-tokenizer`: a byte-level BPE of one's own text."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from graddot_lm.errors import GraddotError
from graddot_lm.files import reached, write_atomic, writing
from graddot_lm.text.load_tokenizer import END_OF_TEXT
from graddot_lm.text.text_source import (
    INPUT_HELP,
    SKIP_HELP,
    TEXT_HELP,
    BadRecordError,
    Source,
    check_apart,
    count_skipped,
    find_sources,
    nothing_skipped,
    parse,
    read_chunks,
    with_skipped,
)

MOST = 10_000_000  # tokens of a vocabulary, for which memory is taken at once


def train_bpe(
    paths: list[str],
    vocab_size: int,
    out_path: str | Path,
    text_column: str = "text",
    skipped: dict | None = None,
) -> int:
    """Train a byte-level BPE on the text of JSON-lines files and write it as a tokenizer.json.

    Every byte is a token, and `<|endoftext|>` is id 0, so `vocab_size` must be at least 257.
    Returns the size reached: less than `vocab_size` where the text has too few different pairs.
    Raises GraddotError for input that `graddot tokenize` would refuse; with `skipped`, malformed
    documents are counted there instead (`count_skipped`).
    """
    if vocab_size < 257:
        raise GraddotError(f"--vocab_size {vocab_size}: must be at least 257 (all bytes, and eot)")
    if vocab_size > MOST:
        raise GraddotError(f"--vocab_size {vocab_size}: must be at most {MOST:,}")
    out = reached(Path(out_path))
    if out.is_dir():
        raise GraddotError(f"--output {out}: is a folder; name a file, as {out / 'tokenizer.json'}")
    if out.exists() and not out.is_file():  # as /dev/null, which a file would replace
        raise GraddotError(f"--output {out}: is no file that can be replaced; name another")
    check_apart(paths, str(out))
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
    tokenizer.train_from_iterator(_texts(sources, text_column, skipped), trainer)
    out = out.resolve()  # not a link, as /dev/stdout, but what it leads to is replaced
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, tokenizer.to_str(pretty=True).encode())
    return tokenizer.get_vocab_size()


def _texts(sources: list[Source], text_column: str, skipped: dict | None) -> Iterator[str]:
    none = True
    for chunk in read_chunks(sources, 0, 0):
        for line, record in chunk.records:
            try:
                text, _ = parse(record, text_column, "", "any")
            except BadRecordError as bad:
                if skipped is None:
                    raise BadRecordError(f"{chunk.name}:{line}: {bad}") from bad
                count_skipped(skipped, chunk.name, line, bad)
                continue
            none = False
            yield text
    if none:
        names = ", ".join(source.name for source in sources)
        raise GraddotError(with_skipped(f"no document in {names}", skipped or nothing_skipped()))


def add_bpe_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `graddot train-tokenizer`."""
    size_help = f"tokens of the vocabulary; at least 257: every byte and {END_OF_TEXT} are in it"
    add = parser.add_argument
    add("--input", help=INPUT_HELP, nargs="+", required=True, metavar="PATH")
    add("--output", help="the tokenizer.json to write", required=True, metavar="FILE")
    add("--vocab_size", help=size_help, type=int, required=True, metavar="N")
    add("--text_column", help=TEXT_HELP, default="text", metavar="KEY")
    add("--skip_bad_lines", help=SKIP_HELP, action="store_true")


def run_bpe(args: argparse.Namespace) -> int:
    """`graddot train-tokenizer`: write `args.output`; returns the exit status 0."""
    skipped = nothing_skipped()
    counted = skipped if args.skip_bad_lines else None
    size = train_bpe(args.input, args.vocab_size, args.output, args.text_column, counted)
    closing = f"{args.output}: {size:,} tokens"
    if size < args.vocab_size:
        closing += f" of the {args.vocab_size:,} asked for: the text has nothing left to merge"
    print(with_skipped(closing, skipped))
    return 0
