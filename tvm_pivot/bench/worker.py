"""The process one runtime runs in. It reads requests and writes replies, one JSON object a line.

It is started by its path, with the Python of the runtime's environment, where tvm_pivot may not
be installed: so it loads the folder `runtimes` beside it under a name of its own and needs nothing
but the standard library and NumPy. `workers.Worker` is the other end.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

_FOLDER = Path(__file__).resolve().parent
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve requests until ``close``, the end of stdin, or the death of the controller."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runtime", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--precision", required=True)
    parser.add_argument("--controller", type=int, required=True)
    options = parser.parse_args()
    _die_with(options.controller)
    requests, replies = _take_standard_streams()
    # Python put this folder first; its modules would hide others of the same names.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _FOLDER]
    server = Server(options.runtime, options.threads, options.precision)
    for line in requests:
        reply = server.answer(json.loads(line))
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
        if server.closed:
            break


def _die_with(controller: int) -> None:
    """Have the kernel kill this process when the controller ends, however it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != controller:  # it ended before that
        os._exit(1)


def _take_standard_streams() -> tuple[IO[str], IO[str]]:
    """Keep the streams of the protocol; runtimes get an empty stdin, and print to stderr."""
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return requests, replies


class Server:
    """Answers requests with one runtime, which is loaded by the first of them.

    Attributes:
        closed: whether the last request was ``close``.
    """

    def __init__(self, runtime: str, threads: int, precision: str) -> None:
        self.closed = False
        self._make: Callable[[], Any] = lambda: load_class(runtime)(threads, precision)
        self._runtime: Any = None
        self._actions: dict[str, Callable[..., dict[str, Any]]] = {
            "version": self._version,
            "convert": self._convert,
            "prepare": self._prepare,
            "check": self._check,
            "time": self._time,
            "memory": self._memory,
            "close": self._close,
        }

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply to a request; an error of any kind is a reply too."""
        try:
            if self._runtime is None:
                self._runtime = self._make()
            return self._actions[request.pop("do")](**request)
        except BaseException as e:  # runtimes raise all sorts, SystemExit included
            # By its name: an adapter of a user has the class from the installed package.
            unsupported = any(c.__name__ == "UnsupportedModelError" for c in type(e).__mro__)
            message = str(e) if unsupported else f"{type(e).__name__}: {e}"
            trace = "".join(traceback.format_exception(type(e), e, e.__traceback__))
            return {"error": message, "unsupported": unsupported, "trace": trace}

    def _version(self) -> dict[str, Any]:
        return {"version": self._runtime.version}

    def _convert(self, model: str, folder: str) -> dict[str, Any]:
        began = time.perf_counter()
        files = self._runtime.convert(Path(model), Path(folder))
        return {"files": list(map(str, files)), "seconds": time.perf_counter() - began}

    def _prepare(self, files: list[str]) -> dict[str, Any]:
        # Imports the runtime, whose time and memory are not the model's.
        version = self._runtime.version
        before = _memory_mb("VmRSS")
        began = time.perf_counter()
        self._runtime.prepare([Path(file) for file in files])
        seconds = time.perf_counter() - began
        gc.collect()
        gc.disable()  # no pause of Python's falls into a timed call
        settings = {str(k): str(v) for k, v in self._runtime.settings().items()}
        return {
            "seconds": seconds,
            "version": version,
            "settings": settings,
            "resident_mb": before,
        }

    def _check(self, inputs: str, other: str, names: list[str], outputs: str) -> dict[str, Any]:
        """Run once on `inputs` and write what came out. Later calls of ``time`` use `inputs` too.

        Before the outputs are read, the inputs of another sample are bound: `run` must have done
        the work, on the inputs bound then. CPU time shows who did it.
        """
        import numpy as np

        runtime, arrays = self._runtime, _read(inputs, names)
        runtime.bind(arrays)
        cpu, began = time.process_time(), time.perf_counter()
        runtime.run()
        seconds, run_cpu = time.perf_counter() - began, time.process_time() - cpu
        runtime.bind(_read(other, names))
        cpu = time.process_time()
        found = {name: np.array(y) for name, y in runtime.outputs().items()}
        outputs_cpu = time.process_time() - cpu
        np.savez(outputs, *found.values())
        runtime.bind(arrays)
        return {
            "names": list(found),
            "seconds": seconds,
            "run_cpu_seconds": run_cpu,
            "outputs_cpu_seconds": outputs_cpu,
        }

    def _time(self, warm: int, calls: int, warm_seconds: float = 0.0) -> dict[str, Any]:
        """Time `calls` runs, after `warm` others and as many more as `warm_seconds` takes."""
        run, clock = self._runtime.run, time.perf_counter
        seconds = [0.0] * calls
        began, done = clock(), 0
        while done < warm or clock() - began < warm_seconds:
            run()
            done += 1
        cpu, began = time.process_time_ns(), clock()  # CPU time of all threads
        for i in range(calls):
            start = clock()
            run()
            seconds[i] = clock() - start
        wall, cpu = clock() - began, time.process_time_ns() - cpu
        return {"seconds": seconds, "cpu_seconds": cpu * 1e-9, "wall_seconds": wall}

    def _memory(self) -> dict[str, Any]:
        return {"peak_mb": _memory_mb("VmHWM")}

    def _close(self) -> dict[str, Any]:
        self.closed = True
        self._runtime.close()
        return {}


def load_class(runtime: str) -> Any:
    """The adapter class of a known runtime's name, or of ``file.py:Class``."""
    file, _, class_name = runtime.rpartition(":")
    if file.endswith(".py"):
        return getattr(_load("bench_user_runtime", Path(file)), class_name)
    folder = _FOLDER / "runtimes"
    return _load("bench_runtimes", folder / "__init__.py", [str(folder)]).adapter(runtime)


def _load(name: str, path: Path, folders: list[str] | None = None) -> Any:
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=folders)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {path}")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _read(path: str, names: list[str]) -> dict[str, Any]:
    """Arrays of a file that `numpy.savez` wrote in the order of `names`."""
    import numpy as np

    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[f"arr_{i}"] for i, name in enumerate(names)}


def _memory_mb(field: str) -> float:
    """Resident memory, in 10^6 bytes: ``VmRSS`` is now, ``VmHWM`` the most there ever was."""
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields[field].split()[0]) * 1024 / 1e6
    import resource  # knows only the most there ever was

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


if __name__ == "__main__":
    main()
