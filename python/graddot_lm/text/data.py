"""Token files by memory map, fixed blocks of them as samples, and the order of sampling.

A sample is a block of `block_size` tokens at a fixed place: block b of a domain's file starts at
token b * block_size, and its labels are the same tokens one further on. Labels are shifted here
and nowhere else. A `sample_id` numbers the blocks of all domains of the data folder, in the order
of meta.json, so that it names the same tokens whichever domains a run selects.
"""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from graddot_lm.errors import GraddotError
from graddot_lm.files import reached
from graddot_lm.text.load_tokenizer import load_tokenizer, tokenizer_sha256
from graddot_lm.text.token_writer import FORMAT_VERSION, SPLITS

# What to do where a split has too few blocks.
MORE_BLOCKS = (
    "a smaller --block_size makes more of them, and --val_fraction of `graddot tokenize` decides which"
    " share of the text is for validation"
)

PIECES, PIECE = 8, 1024  # of a domain's tokens, for `TokenData.content`

if TYPE_CHECKING:  # `graddot tokenize` and `graddot scores` do not wait for torch
    import torch

SampleIds: TypeAlias = "np.ndarray | torch.Tensor | Sequence[int]"


class TokenData:
    """One split of a folder written by `graddot tokenize`.

    `domains` selects by name (default: all) and decides what a sampler draws; the other methods
    answer for every sample_id of the folder. Raises GraddotError for a folder that is unfinished,
    of another version, or whose files differ in size from meta.json, and for an unknown domain or
    a selected one that is too short for a single block.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        domains: Sequence[str] | None = None,
        block_size: int = 1024,
    ) -> None:
        if split not in SPLITS:
            raise GraddotError(f"split {split!r}: must be one of {', '.join(SPLITS)}")
        if block_size < 1:
            raise GraddotError(f"block size {block_size}: must be at least 1")
        self.root, self.split, self.block_size = Path(root), split, block_size
        self.meta = _read_meta(self.root)
        self.vocab_size: int = self.meta["vocab_size"]
        self._names: list[str] = [domain["name"] for domain in self.meta["domains"]]
        self._tokens = [self._open(domain) for domain in self.meta["domains"]]
        # The last token of a block needs a label, hence one token more than whole blocks.
        blocks = [max(0, (len(tokens) - 1) // block_size) for tokens in self._tokens]
        self._first = np.concatenate([[0], np.cumsum(blocks, dtype=np.int64)])  # [domains + 1]
        self.domains = self._select(domains)

    def _open(self, domain: dict) -> np.ndarray:
        path = self.root / domain["slug"] / f"{self.split}.bin"
        dtype = np.dtype(self.meta["dtype"]).newbyteorder("<")
        expected = domain[self.split]["tokens"] * dtype.itemsize
        if not reached(path).exists():
            raise GraddotError(f"{path}: missing; meta.json lists it with {expected} bytes")
        actual = path.stat().st_size
        if actual != expected:
            raise GraddotError(
                f"{path}: {expected} bytes expected by meta.json, {actual} found; "
                "copy or tokenize the data again"
            )
        if not expected:  # an empty file cannot be mapped
            return np.empty(0, dtype)
        return np.memmap(path, dtype, mode="r")

    def _select(self, domains: Sequence[str] | None) -> list[str]:
        if domains is None:
            return list(self._names)
        blocks = self.blocks_per_domain
        for name in domains:
            if name not in blocks:
                raise GraddotError(f"domain {name!r}: unknown; known are {_listed(self._names)}")
            if not blocks[name]:
                raise GraddotError(
                    f"domain {name!r}: its {self.split} split has too few tokens for one block "
                    f"of {self.block_size}; {MORE_BLOCKS}"
                )
        return [name for name in self._names if name in domains]

    def __len__(self) -> int:
        """Blocks in the selected domains."""
        blocks = self.blocks_per_domain
        return sum(blocks[name] for name in self.domains)

    @property
    def blocks_per_domain(self) -> dict[str, int]:
        """Blocks of every domain of the folder, selected or not."""
        return dict(zip(self._names, np.diff(self._first).tolist(), strict=True))

    def first_id(self, domain: str) -> int:
        """sample_id of a domain's first block; its others follow."""
        return int(self._first[self._names.index(domain)])

    def _locate(self, sample_ids: SampleIds) -> tuple[np.ndarray, np.ndarray]:
        """Domain index and token offset `(N,)` int64 of each id. Raises GraddotError."""
        ids = np.asarray(sample_ids, dtype=np.int64).reshape(-1)
        wrong = (ids < 0) | (ids >= self._first[-1])
        if wrong.any():
            raise GraddotError(
                f"sample_id {ids[wrong][0]}: the {self.split} split has ids 0 to "
                f"{self._first[-1] - 1} at block size {self.block_size}"
            )
        domains = np.searchsorted(self._first, ids, side="right") - 1
        return domains, (ids - self._first[domains]) * self.block_size

    def domain_of(self, sample_ids: SampleIds) -> list[str]:
        """Domain name of each sample."""
        return [self._names[index] for index in self._locate(sample_ids)[0]]

    def offset_of(self, sample_ids: SampleIds) -> np.ndarray:
        """Offset `(N,)` int64 of each sample's first token in its domain's file, in tokens."""
        return self._locate(sample_ids)[1]

    def get(self, sample_ids: SampleIds) -> "tuple[torch.Tensor, torch.Tensor]":
        """Inputs and labels, each `(N, T)` int64: Y[:, t] is the token that follows X[:, t].

        Raises GraddotError for an id out of range and a token outside the vocabulary.
        """
        import torch

        tokens = torch.from_numpy(self._blocks(sample_ids))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def _blocks(self, sample_ids: SampleIds) -> np.ndarray:
        """The tokens `(N, T + 1)` int64 of samples, each with the one that follows it."""
        T = self.block_size
        domains, offsets = self._locate(sample_ids)
        rows = np.empty((len(domains), T + 1), dtype=np.int64)
        for row, domain, offset in zip(rows, domains, offsets, strict=True):
            row[:] = self._tokens[domain][offset : offset + T + 1]
        damaged = np.argwhere(rows >= self.vocab_size)
        if len(damaged):
            n, t = damaged[0]
            raise GraddotError(
                f"domain {self._names[domains[n]]!r}, token offset {offsets[n] + t}: token id "
                f"{rows[n, t]} is outside the vocabulary of {self.vocab_size}; the file is damaged"
            )
        return rows

    def token_ids(self, sample_id: int) -> np.ndarray:
        """Input tokens `(T,)` int64 of one sample, to be decoded for an excerpt."""
        return self._blocks([sample_id])[0, :-1]

    def check_tokenizer(self, tokenizer_path: str) -> None:
        """Raise GraddotError if the data was written with another tokenizer."""
        found = tokenizer_sha256(load_tokenizer(tokenizer_path))
        wanted = self.meta["tokenizer"]
        if found != wanted["sha256"]:
            raise GraddotError(
                f"{tokenizer_path}: not the tokenizer that {self.root} was written with "
                f"({wanted['name']}, sha256 {wanted['sha256'][:12]}; this one {found[:12]})"
            )

    @property
    def fingerprint(self) -> str:
        """sha256 over what decides the tokens; a resumed run must find the same."""
        names = ("format_version", "dtype", "vocab_size", "eot_token_id", "seed", "val_fraction")
        matter = {name: self.meta[name] for name in names}
        matter["tokenizer"] = self.meta["tokenizer"]["sha256"]
        matter["domains"] = self.meta["domains"]
        return hashlib.sha256(json.dumps(matter, sort_keys=True).encode()).hexdigest()

    @property
    def content(self) -> str:
        """sha256 over pieces of every domain's tokens, which other text of as many tokens has not in
        common: a resumed run must find the same, and a whole Pile takes too long to read."""
        digest = hashlib.sha256()
        for tokens in self._tokens:
            for start in np.linspace(0, max(0, len(tokens) - PIECE), PIECES).astype(np.int64):
                digest.update(tokens[start : start + PIECE].tobytes())
        return digest.hexdigest()


def _read_meta(root: Path) -> dict:
    path = root / "meta.json"
    if not reached(path).exists():
        unfinished = (root / "progress.json").exists()
        reason = "tokenizing it was not finished" if unfinished else "no token data here"
        raise GraddotError(f"{path}: missing: {reason}; run `graddot tokenize`")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        version = meta["format_version"]
        if version == FORMAT_VERSION and not _is_meta(meta):
            raise ValueError
    except OSError as error:
        raise GraddotError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise GraddotError(f"{path}: not the meta.json of token data") from error
    if version != FORMAT_VERSION:
        raise GraddotError(
            f"{path}: format version {version}, this program reads {FORMAT_VERSION}; "
            "tokenize the text again"
        )
    return meta


def _is_meta(meta: dict) -> bool:
    """Whether it says what `graddot tokenize` writes there. May raise KeyError and TypeError."""
    counts = [domain[split]["tokens"] for domain in meta["domains"] for split in SPLITS]
    names = [domain[key] for domain in meta["domains"] for key in ("name", "slug")]
    names += [meta["tokenizer"][key] for key in ("name", "sha256")]
    whole = {"eot_token_id", "seed", "val_fraction"} <= meta.keys()
    return (
        whole
        and meta["dtype"] in ("uint16", "uint32")
        and all(type(count) is int and count >= 0 for count in (*counts, meta["vocab_size"]))
        and all(isinstance(name, str) for name in names)
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)


# Order of sampling


def permute(index: np.ndarray, n: int, key: str) -> np.ndarray:
    """Where a shuffle of range(n) named by `key` puts `index`, int64 in and out.

    A Feistel network permutes 4**k >= n numbers; those that land beyond n go through it again
    until they are back below (cycle walking; under 4 passes on average), which leaves a bijection
    of range(n). Nothing of size n is held, and the same key gives the same order on any machine.
    """
    half = np.uint64(max(1, (int(n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.frombuffer(hashlib.blake2b(key.encode()).digest(), dtype="<u8")  # 8 rounds

    def feistel(x: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        return (left << half) | right

    out = feistel(np.asarray(index).astype(np.uint64))
    while (beyond := out >= n).any():
        out[beyond] = feistel(out[beyond])
    return out.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64: every output bit depends on every input bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class _Shuffled:
    """The blocks of some domains, shuffled together anew in every epoch."""

    def __init__(self, data: TokenData, domains: Sequence[str], key: str) -> None:
        blocks = data.blocks_per_domain
        self.key = key
        self._ends = np.cumsum([blocks[name] for name in domains], dtype=np.int64)
        # Added to a position among these domains' blocks, gives the sample_id.
        starts = np.concatenate([[0], self._ends[:-1]])
        self._shift = np.array([data.first_id(name) for name in domains], dtype=np.int64) - starts

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def take(self, start: int, count: int) -> np.ndarray:
        """Draws `start` to `start + count` of the endless sequence of epochs, `(count,)` int64."""
        parts, end = [np.empty(0, np.int64)], start + count
        while start < end:
            epoch, place = divmod(start, len(self))
            here = min(end - start, len(self) - place)
            order = permute(np.arange(place, place + here), len(self), f"{self.key}/{epoch}")
            parts.append(order + self._shift[np.searchsorted(self._ends, order, side="right")])
            start += here
        return np.concatenate(parts)


class MixtureSampler:
    """Endless batches of sample_ids over the selected domains of `data`.

    Without `weights`, all blocks are shuffled together: each comes once before any comes again,
    and domains appear in proportion to their blocks. With `weights`, each draw first picks a
    domain (those not named are not drawn), then its next block; a domain is shuffled anew when its
    own blocks are used up. The order follows from `seed` alone, on any machine.

    Raises GraddotError for weights that name an unknown, unselected or empty domain, that are
    negative or not finite or all zero, and where there is no block to draw.
    """

    def __init__(
        self,
        data: TokenData,
        batch_size: int,
        seed: int,
        weights: dict[str, float] | None = None,
    ) -> None:
        if batch_size < 1:
            raise GraddotError(f"batch size {batch_size}: must be at least 1")
        if not len(data):
            raise GraddotError(
                f"{data.root}: no block of {data.block_size} tokens in the {data.split} split; "
                f"{MORE_BLOCKS}"
            )
        self.batch_size = batch_size
        if weights is None:
            self._streams = [_Shuffled(data, data.domains, f"{seed}/all")]
            shares = np.ones(1)
        else:
            _check_weights(data, weights)
            drawn = [name for name in data.domains if weights.get(name, 0) > 0]
            self._streams = [_Shuffled(data, [name], f"{seed}/domain/{name}") for name in drawn]
            shares = np.array([weights[name] for name in drawn], dtype=np.float64)
        self._thresholds = np.cumsum(shares / shares.sum())[:-1]
        self._drawn = [0] * len(self._streams)
        self._pick_key = np.frombuffer(hashlib.blake2b(f"{seed}/pick".encode()).digest(), "<u8")[0]
        self._identity = {
            "data": data.fingerprint,
            "split": data.split,
            "block_size": data.block_size,
            "domains": data.domains,
            "seed": seed,
            "weights": weights,
        }

    def next_batch(self) -> np.ndarray:
        """The next sample_ids, `(batch_size,)` int64."""
        draw = np.arange(self.batch_size, dtype=np.uint64) + np.uint64(sum(self._drawn))
        uniform = (_mix(_mix(draw) ^ self._pick_key) >> np.uint64(11)) * 2.0**-53
        picks = np.searchsorted(self._thresholds, uniform, side="right")
        batch = np.empty(self.batch_size, dtype=np.int64)
        for index, stream in enumerate(self._streams):
            here = picks == index
            count = int(here.sum())
            batch[here] = stream.take(self._drawn[index], count)
            self._drawn[index] += count
        return batch

    def state_dict(self) -> dict:
        """Position and identity, of JSON types alone."""
        return {"drawn": list(self._drawn), **self._identity}

    def load_state_dict(self, state: dict) -> None:
        """Go on exactly where `state` was taken; the batch size may differ.

        Raises GraddotError naming what differs: data, split, block size, domains, seed, weights.
        """
        for key, value in self._identity.items():
            if state.get(key) != value:
                raise GraddotError(
                    f"the saved sampler had {key} {state.get(key)!r}, this run has {value!r}; "
                    "a resumed run needs the same"
                )
        drawn = list(state["drawn"])
        if len(drawn) != len(self._streams) or any(type(n) is not int or n < 0 for n in drawn):
            raise ValueError(f"the sampler's position is {drawn!r}")
        self._drawn = drawn


def _check_weights(data: TokenData, weights: dict[str, float]) -> None:
    blocks = data.blocks_per_domain
    for name, weight in weights.items():
        if name not in data.domains:
            raise GraddotError(
                f"weights: domain {name!r} is unknown or not selected; "
                f"known are {_listed(data.domains)}"
            )
        if not (math.isfinite(weight) and weight >= 0):
            raise GraddotError(f"weights: {name}={weight}: must be a number of at least 0")
        if weight > 0 and not blocks[name]:
            raise GraddotError(f"weights: domain {name!r} has no block of {data.block_size} tokens")
    total = sum(weights.values())
    if not 0 < total < math.inf:
        problem = "at least one must be above 0" if not total else "their sum is too large"
        raise GraddotError(f"weights: {problem}")


def separated(text: str) -> list[str]:
    """The parts between commas, which are none between the double quotes that a part begins with; in
    there a double quote is written twice."""
    quoted = r'"((?:[^"]|"")*)"'
    parts = re.finditer(rf"(?:^|,)\s*({quoted}[^,]*|[^,]*)", text)
    inside = lambda match: match[1].replace('""', '"')
    return [re.sub(f"^{quoted}", inside, part[1].strip()) for part in parts]


def parse_weights(text: str) -> dict[str, float]:
    """Read "code=2,math=1". Raises GraddotError naming the part that cannot be read."""
    weights: dict[str, float] = {}
    for part in separated(text):
        name, equals, number = part.rpartition("=")
        name = name.strip()
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not equals or not name or not (math.isfinite(weight) and weight >= 0):
            raise GraddotError(f"weights: {part!r}: must be like NAME=NUMBER, at least 0")
        if name in weights:
            raise GraddotError(f"weights: {name!r} is named twice")
        weights[name] = weight
    return weights


def fixed_batch(data: TokenData, n: int, seed: int) -> np.ndarray:
    """`n` different sample_ids `(n,)` int64 of the selected domains, always the same for a seed.

    Raises GraddotError if n is 0 or there are fewer blocks.
    """
    if not 1 <= n <= len(data):
        raise GraddotError(
            f"a fixed batch of {n}: the {data.split} split of {_listed(data.domains)} has "
            f"{len(data)} blocks of {data.block_size} tokens; --val_batch_size asks for fewer, "
            f"{MORE_BLOCKS}"
        )
    return _Shuffled(data, data.domains, f"{seed}/fixed").take(0, n)
