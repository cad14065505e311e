"""Find and read documents: JSON-lines files, plain or compressed, and datasets of the hub.

Sources come in a fixed order and are cut into chunks of records. The cuts depend on the records
alone, so the end of a chunk, a source and the number of records read of it, is a position from
which a later process reads on.
"""

import codecs
import contextlib
import functools
import hashlib
import json
import os
import re
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import zstandard

from graddot_lm.errors import GraddotError, printable
from graddot_lm.files import reached

CHUNK_BYTES = 1 << 20
READ_BYTES = 256 << 10
FILE_NAME = re.compile(r"\.(jsonl|ndjson|json)(\.(gz|zst))?$")
SURROGATE = re.compile("[\ud800-\udfff]")
HUB_NAME = re.compile(r"^[\w-][\w.-]*(/[\w-][\w.-]*)?$")
HUB_SECONDS = 5.0  # in which a hub that is there begins to answer
INPUT_HELP = (
    "text as JSON lines, one object a document: .jsonl, .json or .ndjson files, plain, .gz or .zst;"
    " folders, of which every such file is read, in sorted order; or the name of a dataset on the"
    " hub, which is streamed"
)
TEXT_HELP = (
    "key of a document's text; dots go into nested objects, where no key has them (default:"
    " %(default)s)"
)
SKIP_HELP = (
    "pass over malformed documents and what follows the damage in a compressed file, and say so at"
    " the end, instead of stopping at the first"
)
EXPECTED = "one JSON object a line was expected (JSON lines)"

# The bytes of a line, a mapping from a hub dataset, or the BadRecordError found in its place.
Record = Any


class BadRecordError(GraddotError):
    """One document cannot be read; `--skip_bad_lines` passes over it."""


class DamagedFileError(BadRecordError):
    """A compressed file cannot be read on: with `--skip_bad_lines`, the rest of it is lost."""


class Source(NamedTuple):
    """A file (`bytes` is its size) or a hub dataset (`bytes` is None, `split` the one to read).

    A file that was replaced is told by `modified`, in nanoseconds, or by `start`, a digest of its
    first bytes.
    """

    name: str
    bytes: int | None
    split: str | None = None
    modified: int | None = None
    start: str | None = None


def find_sources(inputs: list[str], dataset_split: str = "train") -> list[Source]:
    """List every file behind `inputs` (folders recursively, sorted) and every hub dataset name.

    Raises GraddotError for a missing path, an unknown file ending, a folder without text files or
    with one that cannot be listed, and what would be read twice.
    """
    sources: list[Source] = []
    for name in inputs:
        path = reached(Path(name))
        if path.is_dir():
            files = _files_in(path)
            if not files:
                raise GraddotError(f"{name}: no .jsonl, .json or .ndjson file (.gz, .zst) in it")
            sources += [_file_source(str(file)) for file in files]
        elif path.exists():
            if not FILE_NAME.search(path.name):
                raise GraddotError(
                    f"{name}: unknown file ending; wanted .jsonl, .json or .ndjson, "
                    "optionally followed by .gz or .zst"
                )
            sources.append(_file_source(name))
        elif FILE_NAME.search(name) or not HUB_NAME.match(name):
            raise GraddotError(f"{name}: no such file or folder")
        else:
            sources.append(Source(name, None, dataset_split))
    _check_once(sources)
    return sources


def _file_source(name: str) -> Source:
    status = os.stat(name)
    if not stat.S_ISREG(status.st_mode):  # a pipe can be read once
        return Source(name, status.st_size)
    try:
        with open(name, "rb") as file:
            start = hashlib.sha256(file.read(READ_BYTES)).hexdigest()
    except OSError as error:
        raise GraddotError(f"{name}: cannot be read: {error.strerror}") from error
    return Source(name, status.st_size, modified=status.st_mtime_ns, start=start)


def _files_in(folder: Path) -> list[Path]:
    """Every text file in it, sorted, also behind links to folders. Path.rglob would pass over these,
    and over a folder that it may not list."""

    def refuse(error: OSError) -> NoReturn:
        raise GraddotError(f"{error.filename}: cannot be read: {error.strerror}") from error

    files: list[Path] = []
    seen = set()
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        place = os.path.realpath(parent)
        if place in seen:  # behind another link, perhaps one that leads back
            folders.clear()
            continue
        seen.add(place)
        folders.sort()
        files += [Path(parent, name) for name in names if FILE_NAME.search(name)]
    for file in files:
        if file.is_symlink() and not file.exists():
            raise GraddotError(f"{file}: a link to what is not there; bring that, or take it away")
    return sorted(file for file in files if file.is_file())


def _check_once(sources: list[Source]) -> None:
    """Refuse a file or dataset that is read twice, also in two compressions: one time its documents
    may go to train, the other to val."""
    seen: dict[Path, str] = {}
    for source in sources:
        place = Path(source.name).resolve()
        if source.bytes is not None and place.suffix in (".gz", ".zst"):
            place = place.with_suffix("")
        if place in seen:
            other = "" if seen[place] == source.name else f", also as {seen[place]}"
            raise GraddotError(f"--input has {source.name} twice{other}; give every text once")
        seen[place] = source.name


def check_apart(inputs: list[str], output: str) -> None:
    """Refuse an output in an input, which the next run would read as text, or around one.

    Raises GraddotError. A hub dataset's name counts as a path: once the output is in such a folder,
    the name means the folder.
    """
    out = Path(output).resolve()
    for name in inputs:
        path = reached(Path(name).resolve())
        if out.is_relative_to(path):
            fault = f"is the input {name}, or lies in it"
        elif path.exists() and path.is_relative_to(out):
            fault = f"the input {name} lies in it"
        else:
            continue
        raise GraddotError(f"--output {output}: {fault}; choose a place apart from all --input")


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
        raise DamagedFileError(f"damaged .{kind} stream: {error}") from error
    if decoder is not None or raw.tell() == 0:
        raise DamagedFileError(f"truncated .{kind} stream; fetch the file again")


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
    number = 0
    with open(source.name, "rb") as raw:
        try:
            for number, line in enumerate(_lines(raw, source.name), 1):
                if number > skip:
                    # At a file's start, and further on where files were put together.
                    yield line.removeprefix(codecs.BOM_UTF8), raw.tell()
        except DamagedFileError as damage:
            if number >= skip:  # else the damage itself is the last record that was read before
                yield damage, raw.tell()


def _hub_dataset(source: Source) -> Any:
    """The stream of a hub dataset; from the cache, if it is there, where the hub does not answer.

    `datasets` alone would ask an unreachable hub six times, over 24 s or, where no answer comes at all,
    over five minutes; and the name may be that of a file, mistyped.
    """
    import datasets
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    load = functools.partial(datasets.load_dataset, source.name, split=source.split, streaming=True)
    try:
        card = hf_hub_url(source.name, "README.md", repo_type="dataset")
        get_hf_file_metadata(card, timeout=HUB_SECONDS)
    except HfHubHTTPError:  # the hub answered; `datasets` makes the best of it
        pass
    except Exception:  # of whichever HTTP library the hub's client is built on
        offline = datasets.config.HF_HUB_OFFLINE
        datasets.config.HF_HUB_OFFLINE = True
        try:
            with contextlib.suppress(Exception):
                return load()
        finally:
            datasets.config.HF_HUB_OFFLINE = offline
        raise
    return load()


def _hub_records(source: Source, skip: int) -> Iterator[tuple[Record, int]]:
    try:
        stream = _hub_dataset(source)
    except Exception as error:  # datasets raises the errors of every library below it
        raise GraddotError(
            f"{source.name}: no such file or folder here, and split {source.split!r} of a dataset "
            f"of this name could not be had from the hub: {str(error) or repr(error)}"
        ) from error
    number = skip
    try:
        for record in stream.skip(skip):
            number += 1
            yield record, 0
    except Exception as error:
        raise GraddotError(
            f"{source.name}: the hub's dataset cannot be read beyond document {number} of split "
            f"{source.split!r}: {error}; the same command goes on from what was written"
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
            cause = str(error)
            if isinstance(error, json.JSONDecodeError):  # whose line number counts in this line
                cause = f"{error.msg}, column {error.colno}"
            raise BadRecordError(f"{EXPECTED}; not JSON: {cause}") from error
    if not isinstance(record, dict):
        raise BadRecordError(f"{EXPECTED}, not a value of type {type(record).__name__}")
    text = _column(record, text_column)
    if not isinstance(text, str):
        raise BadRecordError(f"{text_column!r} is missing or not a string")
    if SURROGATE.search(text):
        raise BadRecordError(f"{text_column!r} holds half of a surrogate pair")
    domain = _column(record, domain_column)
    if domain is None or domain == "":
        domain = default_domain
    if domain is None:
        raise BadRecordError(f"no domain at {domain_column!r}; give --default_domain for such text")
    if not isinstance(domain, str):  # as a dataset's labels, which the default would throw together
        kind = type(domain).__name__
        raise BadRecordError(f"the domain at {domain_column!r} is of type {kind}, not a string")
    if SURROGATE.search(domain):
        raise BadRecordError(f"{domain_column!r} holds half of a surrogate pair")
    return text, domain


def nothing_skipped() -> dict:
    """What `count_skipped` adds to."""
    return {"bad_lines": 0, "damaged_files": []}


def count_skipped(skipped: dict, name: str, line: int, bad: BadRecordError) -> None:
    """Add to `skipped` what `--skip_bad_lines` passes over."""
    if isinstance(bad, DamagedFileError):
        skipped["damaged_files"].append({"name": name, "line": line, "problem": str(bad)})
    else:
        skipped["bad_lines"] += 1


def with_skipped(closing: str, skipped: dict) -> str:
    """A command's closing line, with what `count_skipped` was told of."""
    count = skipped["bad_lines"]
    if count:
        closing += f", {count:,} bad line{'s' * (count > 1)} skipped"
    lost = [
        f"{file['name']}: all from line {file['line']} on is lost: {file['problem']}"
        for file in skipped["damaged_files"]
    ]
    return printable("\n".join([closing, *lost]))


def _column(record: dict, dotted: str) -> Any:
    if dotted in record:  # as flattened tables have them
        return record[dotted]
    value: Any = record
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value
