"""An ONNX file as a ``.tflite`` file, by onnx2tf and TensorFlow's own converter.

Neither of them says how it ordered the axes of inputs and outputs. So the inputs' order is chosen
here and the outputs' is read off their shapes; where those fit several orders, off their values.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from .litert import Layout, TensorLayout
from .litert_onnx import channels_last_ranks, prepared
from .protocol import Array, Port, UnsupportedModelError, ports

Axes = tuple[int, ...]

_SAMPLE_IMAGES = (20, 128, 128, 3)  # shape of what onnx2tf would download


def convert(path: Path) -> tuple[bytes, Layout]:
    """Convert an ONNX file.

    Returns:
        What to write into the ``.tflite`` file, and how inputs and outputs lie in it.

    Raises:
        UnsupportedModelError: one of the converters refuses the model.
    """
    import onnxsim  # noqa: F401 (it crashes unless it is loaded before TensorFlow)

    inputs, outputs = ports(path)
    _keep_freed_memory()
    model = prepared(path)
    transposed = channels_last_ranks(model)
    input_axes = [
        _channels_last(len(port.shape)) if len(port.shape) in transposed else _as_is(port)
        for port in inputs
    ]
    content = _to_tflite(_to_keras(model, inputs, input_axes))
    del model
    output_axes = _output_axes(path, content, inputs, input_axes, outputs)
    return content, Layout(
        _layout(inputs, input_axes, "input"), _layout(outputs, output_axes, "output")
    )


def _layout(of: Sequence[Port], axes: Sequence[Axes], kind: str) -> tuple[TensorLayout, ...]:
    return tuple(
        TensorLayout(port.name, f"{kind}_{i}", port.dtype, axes[i]) for i, port in enumerate(of)
    )


def _as_is(port: Port) -> Axes:
    return tuple(range(len(port.shape)))


def _channels_last(rank: int) -> Axes:
    return (0, *range(2, rank), 1)


def _keep_freed_memory() -> None:
    """Have malloc use freed memory again instead of returning it to the system at once.

    The converters copy all weights many times. Half of their time would be page faults.
    """
    if sys.platform == "linux":
        trim_threshold, top_pad, mmap_max = -1, -2, -4
        with contextlib.suppress(OSError, AttributeError):  # not glibc
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(trim_threshold, 2**31 - 1)
            mallopt(top_pad, 1 << 28)
            mallopt(mmap_max, 0)


def _to_keras(model: onnx.ModelProto, inputs: Sequence[Port], input_axes: Sequence[Axes]) -> Any:
    """The model in Keras, with its inputs and outputs in the order of the ONNX file."""
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from onnx2tf import onnx2tf

    # It would download them, even where it is given other inputs to check itself with.
    onnx2tf.download_test_image_data = lambda: np.zeros(_SAMPLE_IMAGES, np.float32)
    names = [port.name.replace(":", "__") for port in inputs]  # as it renames them
    untouched = [
        name
        for name, port, axes in zip(names, inputs, input_axes, strict=True)
        if axes == _as_is(port)
    ]
    try:
        with tempfile.TemporaryDirectory() as folder:
            samples = []
            for i, (port, axes) in enumerate(zip(inputs, input_axes, strict=True)):
                samples.append([names[i], f"{folder}/{i}.npy"])
                np.save(samples[-1][1], _sample(port, axes))
            return onnx2tf.convert(
                onnx_graph=model,
                output_folder_path=folder,
                disable_model_save=True,
                not_use_onnxsim=True,
                not_use_opname_auto_generate=True,
                keep_shape_absolutely_input_names=untouched or None,
                custom_input_op_name_np_data_path=samples,
                replace_to_pseudo_operators=["erf"],  # LiteRT has none; alone, not inside GELU
                non_verbose=True,
            )
    except (Exception, SystemExit) as e:
        node = getattr(e, "onnx_op_name", None)
        where = f" at {node}" if node else ""
        raise UnsupportedModelError(f"onnx2tf cannot convert the model{where}: {e}") from e


def _sample(port: Port, axes: Axes) -> Array:
    """An input for onnx2tf to check its steps with, in the order of axes of its own model.

    It brings this into the order of the ONNX file if the shapes differ, and only then. So where
    they do not, the values are the same in both orders.
    """
    array = _noise(port.shape, np.dtype(port.dtype)).transpose(axes)
    if axes != _as_is(port) and array.shape == port.shape:
        turned = array
        for _ in axes[2:]:
            turned = turned.transpose(axes)
            array = array + turned
    return np.ascontiguousarray(array)


def _to_tflite(model: Any) -> bytes:
    """A ``.tflite`` file with the signature ``input_0, ... -> output_0, ...``."""
    import tensorflow as tf

    signature = [
        tf.TensorSpec(tensor.shape, tensor.dtype, name=f"input_{i}")
        for i, tensor in enumerate(model.inputs)
    ]

    def compute(*inputs: Any) -> dict[str, Any]:
        results = model(list(inputs))
        if not isinstance(results, (list, tuple)):
            results = [results]
        return {f"output_{i}": result for i, result in enumerate(results)}

    # Given the Keras model itself, the converter would first write all weights as JSON.
    module = tf.Module()
    module.compute = tf.function(compute, input_signature=signature)
    function = module.compute.get_concrete_function()
    # Not the model's own list: some depthwise weights are missing there.
    module.weights = list(function.variables)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function], module)
    converter.exclude_conversion_metadata = True
    try:
        return bytes(converter.convert())
    except Exception as e:
        missing = sorted(set(re.findall(r"'tf\.(\w+)' op is neither", str(e))))
        reason = f"LiteRT has no {', '.join(missing)}" if missing else str(e).partition("\n")[0]
        raise UnsupportedModelError(f"TensorFlow cannot convert the model: {reason}") from e


def _output_axes(
    path: Path,
    content: bytes,
    inputs: Sequence[Port],
    input_axes: Sequence[Axes],
    outputs: Sequence[Port],
) -> list[Axes]:
    """How the axes of each output of an ONNX file are ordered in the ``.tflite`` file."""
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(model_content=content).get_signature_runner()
    shapes = runner.get_output_details()
    fitting = [
        _fitting(port, tuple(map(int, shapes[f"output_{i}"]["shape"])))
        for i, port in enumerate(outputs)
    ]
    if all(len(orders) == 1 for orders in fitting):
        return [orders[0] for orders in fitting]

    import onnxruntime

    arrays = [_noise(port.shape, np.dtype(port.dtype), seed) for seed, port in enumerate(inputs)]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    wanted = session.run(
        [port.name for port in outputs],
        {port.name: array for port, array in zip(inputs, arrays, strict=True)},
    )
    fed = {
        f"input_{i}": np.ascontiguousarray(array.transpose(axes))
        for i, (array, axes) in enumerate(zip(arrays, input_axes, strict=True))
    }
    found = runner(**{key: fed[key] for key in runner.get_input_details()})
    return [_nearest(orders, wanted[i], found[f"output_{i}"]) for i, orders in enumerate(fitting)]


def _fitting(port: Port, shape: tuple[int, ...]) -> list[Axes]:
    """The orders of axes that onnx2tf may have chosen, by the shape of its result."""
    rank = len(port.shape)
    orders = dict.fromkeys((_as_is(port), _channels_last(rank) if rank > 2 else _as_is(port)))
    found = [axes for axes in orders if _same_shape([port.shape[axis] for axis in axes], shape)]
    if not found:
        raise UnsupportedModelError(
            f"onnx2tf made {port.name} of shape {port.shape} one of shape {shape}"
        )
    return found


def _same_shape(declared: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether a shape is what an ONNX file declares, in which -1 may stand for any size."""
    return len(declared) == len(shape) and all(
        a in (b, -1) for a, b in zip(declared, shape, strict=True)
    )


def _nearest(orders: Sequence[Axes], wanted: Array, found: Array) -> Axes:
    """The order of axes that brings `wanted` closest to `found`."""

    def distance(axes: Axes) -> float:
        return float(np.abs(np.subtract(wanted.transpose(axes), found, dtype=np.float64)).max())

    return min(orders, key=distance)


def _noise(shape: tuple[int, ...], dtype: np.dtype[Any], seed: int = 0) -> Array:
    """Values from 0 to 1; zeros for integers, which may be indices, and truths."""
    values = np.random.default_rng(seed).random(shape, np.float32)
    return values.astype(dtype)
