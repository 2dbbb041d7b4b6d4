"""One exception family: everything a user can cause and fix is a `QprobeError`.

The command line prints the message as one sentence and exits with code 1.
Our own bugs are `assert`s and keep their traceback.
"""

import errno


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


class LeftOutWarning(UserWarning):
    """Rows or images that were brought are not used."""


_HOST_OUT_OF_MEMORY = ("can't allocate memory", "annot allocate memory")  # torch's allocator; the system
_OUT_OF_MEMORY = (*_HOST_OUT_OF_MEMORY, "CUDA error: out of memory", "ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the host or of a device did not suffice.

    torch's OutOfMemoryError is known by its name, since torch need not be there; its allocator on a CPU, CUDA
    and its libraries raise RuntimeErrors, mapping a file an OSError.
    """
    if is_host_out_of_memory(error) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(x in str(error) for x in _OUT_OF_MEMORY)


def is_host_out_of_memory(error: BaseException) -> bool:
    """Whether it was the memory of the host."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError | OSError) and any(x in str(error) for x in _HOST_OUT_OF_MEMORY)
