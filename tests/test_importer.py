"""The importer: torch and Relax models, and what is no model at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tvm
from importer_oracle import dense, random, run
from tvm import relax

from tvm_pivot.errors import ModelImportError
from tvm_pivot.importer import import_model
from tvm_pivot.tensors import TensorSpec

# --- torch


class Encoder:
    """Built on demand, so that these tests are skipped rather than fail without torch."""

    @staticmethod
    def block(torch: Any) -> Any:
        class Block(torch.nn.Module):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.norm = torch.nn.LayerNorm(16)
                self.qkv = torch.nn.Linear(16, 48)
                self.mlp = torch.nn.Sequential(
                    torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 16)
                )

            def forward(self, x: Any) -> Any:
                q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
                heads = [t.unflatten(-1, (2, 8)).transpose(1, 2) for t in (q, k, v)]
                mixed = torch.nn.functional.scaled_dot_product_attention(*heads)
                x = x + mixed.transpose(1, 2).flatten(2)
                return x + self.mlp(self.norm(x))

        return Block()


def torch_nets(torch: Any) -> dict[str, tuple[Any, tuple[int, ...]]]:
    nn = torch.nn
    return {
        "conv": (
            nn.Sequential(
                nn.Conv2d(3, 8, 3, padding=1, bias=False),
                nn.BatchNorm2d(8),
                nn.ReLU(),
                nn.Dropout(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(8, 5),
            ),
            (2, 3, 9, 9),
        ),
        "lstm": (nn.LSTM(32, 64, batch_first=True), (2, 3, 32)),
        "gru": (nn.GRU(32, 64, batch_first=True), (2, 3, 32)),
        "lstm two layers, both ways": (
            nn.LSTM(6, 8, num_layers=2, bidirectional=True, dropout=0.5),
            (2, 2, 6),
        ),
        "encoder": (Encoder.block(torch), (1, 5, 16)),
    }


def flat(result: Any) -> list[Any]:
    if hasattr(result, "numpy"):
        return [result.numpy()]
    return [item for part in result for item in flat(part)]


@pytest.mark.parametrize("name", ["conv", "lstm", "gru", "lstm two layers, both ways", "encoder"])
def test_torch_modules(name: str) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    net, shape = torch_nets(torch)[name]
    for buffer in net.buffers():  # batch-norm statistics that would show if left out
        if buffer.dtype.is_floating_point:
            buffer.uniform_(0.5, 1.5)
    x = torch.randn(shape)
    imported = import_model(net, example_inputs=(x,))
    with torch.no_grad():
        want = flat(net.eval()(x))
    assert [spec.shape for spec in imported.inputs] == [shape]
    assert [spec.shape for spec in imported.outputs] == [array.shape for array in want]
    for ours, theirs in zip(run(imported, x.numpy()), want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_torch_keeps_names_flags_and_unused_inputs() -> None:
    torch = pytest.importorskip("torch")

    class Net(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(10, 4)
            self.frozen = torch.nn.BatchNorm1d(4).eval()

        def forward(self, ids: Any, unused: Any, x: Any) -> Any:
            return self.table(ids) + self.frozen(x), x

    net = Net().train()
    net.frozen.eval()
    ids, x = torch.tensor([3, 1]), torch.randn(2, 4)
    imported = import_model(net, example_inputs=(ids, torch.zeros(7), x))
    assert [(s.name, s.dtype) for s in imported.inputs] == [
        ("ids", "int64"),
        ("unused", "float32"),
        ("x", "float32"),
    ]
    assert net.training and net.table.training and not net.frozen.training
    got = run(imported, ids.numpy(), np.zeros(7, "float32"), x.numpy())
    with torch.no_grad():
        want = net(ids, None, x)
    np.testing.assert_allclose(got[0], want[0].numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(got[1], x.numpy())


def test_torch_inputs_as_tensor_or_keywords() -> None:
    torch = pytest.importorskip("torch")
    net = torch.nn.Linear(4, 3)
    x = torch.randn(2, 4)
    one = import_model(net, example_inputs=x)
    named = import_model(net, example_inputs={"input": x})
    assert one.inputs == named.inputs == (TensorSpec("input", (2, 4), "float32"),)


def test_exported_programs_with_open_shapes() -> None:
    torch = pytest.importorskip("torch")
    net = torch.nn.Linear(4, 3)
    batch = torch.export.Dim("batch")
    program = torch.export.export(net, (torch.randn(2, 4),), dynamic_shapes=({0: batch},))
    with pytest.raises(ModelImportError, match=r"ExportedProgram: input 'input'.*open.*shapes="):
        import_model(program)
    imported = import_model(program, shapes={"input": (5, 4)})
    x = torch.randn(5, 4)
    np.testing.assert_allclose(
        run(imported, x.numpy())[0], net(x).detach().numpy(), rtol=1e-5, atol=1e-6
    )


def test_torch_errors_name_module_and_remedy() -> None:
    torch = pytest.importorskip("torch")

    class Odd(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, x: Any) -> Any:
            return torch.nonzero(x)

    class Broken(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, x: Any) -> Any:
            raise RuntimeError("the user's own fault")

    x = torch.randn(3)
    with pytest.raises(ModelImportError, match=r"module Odd: operators.*nonzero.*replace"):
        import_model(Odd(), example_inputs=(x,))
    with pytest.raises(
        ModelImportError, match=r"module Broken.*the user's own fault.*ONNX"
    ) as info:
        import_model(Broken(), example_inputs=(x,))
    assert info.value.__cause__ is not None
    with pytest.raises(ModelImportError, match=r"module Odd: needs example_inputs.*torch\.zeros"):
        import_model(Odd())
    for wrong in ((), (x, 3), (torch.zeros(0),), 3):
        with pytest.raises(ModelImportError, match=r"module Odd: example_inputs"):
            import_model(Odd(), example_inputs=wrong)


# --- Relax


def relax_module(rows: Any = 2) -> tvm.IRModule:
    """main(x [rows, 4], w [4, 3]) = relu(x w)."""
    builder = relax.BlockBuilder()
    rows = tvm.tirx.Var(rows, "int64") if isinstance(rows, str) else rows
    x = relax.Var("x", relax.TensorType([rows, 4], "float32"))
    w = relax.Var("w", relax.TensorType([4, 3], "float32"))
    with builder.function("main", [x, w]):
        with builder.dataflow():
            y = builder.emit_output(relax.op.nn.relu(builder.emit(relax.op.matmul(x, w))))
        builder.emit_func_output(y)
    return builder.get()


def test_relax_modules() -> None:
    mod = relax_module()
    w, x = random(4, 3), random(2, 4)
    imported = import_model(mod, params={"w": w})
    assert imported.inputs == (TensorSpec("x", (2, 4), "float32"),)
    assert imported.outputs == (TensorSpec("output", (2, 3), "float32"),)
    np.testing.assert_allclose(run(imported, x)[0], np.maximum(x @ w, 0), rtol=1e-5)
    assert [spec.name for spec in import_model(mod).inputs] == ["x", "w"]
    assert len(mod["main"].params) == 2


def test_relax_parameters_of_other_array_kinds() -> None:
    w = random(4, 3)
    tensors: list[Any] = [tvm.runtime.tensor(w), np.asfortranarray(w)]
    if "torch" in sys.modules:
        tensors.append(sys.modules["torch"].nn.Parameter(sys.modules["torch"].from_numpy(w)))
    for tensor in tensors:
        got = run(import_model(relax_module(), params={"w": tensor}), random(2, 4))[0]
        np.testing.assert_allclose(got, np.maximum(random(2, 4) @ w, 0), rtol=1e-5)


def test_relax_symbols() -> None:
    with pytest.raises(ModelImportError, match=r"input 'x'.*'n' \(axis 0\).*shapes=\{\"n\": 1\}"):
        import_model(relax_module("n"), params={"w": random(4, 3)})
    for shapes in ({"n": 6}, {"x": (6, 4)}):
        imported = import_model(relax_module("n"), params={"w": random(4, 3)}, shapes=shapes)
        assert imported.inputs[0].shape == (6, 4)
        assert imported.outputs[0].shape == (6, 3)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"v": random(4, 3)}, "names 'v'.*'x', 'w'"),
        ({"w": random(3, 4)}, r"params\['w'\] is float32\[3, 4\].*reshape"),
        ({"w": random(4, 3).astype("float64")}, r"params\['w'\] is float64"),
    ],
)
def test_wrong_relax_parameters(params: Any, message: str) -> None:
    with pytest.raises(ModelImportError, match=message):
        import_model(relax_module(), params=params)


def test_a_relax_module_without_main() -> None:
    with pytest.raises(ModelImportError, match=r"no Relax function 'main'.*name the entry"):
        import_model(tvm.IRModule({"other": relax_module()["main"]}))


# --- what is no model


@pytest.mark.parametrize("model", [None, 3, b"bytes", {"x": 1}, np.zeros(3)])
def test_objects_that_are_no_model(model: Any) -> None:
    with pytest.raises(ModelImportError, match=r"cannot import a .*give the path of an ONNX file"):
        import_model(model)


def test_arguments_for_another_kind_of_model() -> None:
    with pytest.raises(ModelImportError, match="params is only for Relax modules"):
        import_model(dense(), params={"w": random(2)})
    with pytest.raises(ModelImportError, match=r"example_inputs is only for torch.*'a\.onnx'"):
        import_model("a.onnx", example_inputs=(random(2),))


def test_onnx_models_do_not_need_torch(tmp_path: Path) -> None:
    path = tmp_path / "dense.onnx"
    onnx.save(dense(), path)
    code = (
        "import sys; sys.modules['torch'] = None; from tvm_pivot.importer import import_model; "
        f"import_model({str(path)!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
