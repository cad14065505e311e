"""Progress bars of one process."""

import threading

from tqdm import tqdm


class Bar(tqdm):
    """tqdm's, without its lock for bars of several processes: as of Python 3.14 that comes with a process of
    its own, which outlives one that is killed and warns of the lock."""


Bar.set_lock(threading.RLock())
