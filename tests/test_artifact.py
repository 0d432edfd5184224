"""Saving and loading: what is written comes back, and whatever is damaged is refused."""

from __future__ import annotations

import gc
import json
import os
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tvm
from tvm import relax

from tvm_pivot import artifact, runtime
from tvm_pivot.errors import ArtifactError, PivotError
from tvm_pivot.manifest import FORMAT, Document, Manifest
from tvm_pivot.session import Session
from tvm_pivot.targets import PRESETS, missing_features, needed_features

X = np.linspace(-1, 1, 16, dtype=np.float32).reshape(1, 16)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good artifact."""
    return tiny.relu().export(tmp_path_factory.mktemp("artifact") / "relu.pivot")


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where libraries are unpacked; checks that nothing stays behind."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    gc.collect()
    assert list(folder.iterdir()) == []


def test_round_trip(saved: Path) -> None:
    built, loaded = tiny.relu(), artifact.load(saved)
    assert isinstance(loaded, Session)
    assert (loaded.inputs, loaded.outputs) == (built.inputs, built.outputs)
    assert loaded.report == built.report
    assert loaded.manifest == built.manifest == artifact.read_manifest(saved)
    np.testing.assert_array_equal(loaded.run(X), built.run(X))


def test_load_takes_a_number_of_threads(saved: Path) -> None:
    assert artifact.load(str(saved), threads=1).threads == 1
    with pytest.raises(PivotError, match="threads must be a whole number"):
        artifact.load(saved, threads=0)


def test_the_unpacked_library_is_private_and_goes_with_the_session(
    saved: Path, temporary: Path
) -> None:
    net = artifact.load(saved)
    (folder,) = temporary.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    y = net.run(X)
    del net
    gc.collect()
    assert list(temporary.iterdir()) == []
    np.testing.assert_array_equal(y, np.maximum(X, 0))


def test_a_loaded_session_can_be_exported_again(saved: Path, tmp_path: Path) -> None:
    again = artifact.load(saved).export(tmp_path / "again.pivot")
    assert again.read_bytes() == saved.read_bytes()


def test_another_process_can_load_it(saved: Path) -> None:
    code = (
        "import sys, numpy as np; from tvm_pivot.artifact import load;"
        "print(load(sys.argv[1]).run(np.full((1, 16), 3, np.float32)).sum())"
    )
    command = [sys.executable, "-c", code, str(saved)]
    # Anywhere but the top of the source tree, so that the installed package is imported.
    cwd = Path(__file__).parent
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True)
    assert done.stdout == "48.0\n"


def test_tvms_lines_about_scopes_are_held_back_and_others_are_not(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = ("x", (1, 16), "float32")
    weight = relax.const(np.ones((16, 16), np.float32))
    first, second = (tiny.compiled([x], lambda x: relax.op.matmul(x, weight)) for _ in range(2))
    net = Session(first, tiny.manifest([x], [("y", (1, 16), "float32")]))
    net.run(np.ones((1, 16), np.float32))  # what was not run has no scopes to tell of
    relax.VirtualMachine(second.jit(), tvm.cpu())
    capfd.readouterr()
    load_module = runtime.load_module

    def chatty(path: Path) -> Any:
        os.write(2, b"something else\n")
        return load_module(path)

    monkeypatch.setattr(runtime, "load_module", chatty)
    artifact.load(net.export(tmp_path / "x.pivot"))
    assert capfd.readouterr().err == "something else\n"
    second.export_library(str(tmp_path / "lib.so"))
    assert "Scope Saving" in capfd.readouterr().err, "TVM is quiet now: _no_scope_lines can go"


def test_a_failed_export_leaves_the_old_file_and_nothing_else(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "old.pivot"
    path.write_text("old")
    net = artifact.load(saved)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifact.shutil, "copyfileobj", full)
    with pytest.raises(ArtifactError, match=r"cannot write .*old.pivot: No space left"):
        net.export(path)
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old.pivot", "temporary"]


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="there is no directory"):
        tiny.relu().export(tmp_path / "absent" / "x.pivot")
    (tmp_path / "x.pivot").mkdir()
    with pytest.raises(ArtifactError, match=r"cannot write .*: Is a directory"):
        tiny.relu().export(tmp_path / "x.pivot")
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match=r"cannot write .*: File exists"):
        tiny.relu().export(tmp_path / "file")
    with pytest.raises(ArtifactError, match="it has files that are no exported network"):
        tiny.relu().export(tmp_path)


def test_without_a_compiler_the_error_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ArtifactError, match=r"cannot link .*; is a C\+\+ compiler there\?"):
        tiny.relu().export(tmp_path / "x.pivot")


def test_a_session_of_a_bare_module_cannot_be_exported(tmp_path: Path) -> None:
    module = tiny.relu_executable().jit()
    specs = [("x", (1, 16), "float32")], [("y", (1, 16), "float32")]
    with pytest.raises(ArtifactError, match="made from a bare TVM module"):
        Session(module, tiny.manifest(*specs)).export(tmp_path / "x.pivot")


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rebuilt(path: Path, parts: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return path


def with_manifest(saved: Path, path: Path, *place: Any, value: Any) -> Path:
    """A copy of `saved` with one place of its manifest.json replaced, or removed (`...`)."""
    parts = members(saved)
    document = json.loads(parts["manifest.json"])
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    parts["manifest.json"] = json.dumps(document).encode()
    return rebuilt(path, parts)


def test_other_compression_and_an_untouched_manifest_are_fine(saved: Path, tmp_path: Path) -> None:
    path = rebuilt(tmp_path / "x.pivot", members(saved), zipfile.ZIP_BZIP2)
    np.testing.assert_array_equal(artifact.load(path).run(X), np.maximum(X, 0))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("format",), 3, "artifact format 3; this tvm_pivot reads format 5"),
        (("format",), "1", "artifact format '1'"),
        (("format",), ..., "artifact format None"),
        (("library_bytes",), ..., "missing library_bytes"),
        (("library_bytes",), 7, "lib.so has [0-9]+ bytes, the manifest says 7"),
        (("library_bytes",), 1 << 60, "lib.so has [0-9]+ bytes, the manifest says"),
        (("library_bytes",), -1, "the manifest says -1"),
        (("library_sha256",), "0" * 64, "its SHA-256 is not the manifest's"),
        (("library_sha256",), None, "library_sha256: expected a string"),
        (("more",), 1, "unknown more"),
        (("manifest",), [], "manifest: expected an object"),
        (("manifest", "name"), 1, "manifest.name: expected a string"),
        (("manifest", "package_version"), ..., "manifest: missing package_version"),
        (("manifest", "tvm_version"), "0.26.0", r"made with TVM 0.26.0, this is TVM 0.27"),
        (("manifest", "tvm_version"), "1.27.0", r"made with TVM 1.27.0"),
        (("manifest", "tvm_version"), 0.27, "tvm_version: expected a string"),
        (("manifest", "inputs"), [], "takes 1 inputs, its manifest says 0"),
        (("manifest", "inputs", 0, "shape"), "1x16", r"inputs\[0\].shape: expected a list"),
        (("manifest", "inputs", 0, "dtype"), "float31", "NumPy has no dtype 'float31'"),
        (("manifest", "outputs", 0, "name"), 1, r"outputs\[0\].name: expected a string"),
        (("manifest", "target", "lanes"), "16", "target.lanes: expected an integer"),
        (("manifest", "target", "tvm"), [], "target.tvm: expected an object"),
        (("manifest", "target", "family"), "arm", r"made for target 'x86' \(arm, aarch64\), which"),
        (("manifest", "report", "layers", 0, "density"), 2, "density must lie between 0 and 1"),
    ],
)
def test_each_field_of_the_manifest_is_checked(
    saved: Path, tmp_path: Path, place: Any, value: Any, message: str
) -> None:
    path = with_manifest(saved, tmp_path / "x.pivot", *place, value=value)
    with pytest.raises(ArtifactError, match=message) as caught:
        artifact.load(path)
    assert str(path) in str(caught.value)


def test_code_for_other_machines_is_refused(saved: Path, tmp_path: Path) -> None:
    arm = json.loads(json.dumps(asdict(PRESETS["cortex-a76"])))
    path = with_manifest(saved, tmp_path / "arm.pivot", "manifest", "target", value=arm)
    with pytest.raises(ArtifactError, match=r"made for target 'cortex-a76' \(arm, aarch64\)"):
        artifact.load(path)
    newest = {"kind": "llvm", "mcpu": "graniterapids", "mattr": ["+avx10.2"]}
    needed = needed_features(replace(PRESETS["x86-avx512"], tvm=newest))
    assert "avx10.2" in missing_features(needed)
    path = with_manifest(saved, tmp_path / "new.pivot", "manifest", "features", value=list(needed))
    with pytest.raises(ArtifactError, match=r"may use .*avx10.2.*; this CPU has not: build it"):
        artifact.load(path)
    assert artifact.read_manifest(path).features == needed


def test_what_linux_offers_is_what_llvm_offers() -> None:
    host = tvm.get_global_func("tvm.codegen.llvm.GetHostCPUFeatures")()
    offered = {str(name) for name, present in host.items() if present}
    for preset in PRESETS.values():
        needed = set(needed_features(preset))
        assert set(missing_features(needed)) == needed - offered
    assert missing_features(["no-such-thing"]) == ("no-such-thing",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: {"manifest.json": parts["manifest.json"]}, "expected manifest.json and lib"),
        (lambda parts: {"lib.so": parts["lib.so"]}, "found 'lib.so'"),
        (lambda parts: {}, "found nothing"),
        (lambda parts: {**parts, "extra.txt": b""}, "found 'extra.txt'"),
        (lambda parts: {**parts, "../../evil.so": b"x"}, "found '../../evil.so'"),
        (lambda parts: {**parts, "/lib.so": b"x"}, "found '/lib.so'"),
        (lambda parts: {**parts, "manifest.json": b"{}"}, "artifact format None"),
        (lambda parts: {**parts, "manifest.json": b"[1]"}, "artifact format None"),
        (lambda parts: {**parts, "manifest.json": b"{"}, "not valid JSON"),
        (lambda parts: {**parts, "lib.so": b""}, "lib.so has 0 bytes"),
        (lambda parts: {**parts, "lib.so": parts["lib.so"][:-1]}, "lib.so has"),
        (lambda parts: {**parts, "lib.so": parts["lib.so"][:-1] + b"?"}, "SHA-256 is not"),
    ],
)
def test_other_members_are_refused(saved: Path, tmp_path: Path, change: Any, message: str) -> None:
    path = rebuilt(tmp_path / "x.pivot", change(members(saved)))
    with pytest.raises(ArtifactError, match=message):
        artifact.load(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_twice_is_refused(saved: Path, tmp_path: Path) -> None:
    path = rebuilt(tmp_path / "x.pivot", members(saved))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("lib.so", b"other")
    with pytest.raises(ArtifactError, match=r"found 'lib\.so'"):
        artifact.load(path)


def test_a_library_of_another_network_or_none_is_refused(saved: Path, tmp_path: Path) -> None:
    """The hash is right, so only loading can tell."""
    for name, library in (("text", b"not a library"), ("object", bytes(tiny_object(tmp_path)))):
        path = tmp_path / f"{name}.pivot"
        source = tmp_path / f"{name}.so"
        source.write_bytes(library)
        artifact.save(path, source, artifact.read_manifest(saved))
        with pytest.raises(ArtifactError, match=r"cannot be loaded|has no function 'main'"):
            artifact.load(path)


def tiny_object(folder: Path) -> bytes:
    """A shared library that is no network."""
    (folder / "empty.c").write_text("int nothing;\n")
    command = ["gcc", "-shared", "-o", str(folder / "empty.so"), str(folder / "empty.c")]
    subprocess.run(command, check=True)
    return (folder / "empty.so").read_bytes()


def test_a_huge_declared_size_is_refused_before_anything_is_unpacked(
    saved: Path, tmp_path: Path, temporary: Path
) -> None:
    parts = members(saved)
    for name in ("manifest.json", "lib.so"):
        path = rebuilt(tmp_path / "x.pivot", parts)
        data = bytearray(path.read_bytes())
        # The uncompressed size stands 24 bytes into a member's entry in the central directory.
        entry = data.rindex(b"PK\x01\x02", 0, data.rindex(name.encode()))
        data[entry + 24 : entry + 28] = (0xFFFF_FFF0).to_bytes(4, "little")
        path.write_bytes(data)
        with pytest.raises(ArtifactError, match=f"{name} is too large|{name} has 4294967280 bytes"):
            artifact.load(path)
        assert list(temporary.iterdir()) == []


def test_a_zip_bomb_unpacks_no_further_than_the_manifest_says(saved: Path, tmp_path: Path) -> None:
    parts = members(saved)
    parts["lib.so"] = bytes(200 << 20)
    path = rebuilt(tmp_path / "x.pivot", parts, zipfile.ZIP_DEFLATED)
    with pytest.raises(ArtifactError, match=r"lib\.so has 209715200 bytes, the manifest says"):
        artifact.load(path)


def test_what_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"cannot read .*absent.pivot: No such file"):
        artifact.load(tmp_path / "absent.pivot")
    with pytest.raises(ArtifactError, match="it has no manifest"):
        artifact.load(tmp_path)
    for name, data in (("empty", b""), ("text", b"hello"), ("zeros", bytes(100_000))):
        path = tmp_path / f"{name}.pivot"
        path.write_bytes(data)
        with pytest.raises(ArtifactError, match=f"{name}.pivot is not an artifact"):
            artifact.load(path)


def check(path: Path, right: tuple[Manifest, bytes]) -> bool:
    """Whether a damaged file is refused; if not, it must hold exactly what was saved."""
    unpacked = path.with_suffix(".so")
    unpacked.unlink(missing_ok=True)
    try:
        with artifact._opened(path) as archive:
            document = artifact._read_document(archive)
            artifact._extract(archive, unpacked, document)
    except ArtifactError:
        return True
    assert (document.manifest, unpacked.read_bytes()) == right
    return False


@pytest.fixture
def small(saved: Path, tmp_path: Path) -> tuple[Path, bytes, tuple[Manifest, bytes]]:
    """An artifact with a library of a few bytes, so that every byte of it can be damaged."""
    source = tmp_path / "small.so"
    source.write_bytes(bytes(range(64)))
    path = artifact.save(tmp_path / "small.pivot", source, artifact.read_manifest(saved))
    parts = members(path)
    # What `load` reads: the rest is not its own to check.
    kept = {name: parts[name] for name in ("manifest.json", "lib.so")}
    rebuilt(path, kept, zipfile.ZIP_DEFLATED)
    return path, path.read_bytes(), (artifact.read_manifest(saved), bytes(range(64)))


def test_every_truncation_is_refused(small: Any) -> None:
    path, data, right = small
    for length in range(len(data)):
        path.write_bytes(data[:length])
        assert check(path, right), length


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_every_flipped_byte_is_refused_or_harmless(small: Any, mask: int) -> None:
    path, data, right = small
    harmless = []
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :])
        if not check(path, right):
            harmless.append(place)
    # Dates and such in the archive's own headers, and the last bits of a compressed member.
    assert len(harmless) < len(data) / 5


def test_manifests_say_what_made_them() -> None:
    manifest = tiny.relu().manifest
    assert manifest.tvm_version == str(tvm.__version__)
    assert manifest.package_version[0].isdigit()
    document = Document(FORMAT, 1, "0" * 64, None, manifest)
    assert Document.from_json(document.to_json()).manifest == manifest
    assert os.sep not in document.to_json()
