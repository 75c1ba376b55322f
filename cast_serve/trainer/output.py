"""Whether an output can be written: asked before the work, and said in one line after it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from safetensors import SafetensorError

from cast_serve.model_loaders.errors import CheckpointError
from cast_serve.model_loaders.write import check_output
from cast_serve.trainer.errors import RunError


def require_free(output: Path, *, source: Path) -> None:
    """Refuse an output that holds something, or that lies in the folder of the model.

    Args:
        source: the checkpoint that is read, which nothing may be written to.

    Raises:
        RunError: says which folder, and what to do.
    """
    try:
        check_output(output, source=source)
    except CheckpointError as error:
        raise RunError(f"output: {error}") from error


def require_writable(output: Path) -> None:
    """Refuse an output that the disk refuses; makes the folder that it is to lie in.

    Raises:
        RunError: says which folder, and why.
    """
    final = output.resolve()
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        # Tried, because os.access knows nothing of quotas and of network file systems.
        with TemporaryFile(dir=final if final.is_dir() else final.parent):
            pass
    except OSError as error:
        raise RunError(
            f"output: cannot write {output}: {error.strerror}; choose another"
        ) from error


@contextmanager
def output_errors(output: Path, *, trained: bool) -> Iterator[None]:
    """Raise RunError where the disk is full, a folder cannot be written, or weights do not fit.

    Args:
        trained: there is a finished training to write again.
    """
    try:
        yield
    except (OSError, SafetensorError, CheckpointError) as error:
        reason = getattr(error, "strerror", None) or error
        # A disk has refused it, or a CheckpointError has another reason, such as an overflow.
        of_disk = isinstance(error.__cause__ or error, OSError | SafetensorError)
        room = "make room and " if of_disk else ""
        if trained:
            raise RunError(
                f"output: cannot write {output} ({reason}); the training is done and saved: "
                f"{room}write it with --resume"
            ) from error
        raise RunError(f"output: cannot write {output} ({reason}); {room}start it again") from error
