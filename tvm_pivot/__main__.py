"""``python -m tvm_pivot`` is the same program as ``tvm-pivot``."""

from .cli import main

if __name__ == "__main__":
    main()
