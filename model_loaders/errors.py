"""The one error of this package: a checkpoint that cannot be used, said in one line."""

from pathlib import Path


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; `str` is one line: FILE: TENSOR: reason.

    Attributes:
        file: the file or folder at fault.
        reason: what is wrong and, after a semicolon, what to do.
        tensor: the tensor at fault, None when it is the file as a whole.
    """

    def __init__(self, file: Path, reason: str, tensor: str | None = None) -> None:
        super().__init__(file, reason, tensor)
        self.file = file
        self.reason = reason
        self.tensor = tensor

    def __str__(self) -> str:
        parts = [str(self.file), self.tensor, self.reason]
        # Names come from files that may hold anything: a line break in one must not break the line.
        return " ".join(": ".join(part for part in parts if part).split())
