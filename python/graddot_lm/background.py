"""Rows that leave a training loop without holding it up.

The loop only starts the copy of what is on a device and goes on; one thread waits for the copies,
builds the rows and saves the parts, in the order in which they were given.

    writer = BackgroundWriter(PartWriter(folder, SCORES))
    engine = GradDotProdEngine(model, val_data, store=writer)
    ...                       # the loop, with writer.flush(wait=False) every so many steps
    writer.flush()
"""

import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:  # a run's store is made of these writers
    from graddot_lm.store import PartWriter


class WriterThread:
    """Runs calls one after the other, in a thread that starts with the first.

    What a call raises is raised again, once, by `check` or `wait`. The interpreter ends when the
    calls that were given are done.
    """

    def __init__(self, limit: int = 256) -> None:
        """While `limit` calls are left to do, giving a further one waits."""
        self._executor = ThreadPoolExecutor(1, "graddot-writer")
        self._room = threading.Semaphore(limit)
        self._errors: deque[BaseException] = deque()

    def call(self, function: Callable[..., object], *args: Any) -> None:
        """Have `function(*args)` called."""
        self._room.acquire()
        self._executor.submit(function, *args).add_done_callback(self._note)

    def _note(self, call: Future[object]) -> None:
        """Runs in the thread before the next call, or in `call` if this one is done by then."""
        error = call.exception()
        if error is not None:
            self._errors.append(error)
        self._room.release()

    @property
    def failed(self) -> bool:
        """Whether `check` would raise."""
        return bool(self._errors)

    def check(self) -> None:
        """Raise what a call raised, the earliest first."""
        if self._errors:
            raise self._errors.popleft()

    def wait(self) -> None:
        """Wait until all calls are done; raise what the first that failed raised, and forget what
        the others did."""
        self._executor.submit(lambda: None).result()
        errors, self._errors = self._errors, deque()
        if errors:
            raise errors[0]

    def close(self) -> None:
        """Wait until all calls are done, whether they fail or not; no more may follow."""
        self._executor.shutdown()


class BackgroundWriter:
    """A `PartWriter` whose rows are appended and saved by a thread.

    What goes wrong there, as a full disk, is raised with its own message by the next `append`,
    which then does not take its rows, or `flush`. Of a thread that is given, for several writers to
    share, whoever gave it checks. Rows that could not be saved stay gathered until a flush succeeds.
    Rows that are refused (see `PartWriter.append`) end the writing: what follows them is refused
    too, so that nothing is saved behind a gap.
    """

    def __init__(self, writer: "PartWriter", thread: WriterThread | None = None) -> None:
        self._writer, self._thread = writer, thread or WriterThread()
        self._checks = thread is None
        self._refused: Exception | None = None

    def append(self, rows: Mapping[str, Any], step: int) -> None:
        """Add rows of one step, as `PartWriter.append` does: lists, arrays or tensors, (N,) each.

        Returns at once; tensors on a GPU are copied in the order of its current stream.
        """
        if self._checks:
            self._thread.check()
        self._thread.call(self._append, *_leaving(rows), step)

    def _append(self, rows: dict[str, Any], copied: list[torch.cuda.Event], step: int) -> None:
        if self._refused is not None:
            raise self._refused
        try:
            for event in copied:
                event.synchronize()
            self._writer.append(rows, step)
        except Exception as error:
            self._refused = error
            raise

    def flush(self, wait: bool = True) -> None:
        """Save the rows so far as one more part; if not `wait`, return before it is done."""
        self._thread.call(self._writer.flush)
        if wait:
            self._thread.wait()
        elif self._checks:
            self._thread.check()

    def truncate_after(self, step: int) -> None:
        """Drop all rows of later steps, and what was not saved. Raises GraddotError."""
        self._thread.wait()
        self._writer.truncate_after(step)


def _leaving(rows: Mapping[str, Any]) -> tuple[dict[str, Any], list[torch.cuda.Event]]:
    """A copy of the columns, in pinned memory of those on a GPU, and what says when it is there."""
    copies: dict[str, Any] = {}
    devices = set()
    for name, values in rows.items():
        if isinstance(values, Tensor):
            on_gpu = values.is_cuda
            copies[name] = values.detach().to("cpu", non_blocking=on_gpu, copy=True)
            devices |= {values.device} if on_gpu else set()
        else:
            copies[name] = list(values) if isinstance(values, list | tuple) else np.array(values)
    events = []
    for device in devices:
        events.append(torch.cuda.Event(blocking=True))  # a waiting thread that leaves the CPU alone
        events[-1].record(torch.cuda.current_stream(device))
    return copies, events
