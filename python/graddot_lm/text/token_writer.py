"""Token files that grow, and a record of what is safe in them.

Layout of the folder::

    <out>/<slug>/train.bin, <out>/<slug>/val.bin   token ids, little endian, uint16 or uint32
    <out>/tokenizer.json                           the tokenizer that wrote them
    <out>/progress.json                            while unfinished: what is safely on disk
    <out>/meta.json                                appears last: the folder is complete
    <out>/writer.lock                              held by the process that writes them

Token files only grow, and `progress.json` is replaced after they have been synced. So a run that
was killed goes on from the recorded position: what lies beyond the recorded lengths is cut off.
"""

import json
import os
import re
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from graddot_lm.errors import GraddotError
from graddot_lm.files import TEMPORARY, lock, reached, sync, write_atomic, writing
from graddot_lm.text.text_source import nothing_skipped

FORMAT_VERSION = 1
SPLITS = ("train", "val")
LOCK = "writer.lock"  # with a dot, which no folder of a domain has
COMMIT_SECONDS = 5.0
COMMIT_BYTES = 64 << 20


class TokenWriter:
    """The output folder of a run: token files that grow, and the record of what is safe in them.

    `settings` decide the content; going on with other ones is refused. `state` is what
    progress.json holds: the settings, the position in the input, and the counts per domain.
    Raises GraddotError for a finished folder, a foreign one, one that another process writes, and
    whatever cannot be written.
    """

    def __init__(self, folder: Path, settings: dict, overwrite: bool) -> None:
        self.folder = folder
        self.dtype = np.dtype(settings["dtype"]).newbyteorder("<")
        self.state: dict = {"settings": settings, "source": 0, "line": 0, "domains": []}
        self.state |= nothing_skipped()
        self._pending: defaultdict[tuple[str, str], list[np.ndarray]] = defaultdict(list)
        self._pending_bytes = 0
        self._committed = time.monotonic()
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            begun = reached(folder / "progress.json").exists()
            ours = begun or _describes_tokens(folder / "meta.json")
            if not ours and any(_foreign(path) for path in folder.iterdir()):
                raise GraddotError(f"{folder}: holds other files; choose a new or empty folder")
            # Two that append to the same files would mix their tokens up.
            busy = f"{folder}: another process is writing token data"
            self._lock = lock(folder / LOCK, busy)
            try:
                self._begin(overwrite)
            except BaseException:
                self.close()
                raise
        self._domains = {domain["name"]: domain for domain in self.state["domains"]}

    def _begin(self, overwrite: bool) -> None:
        """Go on from the record that is there, or start anew."""
        meta, progress = self.folder / "meta.json", self.folder / "progress.json"
        if reached(meta).exists() and not overwrite:
            raise GraddotError(f"{self.folder}: holds finished token data; --overwrite replaces it")
        if reached(progress).exists() and not overwrite:
            self.state = self._read_progress(progress)
        else:
            write_atomic(progress, json.dumps(self.state).encode())
            meta.unlink(missing_ok=True)
        self._cut_files()

    def _read_progress(self, path: Path) -> dict:
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            old, read_nothing = state["settings"], (state["source"], state["line"]) == (0, 0)
            if not _is_progress(state):
                raise ValueError
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise GraddotError(f"{path}: damaged; --overwrite starts anew") from error
        new = self.state["settings"]
        differing = [
            f"{key}: {old.get(key)!r} before, {new.get(key)!r} now"
            for key in sorted({*old, *new})
            if old.get(key) != new.get(key) and key != "sources"
        ]
        before, now = old.get("sources", []), new["sources"]
        known = set().union(*before)  # an older version recorded names and sizes alone
        now = [{key: source[key] for key in source if key in known} for source in now]
        if before != now:
            differing.append(_differing_sources(before, now))
        if differing and read_nothing:
            return self.state
        if differing:
            raise GraddotError(
                f"{self.folder}: an unfinished run had other settings ({'; '.join(differing)}); "
                "repeat them to go on, or start anew with --overwrite"
            )
        return {**self.state, **state}  # an older version recorded no damaged files

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
    def finished(self) -> bool:
        """Whether the folder is complete; until then, the same settings go on with it."""
        return reached(self.folder / "meta.json").exists()

    @property
    def due(self) -> bool:
        """Whether it is time to commit."""
        late = time.monotonic() - self._committed >= COMMIT_SECONDS
        return late or self._pending_bytes >= COMMIT_BYTES

    def add(self, name: str, split: str, tokens: np.ndarray) -> None:
        """Append the tokens of one document of domain `name`; on disk with the next commit."""
        domain = self._domains.get(name)
        if domain is None:
            domain = self._new_domain(name)
        domain[split]["tokens"] += len(tokens)
        domain[split]["documents"] += 1
        self._pending[domain["slug"], split].append(tokens)
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
        try:
            self._sync_pending()
            self.state.update(source=source, line=line)
            write_atomic(self.folder / "progress.json", json.dumps(self.state).encode())
        except GraddotError as error:
            raise GraddotError(
                f"{error}; run the same command again to go on from the last record"
            ) from error
        self._pending.clear()
        self._pending_bytes = 0
        self._committed = time.monotonic()

    def _sync_pending(self) -> None:
        with writing(self.folder):
            for (slug, split), arrays in self._pending.items():
                path = self._path(slug, split)
                if not path.exists():
                    path.parent.mkdir(exist_ok=True)
                with open(path, "ab") as file:
                    file.write(b"".join(array.astype(self.dtype).data for array in arrays))
                    file.flush()
                    os.fsync(file.fileno())
                sync(path.parent)
            sync(self.folder)

    def finish(self, tokenizer: Tokenizer) -> None:
        """Declare the folder complete."""
        recorded = (*nothing_skipped(), "domains")
        meta = {**self.state["settings"], **{key: self.state[key] for key in recorded}}
        with writing(self.folder):
            write_atomic(self.folder / "tokenizer.json", tokenizer.to_str().encode())
            write_atomic(self.folder / "meta.json", f"{json.dumps(meta, indent=2)}\n".encode())
            (self.folder / "progress.json").unlink()

    def close(self) -> None:
        """Let another process write the folder."""
        os.close(self._lock)


def _is_progress(state: dict) -> bool:
    """Whether it is what `commit` records. May raise what other shapes do."""
    counts = [state["source"], state["line"], state.get("bad_lines", 0)]
    parts = [domain[split] for domain in state["domains"] for split in SPLITS]
    counts += [part[key] for part in parts for key in ("tokens", "documents")]
    names = [domain[key] for domain in state["domains"] for key in ("name", "slug")]
    sources = {tuple(source.values()) for source in state["settings"]["sources"]}
    return (
        all(type(count) is int and count >= 0 for count in counts)
        and all(type(name) is str for name in names)
        and all(type(source[0]) is str for source in sources)
        and isinstance(state.get("damaged_files", []), list)
    )


def _differing_sources(old: list[dict], new: list[dict]) -> str:
    """Which files are others, or were written since; of thousands, not all."""
    before, now = ({tuple(source.values()) for source in sources} for sources in (old, new))
    names = sorted({name for name, *_ in before ^ now})
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"--input: {', '.join(names[:3]) or 'its order'}{more} changed"


def _describes_tokens(meta: Path) -> bool:
    """Whether it is ours: other programs write a meta.json too, and folders with a train.bin."""
    try:
        return "format_version" in json.loads(meta.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, TypeError):
        return False


def _foreign(path: Path) -> bool:
    """Whether a file is none of those that a run which was killed as it began may leave."""
    return path.name != LOCK and not path.name.startswith(TEMPORARY)
