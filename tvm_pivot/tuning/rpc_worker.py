"""One trial after the other on remote devices, in a process of its own.

A remote device that stops answering blocks whoever talks to it, in TVM's C++ code. Only a process
can be ended then. Requests come as JSON lines on stdin, results leave as JSON lines on stdout:
``{"seconds": [...]}``, ``{"failed": why}`` if the candidate is to blame, ``{"lost": why}`` if the
device may be.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Argument = tuple[str, tuple[int, ...]]
# Given the artifact's path and each argument's dtype and shape, the arguments' contents. None: any
# numbers do, and the device makes them up.
Allocate = Callable[[Path, Sequence[Argument]], Sequence[npt.NDArray[Any] | None]]


def any_floats(artifact: Path, arguments: Sequence[Argument]) -> list[None]:
    """Leave it to the device to fill floats with random numbers.

    Raises:
        ValueError: an argument holds integers. They may be indices, and random ones would make a
            candidate read out of bounds.
    """
    integers = [dtype for dtype, _ in arguments if not dtype.startswith(("float", "bfloat"))]
    if integers:
        raise ValueError(f"{artifact.name} takes {integers[0]}: say how to allocate its arguments")
    return [None for _ in arguments]


def find_function(name: str) -> Allocate:
    """The function ``"package.module:function"``.

    Raises:
        ValueError: there is none.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as e:
        raise ValueError(f"no function {name!r}: {e}") from e
    if not callable(found):
        raise ValueError(f"{name!r} is no function")
    return found  # type: ignore[no-any-return]


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Do one trial: connect, upload, allocate, time."""
    from tvm import rpc

    try:
        session = rpc.connect(
            request["host"], request["port"], request["password"], request["timeout_s"]
        )
    except Exception as e:
        return {"lost": _one_line(e)}
    try:
        return {"seconds": _time(session, request)}
    except Exception as e:
        return {"failed" if _answers(session) else "lost": _one_line(e)}


def _time(session: Any, request: dict[str, Any]) -> list[float]:
    path = Path(request["artifact"])
    arguments = [(dtype, tuple(shape)) for dtype, shape in request["arguments"]]
    contents = find_function(request["allocate"])(path, arguments)
    if len(contents) != len(arguments):
        raise ValueError(
            f"{request['allocate']} made {len(contents)} of {len(arguments)} arguments"
        )
    session.upload(str(path), path.name)
    module = session.load_module(path.name)
    device = session.device(request["device"], 0)
    pairs = zip(contents, arguments, strict=True)
    tensors = [_tensor(session, device, content, *argument) for content, argument in pairs]
    evaluator = module.time_evaluator(
        "main",
        device,
        number=request["number"],
        repeat=request["repeat"],
        min_repeat_ms=request["min_repeat_ms"],
    )
    return [float(seconds) for seconds in evaluator(*tensors).results]


def _tensor(
    session: Any,
    device: Any,
    content: npt.NDArray[Any] | None,
    dtype: str,
    shape: tuple[int, ...],
) -> Any:
    import tvm

    if content is None:
        tensor = tvm.runtime.empty(shape, dtype, device)
        session.get_function("tvm.contrib.random.random_fill_for_measure")(tensor)
        return tensor
    if content.shape != shape or str(content.dtype) != dtype:
        found = f"{content.dtype} {content.shape}"
        raise ValueError(f"an argument is {dtype} {shape}, but {found} was made for it")
    return tvm.runtime.tensor(np.ascontiguousarray(content), device)


def _answers(session: Any) -> bool:
    """Whether the device survived its last call."""
    try:
        session.get_function("tvm.rpc.server.workpath")("x")
    except Exception:
        return False
    return True


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]


def main() -> None:
    """Serve requests until stdin ends."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what TVM prints is not a result
    os.environ["TVM_USE_RUNTIME_LIB"] = "1"  # no compiler: 90 MB instead of 400
    from ..runtime import ffi

    ffi()
    print("{}", file=results, flush=True)
    for line in sys.stdin:
        result = measure(json.loads(line))
        gc.collect()  # a session ends with the last object that refers to it
        print(json.dumps(result), file=results, flush=True)


if __name__ == "__main__":
    main()
