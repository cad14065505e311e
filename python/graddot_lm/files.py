"""Files and folders that appear whole or not at all, whenever the process is killed.

They are written under a temporary name, synced and then renamed. What a killed process left under
such a name is ignored by readers and removed by the next writer.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from graddot_lm.errors import GraddotError

if TYPE_CHECKING:
    import pyarrow as pa

TEMPORARY = ".tmp-"


def reached(path: Path) -> Path:
    """The path, whether anything is there or not. Raises OSError where that cannot be told, as for want of
    a permission: as of Python 3.14 `exists()` and its like take it for no."""
    with suppress(FileNotFoundError, NotADirectoryError):
        os.stat(path)
    return path


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError into a GraddotError that names the file and the cause."""
    try:
        yield
    except OSError as error:
        name, cause = Path(error.filename or path), error.strerror or error
        if name.name.startswith(TEMPORARY):  # which people have not heard of
            name = path
        raise GraddotError(f"{name}: cannot be written: {cause}") from error


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary_for(path: Path) -> Path:
    return path.with_name(TEMPORARY + path.name)


def lock(path: Path, busy: str, length: int = 0, start: int = 0) -> int:
    """Lock a file, made if need be, for this process; closing the handle returned unlocks it.

    Of several processes each may take `length` bytes of its own, 0 for all from `start` on. Raises
    GraddotError with the message `busy` if another process has one of them.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:  # a record lock, which a forked process that outlives a killed one does not hold
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
    except (BlockingIOError, PermissionError) as error:
        os.close(handle)
        raise GraddotError(busy) from error
    return handle


def write_atomic(path: Path, data: "bytes | pa.Buffer") -> None:
    """Replace `path` by a file of `data`. Raises GraddotError, and then leaves no trace."""
    temporary = temporary_for(path)
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder so that it vanishes whole."""
    temporary = folder.with_name(f"{TEMPORARY}old-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    os.rename(folder, temporary)
    shutil.rmtree(temporary)


def remove_temporary(folder: Path) -> None:
    """Remove what a killed process left in `folder`."""
    for path in folder.glob(TEMPORARY + "*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
