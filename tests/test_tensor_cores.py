"""The tensor-core kernels: their CUDA text, emulated on the CPU, against float64; and compiled."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tensor_core_oracle import aligned_bits, emulated, needs_compiler, rounded, stored_bits

from benchmarks.gpu import tensor_core_cases
from tvm_pivot.fragments import from_bits
from tvm_pivot.layout import BlockShape
from tvm_pivot.pack_tensor_cores import pack_tensor_cores
from tvm_pivot.planes import AxisGeometry
from tvm_pivot.schedules.problems import Epilogue
from tvm_pivot.schedules.tensor_core_rule import choose_tensor_core_tile, roofline
from tvm_pivot.schedules.tensor_cores import (
    TABLES,
    TensorCoreProblem,
    TensorCoreTile,
    entry_source,
    kernel_name,
    tensor_core_kernel,
    window_columns,
)
from tvm_pivot.targets import PRESETS

RELU, EVERYTHING = Epilogue(low=0.0), Epilogue(residual=True, low=-0.5, high=1.5)
PLAIN = Epilogue()
# A unit of the last place in the stored type.
EPSILON = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-20}


A100, ADA, H100 = (PRESETS[name].gpu for name in ("a100", "rtx-4090", "h100"))


def matrix_problem(n, k, m, rows, images=1, dtype="float16", out=None, epilogue=RELU, **more):
    """A dense layer, or a 1 x 1 convolution."""
    size = (images, n, k, m, k * m, rows, -(-n // rows))
    out = out or ("float32" if dtype == "tf32" else dtype)
    return TensorCoreProblem(*size, dtype, out, epilogue, **more)


def conv_problem(n, channels, window, rows, images=1, epilogue=RELU, dtype="float16"):
    y, x = window
    taps, pixels = y.kernel * x.kernel, y.output * x.output
    size = (images, n, channels * taps, pixels, channels * y.size * x.size, rows, -(-n // rows))
    out = "float32" if dtype == "tf32" else dtype
    return TensorCoreProblem(*size, dtype, out, epilogue, window)


def sparse(rng, problem, density=0.3):
    """A weight of R x 1 blocks in values that the problem's type holds."""
    n, k, rows = problem.outputs, problem.columns, problem.block_rows
    kept = np.repeat(rng.random((-(-n // rows), k)) < density, rows, axis=0)[:n]
    return rounded(rng.standard_normal((n, k)), problem.dtype) * kept


def unfolded(image, window):
    """Every tap of every channel as a row over the output pixels: [images, columns, pixels]."""
    y, x = window
    far = (y.before + y.kernel * y.dilation, x.before + x.kernel * x.dilation)
    padded = np.pad(image, ((0, 0), (0, 0), (y.before, far[0]), (x.before, far[1])))
    taps = []
    for channel in range(image.shape[1]):
        for ky in range(y.kernel):
            for kx in range(x.kernel):
                down, right = ky * y.dilation, kx * x.dilation
                rows = slice(down, down + y.output * y.stride, y.stride)
                cols = slice(right, right + x.output * x.stride, x.stride)
                tap = padded[:, channel, rows, cols][:, : y.output, : x.output]
                taps.append(tap.reshape(image.shape[0], -1))
    return np.stack(taps, axis=1)


def check(problem, tile, folder, seed=0, **edit):
    """Emulate the kernel on random values and compare with float64."""
    rng = np.random.default_rng(seed)
    weight = sparse(rng, problem)
    given = rng.standard_normal((problem.images, problem.image_halves)).astype(np.float32)
    x = rounded(given, problem.dtype)
    if problem.window is None:
        columns = x.reshape(problem.images, problem.columns, problem.pixels)
        offsets, taps = np.arange(problem.columns, dtype=np.int32) * problem.pixels, None
    else:
        y, w = problem.window
        channels = problem.image_halves // (y.size * w.size)
        offsets, taps = window_columns(channels, problem.window)
        columns = unfolded(x.reshape(problem.images, channels, y.size, w.size), problem.window)
    bias = rng.standard_normal(problem.outputs).astype(np.float32)
    residual = rng.standard_normal(problem.output).astype(np.float32)
    if problem.dtype != "tf32":
        given, residual = x, rounded(residual, problem.dtype)
    want = weight.astype(np.float64) @ columns.astype(np.float64) + bias[:, None]
    epilogue = problem.epilogue
    if epilogue.residual:
        want += residual
    low, high = epilogue.low, epilogue.high
    want = np.clip(want, -np.inf if low is None else low, np.inf if high is None else high)
    team = tile.team(problem.block_rows)
    packed = pack_tensor_cores(weight, team, dtype=problem.dtype, offsets=offsets, taps=taps)
    halves = problem.out_dtype != "float32"
    out = np.full(problem.output, 0xFFFF if halves else np.nan, "uint16" if halves else "float32")
    run = emulated(problem, tile, folder, **edit)
    dtype = problem.dtype
    run(aligned_bits(given, dtype), packed, bias, stored_bits(residual, dtype), out, seed)
    got = from_bits(out, problem.dtype) if halves else out
    np.testing.assert_allclose(got, want, rtol=EPSILON[problem.out_dtype], atol=1e-4)


def tile(rows, columns, blocks, pixels, slab, slots, cluster, producers, loader, grid, size=2):
    return TensorCoreTile(
        rows, columns, blocks, pixels, slab, slots, 5, cluster, producers, loader, grid, size
    )


@needs_compiler
@pytest.mark.parametrize(
    ("problem", "choice"),
    [
        (matrix_problem(300, 160, 72, 32), tile(2, 1, 1, 64, 32, 2, 2, 1, "bulk", 2)),
        (matrix_problem(300, 160, 72, 16), tile(2, 1, 2, 32, 32, 3, 4, 1, "bulk", 4)),
        (
            matrix_problem(100, 160, 40, 8, images=2, epilogue=EVERYTHING),
            tile(2, 1, 2, 32, 64, 2, 1, 1, "bulk", 2),
        ),
        (
            matrix_problem(100, 96, 72, 16, images=2, dtype="bfloat16"),
            tile(1, 2, 2, 32, 32, 2, 1, 2, "async", 2),
        ),
        (
            matrix_problem(70, 96, 72, 8, out="float32", epilogue=EVERYTHING),
            tile(1, 1, 2, 64, 32, 2, 1, 2, "async", 2),
        ),
        (
            matrix_problem(70, 96, 49, 32, images=3, epilogue=EVERYTHING),
            tile(1, 1, 1, 64, 32, 2, 1, 1, "gather", 2),
        ),
        (
            matrix_problem(300, 160, 76, 32, dtype="tf32"),
            tile(2, 1, 1, 64, 32, 2, 2, 1, "bulk", 2, 4),
        ),
        (
            matrix_problem(100, 96, 72, 16, images=2, dtype="tf32", epilogue=EVERYTHING),
            tile(1, 2, 2, 32, 32, 2, 1, 2, "async", 2, 4),
        ),
        (
            matrix_problem(70, 160, 44, 8, images=2, dtype="tf32", epilogue=EVERYTHING),
            tile(2, 1, 2, 64, 64, 2, 1, 1, "bulk", 2, 4),
        ),
        (
            matrix_problem(70, 96, 49, 8, images=3, dtype="tf32", epilogue=EVERYTHING),
            tile(1, 1, 2, 64, 32, 2, 1, 1, "gather", 2, 4),
        ),
    ],
    ids=lambda value: value.loader if isinstance(value, TensorCoreTile) else value.block_rows,
)
def test_matrices(problem, choice, tmp_path):
    check(problem, choice, tmp_path)


@needs_compiler
@pytest.mark.parametrize(
    ("axes", "rows", "dtype"),
    [
        ((AxisGeometry(9, 3, 2, 1, 1, 1), AxisGeometry(7, 3, 1, 1, 1, 1)), 16, "float16"),
        ((AxisGeometry(8, 1, 2), AxisGeometry(8, 5, 1, 2, 3, 4)), 8, "float16"),
        ((AxisGeometry(9, 3, 2, 1, 1, 1), AxisGeometry(7, 3, 1, 1, 1, 1)), 32, "tf32"),
    ],
)
def test_convolutions(axes, rows, dtype, tmp_path):
    problem = conv_problem(40, 8, axes, rows, images=3, epilogue=EVERYTHING, dtype=dtype)
    size = problem.element_bytes
    check(problem, tile(2, 1, 2, 64, 24, 2, 1, 1, "gather", 1, size), tmp_path)


@needs_compiler
def test_a_missing_rounding_would_be_found(tmp_path):
    def truncated(text):
        assert text.count("round_tf32(v.x)") == 1
        return text.replace("round_tf32(v.x)", "v.x")

    problem = matrix_problem(64, 96, 200, 16, dtype="tf32")
    with pytest.raises(AssertionError):
        choice = tile(1, 1, 2, 64, 32, 2, 1, 1, "bulk", 1, 4)
        check(problem, choice, tmp_path, edit=truncated)


@needs_compiler
@pytest.mark.parametrize("line", ["barrier_wait(full, ring.parity);", "await_copies<0>();"])
def test_a_missing_wait_would_be_found(line, tmp_path):
    def without(text):
        assert text.count(line) == 1
        return text.replace(line, "")

    problem = matrix_problem(64, 96, 200, 16)
    with pytest.raises(AssertionError):
        check(problem, tile(1, 1, 2, 64, 32, 2, 1, 1, "bulk", 1), tmp_path, edit=without)


PROBLEMS = {
    "32x32": matrix_problem(4096, 4096, 4096, 32, block_columns=32),
    "16x16": matrix_problem(4096, 4096, 4096, 16, block_columns=16, epilogue=EVERYTHING),
    "8x1": matrix_problem(2048, 512, 4096, 8),
    "8x1 float32": matrix_problem(512, 512, 4096, 8, out="float32", epilogue=EVERYTHING),
    "16x1 bfloat16": matrix_problem(512, 2048, 512, 16, dtype="bfloat16", epilogue=PLAIN),
    "3x3": conv_problem(128, 128, (AxisGeometry(28, 3, 1, 1, 1, 1),) * 2, 8, 64, EVERYTHING),
    "3x3 stride 2": conv_problem(256, 128, (AxisGeometry(28, 3, 2, 1, 1, 1),) * 2, 16, 1),
    "7x7 pixels": conv_problem(512, 512, (AxisGeometry(7, 3, 1, 1, 1, 1),) * 2, 32, 64, EVERYTHING),
    "tf32 8x1": matrix_problem(2048, 512, 4096, 8, dtype="tf32", epilogue=EVERYTHING),
    "tf32 16x1": matrix_problem(512, 2048, 512, 16, dtype="tf32", epilogue=EVERYTHING),
    "tf32 32x1": matrix_problem(4096, 4096, 4096, 32, dtype="tf32"),
    "tf32 3x3": conv_problem(
        128, 128, (AxisGeometry(28, 3, 1, 1, 1, 1),) * 2, 8, 64, EVERYTHING, "tf32"
    ),
    "tf32 7x7 pixels": conv_problem(
        512, 512, (AxisGeometry(7, 3, 1, 1, 1, 1),) * 2, 32, 64, EVERYTHING, "tf32"
    ),
    "tf32 3x3 stride 2": conv_problem(
        256, 128, (AxisGeometry(28, 3, 2, 1, 1, 1),) * 2, 16, 1, EVERYTHING, "tf32"
    ),
    "1x1 of 196": matrix_problem(1024, 256, 196, 16, images=8, epilogue=EVERYTHING),
}


@pytest.mark.parametrize("chip", [A100, ADA, H100], ids=lambda chip: chip.arch)
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_rule_keeps_to_the_chip(name, chip):
    problem = PROBLEMS[name]
    choice, cost = choose_tensor_core_tile(problem, 0.1, chip)
    assert choice.shared_bytes(problem.block_rows) <= chip.shared_bytes - 1024
    assert choice.grid % choice.cluster == 0
    assert choice.cluster == 1 or chip is H100
    assert (choice.loader == "gather") == (not problem.aligned)
    assert choice.threads <= 1024
    assert cost.seconds > max(cost.tensor, cost.memory)
    _, sparser = choose_tensor_core_tile(problem, 0.05, chip)
    assert sparser.seconds <= cost.seconds
    assert cost == roofline(problem, choice, 0.1, chip)


def test_no_tile_before_ampere():
    turing = replace(A100, arch="sm_75")
    assert choose_tensor_core_tile(PROBLEMS["32x32"], 0.1, turing) is None
    with pytest.raises(ValueError, match="compute capability"):
        choose_tensor_core_tile(PROBLEMS["32x32"], 0.1, replace(A100, arch="ampere"))


def test_functions_name_their_tables():
    problem = PROBLEMS["16x16"]
    choice, _ = choose_tensor_core_tile(problem, 0.1, H100)
    func = tensor_core_kernel(problem, choice)
    names = [param.name for param in func.params]
    assert names == ["X", *(name for name, _ in TABLES), "residual", "Y"]
    assert kernel_name(problem, choice) in func.script()
    assert "clusterCtaIdx.x" in func.script()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("chip", [A100, H100], ids=lambda chip: chip.arch)
def test_kernels_compile_without_spills(chip, tmp_path):
    text, choices = "", {}
    narrow = {"narrow": matrix_problem(63, 56, 3136, 32)}  # dense, all rows in one team
    for name, problem in (PROBLEMS | narrow).items():
        choice, _ = choose_tensor_core_tile(problem, 1.0 if name in narrow else 0.1, chip)
        body = kernel_name(problem, choice)
        choices[f"entry_{body}"] = name, choice
        text += entry_source(problem, choice)
    source = tmp_path / "kernels.cu"
    source.write_text(text)
    command = ["nvcc", "-std=c++17", "-cubin", f"-arch={chip.arch}", "-Xptxas", "-v", str(source)]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "kernels.cubin")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers",
        done.stderr,
        re.DOTALL,
    )
    assert {entry for entry, *_ in report} == choices.keys()
    spilled = {
        choices[entry]: (out, back) for entry, out, back, _ in report if int(out) + int(back)
    }
    assert not spilled
    # Registers go to warps by fours of them.
    for entry, *_, registers in report:
        warps = -(-choices[entry][1].threads // 128) * 4
        assert int(registers) * 32 * warps <= 65536


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_cases_for_a_gpu_are_built_without_one(tmp_path):
    rng = np.random.default_rng(0)
    case = tensor_core_cases.random_case(rng, 256, 128, BlockShape(16, 16), 0.3)
    entry = tensor_core_cases.build(case, tmp_path, 7, "sm_90")
    assert json.loads(json.dumps(entry)) == entry
    cubin = (tmp_path / entry["cubin"]).read_bytes()
    assert {variant["tile"]["cluster"] for variant in entry["variants"]} >= {1, 2}
    assert {variant["tile"]["loader"] for variant in entry["variants"]} == {"bulk", "async"}
    for variant in entry["variants"]:
        assert variant["kernel"].encode() in cubin
        tables = np.load(tmp_path / variant["tables"])
        assert len(tables.files) == len(TABLES)
    assert np.array_equal(np.load(tmp_path / entry["weight"])["weight"], case.weight)


def test_the_page_shows_the_rooflines_of_today():
    page = (Path(__file__).parents[1] / "docs" / "tensor_cores.md").read_text()
    assert "\n".join(tensor_core_cases.table(None, "sm_90")) in page
