"""Every error a user can meet. Each message names the node or file and what to do about it."""


class PivotError(Exception):
    """Base class of all errors raised on purpose by tvm_pivot."""


class ModelImportError(PivotError):
    """The model could not be read: not a model, damaged, an unknown operator, an open shape."""


class UnsupportedTargetError(PivotError):
    """The target is unknown, or it has no schedules yet."""


class CompileError(PivotError):
    """A graph was imported but could not be compiled."""


class InputError(PivotError):
    """An array given to `Session.run` has the wrong name, shape or dtype."""


class ArtifactError(PivotError):
    """A saved artifact is missing, damaged, or made for another machine."""


class PruneError(PivotError):
    """A network cannot be pruned as asked, or torch, which that needs, is not installed."""


class TuningError(PivotError):
    """A tuning log cannot be read or written, or the machines to measure on cannot be reached."""
