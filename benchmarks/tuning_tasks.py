"""What the scripts that measure tuning share: where candidates are built and timed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tvm_pivot.targets import PivotTarget
from tvm_pivot.tuning.machine import LocalMachine, Workshop, workers
from tvm_pivot.tuning.search import Job
from tvm_pivot.tuning.tasks import LayerTask


@contextmanager
def measuring(
    tasks: Sequence[LayerTask], target: PivotTarget
) -> Iterator[tuple[Workshop, LocalMachine]]:
    """A workshop for candidates of the tasks, and a machine to time them; both are closed."""
    machine = LocalMachine(target)
    try:
        with Workshop({Job(task).name: task for task in tasks}, workers()) as workshop:
            yield workshop, machine
    finally:
        machine.close()
