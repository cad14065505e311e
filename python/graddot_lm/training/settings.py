"""A run's config.json: its settings, and whether a resumed run keeps to them."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from graddot_lm.errors import GraddotError
from graddot_lm.files import reached, write_atomic

WIDTH = 100  # of a value in a message

_OVERHEAD = ("overhead", "overhead_over_regular_n")


def _all(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


# What is read again, beside being compared: whether it is what was written.
_IS_RIGHT: dict[str, Callable[[Any], bool]] = {
    "block_size": lambda x: type(x) is int,
    "data_dir": lambda x: type(x) is str,
    "tokenizer": lambda x: type(x) is str,
    "val_sample_ids": lambda x: _all(x, int),
    "data_content": lambda x: _all(x, str) and len(x) == 2,
    "measured": lambda x: all(isinstance(x.get(k, 0), int | float) for k in _OVERHEAD),
    "coverage": lambda x: (
        _all(x["covered"], str) and _all(x["excluded"], str) and type(x["share"]) is float
    ),
}
_NOTES = {
    "max_steps": "; only a run with --lr_schedule constant can be extended",
    "data_content": "; the token files hold other tokens",
}


def read_config(run: str | Path) -> dict:
    """A run's config.json. Raises GraddotError if there is none."""
    path = Path(run) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if problem := _wrong(config):
            raise ValueError(problem)
        return config
    except (FileNotFoundError, NotADirectoryError) as error:
        why = "it has no config.json" if reached(Path(run)).is_dir() else "there is no such folder"
        raise GraddotError(f"{run}: not a run's directory, for {why}") from error
    except (OSError, ValueError) as error:
        raise GraddotError(f"{path}: cannot be read: {error}") from error


def _wrong(config: Any) -> str | None:
    """What in it is of another kind than what is written there."""
    if not isinstance(config, dict):
        return "it holds no settings by name"
    for name in _IS_RIGHT.keys() & config.keys():
        try:
            right = _IS_RIGHT[name](config[name])
        except (LookupError, TypeError, AttributeError):
            right = False
        if not right:
            return f"{name} is {_shown(json.dumps(config[name]))}"
    return None


def recorded_config(folder: str | Path) -> dict:
    """The same; empty for scores that lie in a folder without, as those of the Trainer."""
    return read_config(folder) if reached(Path(folder) / "config.json").exists() else {}


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


def _differing(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """A line for each setting that is not the same in both, the long ones last."""
    lines = [
        f"  {key}: {_shown(old.get(key))} before, {_shown(new.get(key))} now{_NOTES.get(key, '')}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]
    return sorted(lines, key=lambda line: len(line) > WIDTH)


def _shown(value: str | None) -> str:
    if value is None:
        return "not set"
    return value if len(value) <= WIDTH else value[: WIDTH - 1] + "…"


def check_resume(
    run: str | Path, config: Mapping, may_differ: Sequence[str] = ("max_steps",)
) -> None:
    """Raise GraddotError naming each setting in which `config` differs from the run's own.

    `may_differ` names settings, or groups of settings, that a resumed run is free to change.
    """
    free = {*may_differ, "measured"}
    old, new = (
        {k: v for k, v in _flat(each) if k not in free and k.split(".")[0] not in free}
        for each in (read_config(run), config)
    )
    if differing := _differing(old, new):
        raise GraddotError(
            f"{run}: cannot be resumed with other settings; repeat its own, or choose another "
            "folder:\n" + "\n".join(differing)
        )


def check_evaluation(run: str | Path, config: Mapping) -> None:
    """Raise GraddotError naming each setting of `config` that the run recorded otherwise."""
    recorded = read_config(run)
    known = recorded.keys() & config.keys()  # an older run may not have recorded all of them
    old, new = (dict(_flat({key: each[key] for key in known})) for each in (recorded, config))
    if differing := _differing(old, new):
        raise GraddotError(
            f"{run}: its model cannot be evaluated with other settings; repeat its own:\n"
            + "\n".join(differing)
        )
