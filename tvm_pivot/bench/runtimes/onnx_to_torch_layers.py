"""Translations of ONNX layers: convolutions, dense layers, pooling, normalisation, resizing."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .onnx_to_torch_graph import Operator, Value, shape

_CONV = (F.conv1d, F.conv2d, F.conv3d)
_CONV_TRANSPOSE = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_MAX_POOL = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
_AVG_POOL = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)


class _Window:
    """Where the window of a convolution or pooling goes, per spatial axis.

    Attributes:
        kernel, strides, dilations: as in the node, or the operator's defaults.
        begins, ends: padding before and after.
    """

    def __init__(self, op: Operator, kernel: Sequence[int]) -> None:
        sizes = shape(op.input(0))[2:]
        rank = len(sizes)
        if not 1 <= rank <= 3:
            raise op.unsupported(f"{rank} spatial axes")
        self.kernel = tuple(kernel)
        self.strides = tuple(op.get("strides", (1,) * rank))
        self.dilations = tuple(op.get("dilations", (1,) * rank))
        mode = op.get("auto_pad", "NOTSET")
        if mode in ("SAME_UPPER", "SAME_LOWER"):
            totals = [
                max((math.ceil(size / stride) - 1) * stride + (k - 1) * dilation + 1 - size, 0)
                for size, k, stride, dilation in zip(
                    sizes, self.kernel, self.strides, self.dilations, strict=True
                )
            ]
            small = tuple(total // 2 for total in totals)
            large = tuple(total - total // 2 for total in totals)
            self.begins, self.ends = (small, large) if mode == "SAME_UPPER" else (large, small)
        else:
            pads = (0,) * (2 * rank) if mode == "VALID" else op.get("pads", (0,) * (2 * rank))
            self.begins, self.ends = tuple(pads[:rank]), tuple(pads[rank:])

    @property
    def symmetric(self) -> bool:
        """Whether torch can pad by itself."""
        return self.begins == self.ends and min(self.begins) >= 0

    @property
    def pool_pads(self) -> bool:
        """Whether torch's pooling can pad by itself: by half a window at most."""
        return self.symmetric and all(
            2 * pad <= k for pad, k in zip(self.begins, self.kernel, strict=True)
        )

    def pad(self, op: Operator, x: Value, fill: float) -> Any:
        """Pad `x` in a step of its own."""
        pairs = zip(reversed(self.begins), reversed(self.ends), strict=True)
        return op.emit(F.pad, x, [amount for pair in pairs for amount in pair], "constant", fill)


def _conv(op: Operator) -> Any:
    x, weight = op.input(0), op.input(1)
    window = _Window(op, shape(weight)[2:])
    padding = window.begins
    if not window.symmetric:
        x, padding = window.pad(op, x, 0.0), (0,) * len(padding)
    function = _CONV[len(padding) - 1]
    groups = op.get("group", 1)
    bias = op.optional(2)
    return op.emit(function, x, weight, bias, window.strides, padding, window.dilations, groups)


def _conv_transpose(op: Operator) -> Any:
    weight = op.input(1)
    window = _Window(op, shape(weight)[2:])
    if op.get("auto_pad", "NOTSET") != "NOTSET" or "output_shape" in op.attributes:
        raise op.unsupported("auto_pad and output_shape")
    if not window.symmetric:
        raise op.unsupported(f"pads {window.begins} and {window.ends}")
    extra = tuple(op.get("output_padding", (0,) * len(window.begins)))
    groups = op.get("group", 1)
    function = _CONV_TRANSPOSE[len(extra) - 1]
    before = (op.input(0), weight, op.optional(2), window.strides, window.begins)
    return op.emit(function, *before, extra, groups, window.dilations)


def _max_pool(op: Operator) -> Any:
    x, window = op.input(0), _Window(op, op.get("kernel_shape"))
    padding = window.begins
    if not window.pool_pads:
        x, padding = window.pad(op, x, -math.inf), (0,) * len(padding)
    function = _MAX_POOL[len(padding) - 1]
    ceil = bool(op.get("ceil_mode", 0))
    return op.emit(function, x, window.kernel, window.strides, padding, window.dilations, ceil)


def _average_pool(op: Operator) -> Any:
    x, window = op.input(0), _Window(op, op.get("kernel_shape"))
    if set(window.dilations) != {1}:
        raise op.unsupported(f"dilations {window.dilations}")
    rank = len(window.begins)
    function, ceil = _AVG_POOL[rank - 1], bool(op.get("ceil_mode", 0))
    counted = bool(op.get("count_include_pad", 0))
    places = (window.kernel, window.strides)
    if window.pool_pads:
        return op.emit(function, x, *places, window.begins, ceil, counted)
    result = op.emit(function, window.pad(op, x, 0.0), *places, (0,) * rank, ceil)
    if counted:
        return result
    ones = window.pad(op, torch.ones(1, 1, *shape(x)[2:]), 0.0)
    return op.emit(operator.truediv, result, op.emit(function, ones, *places, (0,) * rank, ceil))


def _global_pool(function: Callable[..., Any]) -> Callable[[Operator], Any]:
    def translate(op: Operator) -> Any:
        axes = tuple(range(2, len(shape(op.input(0)))))
        return op.emit(function, op.input(0), axes, keepdim=True)

    return translate


def _gemm(op: Operator) -> Any:
    a, b, c = op.input(0), op.input(1), op.optional(2)
    if op.get("transA", 0):
        a = op.emit(torch.t, a)
    if not op.get("transB", 0):
        b = op.emit(torch.t, b)
    if op.get("alpha", 1.0) != 1.0:
        b = op.emit(operator.mul, b, op.get("alpha"))
    if c is not None and op.get("beta", 1.0) != 1.0:
        c = op.emit(operator.mul, c, op.get("beta"))
    features = shape(b)[0]
    if isinstance(c, Tensor) and c.numel() == features and shape(c)[-1:] == (features,):
        return op.emit(F.linear, a, b, c.reshape(features))
    result = op.emit(F.linear, a, b)
    return result if c is None else op.emit(operator.add, result, c)


def _matmul(op: Operator) -> Any:
    a, b = op.input(0), op.input(1)
    if isinstance(b, Tensor) and b.ndim == 2:
        return op.emit(F.linear, a, b.t().contiguous())
    return op.emit(torch.matmul, a, _in_two_steps(op, b))


def _in_two_steps(op: Operator, value: Value) -> Any:
    """A permuted factor as a permutation that keeps the last two axes in order, and their swap.

    So people write the keys of attention. TorchInductor takes any one permutation of them for the
    swap alone and gets the product wrong (PyTorch's issue 195320).
    """
    if isinstance(value, Tensor) or value.target is not torch.permute:
        return value
    source, order = value.args
    *leading, row, column = cast(tuple[int, ...], order)
    kept = (*leading, column, row)
    if row < column or kept == tuple(range(len(kept))):
        return value
    return op.emit(torch.transpose, op.emit(torch.permute, source, kept), -2, -1)


def _batch_norm(op: Operator) -> Any:
    if op.get("training_mode", 0):
        raise op.unsupported("training mode")
    x, weight, bias, mean, variance = (op.input(index) for index in range(5))
    epsilon = op.get("epsilon", 1e-5)
    return op.emit(F.batch_norm, x, mean, variance, weight, bias, False, 0.0, epsilon)


def _instance_norm(op: Operator) -> Any:
    x, weight, bias = (op.input(index) for index in range(3))
    return op.emit(F.instance_norm, x, weight=weight, bias=bias, eps=op.get("epsilon", 1e-5))


def _layer_norm(op: Operator) -> Any:
    size = shape(op.input(0))
    size = size[op.axis(op.get("axis", -1), len(size)) :]
    scale, bias = (
        None if value is None else op.emit(torch.broadcast_to, value, size)
        for value in (op.input(1), op.optional(2))
    )
    return op.emit(F.layer_norm, op.input(0), size, scale, bias, op.get("epsilon", 1e-5))


def _local_response_norm(op: Operator) -> Any:
    numbers = (op.get("alpha", 1e-4), op.get("beta", 0.75), op.get("bias", 1.0))
    return op.emit(F.local_response_norm, op.input(0), op.get("size"), *numbers)


def _resize(op: Operator) -> Any:
    x, size = op.input(0), shape(op.input(0))
    result = _resized(op, size)
    if result[:2] != size[:2]:
        raise op.unsupported("more than the spatial axes change")
    mode, space, rounding = _resize_modes(op)
    if mode == "nearest":
        whole = all(new % old == 0 for new, old in zip(result, size, strict=True))
        floors = (space, rounding) == ("asymmetric", "floor")
        # Rounding a pixel's middle is rounding its corner down, if sizes grow by whole factors.
        if not floors and not (whole and space.endswith("half_pixel") and "round" in rounding):
            raise op.unsupported(f"nearest, {space}, {rounding}")
        return op.emit(F.interpolate, x, result[2:], mode="nearest")
    if space not in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        raise op.unsupported(f"{mode}, {space}")
    names = {("linear", 3): "linear", ("linear", 4): "bilinear", ("linear", 5): "trilinear"}
    names |= {("cubic", 4): "bicubic"}
    if (mode, len(size)) not in names or op.get("antialias", 0):
        raise op.unsupported(f"{mode}, rank {len(size)}, antialias {op.get('antialias', 0)}")
    corners = space == "align_corners"
    named = names[mode, len(size)]
    return op.emit(F.interpolate, x, result[2:], mode=named, align_corners=corners)


def _resize_modes(op: Operator) -> tuple[str, str, str]:
    """The mode, how coordinates are mapped, and how they are rounded to the nearest."""
    old = op.opset < 11
    space = op.get("coordinate_transformation_mode", "asymmetric" if old else "half_pixel")
    rounding = op.get("nearest_mode", "floor" if old else "round_prefer_floor")
    if op.get("cubic_coeff_a", -0.75) != -0.75 or op.get("exclude_outside", 0):
        raise op.unsupported("cubic_coeff_a and exclude_outside")
    return op.get("mode", "nearest"), space, rounding


def _resized(op: Operator, size: Sequence[int]) -> tuple[int, ...]:
    """The shape that Resize or Upsample gives."""
    if "axes" in op.attributes or op.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise op.unsupported("axes and keep_aspect_ratio_policy")
    sizes = op.ints(3)
    if sizes:
        return tuple(sizes)
    scales = op.get("scales")
    if scales is None:
        given = op.constant(2 if len(op.inputs) > 2 else 1)
        scales = [] if given is None else given.tolist()
    exact = [length * scale for length, scale in zip(size, scales, strict=True)]
    if any(length != int(length) for length in exact):
        raise op.unsupported(f"scales {scales} of {tuple(size)}, which leave fractions")
    return tuple(int(length) for length in exact)


LAYERS: dict[str, Callable[[Operator], Any]] = {
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_pool(torch.mean),
    "GlobalMaxPool": _global_pool(torch.amax),
    "InstanceNormalization": _instance_norm,
    "LRN": _local_response_norm,
    "LayerNormalization": _layer_norm,
    "MatMul": _matmul,
    "MaxPool": _max_pool,
    "Resize": _resize,
    "Upsample": _resize,
}
