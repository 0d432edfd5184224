"""How many threads a network runs on.

TVM keeps one pool of worker threads per *calling* thread, made on first use. Left alone, such a
pool takes half of the logical CPUs, binds its workers to the first cores of the machine, and
narrows the caller's own CPU affinity, which child processes inherit. So the pool is configured
here before it is first used: as many threads as asked for, on the CPUs the caller may use.
"""

from __future__ import annotations

import os
import threading

from . import runtime
from .errors import PivotError

# ThreadGroup::kSpecifyThreadShareAllCore: all threads may run on all of the CPUs given.
_SHARE_CPUS = -3
# How often a worker that has nothing to do looks for work before it sleeps; TVM reads this as it
# starts one. Its own 300,000 times take a whole core for 0.2 s after every run, and after the start
# of each worker that is not used; these take 7 ms, far longer than a pause within a network.
_SPIN = ("TVM_THREAD_POOL_SPIN_COUNT", "10000")


class _Pool(threading.local):
    """What this thread's pool is set to; 0 before the first run on this thread."""

    count = 0


current = _Pool()


def default_count() -> int:
    """Threads a network uses when the user does not say.

    ``TVM_NUM_THREADS`` if set, else ``OMP_NUM_THREADS`` (TVM's own order), else one per
    physical core that this process may use.

    Raises:
        PivotError: one of the variables is set and is not a positive whole number.
    """
    import psutil

    usable = len(_usable_cpus())
    return _from_environment() or min(usable, psutil.cpu_count(logical=False) or usable)


def check_count(count: int) -> int:
    """`count` if it is a possible number of threads.

    Raises:
        PivotError: not an int, not positive, or more than there are CPUs for.
    """
    limit = max(len(_usable_cpus()), _from_environment() or 0)
    if type(count) is not int or not 1 <= count <= limit:
        raise PivotError(
            f"threads must be a whole number from 1 to {limit}, not {count!r}; "
            f"this process may use {len(_usable_cpus())} CPUs (TVM_NUM_THREADS allows more)"
        )
    return count


def configure(count: int, *, required: bool) -> None:
    """Make the calling thread's TVM pool use `count` threads, the caller included.

    Args:
        count: as many, at most, as `check_count` allows.
        required: whether fewer are an error.

    Raises:
        PivotError: TVM made this thread's pool before tvm_pivot could, and it is too small.
    """
    os.environ.setdefault(*_SPIN)
    cpus = [str(cpu) for cpu in _usable_cpus()]
    # The pool, if this call makes it, gets as many workers as there are entries.
    entries = cpus * -(-count // len(cpus))
    runtime.function("runtime.config_threadpool")(_SHARE_CPUS, count, entries)
    got = int(runtime.function("runtime.NumThreads")())
    if got != count and required:
        raise PivotError(
            f"{count} threads asked for, but TVM already made a pool of {got} on this thread; "
            f"set TVM_NUM_THREADS={count} in the environment, or run on a fresh thread"
        )
    current.count = count


def _from_environment() -> int | None:
    for name in ("TVM_NUM_THREADS", "OMP_NUM_THREADS"):
        text = os.environ.get(name)
        if text:
            first = text.split(",")[0].strip()  # OpenMP allows one number per nesting level
            if not first.isdecimal() or int(first) == 0:
                raise PivotError(f"{name}={text!r} is not a positive whole number")
            return int(first)
    return None


def _usable_cpus() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
