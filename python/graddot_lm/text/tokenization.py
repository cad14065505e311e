"""`graddot tokenize`: turn text into flat token files, one per domain and split.

One process reads lines (text_source) and writes tokens (token_writer); worker processes parse and
encode chunks of lines. Their results are taken in the order of the input, so the files do not
depend on the number of workers, nor on whether a run was interrupted.
"""

import argparse
import hashlib
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from graddot_lm.errors import GraddotError
from graddot_lm.results.excerpts import escape
from graddot_lm.text.load_tokenizer import (
    END_OF_TEXT,
    end_of_text_id,
    load_tokenizer,
    tokenizer_sha256,
)
from graddot_lm.text.text_source import (
    INPUT_HELP,
    SKIP_HELP,
    TEXT_HELP,
    BadRecordError,
    Chunk,
    Source,
    check_apart,
    count_skipped,
    find_sources,
    parse,
    read_chunks,
    with_skipped,
)
from graddot_lm.text.token_writer import FORMAT_VERSION, SPLITS, TokenWriter
from graddot_lm.training.progress import Bar

# Encoding, in the worker processes


class Document(NamedTuple):
    """What became of one record: `length` tokens of a domain and split, or a problem."""

    line: int
    domain: str = ""
    split: str = ""
    length: int = 0
    problem: BadRecordError | None = None


@dataclass(frozen=True)
class Encoder:
    """What a worker needs to turn records into tokens."""

    tokenizer: Tokenizer
    eot_token_id: int
    dtype: str
    text_column: str
    domain_column: str
    default_domain: str | None
    seed: int
    val_fraction: float

    def split(self, source: int, line: int) -> str:
        key = f"{self.seed}:{source}:{line}".encode()
        draw = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") / 2**64
        return "val" if draw < self.val_fraction else "train"

    def encode(self, chunk: Chunk) -> tuple[list[Document], np.ndarray]:
        """Documents (and bad records) of a chunk in order, and their tokens end to end."""
        documents, texts = [], []
        for line, record in chunk.records:
            try:
                text, domain = parse(
                    record, self.text_column, self.domain_column, self.default_domain
                )
                documents.append(Document(line, domain, self.split(chunk.source, line)))
                texts.append(text)
            except BadRecordError as bad:
                documents.append(Document(line, problem=bad))
        try:
            encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # the Rust library raises bare Exception
            lines = f"lines {documents[0].line} to {documents[-1].line}"
            raise GraddotError(
                f"{chunk.name}: the tokenizer cannot encode all of {lines}: {error}; choose another"
                " --tokenizer, whose tokens every text can be made of"
            ) from error
        pieces = iter([[*encoding.ids, self.eot_token_id] for encoding in encodings])
        tokens: list[int] = []
        for index, document in enumerate(documents):
            if document.problem is None:
                piece = next(pieces)
                tokens += piece
                documents[index] = document._replace(length=len(piece))
        return documents, np.array(tokens, dtype=self.dtype)


_encoder: Encoder | None = None  # one a worker process, set when it starts


def _start_worker(tokenizer_json: str, settings: dict) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.encode_special_tokens = True  # text that spells a special token stays text
    _encoder = Encoder(tokenizer, **settings)


def _die_with_parent() -> None:
    """A worker waits for work for ever, also after the main process was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(chunk: Chunk) -> tuple[list[Document], np.ndarray]:
    assert _encoder is not None
    return _encoder.encode(chunk)


def _encoded(
    pool: ProcessPoolExecutor, chunks: Iterator[Chunk], window: int
) -> Iterator[tuple[Chunk, list[Document], np.ndarray]]:
    """Encode chunks in the pool, yield them in order; at most `window` are in memory."""
    pending: deque[tuple[Chunk, Future]] = deque()
    more = True
    while more or pending:
        while more and len(pending) < window:
            chunk = next(chunks, None)
            more = chunk is not None
            if chunk is not None:
                pending.append((chunk, pool.submit(_encode, chunk)))
        if pending:
            chunk, future = pending.popleft()
            yield chunk, *future.result()


# Command line

CPUS = os.cpu_count() or 1

OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "--input": (INPUT_HELP, {"nargs": "+", "required": True, "metavar": "PATH"}),
    "--output": (
        "folder for the token files; repeat the command to go on after an interruption",
        {"required": True, "metavar": "DIR"},
    ),
    "--tokenizer": (
        "a local tokenizer.json, a folder with one, or a name on the hub (default: %(default)s)",
        {"default": "gpt2", "metavar": "NAME"},
    ),
    "--eot_token": (
        f"token that closes every document (default: {END_OF_TEXT}, else the tokenizer's eos)",
        {"metavar": "TOKEN"},
    ),
    "--text_column": (TEXT_HELP, {"default": "text", "metavar": "KEY"}),
    "--domain_column": (
        "key of a document's domain, dots likewise (default: %(default)s)",
        {"default": "meta.pile_set_name", "metavar": "KEY"},
    ),
    "--default_domain": (
        "domain of documents that name none (default: such a document is malformed)",
        {"metavar": "NAME"},
    ),
    "--dataset_split": (
        "split to read of a hub dataset (default: %(default)s)",
        {"default": "train", "metavar": "NAME"},
    ),
    "--val_fraction": (
        "share of the documents that goes to the val split (default: %(default)s)",
        {"type": float, "default": 0.01, "metavar": "F"},
    ),
    "--seed": (
        "decides which documents those are (default: %(default)s)",
        {"type": int, "default": 0},
    ),
    "--max_tokens": (
        "stop at exactly this many tokens, cutting the last document short (default: read all)",
        {"type": int, "metavar": "N"},
    ),
    "--workers": (
        "processes that encode; the result does not depend on it (default and most: %(default)s, CPUs)",
        {"type": int, "default": CPUS, "metavar": "N"},
    ),
    "--skip_bad_lines": (SKIP_HELP, {"action": "store_true"}),
    "--overwrite": (
        "start anew in a folder that holds finished or unfinished token data",
        {"action": "store_true"},
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `graddot tokenize`."""
    for flag, (text, keywords) in OPTIONS.items():
        parser.add_argument(flag, help=text, **keywords)


def _check(args: argparse.Namespace) -> None:
    if not 0 <= args.val_fraction < 1:
        raise GraddotError(f"--val_fraction {args.val_fraction}: must be at least 0 and below 1")
    if args.max_tokens is not None and args.max_tokens < 1:
        raise GraddotError(f"--max_tokens {args.max_tokens}: must be at least 1")
    if args.workers < 1:
        raise GraddotError(f"--workers {args.workers}: must be at least 1")
    if args.default_domain == "":
        raise GraddotError("--default_domain is empty; it must be a name")


def run(args: argparse.Namespace) -> int:
    """`graddot tokenize`: write or go on writing `args.output`; returns the exit status 0.

    Ctrl-C ends the process with status 130, as a shell reports SIGINT.
    """
    writer = None
    try:
        _check(args)
        check_apart(args.input, args.output)
        sources = find_sources(args.input, args.dataset_split)
        tokenizer = load_tokenizer(args.tokenizer)
        settings, rules = _settings(args, sources, tokenizer)
        writer = TokenWriter(Path(args.output), settings, args.overwrite)
        _tokenize_in_processes(writer, sources, tokenizer, rules, args)
        writer.finish(tokenizer)
        _report(writer, args.output)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # another one could only disturb the exit
        message = "graddot tokenize: interrupted"
        if writer and not writer.finished:
            command = "the same command" + " without --overwrite" * args.overwrite
            message += f"; {command} goes on where it was"
        print(message, file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    finally:
        if writer:
            writer.close()
    return 0


def _settings(
    args: argparse.Namespace, sources: list[Source], tokenizer: Tokenizer
) -> tuple[dict, dict]:
    """All that decides the content of the token files, and the part that an Encoder needs."""
    vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    rules = {
        "eot_token_id": end_of_text_id(tokenizer, args.tokenizer, args.eot_token),
        "dtype": "uint16" if vocab_size <= 65536 else "uint32",
    }
    for key in ("text_column", "domain_column", "default_domain", "seed", "val_fraction"):
        rules[key] = getattr(args, key)
    settings = {
        "format_version": FORMAT_VERSION,
        "vocab_size": vocab_size,
        "tokenizer": {"name": args.tokenizer, "sha256": tokenizer_sha256(tokenizer)},
        "sources": [source._asdict() for source in sources],
        "max_tokens": args.max_tokens,
        **rules,
    }
    return settings, rules


def _tokenize_in_processes(
    writer: TokenWriter,
    sources: list[Source],
    tokenizer: Tokenizer,
    rules: dict,
    args: argparse.Namespace,
) -> None:
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    workers = min(args.workers, CPUS)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (tokenizer.to_str(), rules))
    try:
        _tokenize(pool, 3 * workers, writer, sources, args)
    except BrokenProcessPool as error:
        raise GraddotError(
            "a worker process was killed (out of memory?); run the same command again to go on, "
            "with fewer --workers if memory was short"
        ) from error
    finally:
        with _interrupts_held():
            pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C waits till the end, for a pool half started or half shut down keeps its processes."""
    if threading.current_thread() is not threading.main_thread():  # which alone is interrupted
        yield
        return
    held: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held:
            signal.raise_signal(signal.SIGINT)


def _tokenize(
    pool: ProcessPoolExecutor,
    window: int,
    writer: TokenWriter,
    sources: list[Source],
    args: argparse.Namespace,
) -> None:
    """Read on from the recorded position to the end of the input or `args.max_tokens`."""
    sizes = [source.bytes for source in sources]
    input_bytes = 0 if None in sizes else sum(size or 0 for size in sizes)
    limit = args.max_tokens or sys.maxsize
    source, line, total = writer.state["source"], writer.state["line"], writer.tokens
    # Workers are forked here, before anything below starts a thread.
    with _interrupts_held():
        forked = pool.submit(os.getpid)
    forked.result()
    chunks = read_chunks(sources, source, line) if total < limit else iter(())
    with Bar(initial=total, unit="tok", unit_scale=True, disable=None) as bar:
        for chunk, documents, tokens in _encoded(pool, chunks, window):
            source, line = chunk.source, chunk.line
            total += _store(writer, chunk, documents, tokens, limit - total, args)
            bar.total = args.max_tokens
            if input_bytes and chunk.bytes_done:  # tokens to come, from the share of bytes read
                bar.total = min(limit, total * input_bytes // chunk.bytes_done)
            bar.update(total - bar.n)
            if total >= limit:
                break
            if writer.due:
                writer.commit(source, line)
    writer.commit(source, line)
    if not total:
        raise GraddotError(with_skipped(f"no document in {', '.join(args.input)}", writer.state))


def _store(
    writer: TokenWriter,
    chunk: Chunk,
    documents: list[Document],
    tokens: np.ndarray,
    room: int,
    args: argparse.Namespace,
) -> int:
    """Add a chunk's documents up to `room` tokens; returns how many tokens were added."""
    used = 0
    for document in documents:
        if document.problem is not None:
            if not args.skip_bad_lines:
                raise BadRecordError(f"{chunk.name}:{document.line}: {document.problem}")
            count_skipped(writer.state, chunk.name, document.line, document.problem)
            continue
        piece = tokens[used : used + document.length]
        if used + document.length > room:
            piece = np.append(tokens[used : room - 1], tokens[-1:])  # closed by the last token, eot
        writer.add(document.domain, document.split, piece)
        used += len(piece)
        if used >= room:
            break
    return used


def _report(writer: TokenWriter, output: str) -> None:
    for domain in writer.state["domains"]:
        counts = (f"{domain[split]['tokens']:,} {split}" for split in SPLITS)
        print(f"{escape(domain['name'])}: {' and '.join(counts)} tokens")
    print(with_skipped(f"{output}: {writer.tokens:,} tokens", writer.state))
