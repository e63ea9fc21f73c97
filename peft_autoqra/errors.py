"""Errors that peft_autoqra raises; each is also the builtin that callers would expect."""


class AutoQRAError(Exception):
    """Base of all errors that this package raises on purpose."""


class UsageError(AutoQRAError, ValueError):
    """A command line that cannot be understood."""


class InvalidPlanError(AutoQRAError, ValueError):
    """A bit-width, rank, module name, file or setting that no layer can be built from."""


class PlanMismatchError(InvalidPlanError):
    """A plan or adapter that was made for another model."""


class MemoryBudgetError(AutoQRAError, ValueError):
    """A memory budget that cannot be read or cannot be reached."""


class UnreachableBudgetError(MemoryBudgetError):
    """A memory budget that even the smallest plan exceeds."""


class CalibrationError(AutoQRAError, ValueError):
    """Calibration data or statistics that are empty, not finite or do not fit the model."""


class HubError(AutoQRAError, OSError):
    """A repository of the hub that does not exist, gives no access or cannot be reached."""


class SearchBudgetError(AutoQRAError, ValueError):
    """A limit on what a search may cost that leaves nothing to search with."""


class SearchStateError(AutoQRAError, RuntimeError):
    """A search directory that cannot be continued, for example one that belongs to another search."""


class ExecutorError(AutoQRAError, RuntimeError):
    """Workers of a search that cannot be had, or that all died; what was told is on disk and the search can go on."""


class MissingDependencyError(AutoQRAError, RuntimeError):
    """Something outside the package that a feature needs and that is not installed."""


class StorageError(AutoQRAError, OSError):
    """A file that cannot be written, for example because the disk is full; what was there before is kept."""


class ExportError(AutoQRAError, ValueError):
    """An adapter or plan that another format cannot hold, or a folder that an export must not replace."""


class EvaluationError(AutoQRAError, ValueError):
    """A metric or task that does not exist, or data that a model cannot be judged by."""
