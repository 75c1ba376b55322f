"""What may become of a safetensors file, whatever lies in it; scripts/fuzz_headers.py asks too."""

from pathlib import Path

from cast_serve.model_loaders.checkpoint import Checkpoint
from cast_serve.model_loaders.errors import CheckpointError
from cast_serve.model_loaders.header import read_header

LONGEST_LINE = 4000


def judge(file: Path) -> str | None:
    """The line that `file` is refused by; None if every tensor of it can be read.

    Raises if it is neither, or if the line is more than that or cannot be printed.
    """
    try:
        checkpoint = Checkpoint(path=file.parent, config={}, entries=read_header(file))
        for name, entry in checkpoint.entries.items():
            tensor = checkpoint.read(name)
            assert (tuple(tensor.shape), tensor.dtype) == (entry.shape, entry.dtype)
            assert tensor.numel() * tensor.element_size() == entry.nbytes
    except CheckpointError as error:
        line = str(error)
        assert len(line) < LONGEST_LINE and len(line.splitlines()) == 1, line[:LONGEST_LINE]
        line.encode()
        return line
    return None
