"""The standing networks are what they claim to be: pruned as asked, healthy, reproducible."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from benchmarks import zoo
from benchmarks.zoo import build, data, files, pruning
from benchmarks.zoo.pruning import Variant

SMALLEST_NORMAL = np.finfo(np.float32).tiny
CIFAR = [name for name, entry in zoo.CATALOGUE.items() if entry.trained]
MODULES = [name for name, entry in zoo.CATALOGUE.items() if entry.file is None]
ULTRAFACE = "ultraface_rfb320.onnx"


def small(name: str) -> dict[str, int]:
    """Size options that make a network quick to build and run."""
    sizes = {"image": {"image": 64}, "length": {"length": 8}}
    if name == "vgg16":  # its classifier shrinks with the image
        return {"image": 32}
    return sizes.get(zoo.find(name).resizable or "", {})


@pytest.fixture
def need_data(request: pytest.FixtureRequest, name: str) -> None:
    """Skips a network whose weights are real data where that is absent."""
    if name in CIFAR:
        request.getfixturevalue("shared_data")


def pruned_weights(name: str, net: nn.Module) -> dict[str, np.ndarray]:
    weights = zoo.prunable_weights(zoo.find(name), net)
    return {key: weight.numpy() for key, weight in weights.items()}


# --- networks -------------------------------------------------------------------------------

PRUNED_LAYERS = {  # by hand, from the papers' tables
    "resnet18": 20,
    "resnet50": 53,
    "vgg16": 15,
    "mobilenet_v1": 13,
    "mobilenet_v2": 34,
    "bert2": 12,
    "mlp": 3,
    "mlp_b1": 3,
    "lstm": 2,
    "gru": 2,
    "resnet20_cifar": 18,
    "resnet56_cifar": 54,
}
PARAMETERS = {  # published sizes in millions, batch norm included, at 1000 classes
    "resnet18": 11.69,
    "resnet50": 25.56,
    "mobilenet_v1": 4.23,
    "mobilenet_v2": 3.50,
}


@pytest.mark.parametrize(("name", "millions"), PARAMETERS.items())
def test_networks_have_their_published_size(name: str, millions: float) -> None:
    net, _ = zoo.build_torch(name, "dense", **small(name))
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 2) == millions


@pytest.mark.usefixtures("need_data")
@pytest.mark.parametrize("name", MODULES)
def test_exactly_the_prunable_layers_are_pruned(name: str) -> None:
    net, _ = zoo.build_torch(name, "8x1@0.1", **small(name))
    weights = pruned_weights(name, net)
    assert len(weights) == PRUNED_LAYERS[name]
    for weight in weights.values():
        matrix = pruning.as_matrix(weight)
        blocks = -(-matrix.shape[0] // 8) * matrix.shape[1]
        kept = pruning.block_scores(matrix, (8, 1)) > 0
        assert kept.sum() == round(0.1 * blocks)
        assert (matrix != 0).sum() <= kept.sum() * 8
        assert (matrix != 0).mean() == pytest.approx(0.1, abs=8 / matrix.size + 1e-2)
    others = {k: p for k, p in net.named_parameters() if k not in weights and p.ndim > 1}
    for key, parameter in others.items():
        assert (parameter != 0).all(), f"{key} must stay dense"
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and (module.in_channels == 3 or module.groups > 1):
            assert (module.weight != 0).all(), "stem and depthwise convolutions stay dense"


@pytest.mark.parametrize("variant", ["16x1@0.05", "1x1@0.1", "1x16@0.2", "8x8@0.1"])
def test_density_and_blocks_are_as_asked(variant: str) -> None:
    asked = Variant.parse(variant)
    net, _ = zoo.build_torch("resnet18", variant, **small("resnet18"))
    for weight in pruned_weights("resnet18", net).values():
        scores = pruning.block_scores(pruning.as_matrix(weight), asked.block)
        assert (scores > 0).sum() == round(asked.density * scores.size)
        assert (weight != 0).mean() == pytest.approx(asked.density, rel=0.02)


def test_hidden_diagonal_has_the_degrees_of_the_plain_one() -> None:
    plain, hidden = (
        pruned_weights("mlp", zoo.build_torch("mlp", variant)[0])
        for variant in ("diag@0.125", "hidden-diag@0.125")
    )
    for key, weight in plain.items():
        assert (weight != 0).mean() == 0.125
        for axis in (0, 1):
            degrees = (weight != 0).sum(axis)
            np.testing.assert_array_equal(degrees, (hidden[key] != 0).sum(axis))
        assert not np.array_equal(weight != 0, hidden[key] != 0)


@pytest.mark.usefixtures("need_data")
@pytest.mark.parametrize("variant", ["dense", "1x1@0.05"])
@pytest.mark.parametrize("name", MODULES)
def test_activations_stay_near_one(name: str, variant: str) -> None:
    net, x = zoo.build_torch(name, variant, **small(name))
    seen = []

    def check(module: nn.Module, _: object, output: Tensor | tuple[Tensor, ...]) -> None:
        y = output[0] if isinstance(output, tuple) else output
        seen.append(module)
        assert torch.isfinite(y).all(), module
        assert 0.05 < y.square().mean().sqrt() < 10, module
        assert not ((y != 0) & (y.abs() < SMALLEST_NORMAL)).any(), f"denormals from {module}"

    for module in net.modules():
        module.register_forward_hook(check)
    with torch.no_grad():
        net(x)
    assert len(seen) >= 2


@pytest.mark.usefixtures("need_data")
@pytest.mark.parametrize("name", MODULES)
def test_same_arguments_give_the_same_network(name: str) -> None:
    options = small(name)
    state = torch.random.get_rng_state()
    first, x = zoo.build_torch(name, "8x1@0.2", **options)
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random state moved"
    torch.manual_seed(12345)  # must not matter
    second, again = zoo.build_torch(name, "8x1@0.2", **options)
    assert torch.equal(x, again)
    assert torch.equal(x, zoo.example_input(name, **options))
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
    if name not in CIFAR:  # trained weights know no seed
        other, different = zoo.build_torch(name, "8x1@0.2", 1, **options)
        assert not torch.equal(x, different)
        for key, weight in pruned_weights(name, first).items():
            assert not np.array_equal(weight, other.state_dict()[key].numpy()), key


def test_calibrated_statistics_are_those_of_the_data() -> None:
    net, _ = zoo.build_torch("resnet18", "8x1@0.1", image=64)
    samples = torch.randn(32, 3, 64, 64, generator=torch.Generator().manual_seed(7))
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    outputs: list[Tensor] = []
    for norm in norms:
        norm.register_forward_hook(lambda _module, _inputs, y: outputs.append(y))
    with torch.no_grad():
        net(samples)
    assert len(norms) == len(outputs) == 20
    for norm, y in zip(norms, outputs, strict=True):
        # A normalised channel has the norm's bias as mean; other data, so only nearly.
        assert (y.mean((0, 2, 3)) - norm.bias).abs().mean() < 0.1
        assert norm.momentum == 0.1


@pytest.mark.parametrize(
    ("arguments", "options", "complaint"),
    [
        (("resnet34", "dense"), {}, "resnet18, resnet50"),
        (("resnet18", "dlmc@0.1"), {"image": 32}, "ResNet-50, not resnet18"),
        (("mlp", "dense"), {"image": 64}, "no image to set"),
        (("resnet18", "dense"), {"length": 8}, "no length to set"),
        (("vgg16", "dense"), {"image": 100}, "multiple of 32"),
    ],
)
def test_impossible_networks_are_refused(
    arguments: tuple[str, str], options: dict[str, int], complaint: str
) -> None:
    name, variant = arguments
    with pytest.raises(ValueError, match=complaint):
        zoo.build_torch(name, variant, **options)


# --- real data ------------------------------------------------------------------------------


def test_missing_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(zoo.MissingDataError, match=r"dlmc_rn50_magnitude_0\.9\.npz"):
        data.dlmc_resnet50_masks({}, 0.1, tmp_path)
    with pytest.raises(zoo.MissingDataError, match="cifar10_test"):
        data.cifar10("test", 1, tmp_path)


def test_dlmc_masks_are_applied_exactly(shared_data: Path) -> None:
    net, _ = zoo.build_torch("resnet50", "dlmc@0.1", image=32)
    weights = pruned_weights("resnet50", net)
    archive = np.load(shared_data / "dlmc_rn50_magnitude_0.9.npz")
    names = {data.dlmc_layer_name(key) for key in weights}
    published = {key for key in archive.files if not key.endswith(".shape")}
    assert names == published - {"initial_conv"}  # all layers, each once, but for the stem
    for key, weight in weights.items():
        layer = data.dlmc_layer_name(key)
        rows, columns = archive[f"{layer}.shape"]
        stored = np.unpackbits(archive[layer], axis=1)[:, :columns].astype(bool)
        assert stored.shape == (rows, weight[0].size)
        taps_first = weight if weight.ndim == 2 else np.moveaxis(weight, 1, 3)
        np.testing.assert_array_equal(taps_first.reshape(rows, -1) != 0, stored, err_msg=key)


def test_dlmc_mask_of_another_network_is_refused(shared_data: Path) -> None:
    with pytest.raises(ValueError, match="64x256"):
        data.dlmc_resnet50_masks({"layer1.1.conv1.weight": (64, 128, 1, 1)}, 0.1, shared_data)
    with pytest.raises(KeyError, match="no counterpart"):
        data.dlmc_resnet50_masks({"features.0.weight": (64, 3, 3, 3)}, 0.1, shared_data)


@pytest.mark.parametrize(
    ("name", "variant", "least"),
    [
        ("resnet20_cifar", "dense", 0.77),
        ("resnet20_cifar", "1x1@0.5", 0.72),
        ("resnet56_cifar", "dense", 0.79),
        ("resnet56_cifar", "1x1@0.5", 0.77),
    ],
)
@pytest.mark.usefixtures("shared_data")
def test_cifar_networks_classify(name: str, variant: str, least: float) -> None:
    net, x = zoo.build_torch(name, variant)
    images, labels = data.cifar10("test", 400)
    assert torch.equal(images[:1], x)
    assert (net(images).argmax(1).numpy() == labels).mean() >= least


# --- ONNX files -----------------------------------------------------------------------------


@pytest.mark.usefixtures("need_data")
@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("resnet18", "8x1@0.1"),
        ("mobilenet_v2", "16x1@0.1"),
        ("bert2", "1x1@0.1"),
        ("mlp_b1", "8x1@0.1"),
        ("lstm", "8x1@0.1"),
        ("gru", "1x1@0.1"),
        ("resnet20_cifar", "dense"),
    ],
)
def test_exported_file_computes_the_same(name: str, variant: str, tmp_path: Path) -> None:
    path = zoo.load(name, variant, tmp_path, **small(name))
    net, x = zoo.build_torch(name, variant, **small(name))
    with torch.no_grad():
        expected = net(x).numpy()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (got,) = session.run(["y"], {"x": x.numpy()})
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.ptp(expected), rtol=0)
    assert {node.op_type for node in onnx.load(path).graph.node}.isdisjoint({"BatchNormalization"})


def test_zeros_survive_the_export(tmp_path: Path) -> None:
    model = onnx.load(zoo.load("resnet18", "8x1@0.1", tmp_path, image=32))
    arrays = [onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    weights = [array for array in arrays if array.ndim > 1]
    assert len(weights) == 21
    *pruned, stem = sorted(float((weight != 0).mean()) for weight in weights)
    assert stem == 1.0
    assert max(pruned) < 0.11
    assert min(pruned) > 0.09


def test_cache_makes_a_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = zoo.load("mobilenet_v1", "1x1@0.10", tmp_path, image=32)
    stale = tmp_path / path.name.replace(path.stem[-10:], "0" * 10)
    os.link(path, stale)
    other = zoo.load("mobilenet_v1", "1x1@0.1", tmp_path, image=32, seed=1)
    assert other != path
    assert stale.exists()  # another seed's file is nobody's to remove

    with monkeypatch.context() as patch:
        patch.setattr("benchmarks.zoo.export.build_torch", None)  # any build would fail
        assert zoo.load("mobilenet_v1", "1x1@0.1", tmp_path, image=32) == path
    path.unlink()
    assert zoo.load("mobilenet_v1", "1x1@0.1", tmp_path, image=32) == path
    assert sorted(tmp_path.iterdir()) == sorted([path, other])  # the stale file has gone


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_recurrent_files_hold_one_layer_and_no_shape_arithmetic(name: str, tmp_path: Path) -> None:
    model = onnx.load(zoo.load(name, "8x1@0.1", tmp_path, length=8))
    operators = [node.op_type for node in model.graph.node]
    assert operators.count(name.upper()) == 1
    assert set(operators) <= {name.upper(), "Transpose", "Squeeze", "Reshape"}
    assert [entry.domain for entry in model.opset_import] == [""]
    weights = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    matrices = [weight for weight in weights if weight.size > 512 * 512]
    assert len(matrices) == 2
    for weight in matrices:
        assert (weight != 0).mean() == pytest.approx(0.1, abs=0.01)


# --- UltraFace, which comes as an ONNX file


@pytest.fixture
def ultraface(shared_data: Path) -> Path:
    path = shared_data / ULTRAFACE
    if not path.is_file():
        pytest.skip(f"needs {path}")
    return path


def run_file(model: Path | onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    source = model if isinstance(model, Path) else model.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {"input": x}))


def test_ultraface_file_computes_what_the_original_does(ultraface: Path, tmp_path: Path) -> None:
    path = zoo.load("ultraface", "dense", tmp_path)
    x = zoo.example_input("ultraface").numpy()
    for got, expected in zip(run_file(path, x), run_file(ultraface, x), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5)
    model = onnx.load(path)
    assert [value.name for value in model.graph.input] == ["input"]
    assert {node.op_type for node in model.graph.node}.isdisjoint({"BatchNormalization", "Shape"})
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]


@pytest.mark.usefixtures("ultraface")
@pytest.mark.parametrize("variant", ["8x1@0.1", "16x1@0.05", "1x1@0.05"])
def test_ultraface_is_pruned_and_healthy(variant: str, tmp_path: Path) -> None:
    asked = Variant.parse(variant)
    model = onnx.load(zoo.load("ultraface", variant, tmp_path))
    weights = files.prunable_initializers(model)
    assert len(weights) == 33
    for name, weight in weights.items():
        scores = pruning.block_scores(pruning.as_matrix(weight), asked.block)
        assert (scores > 0).sum() == max(1, round(asked.density * scores.size)), name
    names = [node.output[0] for node in model.graph.node if node.op_type == "Conv"]
    assert len(names) == 52
    model.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names
    )
    for y in run_file(model, zoo.example_input("ultraface").numpy()):
        assert np.isfinite(y).all()
        assert 1e-3 < np.sqrt(np.square(y).mean()) < 20
        assert not ((y != 0) & (np.abs(y) < SMALLEST_NORMAL)).any()


def test_ultraface_is_no_module_and_missing_without_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="not a torch module"):
        zoo.build_torch("ultraface")
    monkeypatch.setattr("benchmarks.zoo.export.data_file", lambda n: data.data_file(n, tmp_path))
    with pytest.raises(zoo.MissingDataError, match=ULTRAFACE):
        zoo.load("ultraface", "dense", tmp_path)
    assert not list(tmp_path.iterdir())


def test_prune_leaves_a_dense_network_alone() -> None:
    entry = zoo.find("mlp")
    net, _ = zoo.build_torch("mlp")
    before = {key: value.clone() for key, value in net.state_dict().items()}
    build.prune(entry, net, Variant())
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key])
