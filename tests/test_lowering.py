"""What the passes make of a graph: fused epilogues, shared planes, transposes, plans, reports."""

from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
from tvm import relax

import tvm_pivot
from tvm_pivot.relay_passes import PHASES, Compilation
from tvm_pivot.relay_passes.detect import detect
from tvm_pivot.relay_passes.epilogues import fuse_epilogues
from tvm_pivot.relay_passes.graph import MAIN, live_bindings, op_name
from tvm_pivot.relay_passes.layers import find_layers
from tvm_pivot.targets import resolve

RNG = np.random.default_rng(7)
# The package exports the pass of the same name.
detect_pass = import_module("tvm_pivot.relay_passes.detect")


def module(shapes, body):
    """A Relax module whose main is `body(emit, *inputs)`."""
    builder = relax.BlockBuilder()
    inputs = [relax.Var(f"x{i}", relax.TensorType(s, "float32")) for i, s in enumerate(shapes)]
    with builder.function("main", inputs):
        with builder.dataflow():
            out = builder.emit_output(body(builder.emit, *inputs))
        builder.emit_func_output(out)
    return builder.get()


def conv(emit, x, outputs, kernel=3, stride=1, bias=True):
    channels = int(x.ty.shape.values[1])
    weight = RNG.standard_normal((outputs, channels, kernel, kernel)).astype("float32")
    weight[:, ::2] = 0
    y = emit(relax.op.nn.conv2d(x, relax.const(weight), stride, kernel // 2))
    if not bias:
        return y
    return emit(relax.op.add(y, relax.const(np.ones((1, outputs, 1, 1), "float32"))))


def dense(emit, x, outputs):
    weight = RNG.standard_normal((int(x.ty.shape.values[-1]), outputs)).astype("float32")
    return emit(relax.op.matmul(x, relax.const(weight)))


def lowered(mod, until="lower_layers", sparse=True):
    state = Compilation(mod, resolve("x86"), sparse)
    for phase in PHASES:
        state = phase.run(state)
        if phase.name == until:
            break
    return state


def ops(mod):
    """Names of all operators in main, in order; the kernel's name for a call_tir."""
    names = []
    for _, value in live_bindings(mod[MAIN]):
        name = op_name(value)
        names.append(str(value.args[0].name_hint) if name == "call_tir" else name)
    return names


def kernels(mod):
    return [name for name in ops(mod) if name.startswith(("conv2d_", "dense_"))]


def test_bias_residual_and_clamp_are_one_kernel():
    def body(emit, x, other):
        y = emit(relax.op.add(conv(emit, x, 8), other))
        return relax.op.clip(y, 0, 6)

    mod = module([(1, 8, 9, 9), (1, 8, 9, 9)], body)
    (fused,) = fuse_epilogues(mod, list(find_layers(mod)))
    assert (fused.epilogue.residual, fused.epilogue.low, fused.epilogue.high) == (True, 0.0, 6.0)
    assert fused.bias.tolist() == [1.0] * 8
    names = ops(lowered(mod).mod)
    assert len(kernels(lowered(mod).mod)) == 1
    assert not {"add", "clip", "nn.conv2d"} & set(names)


def test_a_sum_that_is_used_twice_is_not_fused_into():
    def body(emit, x):
        y = conv(emit, x, 8, bias=False)
        return relax.op.add(emit(relax.op.nn.relu(y)), y)

    mod = module([(1, 8, 9, 9)], body)
    (fused,) = fuse_epilogues(mod, list(find_layers(mod)))
    assert fused.end.same_as(fused.layer.var)
    assert not fused.inner


def test_nothing_is_fused_behind_a_clamp():
    def body(emit, x, other):
        return relax.op.add(emit(relax.op.nn.relu(conv(emit, x, 8))), other)

    mod = module([(1, 8, 9, 9), (1, 8, 9, 9)], body)
    (fused,) = fuse_epilogues(mod, list(find_layers(mod)))
    assert not fused.epilogue.residual
    assert fused.epilogue.low == 0.0


def test_a_broadcast_addition_is_not_a_residual():
    def body(emit, x, other):
        return relax.op.add(conv(emit, x, 8), other)

    mod = module([(1, 8, 9, 9), (1, 1, 9, 9)], body)
    (fused,) = fuse_epilogues(mod, list(find_layers(mod)))
    assert fused.residual is None


def test_a_constant_per_pixel_is_not_a_bias():
    def body(emit, x):
        y = conv(emit, x, 8, bias=False)
        return relax.op.add(y, relax.const(np.ones((1, 1, 1, 9), "float32")))

    mod = module([(1, 8, 9, 9)], body)
    (fused,) = fuse_epilogues(mod, list(find_layers(mod)))
    assert fused.end.same_as(fused.layer.var)


def test_of_two_layers_that_meet_the_later_adds_the_earlier():
    def body(emit, x):
        first, second = conv(emit, x, 8), conv(emit, x, 8, kernel=1)
        return relax.op.nn.relu(emit(relax.op.add(second, first)))

    mod = module([(1, 8, 9, 9)], body)
    first, second = fuse_epilogues(mod, list(find_layers(mod)))
    assert not first.epilogue.residual
    assert second.epilogue.residual
    assert second.residual.same_as(first.end)


def test_layers_that_read_alike_share_planes():
    def body(emit, x):
        return relax.op.concat([conv(emit, x, 8), conv(emit, x, 16), conv(emit, x, 4, 5)], 1)

    names = ops(lowered(module([(1, 8, 9, 9)], body)).mod)
    assert sum(name.startswith("pack_planes") for name in names) == 2


def test_a_chain_of_dense_layers_transposes_only_at_its_ends():
    def body(emit, x):
        y = dense(emit, x, 32)
        y = emit(relax.op.nn.gelu(y))
        y = emit(relax.op.multiply(dense(emit, y, 48), relax.const(np.float32(0.5))))
        return dense(emit, y, 16)

    mod = lowered(module([(2, 10, 24)], body)).mod
    assert ops(mod).count("permute_dims") == 2
    assert len(kernels(mod)) == 3


def test_pointwise_convolutions_need_no_data_movement():
    def body(emit, x):
        return conv(emit, emit(relax.op.nn.relu(conv(emit, x, 16, 1))), 8, 1)

    assert set(ops(lowered(module([(1, 8, 9, 9)], body)).mod)) <= {
        "reshape",
        *kernels(lowered(module([(1, 8, 9, 9)], body)).mod),
    }


def test_a_dense_plan_skips_nothing():
    mod = module([(1, 16, 9, 9)], lambda emit, x: conv(emit, x, 16))
    (layer,) = detect(mod, resolve("x86"), sparse=False)
    assert layer.plan.keep_all
    assert not layer.skips
    (pruned,) = detect(mod, resolve("x86"))
    assert pruned.skips
    assert pruned.plan.cycles < layer.plan.cycles
    dense, sparse = (tvm_pivot.build(mod, sparse=s).report.layers[0] for s in (False, True))
    assert (dense.mode, dense.flops_kept) == ("dense", dense.flops_dense)
    assert (sparse.mode, sparse.flops_kept) == ("sparse", sparse.flops_dense // 2)


def test_the_report_shows_layers_as_the_user_gave_them():
    """Dead rows and columns are dropped before layers are planned, yet count as pruned."""
    first = RNG.standard_normal((20, 40)).astype("float32")
    second = RNG.standard_normal((40, 8)).astype("float32")
    first[:, ::2] = 0
    useless = np.zeros((8, 5), "float32")

    def body(emit, x):
        y = emit(relax.op.nn.relu(emit(relax.op.matmul(x, relax.const(first)))))
        y = emit(relax.op.matmul(y, relax.const(second)))
        z = emit(relax.op.matmul(y, relax.const(useless)))
        return relax.op.concat([y, z], 1)

    net = tvm_pivot.build(module([(32, 20)], body))
    a, b, c = net.report.layers
    assert (a.shape, a.density, a.flops_kept * 2) == ((40, 20), 0.5, a.flops_dense)
    assert (b.shape, b.density, b.flops_kept * 2) == ((8, 40), 1.0, b.flops_dense)
    assert (c.pattern, c.flops_kept, c.kernel) == ("dead", 0, "")
    assert "dropped" in net.report.notes[0]
    x = RNG.standard_normal((32, 20)).astype("float32")
    want = np.concatenate([np.maximum(x @ first, 0) @ second, np.zeros((32, 5))], 1)
    np.testing.assert_allclose(net.run(x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("density", [0.02, 0.3, 0.95, 0.999])
@pytest.mark.parametrize("pixels", [1, 64])
def test_a_plan_is_never_predicted_slower_than_dense(density, pixels):
    mask = RNG.random((200, 96)) < density
    weight = np.where(mask, RNG.standard_normal(mask.shape), 0).astype("float32")

    def body(emit, x):
        return relax.op.matmul(x, relax.const(weight))

    mod = module([(pixels, 200)], body)
    (pruned,), (full,) = detect(mod, resolve("x86")), detect(mod, resolve("x86"), sparse=False)
    assert pruned.plan.cycles <= full.plan.cycles


def test_the_report_tells_the_fill_of_other_blocks():
    weight = np.repeat(RNG.random((32, 24)) < 0.3, 4, axis=1) * RNG.standard_normal((32, 96))
    body = module([(40, 32)], lambda emit, x: relax.op.matmul(x, relax.const(weight.astype("f"))))
    (layer,) = tvm_pivot.inspect(body).layers
    fills = {f.block: f.fill for f in layer.fills}
    assert fills["2x1"] == fills["4x1"] == 1.0
    assert layer.density < fills["16x1"] < fills["8x1"] < 1.0
    assert fills["8x8"] < fills["4x4"] < 1.0


def test_float64_layers_are_left_to_tvm():
    x = relax.Var("x", relax.TensorType((4, 8), "float64"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            out = builder.emit_output(relax.op.matmul(x, relax.const(np.ones((8, 3)), "float64")))
        builder.emit_func_output(out)
    net = tvm_pivot.build(builder.get())
    assert net.report.layers == ()
    data = RNG.standard_normal((4, 8))
    np.testing.assert_allclose(net.run(data), data.sum(1, keepdims=True).repeat(3, 1), rtol=1e-12)


def test_inspect_tells_what_build_does():
    mod = module([(1, 16, 9, 9)], lambda emit, x: conv(emit, x, 16))
    seen, net = tvm_pivot.inspect(mod), tvm_pivot.build(mod)
    assert seen.compile_seconds is None
    assert net.report.compile_seconds > 0
    assert [la.reason for la in seen.layers] == [la.reason for la in net.report.layers]
    assert all(la.kernel for la in net.report.layers)


def test_inspect_works_where_build_has_no_schedules_yet():
    mod = module([(1, 16, 9, 9)], lambda emit, x: conv(emit, x, 16))
    bare = replace(resolve("cortex-a76"), name="bare", has_schedules=False)
    assert tvm_pivot.inspect(mod, target=bare).target == "bare"
    with pytest.raises(tvm_pivot.UnsupportedTargetError, match="no schedules yet"):
        tvm_pivot.build(mod, target=bare)


def test_debug_dir_holds_the_module_after_each_phase(tmp_path):
    mod = module([(1, 16, 9, 9)], lambda emit, x: conv(emit, x, 16))
    phases = []
    tvm_pivot.build(mod, debug_dir=tmp_path, progress=phases.append)
    names = [path.name for path in sorted(tmp_path.iterdir())]
    assert names == ["00_import.py"] + [f"{i:02d}_{p.name}.py" for i, p in enumerate(PHASES, 1)]
    assert phases == ["import", *(p.name for p in PHASES), "compile"]
    assert "nn.conv2d" in (tmp_path / "00_import.py").read_text()
    assert "nn.conv2d" not in (tmp_path / names[-1]).read_text()


def test_layers_of_the_same_weights_are_planned_once(monkeypatch):
    planned = []
    plan_layer = detect_pass.plan_layer

    def counted(layer, *rest):
        planned.append(layer.name)
        return plan_layer(layer, *rest)

    monkeypatch.setattr(detect_pass, "plan_layer", counted)
    weight = (RNG.standard_normal((32, 32)) * (RNG.random((32, 32)) < 0.1)).astype("float32")

    def body(emit, x):
        for _ in range(3):
            x = emit(relax.op.tanh(emit(relax.op.matmul(x, relax.const(weight)))))
        return emit(relax.op.matmul(x, relax.const(2 * weight)))

    found = detect(module([(2, 32)], body), resolve("x86"))
    assert len(planned) == 2
    assert len({p.layer.name for p in found}) == 4
    assert found[0].plan is found[2].plan is not found[3].plan
