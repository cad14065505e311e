"""Tokenizers by path or hub name, their fingerprint, and the token that ends a document."""

import contextlib
import hashlib
import textwrap
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from graddot_lm.errors import GraddotError
from graddot_lm.files import reached
from graddot_lm.text.text_source import HUB_NAME, HUB_SECONDS

END_OF_TEXT = "<|endoftext|>"


def load_tokenizer(name: str) -> Tokenizer:
    """Load a local tokenizer.json (or a folder that holds one), or a tokenizer of the hub.

    Truncation and padding that the file may ask for are switched off. Raises GraddotError.
    """
    path = reached(Path(name))
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
    from huggingface_hub.errors import EntryNotFoundError

    try:
        try:
            return Tokenizer.from_file(_hub_file(name, "tokenizer.json"))
        except EntryNotFoundError:  # transformers converts the older formats
            return _auto_tokenizer(name).backend_tokenizer
    except Exception as error:
        reason = textwrap.shorten(str(error) or repr(error), 200)
        raise GraddotError(
            f"tokenizer {name!r} could not be had from the hub ({reason}); "
            "the path of a local tokenizer.json works without network"
        ) from error


def _hub_file(name: str, file: str) -> str:
    """Path of a file of the hub, fetched if need be; the cached one if the hub does not answer.

    `hf_hub_download` alone would ask an unreachable hub six times, over 24 s.
    """
    from huggingface_hub import (
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )
    from huggingface_hub.errors import EntryNotFoundError

    try:
        get_hf_file_metadata(hf_hub_url(name, file), timeout=HUB_SECONDS)
    except EntryNotFoundError:  # the hub answered: no such file
        raise
    except Exception:  # of whichever HTTP library the hub's client is built on
        cached = try_to_load_from_cache(name, file)
        if not isinstance(cached, str):
            raise
        return cached
    return hf_hub_download(name, file)


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
