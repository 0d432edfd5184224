"""OpenVINO's CPU plugin, without and with its option for sparse weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from .arrays import aligned_copy
from .protocol import BF16, FP32, Array, Environment, Runtime, UnsupportedModelError

_HINTS = {FP32: "f32", BF16: "bf16"}  # OpenVINO's names
# As the system lists them. Without one of these OpenVINO emulates bf16, or ignores the wish.
_BF16_FEATURES = {"avx512_bf16", "amx_bf16", "bf16"}


class OpenVino(Runtime):
    """OpenVINO set up for latency: one stream of `threads` threads."""

    name = "openvino"
    title = "OpenVINO"
    environment = Environment(None, ("openvino==2026.4.1",), ("openvino",))
    precisions = (FP32, BF16)

    options: ClassVar[Mapping[str, Any]] = {}

    @property
    def version(self) -> str:
        import openvino

        return str(openvino.__version__).partition("-")[0]

    def convert(self, model: Path, folder: Path) -> list[Path]:
        """Write OpenVINO's own ``.xml`` and ``.bin``, weights in fp32."""
        import openvino

        # Not openvino.convert_model, which can report its use over the network.
        try:
            network = openvino.Core().read_model(model)
        except RuntimeError as e:
            raise UnsupportedModelError(f"OpenVINO cannot read the model: {e}") from e
        path = folder / "model.xml"
        openvino.save_model(network, path, compress_to_fp16=False)
        return [path, path.with_suffix(".bin")]

    def prepare(self, files: Sequence[Path]) -> None:
        import openvino

        if self.precision == BF16:
            _require_bf16()
        options = {
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            # Left alone, it computes in bf16 where the CPU can.
            "INFERENCE_PRECISION_HINT": _HINTS[self.precision],
            **self.options,
        }
        core = openvino.Core()
        network = core.read_model(files[0])
        # Compiling merges tensors, and then one may have the names of several.
        self._names = [output.any_name for output in network.outputs]
        self._compiled: Any = core.compile_model(network, "CPU", options)
        reported = self.settings()["INFERENCE_PRECISION_HINT"]
        if reported != _HINTS[self.precision]:
            raise UnsupportedModelError(f"asked for {self.precision}, it computes in {reported}")
        self._request: Any = self._compiled.create_infer_request()

    def bind(self, inputs: Mapping[str, Array]) -> None:
        import openvino

        # The tensors are views of these arrays, which must live as long.
        self._inputs = {name: aligned_copy(array) for name, array in inputs.items()}
        for name, array in self._inputs.items():
            self._request.set_tensor(name, openvino.Tensor(array, shared_memory=True))

    def run(self) -> None:
        self._request.infer(share_outputs=True)

    def outputs(self) -> dict[str, Array]:
        return {
            name: self._request.get_output_tensor(i).data.copy()
            for i, name in enumerate(self._names)
        }

    def settings(self) -> dict[str, str]:
        names = ("INFERENCE_NUM_THREADS", "NUM_STREAMS", "PERFORMANCE_HINT", *self.options)
        reported = {name: str(self._compiled.get_property(name)) for name in names}
        precision = self._compiled.get_property("INFERENCE_PRECISION_HINT")
        return {**reported, "INFERENCE_PRECISION_HINT": precision.get_type_name()}

    def close(self) -> None:
        del self._request, self._compiled


class OpenVinoSparse(OpenVino):
    """OpenVINO allowed to keep weights compressed when at least half of them are zero.

    It takes the option for every network, and reports it in `settings`. It saves memory traffic,
    no arithmetic, where a kernel heeds it at all.
    """

    name = "openvino-sparse"
    title = "OpenVINO, sparse weights"
    skips_zeros = True

    options: ClassVar[Mapping[str, Any]] = {"CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": 0.5}


def _require_bf16() -> None:
    """Raise UnsupportedModelError unless the CPU has bf16 instructions."""
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError as e:
        raise UnsupportedModelError("bf16: cannot tell whether this CPU has it") from e
    if not words & _BF16_FEATURES:
        raise UnsupportedModelError("bf16: this CPU has neither avx512_bf16 nor amx_bf16")
