"""Small ONNX models, and seeded ways to damage them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

F32, I64 = TensorProto.FLOAT, TensorProto.INT64
EXTREMES = [0, 1, -1, 2, 3, 7, 100_000, 2**31 - 1, 2**31, 2**40, -(2**40), 2**63 - 1, -(2**63)]


def weight(name: str, *shape: int) -> onnx.TensorProto:
    values = np.random.default_rng(list(map(ord, name))).uniform(0.5, 1.5, shape)
    return numpy_helper.from_array(values.astype("float32"), name)


def ints(name: str, values: Any) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values, "int64"), name)


def build(
    nodes: list[onnx.NodeProto],
    weights: list[onnx.TensorProto],
    shape: list[int],
    outputs: list[onnx.ValueInfoProto],
    opset: int,
) -> onnx.ModelProto:
    inputs = [helper.make_tensor_value_info("x", F32, shape)]
    for number, item in enumerate(nodes):
        item.name = f"{item.op_type}_{number}"
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def output(name: str, *shape: int, dtype: int = F32) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def convolutional(opset: int) -> onnx.ModelProto:
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "w", "b"], ["c"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        node("BatchNormalization", ["c", "scale", "shift", "mean", "var"], ["n"]),
        node("Relu", ["n"], ["r"]),
        node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Reshape", ["p", "shape"], ["f"]),
        node("Gemm", ["f", "w2", "b2"], ["y"], transB=1),
    ]
    weights = [
        weight("w", 4, 3, 3, 3),
        ints("shape", [1, 64]),
        weight("w2", 5, 64),
        weight("b2", 5),
    ]
    weights += [weight(name, 4) for name in ("b", "scale", "shift", "mean", "var")]
    outputs = [output("y", 1, 5)]
    if opset < 10:  # operators that changed form
        nodes.append(node("Slice", ["y"], ["s"], starts=[1], ends=[3], axes=[1]))
        nodes.append(node("Upsample", ["c", "scales"], ["u"], mode="nearest"))
        weights.append(numpy_helper.from_array(np.array([1, 1, 2, 2], "float32"), "scales"))
        outputs += [output("s", 1, 2), output("u", 1, 4, 16, 16)]
    return build(nodes, weights, [1, 3, 8, 8], outputs, opset)


def shape_heavy() -> onnx.ModelProto:
    node = helper.make_node
    fill = numpy_helper.from_array(np.array([1.5], "float32"))
    nodes = [
        node("Shape", ["x"], ["shape"]),
        node("ConstantOfShape", ["shape"], ["z"], value=fill),
        node("Add", ["x", "z"], ["a"]),
        node("Slice", ["a", "start", "end", "axis"], ["part"]),
        node("Transpose", ["part"], ["t"], perm=[1, 0, 2]),
        node("Softmax", ["t"], ["soft"], axis=-1),
        node("Concat", ["soft", "soft"], ["both"], axis=1),
        node("ReduceMean", ["both"], ["y"], axes=[1]),
        node("Range", ["r0", "r1", "r2"], ["range"]),
        node("Tile", ["y", "times"], ["tiled"]),
        node("Expand", ["y", "wide"], ["expanded"]),
        node("Pad", ["y", "pads"], ["padded"]),
    ]
    weights = [ints("start", [1]), ints("end", [5]), ints("axis", [1]), ints("times", [1, 1, 2])]
    weights += [ints("r0", 0), ints("r1", 10), ints("r2", 2)]
    weights += [ints("wide", [4, 3, 4]), ints("pads", [0, 0, 0, 1, 1, 1])]
    outputs = [output("y", 4, 1, 4), output("range", 5, dtype=I64), output("tiled", 4, 1, 8)]
    outputs += [output("expanded", 4, 3, 4), output("padded", 5, 2, 5)]
    return build(nodes, weights, [2, 6, 4], outputs, 13)


MODELS: dict[str, Callable[[], onnx.ModelProto]] = {
    "conv17": lambda: convolutional(17),
    "conv9": lambda: convolutional(9),
    "shapes": shape_heavy,
}


# --- the damage


def damage_bytes(data: bytes, dice: random.Random) -> bytes:
    """Flip, replace, delete, insert or cut off a few bytes."""
    out = bytearray(data)
    for _ in range(dice.choice([1, 1, 2, 4])):
        at, kind = dice.randrange(len(out)), dice.randrange(11)
        if kind < 3:
            out[at] ^= 1 << dice.randrange(8)
        elif kind < 5:
            out[at] = dice.randrange(256)
        elif kind < 7:
            del out[at : at + dice.randrange(1, 5)]
        elif kind < 9:
            out[at:at] = dice.randbytes(dice.randrange(1, 5))
        elif kind < 10:
            out[at:at] = b"\xff\xff\xff\xff\x7f"  # a length or size of 2**35
        else:
            del out[max(at, 1) :]
    return bytes(out) or b"\0"


def damage_nodes(graph: onnx.GraphProto, dice: random.Random) -> None:
    node = dice.choice(list(graph.node))
    kind = dice.randrange(7)
    if kind == 0 and node.input:
        del node.input[dice.randrange(len(node.input))]
    elif kind == 1 and node.input:
        names = [name for n in graph.node for name in (*n.input, *n.output)]
        node.input[dice.randrange(len(node.input))] = dice.choice([*names, "", "", "nowhere"])
    elif kind == 2:
        node.op_type = dice.choice(sorted({schema.name for schema in onnx.defs.get_all_schemas()}))
    elif kind == 3:
        node.domain = dice.choice(["ai.onnx", "com.microsoft", "ai.onnx.ml", "x"])
    elif kind == 4:
        graph.node.remove(node)
    elif kind == 5:
        node.output.append("extra")
    else:
        graph.node.append(node)


def damage_attributes(graph: onnx.GraphProto, dice: random.Random) -> None:
    node = dice.choice(list(graph.node))
    if not node.attribute or dice.random() < 0.2:
        name = dice.choice(["axis", "axes", "group", "auto_pad", "mode", "perm", "to", "dilations"])
        extreme = dice.choice(EXTREMES)
        node.attribute.append(
            helper.make_attribute(name, dice.choice([extreme, [extreme], 1.0, "NOTSET"]))
        )
        return
    attribute = dice.choice(list(node.attribute))
    kind = dice.randrange(4)
    if kind == 0:
        node.attribute.remove(attribute)
    elif kind == 1:
        attribute.type = dice.randrange(15)
    elif attribute.ints:
        attribute.ints[dice.randrange(len(attribute.ints))] = dice.choice(EXTREMES)
        if kind == 2:
            attribute.ints.append(dice.choice(EXTREMES))
    else:
        attribute.i = dice.choice(EXTREMES)


def damage_tensors(graph: onnx.GraphProto, dice: random.Random) -> None:
    tensor = dice.choice(list(graph.initializer))
    kind = dice.randrange(5)
    if kind == 0 and tensor.dims:
        tensor.dims[dice.randrange(len(tensor.dims))] = dice.choice(EXTREMES)
    elif kind == 1:
        tensor.data_type = dice.randrange(26)
    elif kind < 4 and tensor.data_type == I64:
        values = np.frombuffer(tensor.raw_data, "int64").copy()
        values[dice.randrange(values.size)] = dice.choice(EXTREMES)
        tensor.raw_data = values.tobytes()
    else:
        tensor.raw_data = tensor.raw_data[:-1]


def damage_inputs(graph: onnx.GraphProto, dice: random.Random) -> None:
    tensor = graph.input[0].type.tensor_type
    kind = dice.randrange(4)
    if kind == 0:
        tensor.elem_type = dice.randrange(26)
    elif kind == 1:
        tensor.shape.dim.add().dim_value = dice.choice(EXTREMES)
    elif kind == 2 and tensor.shape.dim:
        del tensor.shape.dim[-1]
    elif tensor.shape.dim:
        dice.choice(list(tensor.shape.dim)).dim_value = dice.choice(EXTREMES)


def damage_fields(data: bytes, dice: random.Random) -> bytes:
    """Keep the file readable but make it mean something else."""
    model = onnx.ModelProto.FromString(data)
    for _ in range(dice.choice([1, 1, 2, 3])):
        if not model.graph.node:
            break
        if dice.random() < 0.05:
            model.opset_import[0].version = dice.choice([1, 6, 7, 9, 11, 12, 14, 18, 21, 24, 2**40])
        parts = [damage_nodes, damage_attributes, damage_tensors, damage_inputs]
        dice.choices(parts, [4, 4, 4, 2])[0](model.graph, dice)
    return bytes(model.SerializeToString())


def mutants(data: bytes, name: str, count: int) -> Iterator[tuple[str, bytes]]:
    for seed in range(count):
        dice = random.Random(f"{name} {seed}")
        damage = damage_fields if seed % 2 else damage_bytes
        yield f"{name}_{seed:04}.onnx", damage(data, dice)
