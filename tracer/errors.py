"""The exception for mistakes that a user of the command line can mend."""

from __future__ import annotations

from signal import SIGTERM


class UserError(ValueError):
    """Bad input in the rooms behind the command line, which prints its one line; the library raises ValueError."""


class Diverged(UserError):
    """The loss or the weights of a run are no longer finite; a sweep goes on without such a trial."""


class Stopped(BaseException):
    """A signal has asked the process to stop; like KeyboardInterrupt it passes through ``except Exception``.

    Args:
        message: what was saved, and how to go on.
        signal: number of the signal.
        saved: whether the work so far was saved on its account.
        together: whether all ranks of the run have agreed to stop here; otherwise this one alone was asked to.

    Attributes:
        signal, together: as given.
        code: the exit code: 0 where SIGTERM was obeyed and the work saved, since the system that sent it did what
            it should; else 128 + the signal's number, as shells have it.
    """

    def __init__(self, message: str, signal: int, saved: bool = False, together: bool = False) -> None:
        super().__init__(message)
        self.signal, self.together = signal, together
        self.code = 0 if saved and signal == SIGTERM else 128 + signal


class Refused(UserError):
    """Another rank has ended the run, and says why; this rank ends with it and says nothing."""


# The extra of this package that brings a library, where it is not "train".
EXTRAS = {"nvidia": "dali", "pyarrow": "parquet", "wandb": "wandb", "mlflow": "mlflow"}


def how_to_install(library: str) -> str:
    """Return the words that say which extra brings a library, and the command that installs it.

    Args:
        library: name of the module that could not be imported.
    """
    library = library.partition(".")[0]
    extra = EXTRAS.get(library)
    extras = f"train,{extra}" if extra else "train"
    return f"needs {library}, which is not installed: pip install 'tracer-clip[{extras}]'"
