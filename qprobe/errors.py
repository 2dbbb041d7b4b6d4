"""One exception family: everything a user can cause and fix is a `QprobeError`.

The command line prints the message as one sentence and exits with code 1.
Our own bugs are `assert`s and keep their traceback.
"""


class QprobeError(Exception):
    """A mistake the user can fix; the message says what happened, why, and what to do."""


class ModelError(QprobeError):
    """The model cannot be found, loaded or used for what was asked."""


class SampleError(QprobeError):
    """No usable image, prompt or answer is left."""


class RunError(QprobeError):
    """A run folder is missing, incomplete, or belongs to another scan."""


class BudgetError(QprobeError):
    """The budget cannot be read, or no skip-list fits it."""


class ManifestError(QprobeError):
    """A manifest is broken, or written for another model."""


class VerificationError(QprobeError):
    """The loaded model does not hold what the manifest expected."""


class MachineError(QprobeError):
    """This machine lacks a device, a library or the memory for what was asked."""
