"""Fixtures and settings shared by all tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

# Tests import `benchmarks` from the repository but `tvm_pivot` as installed: only there are
# relay_passes and schedules inside it.  So the root comes last, wherever it was before.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
sys.path.append(str(ROOT))

# Read when torch and TVM are first imported, which only test modules do.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TVM_NUM_THREADS", "2")

SHARED_DATA = ROOT.parent / "shared" / "data"

# No deadline: the first example of a test may compile, and shared machines stall.
settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data beside the repository; skips the test where there is none."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs real data, which is not part of the project: no {SHARED_DATA}")
    return SHARED_DATA
