"""Running a compiled network: NumPy arrays in, NumPy arrays out."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import cuda_runtime, runtime
from . import threads as thread_pool
from .errors import InputError, PivotError
from .memory import ALIGNMENT, Array, Bytes
from .targets import cannot_run
from .tensors import TensorSpec
from .virtual_machine import VirtualMachine, as_tensor, bound

if TYPE_CHECKING:
    from .manifest import Manifest
    from .remote import RemoteNetwork
    from .report import Report

_ffi = runtime.ffi()

# Below this, copying an input is cheaper than finding out whether it need be copied.
_ALWAYS_COPY_BYTES = 16 << 10


class Session:
    """A compiled network, ready to run. `tvm_pivot.build` and `tvm_pivot.load` make one.

    Calls from several threads at once are safe and run side by side: each calling thread has
    its own Relax virtual machine, with memory for what lies between the layers (weights are
    shared), and its own TVM pool of `threads` threads. A server with many calling threads usually
    wants `set_threads(1)`.

    Attributes:
        inputs: name, shape and dtype of each input, in the order `run` takes them.
        outputs: the same for the outputs, in the order `run` returns them.
        report: what was done to each layer.
    """

    def __init__(
        self,
        library: Any,
        manifest: Manifest,
        *,
        weights: Bytes | None = None,
        threads: int | None = None,
        library_file: Path | None = None,
    ) -> None:
        """Wrap a compiled library.

        Args:
            library: a `relax.VMExecutable`, or the `tvm_ffi.Module` of an exported one, with a
                function ``main``.
            manifest: describes the library; its inputs must be those of ``main``.
            weights: see `Weights`; needed where the manifest says that the library takes memory.
            threads: see `set_threads`; None means `threads.default_count()`.
            library_file: where `library` was loaded from, for a later `export`.

        Raises:
            PivotError: the network is for a GPU that this machine has not (`cuda_runtime.check`),
                or the library has no ``main``, or not with the manifest's inputs or memory (`run`
                says so if it is a `relax.VMExecutable`); the weights are not of the manifest's
                size; or an input or output has a dtype that NumPy has not.
        """
        self.manifest = manifest
        self.inputs: tuple[TensorSpec, ...] = manifest.inputs
        self.outputs: tuple[TensorSpec, ...] = manifest.outputs
        self.report: Report = manifest.report
        self._library = library
        self._library_file = library_file
        self._weights_data = weights
        self._weights = bound(manifest.memory, weights)
        self._elsewhere = cannot_run(manifest.target)
        self._module = None if self._elsewhere else runtime.link(library)
        gpu = manifest.target.gpu
        self._arch = None if gpu is None else gpu.arch
        self._threads = thread_pool.default_count()
        self._threads_required = False
        if threads is not None:
            self.set_threads(threads)
        for spec in (*self.inputs, *self.outputs):
            spec.numpy_dtype()
        self._arity = len(self.inputs)
        self._copy_output: tuple[bool, ...] | None = None
        self._lock = threading.Lock()  # held while a thread makes its runner, never to run
        self._local = threading.local()
        self._remotes: dict[str, RemoteNetwork] = {}
        if self._module is library:
            self._new_runner()
        # else it comes from the compiler, and linking takes seconds that `export` does not need

    def __repr__(self) -> str:
        takes = ", ".join(map(str, self.inputs))
        gives = ", ".join(map(str, self.outputs))
        return f"<tvm_pivot.Session {self.manifest.name!r}: ({takes}) -> ({gives})>"

    def run(self, /, *args: Any, remote: str | None = None, **named: Any) -> Any:
        """Run the network once.

        Inputs are given in order, by name, or as one dict. Each is a NumPy array, or anything
        with DLPack or ``__array__`` on the CPU (a torch tensor, say), of exactly the shape and
        dtype in `inputs`. An array that is large, contiguous, writeable and aligned to 64 bytes
        (such as an output of another session) is used in place; any other is copied.

        With `remote`, ``"host:port"`` of an RPC server or ``"host:port/key"`` of a tracker, it
        runs on that machine, which the network must have been compiled for. The library is sent
        there the first time.

        Returns:
            One array, or a tuple of arrays in the order of `outputs` where there are several.
            They are the caller's: no later run changes them, and they outlive the session.

        Raises:
            InputError: a missing or unknown input, a wrong shape or dtype.
            PivotError: the network failed while running.
        """
        if named or len(args) != self._arity or (args and type(args[0]) is dict):
            args = self._bind(args, named)
        if remote is not None:
            slots = map(_Slot, self.inputs)
            arrays = [slot.check(x) for slot, x in zip(slots, args, strict=True)]
            outputs = self.on(remote).run(arrays)
            return outputs[0] if len(outputs) == 1 else outputs
        try:
            runner: _Runner = self._local.runner
        except AttributeError:  # the first run on this thread
            runner = self._new_runner()
        if thread_pool.current.count != self._threads:
            thread_pool.configure(self._threads, required=self._threads_required)
        tensors = [slot.take(x) for slot, x in zip(runner.slots, args)]  # noqa: B905 (_bind checks)
        results = runner.call(tensors)
        if self._arch is not None:
            arrays = cuda_runtime.to_numpy(results, self.outputs)
            return arrays[0] if len(arrays) == 1 else tuple(arrays)
        if self._copy_output is None:
            self._copy_output = self._shared_outputs(results, tensors, runner)
        if len(results) == 1:
            return _to_numpy(results[0], self._copy_output[0])
        return tuple(map(_to_numpy, results, self._copy_output))

    def on(self, address: str) -> RemoteNetwork:
        """The network on another machine, sent there the first time; see `run`.

        Raises:
            ArtifactError: the library cannot be linked.
            PivotError: no server answers there, or it cannot load the library.
        """
        if address not in self._remotes:
            from .remote import RemoteNetwork

            library = self._library_file or self._library
            weights = self._weights_data
            self._remotes[address] = RemoteNetwork(address, library, self.manifest, weights)
        return self._remotes[address]

    @property
    def threads(self) -> int:
        """Threads one `run` may use, the caller included."""
        return self._threads

    def set_threads(self, count: int) -> None:
        """Let each later `run` use `count` threads, the caller included.

        The number belongs to this session. Without a call it is ``TVM_NUM_THREADS`` or
        ``OMP_NUM_THREADS`` as set when the session was made, else one per physical core.

        Raises:
            PivotError: not a whole number, or more than the CPUs this process may use.
        """
        self._threads = thread_pool.check_count(count)
        self._threads_required = True

    def export(self, path: str | PathLike[str]) -> Path:
        """Write the network to a directory that `tvm_pivot.load` reads, or to one file where the
        name ends in ``.pivot``: a zip archive of that directory.

        The directory has the library, its weights, a manifest, a runtime in C and a README.
        Linking needs a C compiler, unless the session was itself loaded.

        Returns:
            The path written.

        Raises:
            ArtifactError: the library cannot be linked, or nothing can be written there.
        """
        from . import artifact

        library = self._library_file or self._library
        return artifact.save(path, library, self.manifest, self._weights_data)

    def virtual_machine(self) -> VirtualMachine:
        """A virtual machine of its own for the network, for tools that watch its steps.

        It shares the weights, takes tensors in the order of `inputs` and runs on the calling
        thread's TVM pool, which `run` sets to `threads`.
        """
        if self._arch is not None:
            cuda_runtime.check(self._arch)
        return VirtualMachine(self._module, self._weights, cuda=self._arch is not None)

    def _new_runner(self) -> _Runner:
        if self._elsewhere is not None:
            raise PivotError(
                f"this network is {self._elsewhere}: export it and load it there, or say "
                f"run(..., remote='host:port') with an RPC server on such a machine"
            )
        with self._lock:
            machine, on_gpu = self.virtual_machine(), self._arch is not None
            runner = self._local.runner = _Runner(machine, self.inputs, on_gpu)
        return runner

    def _bind(self, args: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Any, ...]:
        """Arguments in the order of `inputs`, from any of the ways to give them."""
        if len(args) == 1 and not named and type(args[0]) is dict:
            named, args = args[0], ()
        names = [spec.name for spec in self.inputs]
        expected = f"the network takes {', '.join(map(str, self.inputs)) or 'no inputs'}"
        if len(args) > len(names):
            raise InputError(f"{len(args)} inputs given; {expected}")
        for name in named:
            if name not in names:
                raise InputError(f"there is no input {name!r}; {expected}")
            if name in names[: len(args)]:
                raise InputError(f"input {name!r} is given twice; {expected}")
        missing = [repr(name) for name in names[len(args) :] if name not in named]
        if missing:
            raise InputError(f"input {', '.join(missing)} is missing; {expected}")
        return (*args, *(named[name] for name in names[len(args) :]))

    def _shared_outputs(
        self, results: Sequence[Any], inputs: Sequence[Any], runner: _Runner
    ) -> tuple[bool, ...]:
        """Which outputs are memory that is not theirs alone and must be copied for the user: an
        input, a constant of the network, or another output.

        Where the library holds its weights, constants are found by running again while holding
        the results: a fresh output is at a new place then. That is on the first run only.
        """
        if len(results) != len(self.outputs):
            raise PivotError(
                f"the library returns {len(results)} outputs, its manifest says {len(self.outputs)}"
            )
        seen = set(map(_place, inputs))
        if self._weights is None:
            seen.update(map(_place, results))
            results = runner.call(inputs)
        shared = []
        for address in map(_place, results):
            constant = self._weights is not None and address in self._weights
            shared.append(constant or address in seen)
            seen.add(address)
        return tuple(shared)


class _Runner:
    """One thread's virtual machine and input buffers."""

    __slots__ = ("_main", "_vm", "slots")

    def __init__(self, machine: VirtualMachine, inputs: Sequence[TensorSpec], on_gpu: bool) -> None:
        self._vm, self._main = machine, machine.run
        arity = machine.arity
        if arity not in (None, len(inputs)):
            raise PivotError(f"the library takes {arity} inputs, its manifest says {len(inputs)}")
        self.slots = [(_GpuSlot if on_gpu else _Slot)(spec) for spec in inputs]

    def call(self, tensors: Sequence[Any]) -> Sequence[Any]:
        """The network's output tensors, always as a sequence."""
        try:
            result = self._main(*tensors)
        except Exception as e:
            raise PivotError(f"the network failed while running: {e}") from e
        return (result,) if isinstance(result, _ffi.Tensor) else result


class _Slot:
    """One input: checks an array and turns it into a tensor TVM can read."""

    __slots__ = ("_tensor", "_view", "dtype", "shape", "spec")

    def __init__(self, spec: TensorSpec) -> None:
        self.spec = spec
        self.shape = tuple(spec.shape)
        self.dtype = spec.numpy_dtype()
        self._tensor: Any = None
        self._view: Array | None = None

    def check(self, x: Any) -> Array:
        """`x` as an array, of this input's shape and dtype."""
        if type(x) is not np.ndarray:
            x = self._as_array(x)
        array: Array = x
        if array.dtype != self.dtype or array.shape != self.shape:
            raise self._mismatch(array)
        return array

    def take(self, x: Any) -> Any:
        """A tensor with the values of `x`: `x` itself where possible, else this slot's buffer."""
        x = self.check(x)
        if (
            x.nbytes > _ALWAYS_COPY_BYTES
            and x.flags.c_contiguous
            and x.flags.writeable  # NumPy does not lend read-only memory
            and _address(x) % ALIGNMENT == 0
        ):
            return as_tensor(x)
        if self._view is None:
            self._tensor = runtime.empty(self.shape, self.spec.dtype)
            self._view = np.from_dlpack(self._tensor)
        self._view[...] = x
        return self._tensor

    def _as_array(self, x: Any) -> Array:
        if isinstance(x, np.ndarray):
            return x  # a subclass such as memmap
        try:
            if hasattr(x, "__dlpack__"):
                return np.from_dlpack(x)
            if hasattr(x, "__array__"):
                return np.asarray(x)
        except Exception as e:  # whatever the other library raises
            raise InputError(
                f"input {self.spec.name!r}: {type(x).__name__} cannot be read as an array: {e}; "
                f"a torch tensor needs .detach().cpu()"
            ) from e
        raise InputError(
            f"input {self.spec.name!r}: expected an array, got {type(x).__name__}; "
            f"pass np.asarray(value, dtype={self.spec.dtype!r})"
        )

    def _mismatch(self, x: Array) -> InputError:
        message = f"input {self.spec.name!r}: expected {self.spec.form}, "
        message += f"got {x.dtype} {list(x.shape)}"
        if x.dtype != self.dtype:
            message += f"; convert it with .astype({self.spec.dtype!r})"
        return InputError(message)


class _GpuSlot(_Slot):
    """One input of a network on a GPU."""

    __slots__ = ("_device",)

    def __init__(self, spec: TensorSpec) -> None:
        super().__init__(spec)
        self._device = cuda_runtime.DeviceSlot(spec)

    def take(self, x: Any) -> Any:
        """The tensor on the GPU, with the values of `x`."""
        array = x if type(x) is np.ndarray else self._as_array(x)
        if array.dtype != self.dtype or array.shape != self.shape:
            raise self._mismatch(array)
        return self._device.fill(array)


def _to_numpy(tensor: Any, copy: bool) -> Array:
    array: Array = np.from_dlpack(tensor)
    # NumPy 1.x hands out DLPack memory read-only.
    return array.copy() if copy or not array.flags.writeable else array


def _place(tensor: Any) -> int:
    return _address(np.from_dlpack(tensor))


def _address(array: Array) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
