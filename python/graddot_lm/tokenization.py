"""Turn JSON-lines text into flat token files, one per domain and split.

Layout of the output folder::

    <out>/<slug>/train.bin, <out>/<slug>/val.bin   token ids, little endian, uint16 or uint32
    <out>/tokenizer.json                           the tokenizer that wrote them
    <out>/progress.json                            while unfinished: what is safely on disk
    <out>/meta.json                                appears last: the folder is complete

One process reads lines and writes tokens; worker processes parse and encode chunks of lines, whose
results are taken in the order of the input. Token files only grow, and `progress.json` is replaced
after they have been synced, so a run that was killed goes on from the recorded position: what lies
beyond the recorded lengths is cut off and encoded again.
"""

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import zlib
from collections import defaultdict, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import zstandard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from graddot_lm.errors import GraddotError

FORMAT_VERSION = 1
SPLITS = ("train", "val")
END_OF_TEXT = "<|endoftext|>"
COMMIT_SECONDS = 5.0
COMMIT_BYTES = 64 << 20
CHUNK_BYTES = 1 << 20
READ_BYTES = 256 << 10
FILE_NAME = re.compile(r"\.(jsonl|ndjson|json)(\.(gz|zst))?$")
HUB_NAME = re.compile(r"^[\w-][\w.-]*(/[\w-][\w.-]*)?$")

Record = (
    Any  # bytes of a line, a mapping from a hub dataset, or the BadRecordError found in its place
)


class BadRecordError(GraddotError):
    """One document cannot be read; `--skip_bad_lines` passes over it."""


# Sources: where documents come from, in a fixed order


class Source(NamedTuple):
    """A file (`bytes` is its size) or a hub dataset (`bytes` is None, `split` the one to read)."""

    name: str
    bytes: int | None
    split: str | None = None


def find_sources(inputs: list[str], dataset_split: str = "train") -> list[Source]:
    """List every file behind `inputs` (folders recursively, sorted) and every hub dataset name.

    Raises GraddotError for a missing path, an unknown file ending, and a folder without text files.
    """
    sources = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if FILE_NAME.search(p.name) and p.is_file())
            if not files:
                raise GraddotError(f"{name}: no .jsonl, .json or .ndjson file (.gz, .zst) in it")
            sources += [Source(str(p), p.stat().st_size) for p in files]
        elif path.exists():
            if not FILE_NAME.search(path.name):
                raise GraddotError(
                    f"{name}: unknown file ending; wanted .jsonl, .json or .ndjson, "
                    "optionally followed by .gz or .zst"
                )
            sources.append(Source(name, path.stat().st_size))
        elif FILE_NAME.search(name) or not HUB_NAME.match(name):
            raise GraddotError(f"{name}: no such file or folder")
        else:
            sources.append(Source(name, None, dataset_split))
    return sources


def _decompressed(raw: BinaryIO, name: str) -> Iterator[bytes]:
    """The content of `raw` in pieces; frames that follow each other are read as one stream."""
    if not name.endswith((".gz", ".zst")):
        yield from iter(lambda: raw.read(READ_BYTES), b"")
        return
    kind = name.rpartition(".")[2]
    decoder: Any = None
    try:
        while data := raw.read(READ_BYTES):
            while data:
                if decoder is None and kind == "gz":
                    decoder = zlib.decompressobj(wbits=31)
                elif decoder is None:
                    decoder = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
                yield decoder.decompress(data)
                data = decoder.unused_data if decoder.eof else b""
                decoder = None if decoder.eof else decoder
    except (zlib.error, zstandard.ZstdError) as error:
        raise BadRecordError(f"damaged .{kind} stream: {error}") from error
    if decoder is not None or raw.tell() == 0:
        raise BadRecordError(f"truncated .{kind} stream; fetch the file again")


def _lines(raw: BinaryIO, name: str) -> Iterator[bytes]:
    """The lines of a possibly compressed file, of any length, without their line ends."""
    parts: list[bytes] = []
    for piece in _decompressed(raw, name):
        head, *rest = piece.split(b"\n")
        parts.append(head)
        if rest:
            yield b"".join(parts)
            yield from rest[:-1]
            parts = [rest[-1]]
    if last := b"".join(parts):
        yield last


def _file_records(source: Source, skip: int) -> Iterator[tuple[Record, int]]:
    with open(source.name, "rb") as raw:
        try:
            for line in islice(_lines(raw, source.name), skip, None):
                yield line, raw.tell()
        except BadRecordError as bad:
            yield bad, raw.tell()


def _hub_records(source: Source, skip: int) -> Iterator[tuple[Record, int]]:
    import datasets

    try:
        stream = datasets.load_dataset(source.name, split=source.split, streaming=True)
        for record in stream.skip(skip):
            yield record, 0
    except Exception as error:  # datasets raises the errors of every library below it
        raise GraddotError(
            f"{source.name}: no such file or folder here, and split {source.split!r} of a dataset "
            f"of this name could not be read from the hub: {error}"
        ) from error


class Chunk(NamedTuple):
    """Consecutive records of one source; `line` counts those read up to the chunk's end."""

    source: int
    name: str
    records: list[tuple[int, Record]]
    line: int
    bytes_done: int


def read_chunks(sources: list[Source], start: int, line: int) -> Iterator[Chunk]:
    """Cut the sources into chunks, from record `line` of source `start` on.

    The cuts depend on the records alone, so a chunk's end is a position to go on from.
    """
    done = sum(source.bytes or 0 for source in sources[:start])
    for index in range(start, len(sources)):
        source = sources[index]
        skip = line if index == start else 0
        records: list[tuple[int, Record]] = []
        size, number, position = 0, skip, 0
        read = _hub_records if source.bytes is None else _file_records
        try:
            for number, (record, position) in enumerate(read(source, skip), skip + 1):
                if isinstance(record, bytes) and not record.strip():
                    continue
                records.append((number, record))
                size += len(record) if isinstance(record, bytes) else len(str(record))
                if size >= CHUNK_BYTES:
                    yield Chunk(index, source.name, records, number, done + position)
                    records, size = [], 0
        except OSError as error:
            raise GraddotError(f"{source.name}: cannot be read: {error.strerror}") from error
        done += source.bytes or 0
        yield Chunk(index, source.name, records, number, done)


def parse(
    record: Record, text_column: str, domain_column: str, default_domain: str | None
) -> tuple[str, str]:
    """Text and domain of a record. Raises BadRecordError."""
    if isinstance(record, BadRecordError):
        raise record
    if isinstance(record, bytes):
        try:
            record = json.loads(record.decode())
        except UnicodeDecodeError as error:
            raise BadRecordError(f"not UTF-8: {error}") from error
        except (ValueError, RecursionError) as error:
            raise BadRecordError(f"not JSON: {error}") from error
    if not isinstance(record, dict):
        raise BadRecordError(f"a JSON object was expected, not {type(record).__name__}")
    text = _column(record, text_column)
    if not isinstance(text, str):
        raise BadRecordError(f"{text_column!r} is missing or not a string")
    if re.search("[\ud800-\udfff]", text):
        raise BadRecordError(f"{text_column!r} holds half of a surrogate pair")
    domain = _column(record, domain_column)
    if not isinstance(domain, str) or not domain:
        domain = default_domain
    if domain is None:
        raise BadRecordError(f"no domain at {domain_column!r}; give --default_domain for such text")
    return text, domain


def _column(record: dict, dotted: str) -> Any:
    value: Any = record
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


# Tokenizers


def load_tokenizer(name: str) -> Tokenizer:
    """Load a local tokenizer.json (or a folder that holds one), or a tokenizer of the hub.

    Truncation and padding that the file may ask for are switched off. Raises GraddotError.
    """
    path = Path(name)
    file = path / "tokenizer.json" if path.is_dir() else path
    if file.exists():
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the Rust library raises bare Exception
            raise GraddotError(f"{file}: not a tokenizer.json: {error}") from error
    elif name.endswith(".json") or path.is_dir() or not HUB_NAME.match(name):
        raise GraddotError(f"{file}: no such tokenizer file")
    else:
        tokenizer = _hub_tokenizer(name)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _hub_tokenizer(name: str) -> Tokenizer:
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        try:
            return Tokenizer.from_pretrained(name)
        except LocalEntryNotFoundError:  # no network: a second way would only wait as long again
            raise
        except (
            EntryNotFoundError
        ):  # no tokenizer.json there; transformers converts the older formats
            return _auto_tokenizer(name).backend_tokenizer
    except Exception as error:
        raise GraddotError(
            f"tokenizer {name!r} could not be had from the hub ({str(error).splitlines()[0]}); "
            "the path of a local tokenizer.json works without network"
        ) from error


def _auto_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name, use_fast=True)


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """Fingerprint of a tokenizer: the sha256 of its serialized tokenizer.json."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def end_of_text_id(tokenizer: Tokenizer, name: str, eot_token: str | None) -> int:
    """The id that closes every document: `eot_token`, else `<|endoftext|>`, else the eos token."""
    token = eot_token or END_OF_TEXT
    if eot_token is None and tokenizer.token_to_id(token) is None and not Path(name).is_file():
        # Only the files beside tokenizer.json say which of its tokens is the eos.
        with contextlib.suppress(Exception):
            token = _auto_tokenizer(name).eos_token or token
    found = tokenizer.token_to_id(token)
    if found is None:
        raise GraddotError(f"tokenizer {name!r} has no token {token!r}; name one by --eot_token")
    return found


# Encoding, in the worker processes


class Document(NamedTuple):
    """What became of one record: `length` tokens of a domain and split, or a problem."""

    line: int
    domain: str = ""
    split: str = ""
    length: int = 0
    problem: str | None = None


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
                documents.append(Document(line, problem=str(bad)))
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
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


# Writing


def _write_atomic(path: Path, text: str) -> None:
    """Replace `path` by `text` so that a reader, or a crash, sees the old or the new file whole."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _writing(path: Path, advice: str = "") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        name = error.filename or path
        raise GraddotError(f"{name}: cannot be written: {error.strerror}{advice}") from error


class TokenWriter:
    """The output folder of a run: token files that grow, and the record of what is safe in them.

    `settings` decide the content; going on with other ones is refused. `state` is what
    progress.json holds: the settings, the position in the input, and the counts per domain.
    Raises GraddotError for a finished folder, a foreign one, and whatever cannot be written.
    """

    def __init__(self, folder: Path, settings: dict, overwrite: bool) -> None:
        self.folder = folder
        self.dtype = np.dtype(settings["dtype"]).newbyteorder("<")
        self.state: dict = {"settings": settings, "source": 0, "line": 0, "bad_lines": 0}
        self.state["domains"] = []
        self._pending: defaultdict[tuple[str, str], list[np.ndarray]] = defaultdict(list)
        self._pending_bytes = 0
        self._committed = time.monotonic()
        meta, progress = folder / "meta.json", folder / "progress.json"
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            ours = meta.exists() or progress.exists()
            if not ours and any(path.suffix != ".tmp" for path in folder.iterdir()):
                raise GraddotError(f"{folder}: holds other files; choose a new or empty folder")
            if meta.exists() and not overwrite:
                raise GraddotError(f"{folder}: holds finished token data; --overwrite replaces it")
            if progress.exists() and not overwrite:
                self.state = self._read_progress(progress)
            else:
                _write_atomic(progress, json.dumps(self.state))
                meta.unlink(missing_ok=True)
            self._cut_files()
        self._domains = {domain["name"]: domain for domain in self.state["domains"]}

    def _read_progress(self, path: Path) -> dict:
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            old = state["settings"]
        except (ValueError, KeyError) as error:
            raise GraddotError(f"{path}: damaged; --overwrite starts anew") from error
        new = self.state["settings"]
        differing = [
            f"{key}: {old.get(key)!r} before, {new.get(key)!r} now"
            for key in sorted({*old, *new})
            if old.get(key) != new.get(key)
        ]
        if differing:
            raise GraddotError(
                f"{self.folder}: an unfinished run had other settings ({'; '.join(differing)}); "
                "repeat them to go on, or start anew with --overwrite"
            )
        return state

    def _cut_files(self) -> None:
        """Bring the token files to the recorded lengths; remove those that are not recorded."""
        recorded = {
            self._path(domain["slug"], split): domain[split]["tokens"] * self.dtype.itemsize
            for domain in self.state["domains"]
            for split in SPLITS
        }
        for path, length in recorded.items():
            if not path.exists() or path.stat().st_size < length:
                raise GraddotError(f"{path}: shorter than recorded; start anew with --overwrite")
            os.truncate(path, length)
        for split in SPLITS:
            for path in self.folder.glob(f"*/{split}.bin"):
                if path not in recorded:
                    path.unlink()

    def _path(self, slug: str, split: str) -> Path:
        return self.folder / slug / f"{split}.bin"

    @property
    def tokens(self) -> int:
        return sum(domain[split]["tokens"] for domain in self._domains.values() for split in SPLITS)

    @property
    def due(self) -> bool:
        """Whether it is time to commit."""
        late = time.monotonic() - self._committed >= COMMIT_SECONDS
        return late or self._pending_bytes >= COMMIT_BYTES

    def add(self, document: Document, tokens: np.ndarray) -> None:
        """Append one document's tokens; on disk with the next commit."""
        domain = self._domains.get(document.domain)
        if domain is None:
            domain = self._new_domain(document.domain)
        counts = domain[document.split]
        counts["tokens"] += len(tokens)
        counts["documents"] += 1
        self._pending[domain["slug"], document.split].append(tokens)
        self._pending_bytes += tokens.nbytes

    def _new_domain(self, name: str) -> dict:
        base = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")[:64] or "domain"
        taken = {domain["slug"] for domain in self._domains.values()}
        names = (base if n == 1 else f"{base}-{n}" for n in range(1, len(taken) + 2))
        slug = next(slug for slug in names if slug not in taken)
        domain: dict[str, Any] = {"name": name, "slug": slug}
        for split in SPLITS:
            domain[split] = {"tokens": 0, "documents": 0}
            self._pending[slug, split] = []  # creates the file, even if nothing goes there
        self.state["domains"].append(domain)
        self._domains[name] = domain
        return domain

    def commit(self, source: int, line: int) -> None:
        """Sync all tokens added so far, then record them with the position that follows them."""
        with _writing(self.folder, "; run the same command again to go on from the last record"):
            for (slug, split), arrays in self._pending.items():
                path = self._path(slug, split)
                if not path.exists():
                    path.parent.mkdir(exist_ok=True)
                with open(path, "ab") as file:
                    file.write(b"".join(array.astype(self.dtype).data for array in arrays))
                    file.flush()
                    os.fsync(file.fileno())
                _sync_folder(path.parent)
            _sync_folder(self.folder)
            self.state.update(source=source, line=line)
            _write_atomic(self.folder / "progress.json", json.dumps(self.state))
        self._pending.clear()
        self._pending_bytes = 0
        self._committed = time.monotonic()

    def finish(self, tokenizer: Tokenizer) -> None:
        """Declare the folder complete."""
        meta = {**self.state["settings"], "bad_lines": self.state["bad_lines"]}
        meta["domains"] = self.state["domains"]
        with _writing(self.folder):
            _write_atomic(self.folder / "tokenizer.json", tokenizer.to_str())
            _write_atomic(self.folder / "meta.json", json.dumps(meta, indent=2) + "\n")
            (self.folder / "progress.json").unlink()


# Command line


INPUT_HELP = (
    "text as JSON lines, one object a document: .jsonl, .json or .ndjson files, plain, .gz or .zst;"
    " folders, of which every such file is read, in sorted order; or the name of a dataset on the"
    " hub, which is streamed"
)
TEXT_HELP = "key of a document's text; dots go into nested objects (default: %(default)s)"
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
        "processes that encode; the result does not depend on it (default: %(default)s, the CPUs)",
        {"type": int, "default": os.cpu_count() or 1, "metavar": "N"},
    ),
    "--skip_bad_lines": (
        "count malformed documents in meta.json instead of stopping at the first",
        {"action": "store_true"},
    ),
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


def run(args: argparse.Namespace) -> int:
    """`graddot tokenize`: write or go on writing `args.output`; returns the exit status 0."""
    _check(args)
    sources = find_sources(args.input, args.dataset_split)
    tokenizer = load_tokenizer(args.tokenizer)
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
    writer = TokenWriter(Path(args.output), settings, args.overwrite)
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(args.workers, context, _start_worker, (tokenizer.to_str(), rules))
    try:
        _tokenize(pool, writer, sources, args)
    except BrokenProcessPool as error:
        raise GraddotError(
            "a worker process was killed (out of memory?); run the same command again to go on, "
            "with fewer --workers if memory was short"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
    writer.finish(tokenizer)
    _report(writer, args.output)
    return 0


def _tokenize(
    pool: ProcessPoolExecutor, writer: TokenWriter, sources: list[Source], args: argparse.Namespace
) -> None:
    """Read on from the recorded position to the end of the input or `args.max_tokens`."""
    sizes = [source.bytes for source in sources]
    input_bytes = 0 if None in sizes else sum(size or 0 for size in sizes)
    limit = args.max_tokens or sys.maxsize
    source, line, total = writer.state["source"], writer.state["line"], writer.tokens
    # Workers are forked here, before anything below starts a thread.
    pool.submit(os.getpid).result()
    chunks = read_chunks(sources, source, line) if total < limit else iter(())
    with tqdm(initial=total, unit="tok", unit_scale=True, disable=None) as bar:
        for chunk, documents, tokens in _encoded(pool, chunks, 3 * args.workers):
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
        raise GraddotError(f"no document in {', '.join(args.input)}")


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
            writer.state["bad_lines"] += 1
            continue
        piece = tokens[used : used + document.length]
        if used + document.length > room:
            piece = np.append(tokens[used : room - 1], tokens[-1:])  # closed by the last token, eot
        writer.add(document, piece)
        used += len(piece)
        if used >= room:
            break
    return used


def _report(writer: TokenWriter, output: str) -> None:
    for domain in writer.state["domains"]:
        counts = (f"{domain[split]['tokens']:,} {split}" for split in SPLITS)
        print(f"{domain['name']}: {' and '.join(counts)} tokens")
    skipped = writer.state["bad_lines"]
    print(
        f"{output}: {writer.tokens:,} tokens" + (f", {skipped} bad lines skipped" * bool(skipped))
    )


# Training a tokenizer


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
    with _writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        _write_atomic(out, tokenizer.to_str(pretty=True))
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
