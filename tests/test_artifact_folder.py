"""Networks exported to a directory: the same as in one file, and checked as well."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import tiny

from tvm_pivot import artifact
from tvm_pivot.errors import ArtifactError

X = np.linspace(-1, 1, 16, dtype=np.float32).reshape(1, 16)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good artifact in one file."""
    return tiny.relu().export(tmp_path_factory.mktemp("artifact") / "relu.pivot")


def test_a_directory_is_what_the_file_holds(saved: Path, tmp_path: Path) -> None:
    folder = artifact.load(saved).export(tmp_path / "net")
    with zipfile.ZipFile(saved) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == members
    assert artifact.read_manifest(folder) == artifact.read_manifest(saved)
    loaded = artifact.load(folder)
    np.testing.assert_array_equal(loaded.run(X), np.maximum(X, 0))
    (folder / "mine.txt").write_text("kept")
    assert loaded.export(folder) == folder
    assert (folder / "mine.txt").read_text() == "kept"
    assert loaded.export(tmp_path / "again.pivot").read_bytes() == saved.read_bytes()
    readme = (folder / "README.md").read_text()
    assert "float32 [1, 16]" in readme
    assert "cc -O2 -rdynamic -o run run.c pivot.c" in readme


def test_damaged_directories_are_refused(saved: Path, tmp_path: Path) -> None:
    folder = artifact.load(saved).export(tmp_path / "net")
    library, manifest = folder / "lib.so", folder / "manifest.json"
    data, text = library.read_bytes(), manifest.read_text()
    for path, content, message in (
        (library, data[:-1], "lib.so has"),
        (library, data[:-1] + b"?", "its SHA-256 is not the manifest's"),
        (library, None, "no exported network: it has no lib.so"),
        (manifest, b"{", "not valid JSON"),
        (manifest, text.replace('"format": 5', '"format": 3').encode(), "artifact format 3"),
        (manifest, None, "no exported network: it has no manifest.json"),
    ):
        before = path.read_bytes()
        path.write_bytes(content) if content is not None else path.unlink()
        with pytest.raises(ArtifactError, match=message) as caught:
            artifact.load(folder)
        assert str(folder) in str(caught.value)
        path.write_bytes(before)
    artifact.load(folder)
