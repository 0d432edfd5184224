"""What a program costs on ARM cores, counted under emulation: see ``docs/arm-cost.md``.

No ARM machine is needed and no time is measured. QEMU runs aarch64 code and a plugin counts how
often each block of it runs; LLVM's model of a core says how many cycles each block takes.
"""
