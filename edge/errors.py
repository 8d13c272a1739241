"""Every error a user can meet, in one tree, with the exit code of the command that meets it.

Each message names the subject, what was expected and what was found; `hint` is the one next step that helps.
Exceptions of other libraries are mapped to these at the boundary where they are called, nowhere else.
"""

from __future__ import annotations


class EdgeError(Exception):
    """Something went wrong that the user can understand and act on."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(EdgeError):
    """A command, option or argument is not usable as given."""

    exit_code = 2


class QuestionError(UsageError):
    """A question is empty or does not fit the window."""


class FrameError(EdgeError, ValueError):
    """A frame is not (H, W, 3) uint8 RGB, or has a size that the model cannot take."""


class BundleError(EdgeError):
    """A bundle, or one of its files, is missing, altered or of another version."""

    exit_code = 3


class EngineError(EdgeError):
    """A TensorRT engine cannot be built or used: another version or device, no plugin, a graph that is refused."""

    exit_code = 3


class CheckpointError(EdgeError):
    """A checkpoint cannot be exported: another architecture, missing tensors, wrong shapes, unsafe files."""

    exit_code = 3


class ParityError(EdgeError):
    """A graph does not compute what it should: the checkpoint's model in PyTorch, or itself where it was exported."""

    exit_code = 3


class SourceError(EdgeError):
    """A video source cannot be opened or gave no frame."""

    exit_code = 4


class OutputError(EdgeError):
    """An output file cannot be written."""


class MemoryBudgetError(EdgeError):
    """What was asked for does not fit in memory."""

    exit_code = 5


class BackendError(EdgeError):
    """The inference backend failed or is not installed."""


class KernelError(BackendError, ValueError):
    """A native kernel was given arrays that do not fit."""


class DeviceError(BackendError):
    """There is no GPU to compute on: no driver, one that is too old, no such device, or no kernels for it."""


class DeviceLostError(BackendError):
    """The device is unusable for the rest of this process; the process must be restarted."""

    exit_code = 70
