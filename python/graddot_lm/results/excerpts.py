"""The text of samples, a line of each, from the data that a run recorded."""

from collections.abc import Sequence
from typing import Any

from ..errors import GraddotError
from ..text.data import TokenData
from ..text.load_tokenizer import load_tokenizer
from ..text.token_writer import SPLITS

EXCERPT = 80


def escape(text: str, width: int = EXCERPT) -> str:
    """The start of `text` on one line of at most `width` characters, control characters escaped."""
    shown = ""
    for char in text:
        plain = char.isprintable() and char != "\\"
        piece = char if plain else char.encode("unicode_escape", "surrogatepass").decode("ascii")
        if len(shown) + len(piece) > width:
            return shown[: width - 1] + "…"
        shown += piece
    return shown


def _texts(config: dict, data: TokenData, sample_ids: Sequence[int]) -> list[str]:
    """The beginning of each sample, to be shown. Raises GraddotError."""
    # The copy in the data folder is the tokenizer that wrote it, whatever became of the named one.
    own = (data.root / "tokenizer.json").exists()
    if not own and "tokenizer" not in config:
        raise GraddotError("config.json names no tokenizer")
    tokenizer = load_tokenizer(str(data.root) if own else config["tokenizer"])
    texts = []
    for sample_id in sample_ids:
        # A token of several characters is common, one of less than one (a byte) is not.
        tokens = data.token_ids(sample_id)[: 4 * EXCERPT].tolist()
        texts.append(escape(tokenizer.decode(tokens, skip_special_tokens=False)))
    return texts


def add_excerpts(config: dict, samples: list[dict[str, Any]]) -> str | None:
    """Give each sample an "excerpt"; returns why there are none, if so."""
    if not config:
        return "there is no config.json, which would name the data"
    for key in ("data_dir", "block_size"):
        if key not in config:
            return f"config.json names no {key}"
    folder = config["data_dir"]
    try:
        data = TokenData(folder, block_size=config["block_size"])
        if not _is_of_run(config, data):
            return f"{folder}: tokenized anew or otherwise; not the data of this run"
        for sample in samples:
            sample_id = sample["sample_id"]
            place = (data.domain_of([sample_id])[0], int(data.offset_of([sample_id])[0]))
            if place != (sample["domain"], sample["offset"]):
                return f"{folder}: sample {sample_id} is elsewhere; not the data of this run"
        texts = _texts(config, data, [sample["sample_id"] for sample in samples])
    except GraddotError as error:
        return str(error)
    for sample, text in zip(samples, texts, strict=True):
        sample["excerpt"] = text
    return None


def _is_of_run(config: dict, data: TokenData) -> bool:
    """Whether it is what the run recorded: other text may have as many tokens in every domain."""
    if config.get("data_fingerprint", data.fingerprint) != data.fingerprint:
        return False
    recorded = config.get("data_content")
    return recorded is None or recorded[SPLITS.index(data.split)] == data.content


def validation_samples(config: dict, target: str | None) -> list[dict[str, Any]]:
    """The validation samples that the scores are about, with an excerpt each.

    Empty if the run did not record them, or other data is in the place of theirs.
    """
    ids = config.get("val_sample_ids", [])
    if not ids:
        return []
    try:
        data = TokenData(config["data_dir"], "val", block_size=config["block_size"])
        if not _is_of_run(config, data):
            return []
        if config.get("target_per_domain"):
            ids = [i for i in ids if data.domain_of([i]) == [target]]
        texts = _texts(config, data, ids)
        places = zip(ids, data.domain_of(ids), data.offset_of(ids).tolist(), texts, strict=True)
    except GraddotError:  # `add_excerpts` says why for the training samples
        return []
    names = ("sample_id", "domain", "offset", "excerpt")
    return [dict(zip(names, place, strict=True)) for place in places]
