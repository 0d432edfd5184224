"""This package: the sparse build, and a build that skips no zero, to compare with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from .arrays import aligned_copy
from .protocol import Array, Environment, Runtime, UnsupportedModelError

if TYPE_CHECKING:
    from tvm_pivot.session import Session


class Pivot(Runtime):
    """tvm_pivot as `tvm_pivot.build` makes it."""

    name = "pivot"
    title = "tvm_pivot"
    environment = Environment(None, (), ("tvm_pivot",))
    skips_zeros = True

    sparse: ClassVar[bool] = True

    @property
    def version(self) -> str:
        import tvm_pivot
        import tvm_pivot.artifact  # with TVM's runtime: none of it is the model's own

        return tvm_pivot.__version__

    def convert(self, model: Path, folder: Path) -> list[Path]:
        """Compile to one ``.pivot`` file.

        Raises:
            UnsupportedModelError: the file has something the importer does not know.
        """
        import tvm_pivot

        try:
            session = tvm_pivot.build(model, sparse=self.sparse)
        except tvm_pivot.ModelImportError as e:
            raise UnsupportedModelError(str(e)) from e
        return [session.export(folder / "model.pivot")]

    def prepare(self, files: Sequence[Path]) -> None:
        import tvm_pivot

        self._session: Session = tvm_pivot.load(files[0], threads=self.threads)

    def bind(self, inputs: Mapping[str, Array]) -> None:
        # Aligned and writeable, large inputs are read in place.
        self._inputs = tuple(aligned_copy(inputs[spec.name]) for spec in self._session.inputs)

    def run(self) -> None:
        self._results = self._session.run(*self._inputs)

    def outputs(self) -> dict[str, Array]:
        names = [spec.name for spec in self._session.outputs]
        results = self._results if len(names) > 1 else (self._results,)
        return dict(zip(names, results, strict=True))

    def settings(self) -> dict[str, str]:
        layers = self._session.report.layers
        sparse = sum(layer.mode == "sparse" for layer in layers)
        return {
            "threads": str(self._session.threads),
            "target": self._session.manifest.target.name,
            "sparse layers": f"{sparse} of {len(layers)}",
        }

    def close(self) -> None:
        del self._session


class PivotDense(Pivot):
    """tvm_pivot told to skip no zeros: the same kernels' and passes' dense baseline."""

    name = "pivot-dense"
    title = "tvm_pivot, dense build"
    skips_zeros = False
    sparse = False
