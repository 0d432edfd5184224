"""``python -m tvm_pivot.runner OUTPUT``: print the command that compiles the runner here."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from . import compile_command

if len(sys.argv) != 2:
    sys.exit("usage: python -m tvm_pivot.runner OUTPUT")
print(shlex.join(compile_command(Path(sys.argv[1]))))
