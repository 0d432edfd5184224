"""What a compiled network is: `Manifest`, and the file that an artifact keeps it in."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from . import runtime, schema
from .errors import ArtifactError
from .memory import Memory
from .report import Report
from .targets import PivotTarget, needed_features
from .tensors import TensorSpec

FORMAT = 5


@dataclass(frozen=True)
class Manifest:
    """What a library is: written into an artifact, and checked when it is loaded.

    Attributes:
        name: the network's name.
        package_version: the tvm_pivot that compiled it.
        tvm_version: the TVM that compiled it.
        target: the machine it was compiled for.
        features: instruction sets that the library may use, by LLVM's names.
        inputs: name, shape and dtype of each input, in order.
        outputs: the same for the outputs.
        report: what was done to each layer.
        memory: what the library takes besides inputs; None if it has its weights in it.
    """

    name: str
    package_version: str
    tvm_version: str
    target: PivotTarget
    features: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    report: Report
    memory: Memory | None = None

    @classmethod
    def create(
        cls,
        name: str,
        target: PivotTarget,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        report: Report,
        memory: Memory | None = None,
    ) -> Manifest:
        """A manifest for a library made now, by this version of everything."""
        try:
            package = version("tvm-pivot")
        except PackageNotFoundError:  # run from a source tree
            package = "unknown"
        features = needed_features(target)
        made_with = runtime.tvm_version()
        return cls(name, package, made_with, target, features, inputs, outputs, report, memory)


@dataclass(frozen=True)
class Document:
    """``manifest.json``: the version of the file format, the files' identities, the manifest."""

    format: int
    library_bytes: int
    library_sha256: str
    weights_sha256: str | None
    manifest: Manifest

    @property
    def weights_bytes(self) -> int | None:
        """How large ``weights.bin`` is; None if there is none."""
        memory = self.manifest.memory
        return None if memory is None else memory.weight_bytes

    def to_json(self) -> str:
        """The document as JSON text; `from_json` reads it back to an equal document."""
        return schema.dumps(self, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> Document:
        """The document `to_json` wrote.

        Raises:
            ArtifactError: the text is not such JSON, or of another format.
        """
        _check_format(text)
        return schema.loads(cls, text)


def _check_format(text: str | bytes) -> None:
    """Say so when a newer tvm_pivot wrote the file, before fields it added look like damage."""
    found = schema.parse(text)
    number = found.get("format") if isinstance(found, dict) else None
    if type(number) is not int or number != FORMAT:
        raise ArtifactError(
            f"artifact format {number!r}; this tvm_pivot reads format {FORMAT}: build it again, "
            f"or install the version of tvm_pivot that wrote it"
        )
