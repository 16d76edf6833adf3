"""The errors that svdk raises on purpose; the command line turns each into one line and exit code 2."""

from __future__ import annotations


class SvdkError(Exception):
    """Base of every error that svdk raises on purpose."""


class InputError(SvdkError, ValueError):
    """An argument is unusable; the message names it, what it was and what is allowed."""


class DataError(InputError):
    """A data file or an example in it is unusable."""


class ArtifactError(InputError):
    """A steering artifact or adapter is damaged, or does not fit the model it is used with."""


class InvalidLogitsError(InputError):
    """Logits rows hold NaN or +inf, or nothing finite (raised only with ``check=True``)."""


class BackendError(SvdkError, RuntimeError):
    """A backend was asked for by name and cannot run; the message says why."""


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out (host or device); such an error is never reworded.

    PyTorch has a class for devices only: its CPU allocator and its file mapping raise plain RuntimeErrors.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    words = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "bad_alloc")
    return isinstance(error, (RuntimeError, OSError)) and any(text in str(error) for text in words)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for use inside a one-line message."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
