"""The commands that the documentation shows, and what it says of running them.

A block of code with commands stands below one of

    <!-- run -->                    tests/docs/test_commands.py runs it, at small scale
    <!-- not run: needs a GPU -->   or whatever the reason is
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").glob("*/README.md")),
    ROOT / "kernels" / "README.md",
]
PROGRAMS = {
    *("cast-bench", "cast-model", "cast-serve", "cast-train", "torchrun", "python", "python3"),
    *("docker", "kubectl", "systemctl", "journalctl", "install", "ray"),
    *("curl", "git", "hf", "make", "pip"),
}

_MARK = re.compile(r"<!-- (run|not run: (?P<reason>[^>]+)) -->")
_FENCE = re.compile(r"^ *```")


@dataclass(frozen=True, kw_only=True)
class Block:
    """Code of a page.

    Attributes:
        line: number of its first line in the page.
        mark: the directive above it, None where there is none.
        reason: why it is not run; None if it is, or says nothing.
    """

    page: Path
    line: int
    text: str
    mark: str | None
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def commands(self) -> list[str]:
        """Its commands, without prompts, comments, and what they print."""
        joined = re.sub(r"\\\n\s*", " ", self.text)
        lines = (line.strip().removeprefix("$ ").strip() for line in joined.splitlines())
        return [re.sub(r"\s{2,}#.*$", "", line) for line in lines if _program(line) in PROGRAMS]


def blocks(page: Path) -> Iterator[Block]:
    """Blocks between fences, and those that are indented by four columns after an empty line."""
    lines = page.read_text().splitlines()
    index, mark = 0, None
    while index < len(lines):
        start = index
        if _FENCE.match(lines[index]):
            index = next(i for i in range(index + 1, len(lines)) if _FENCE.match(lines[i])) + 1
            code = lines[start + 1 : index - 1]
        elif lines[index].startswith("    ") and (index == 0 or not lines[index - 1].strip()):
            while index < len(lines) and (lines[index].startswith("    ") or not lines[index]):
                index += 1
            code = [line[4:] for line in lines[start:index]]
        else:
            if lines[index].strip():
                mark = _MARK.fullmatch(lines[index].strip())
            index += 1
            continue
        yield Block(
            page=page,
            line=start + 1,
            text="\n".join(code).strip("\n"),
            mark=mark and mark[1],
            reason=mark and mark["reason"],
        )
        mark = None


def _program(line: str) -> str:
    """The first word that is no setting of a variable."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        words = line.split()
    return next((word for word in words if not re.fullmatch(r"\w+=.*", word)), "")
