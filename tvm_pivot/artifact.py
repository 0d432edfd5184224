"""Saving a compiled network to a directory or one file, and loading it back.

The directory has ``manifest.json``, ``lib.so``, ``weights.bin`` and what `deployment` adds; the
file is a zip archive of the same. Everything is checked before the library is loaded: the archive,
each field of the manifest, the size and SHA-256 of library and weights, the TVM version, and that
this machine has the instructions the code was made for.

The hashes guard against damage, not against malice: an artifact is native code, and whoever can
change the library can change its hash too. Load only artifacts you trust, as with any program.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import tempfile
import weakref
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from . import cuda_runtime, deployment, runtime
from .errors import ArtifactError, PivotError
from .linking import linker
from .manifest import FORMAT, Document, Manifest
from .memory import Bytes, new_pages
from .session import Session
from .targets import PivotTarget, cannot_run, missing_features
from .threads import check_count

SUFFIX = ".pivot"
_MANIFEST, _LIBRARY, _WEIGHTS = "manifest.json", "lib.so", "weights.bin"
_MANIFEST_LIMIT = 16 << 20
_SIZE_LIMIT = 64 << 30
_CHUNK = 1 << 20
# What zipfile and zlib raise on damaged input; RuntimeError is "file is encrypted".
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    OverflowError,
    RuntimeError,
    ValueError,
    KeyError,
)


def save(
    path: str | os.PathLike[str], library: Any, manifest: Manifest, weights: Bytes | None = None
) -> Path:
    """Write an artifact.

    Args:
        path: where: a file where the name ends in ``.pivot``, else a directory.
        library: a `relax.VMExecutable`, or the path of a library it exported.
        manifest: describes the library.
        weights: what it takes, where the manifest says that it takes memory.

    Returns:
        The path written.

    Raises:
        ArtifactError: the library cannot be linked, or nothing can be written there.
    """
    path = Path(path)
    exported = isinstance(library, Path)
    if not exported and not runtime.is_executable(library):
        raise ArtifactError("this session was made from a bare TVM module: export that instead")
    if not path.parent.is_dir():
        raise ArtifactError(f"cannot write {path}: there is no directory {path.parent}")
    zipped = path.suffix == SUFFIX
    if not zipped and path.is_dir() and any(path.iterdir()) and not (path / _MANIFEST).is_file():
        raise ArtifactError(f"cannot write {path}: it has files that are no exported network")
    with tempfile.TemporaryDirectory(prefix="tvm-pivot-") as scratch:
        if not exported:
            library = linked(library, manifest.target, path, Path(scratch))
        try:
            described = _described(library, manifest, weights)
            texts = {_MANIFEST: described, **deployment.files(manifest)}
            (_write_file if zipped else _write_folder)(path, library, weights, texts)
        except OSError as e:
            raise ArtifactError(f"cannot write {path}: {e.strerror or e}") from e
    return path


def linked(executable: Any, target: PivotTarget, path: Path, scratch: Path) -> Path:
    """The library of a `relax.VMExecutable`, in the folder `scratch`.

    Raises:
        ArtifactError: the library, which is to be part of `path`, cannot be linked.
    """
    link, library = linker(target), scratch / _LIBRARY
    try:
        with runtime.no_scope_lines():
            executable.export_library(str(library), fcompile=link)
    except Exception as e:  # RuntimeError from the linker, or whatever TVM raises
        raise ArtifactError(f"cannot link {path}; is a C++ compiler there? {e}") from e
    return library


def _described(library: Path, manifest: Manifest, weights: Bytes | None) -> str:
    digest = None if weights is None else hashlib.sha256(weights.data).hexdigest()
    size = library.stat().st_size
    return Document(FORMAT, size, _sha256(library), digest, manifest).to_json()


def _sha256(library: Path) -> str:
    digest = hashlib.sha256()
    with library.open("rb") as source:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _write_file(path: Path, library: Path, weights: Bytes | None, texts: Mapping[str, str]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    size = library.stat().st_size
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            # ZipInfo's fixed date: the same network gives the same file.
            for name, text in texts.items():
                archive.writestr(_member(name), text)
            with (
                library.open("rb") as source,
                archive.open(_member(_LIBRARY), "w", force_zip64=size >= 1 << 31) as sink,
            ):
                shutil.copyfileobj(source, sink, _CHUNK)
            if weights is not None:
                # Inflating them would take longer than all else that loading does.
                member = _member(_WEIGHTS, zipfile.ZIP_STORED)
                large = weights.nbytes >= 1 << 31
                with archive.open(member, "w", force_zip64=large) as sink:
                    sink.write(weights.data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _member(name: str, compression: int = zipfile.ZIP_DEFLATED) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.compress_type = compression
    return info


def _write_folder(
    path: Path, library: Path, weights: Bytes | None, texts: Mapping[str, str]
) -> None:
    """Replace file by file, the manifest last; what else is there stays."""
    path.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=path) as scratch:
        copy = Path(scratch, _LIBRARY)
        with library.open("rb") as source, copy.open("xb") as sink:
            shutil.copyfileobj(source, sink, _CHUNK)
        if weights is not None:
            Path(scratch, _WEIGHTS).write_bytes(weights.data)
        for name, text in texts.items():
            Path(scratch, name).write_text(text)
        for name in sorted(os.listdir(scratch), key=_MANIFEST.__eq__):
            Path(scratch, name).replace(path / name)


def load(path: str | os.PathLike[str], *, threads: int | None = None) -> Session:
    """Load an artifact. It is native code: load only what you trust.

    Args:
        path: a file or a directory written by `Session.export`.
        threads: see `Session.set_threads`.

    Raises:
        ArtifactError: there is no such artifact, it is damaged or of another format or TVM version,
            or it was compiled for a machine with instructions this one lacks.
    """
    if threads is not None:
        check_count(threads)
    path = Path(path)
    if path.is_dir():
        with _told(path):
            document = _folder_document(path)
            _check_host(document.manifest)
            if _sha256(path / _LIBRARY) != document.library_sha256:
                raise _different(_LIBRARY)
            weights = None
            if document.weights_bytes is not None:
                with (path / _WEIGHTS).open("rb", buffering=0) as source:
                    weights = _read_weights(source, document)
        return _start(path, path / _LIBRARY, document.manifest, weights, threads)
    directory = Path(tempfile.mkdtemp(prefix="tvm-pivot-"))  # mode 0700
    try:
        library = directory / _LIBRARY
        with _opened(path) as archive:
            document = _read_document(archive)
            _check_host(document.manifest)
            _extract(archive, library, document)
            weights = None
            if document.weights_bytes is not None:
                with archive.open(_WEIGHTS) as source:
                    weights = _read_weights(source, document)
        session = _start(path, library, document.manifest, weights, threads)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    weakref.finalize(session, shutil.rmtree, directory, ignore_errors=True)
    return session


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """The manifest of an artifact, whatever machine it is for; runs no code of it.

    Raises:
        ArtifactError: there is no such artifact, or it is damaged or of another format.
    """
    path = Path(path)
    if path.is_dir():
        with _told(path):
            return _folder_document(path).manifest
    with _opened(path) as archive:
        return _read_document(archive).manifest


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Whatever goes wrong inside is an ArtifactError that names the artifact."""
    try:
        yield
    except ArtifactError as e:
        raise ArtifactError(f"{path}: {e}") from e
    except OSError as e:
        raise ArtifactError(f"cannot read {path}: {e.strerror or e}") from e
    except _DAMAGE as e:
        raise ArtifactError(f"{path} is not an artifact, or is damaged: {e}") from e


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    with _told(path), zipfile.ZipFile(path) as archive:
        yield archive


def _read_document(archive: zipfile.ZipFile) -> Document:
    names = [info.filename for info in archive.infolist()]
    odd = sorted(set(names) - {_MANIFEST, _LIBRARY, _WEIGHTS} - deployment.NAMES)
    odd += sorted(name for name in set(names) if names.count(name) > 1)
    if odd or not {_MANIFEST, _LIBRARY} <= set(names):
        shown = ", ".join(map(repr, odd[:5] or sorted(names)[:5])) or "nothing"
        raise ArtifactError(f"expected {_MANIFEST} and {_LIBRARY} in the archive, found {shown}")
    info = archive.getinfo(_MANIFEST)
    if info.file_size > _MANIFEST_LIMIT:
        raise ArtifactError(f"{_MANIFEST} is too large: {info.file_size} bytes")
    with archive.open(info) as member:
        text = member.read(_MANIFEST_LIMIT)
    found = (_LIBRARY, _WEIGHTS)
    return _parsed(text, {n: archive.getinfo(n).file_size for n in found if n in names})


def _folder_document(path: Path) -> Document:
    for name in (_MANIFEST, _LIBRARY):
        if not (path / name).is_file():
            raise ArtifactError(f"this directory is no exported network: it has no {name}")
    size = (path / _MANIFEST).stat().st_size
    if size > _MANIFEST_LIMIT:
        raise ArtifactError(f"{_MANIFEST} is too large: {size} bytes")
    found = [path / name for name in (_LIBRARY, _WEIGHTS) if (path / name).is_file()]
    text = (path / _MANIFEST).read_bytes()
    return _parsed(text, {file.name: file.stat().st_size for file in found})


def _parsed(text: bytes, sizes: Mapping[str, int]) -> Document:
    """A document that is right about the sizes of library and weights."""
    document = Document.from_json(text)
    for name, said in ((_LIBRARY, document.library_bytes), (_WEIGHTS, document.weights_bytes)):
        least, found = int(name == _LIBRARY), sizes.get(name)
        if said is None:
            continue  # a folder may have the weights of another network, which is not read
        if found is None:
            raise ArtifactError(f"there is no {name}")
        if not least <= said <= _SIZE_LIMIT or found != said:
            raise ArtifactError(f"{name} has {found} bytes, the manifest says {said}")
    return document


def _check_host(manifest: Manifest) -> None:
    """Refuse code that this TVM or this CPU cannot run."""
    made, here = manifest.tvm_version, runtime.tvm_version()
    # The format of VM byte code and the runtime's interface change between minor versions.
    if made.split(".")[:2] != here.split(".")[:2]:
        raise ArtifactError(f"made with TVM {made}, this is TVM {here}: build it again")
    target = manifest.target
    reason = cannot_run(target)
    if reason is not None:
        raise ArtifactError(reason)
    if target.gpu is not None:
        try:
            cuda_runtime.check(target.gpu.arch)
        except PivotError as e:
            raise ArtifactError(f"made for target {target.name!r}: {e}") from e
    missing = missing_features(manifest.features)
    if missing:
        safe = {"x86": "x86-avx2", "arm": "arm"}[target.family]
        raise ArtifactError(
            f"made for target {target.name!r}, whose code may use {', '.join(missing)}; "
            f"this CPU has not: build it on this machine, or for target {safe!r}"
        )


def _extract(archive: zipfile.ZipFile, path: Path, document: Document) -> None:
    digest, left = hashlib.sha256(), document.library_bytes
    with archive.open(_LIBRARY) as source, path.open("xb") as sink:
        while chunk := _read_at_most(source, left):
            digest.update(chunk)
            sink.write(chunk)
            left -= len(chunk)
    if left or digest.hexdigest() != document.library_sha256:
        raise _different(_LIBRARY)


def _different(name: str) -> ArtifactError:
    return ArtifactError(f"{name} is damaged: its SHA-256 is not the manifest's")


def _read_weights(source: IO[bytes], document: Document) -> Bytes:
    """The weights, read to where they stay."""
    digest, at = hashlib.sha256(), 0
    data = new_pages(document.weights_bytes or 0)
    while at < data.nbytes:
        chunk = data[at : at + _CHUNK].data
        count = source.readinto(chunk)  # type: ignore[attr-defined]
        if not count:
            break
        digest.update(chunk[:count])
        at += count
    if at < data.nbytes or digest.hexdigest() != document.weights_sha256:
        raise _different(_WEIGHTS)
    return data


def _read_at_most(source: IO[bytes], left: int) -> bytes:
    return source.read(min(left, _CHUNK)) if left else b""


def _start(
    path: Path, library: Path, manifest: Manifest, weights: Bytes | None, threads: int | None
) -> Session:
    try:
        with runtime.no_scope_lines():
            module = runtime.load_module(library)
        return Session(module, manifest, weights=weights, threads=threads, library_file=library)
    except PivotError as e:
        raise ArtifactError(f"{path}: {e}") from e
    except Exception as e:  # the dynamic loader's or TVM's complaint, of several types
        raise ArtifactError(f"{path}: its library cannot be loaded: {e}") from e
