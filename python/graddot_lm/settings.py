"""A run's config.json: its settings, and whether a resumed run keeps to them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from graddot_lm.errors import GraddotError
from graddot_lm.files import write_atomic


def read_config(run: str | Path) -> dict:
    """A run's config.json. Raises GraddotError if there is none."""
    path = Path(run) / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise GraddotError(f"{run}: not a run's directory, for it has no config.json") from error
    except (OSError, ValueError) as error:
        raise GraddotError(f"{path}: cannot be read: {error}") from error


def write_config(run: Path, config: Mapping) -> None:
    """Write it, whole or not at all. Raises GraddotError."""
    write_atomic(run / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def _flat(config: Mapping, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Each setting in JSON, in which 1 and 1.0 differ and NaN equals itself."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value)


def check_resume(
    run: str | Path, config: Mapping, may_differ: Sequence[str] = ("max_steps",)
) -> None:
    """Raise GraddotError naming each setting in which `config` differs from the run's own.

    `may_differ` names settings, or groups of settings, that a resumed run is free to change.
    """
    free = {*may_differ, "measured"}
    old, new = dict(_flat(read_config(run))), dict(_flat(config))
    differing = [
        f"  {key}: {old.get(key, 'not set')} before, {new.get(key, 'not set')} now"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key) and key not in free and key.split(".")[0] not in free
    ]
    if differing:
        raise GraddotError(
            f"{run}: cannot be resumed with other settings; repeat its own, or choose another "
            "folder:\n" + "\n".join(differing)
        )
