"""The repository itself: what it ships, how it is written, and that its documents are true."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import typer.main

import tvm_pivot
from tvm_pivot.cli import app

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("tvm_pivot", "relay_passes", "schedules")
SKIP = {".venv", "build", "dist", "__pycache__", ".git", ".cache"}


def files(*suffixes: str, under: Path = ROOT) -> list[Path]:
    """The project's own files with one of the suffixes."""
    found = []
    for folder, folders, names in os.walk(under):
        folders[:] = [
            f for f in folders if f not in SKIP and not f.endswith((".egg-info", "_cache"))
        ]
        found += [Path(folder, name) for name in names if name.endswith(suffixes)]
    return sorted(found)


SOURCES = [path for package in PACKAGES for path in files(".py", under=ROOT / package)]
LOGS = ROOT / "tuning_logs"
README = (ROOT / "README.md").read_text()


def test_files_are_short() -> None:
    python = files(".py")
    assert len(python) > 20
    lengths = {path.relative_to(ROOT): path.read_text().count("\n") for path in python}
    assert {path: n for path, n in lengths.items() if n > 400} == {}


def undocumented(path: Path) -> Iterator[str]:
    """What has no docstring in a file: the module, or a public class or function of it."""
    tree = ast.parse(path.read_text())
    if ast.get_docstring(tree) is None and tree.body:
        yield "the module"
    for node in tree.body:
        if (
            isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and not node.name.startswith("_")
            and ast.get_docstring(node) is None
        ):
            yield node.name


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_everything_public_has_a_docstring(path: Path) -> None:
    assert list(undocumented(path)) == []


def test_a_missing_docstring_would_be_found(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text('class A:\n    """A."""\ndef f(): ...\ndef _g(): ...\nclass B: ...\n')
    assert list(undocumented(path)) == ["the module", "f", "B"]


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    place = re.compile(rf"{re.escape(str(ROOT))}|/(?:home|root|Users|work)/")
    texts = files(".py", ".md", ".toml", ".json", ".svg", "Makefile", "run")
    found = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in texts
        if path != Path(__file__).resolve() and (match := place.search(path.read_text()))
    ]
    assert found == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the project, built offline from a copy of its sources."""
    copy = tmp_path_factory.mktemp("wheel") / "project"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for package in (*PACKAGES, "tuning_logs"):
        shutil.copytree(ROOT / package, copy / package, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--quiet"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(copy / "out"), str(copy)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (copy / "out").iterdir()
    return path


def test_the_wheel_holds_one_package_with_everything_in_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    inside = {name for name in names if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in inside} == {"tvm_pivot"}
    expected = {
        str(path.relative_to(ROOT))
        if path.is_relative_to(ROOT / "tvm_pivot")
        # Beside the package in the sources, inside it when installed.
        else f"tvm_pivot/{path.relative_to(ROOT)}"
        for path in SOURCES
    }
    assert {name for name in inside if name.endswith(".py")} == expected
    assert "tvm_pivot/py.typed" in inside
    demo = {f"tvm_pivot/demo/{p.name}" for p in (ROOT / "tvm_pivot/demo").iterdir() if p.is_file()}
    assert demo <= inside
    logs = {f"tvm_pivot/{path.relative_to(ROOT)}" for path in files(".jsonl", under=LOGS)}
    assert logs <= inside
    kernels = {f"tvm_pivot/schedules/{p.name}" for p in (ROOT / "schedules").glob("*.cuh")}
    assert kernels and kernels <= inside
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_works_alone(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import tvm_pivot, tvm_pivot.relay_passes, tvm_pivot.schedules\n"
        "from tvm_pivot.demo import MODEL\n"
        "assert tvm_pivot.inspect(MODEL).layers\n"
        "print(tvm_pivot.__file__, tvm_pivot.schedules.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert all(Path(file).is_relative_to(tmp_path) for file in done.stdout.split())


def test_the_licence_is_the_one_declared() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text()


def test_ci_can_be_started() -> None:
    assert os.access(ROOT / ".ci/run", os.X_OK)
    subprocess.run(["bash", "-n", str(ROOT / ".ci/run")], check=True)


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_documents_name_things_that_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    for target in re.findall(r"(?:^    |`)make ([a-z-]+)", text, re.M):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / link).exists(), link
    for name in re.findall(r"\btvm_pivot\.([a-zA-Z_]+)", text):
        assert name in tvm_pivot.__all__ or name in PACKAGES, name
    for folder in re.findall(r"^    ([a-z_]+)/", text, re.M):
        assert (ROOT / folder).is_dir(), folder


def test_the_readmes_commands_and_options_exist() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    lines = re.findall(r"^    tvm-pivot ([a-z]+)(.*)$", README, re.M)
    assert {command for command, _ in lines} == set(commands)
    for command, rest in lines:
        known = {option for param in commands[command].params for option in param.opts}
        assert set(re.findall(r"(?<!\S)--?[a-z-]+", rest)) <= known, command


def test_the_readmes_python_uses_the_api_as_it_is() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    builds = [c for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr == "build"]
    parameters = set(tvm_pivot.build.__annotations__)
    assert builds
    assert {str(k.arg) for call in builds for k in call.keywords} <= parameters
    methods = {c.func.attr for c in calls if isinstance(c.func, ast.Attribute)} - {"zeros"}
    assert all(hasattr(tvm_pivot, m) or hasattr(tvm_pivot.Session, m) for m in methods)


def test_the_picture_is_well_formed() -> None:
    root = ElementTree.parse(ROOT / "docs" / "data-path.svg").getroot()
    assert root.tag.endswith("svg")
    children = [child.tag.rpartition("}")[2] for child in root]
    assert {"title", "desc"} <= set(children), "for those who cannot see it"


def test_commands_of_benchmarks_exist() -> None:
    """Modules that documents say to run can be run: they exist, and have a `main`."""
    texts = [path.read_text() for path in [*files(".md"), ROOT / "Makefile", *files(".py")]]
    stated = {name for text in texts for name in re.findall(r"python -m (benchmarks[.\w]*)", text)}
    assert len(stated) > 10
    for name in stated:
        module = ROOT / name.rstrip(".").replace(".", "/")
        path = module / "__main__.py" if module.is_dir() else module.with_suffix(".py")
        assert '__name__ == "__main__"' in path.read_text() or path.name == "__main__.py", name
    assert not [text for text in texts if re.search(r"python benchmarks/\w+", text)]
