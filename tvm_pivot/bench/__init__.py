"""Comparing runtimes on one model: the same file, the same run, outputs checked."""
