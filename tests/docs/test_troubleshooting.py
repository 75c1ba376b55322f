"""docs/troubleshooting.md has every message that the code can raise."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

_spec = importlib.util.spec_from_file_location("list_errors", ROOT / "scripts" / "list_errors.py")
assert _spec is not None and _spec.loader is not None
list_errors = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(list_errors)

PAGE = list_errors.PAGE.read_text()
SOURCES = list_errors.sources()

# Raised with the words of another error or library alone, or with an exit status.
PASSED_ON = {
    "bench/arguments.py: argparse.ArgumentTypeError(f'{path}: {error.strerror}')",
    "bench/result_file.py: ResultError(f'{path}: row {index}: {found}')",
    "bench/serving/breakdown.py: ServerError(f'{url}: {error}')",
    "cast_serve/cli/model.py: typer.Exit(1)",
    "cast_serve/cli/perplexity.py: CheckpointError(Path(place), reason)",
    "cast_serve/cli/perplexity.py: CheckpointError(folder, str(error))",
    "cast_serve/cli/perplexity.py: CheckpointError(path, str(error))",
    "cast_serve/linear.py: ValueError(f\"{', '.join(sorted(names))}: {reason}\")",
    "cast_serve/server/serve.py: fail(f'{type(error).__name__}: {_said(error)}')",
    "cast_serve/server/serve.py: fail(_said(error), WRONG_USAGE)",
    "cast_serve/server/serve.py: fail(str(error))",
    "cast_serve/trainer/comparison/main.py: RunError(error)",
    "cast_serve/trainer/output.py: RunError(f'output: {error}')",
    "cast_serve/trainer/processes.py: RunError(str(outcome[1]))",
    "cast_serve/trainer/scaling/main.py: RunError(str(error))",
    "kernels/cusparselt_abi.py: CusparseltError(f'cusparseLtGetProperty({kind}): {self._mess",
    "kernels/cusparselt_abi.py: CusparseltError(f'{function}: {self._message(status)} (cuSPA",
    "kernels/nvrtc.py: CompileError(f'{source.name} {source.options}:\\n{log.decode(",
    "kernels/nvrtc.py: CompileError(f'{source.name}: {nvrtc.nvrtcGetErrorString(sta",
    "kernels/nvrtc.py: RuntimeError(f'{call}: {name}: {text}')",
    "model_loaders/check.py: checkpoint.error(at_fault, said)",
    "model_loaders/checkpoint.py: CheckpointError(self.entries[name].file, reason, name)",
    "model_loaders/layers.py: checkpoint.error(linear.tensors[0], reason)",
    "model_loaders/write.py: OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))",
}


def test_page_is_as_written_from_the_source():
    current = list_errors.render(PAGE, SOURCES)
    assert current == PAGE, "python scripts/list_errors.py"


def test_every_file_that_raises_belongs_to_a_section():
    paths = list_errors.paths_of(PAGE)
    assert len(paths) == len(set(paths))
    for file, text in SOURCES.items():
        assert not list_errors.messages(text) or list_errors.owner(file, paths), file


def test_every_path_exists():
    for path in list_errors.paths_of(PAGE):
        assert any(file.startswith(path) for file in SOURCES), path


def test_every_section_says_what_to_do():
    for section in PAGE.split("\n## ")[1:]:
        assert len(section.partition("<!-- errors")[0].split()) > 30, section.splitlines()[0]


def test_no_raise_is_overlooked():
    """Each says something that the list has, or is known to pass on the words of another."""
    silent = {
        f"{file}: {call[:60]}"
        for file, text in SOURCES.items()
        for call, texts in list_errors.reports(text)
        if not texts
    }
    assert silent == PASSED_ON


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("raise RunError(f'lr: {x} is out of range')", ["lr: ... is out of range"]),
        ("raise CheckpointError(file, 'no such file', tensor)", ["no such file"]),
        ("raise E.SomeError('too ' 'long ' + reason)", ["too long ..."]),
        (
            "raise SomeError('no such file' if x else 'no such folder')",
            ["no such file", "no such folder"],
        ),
        (
            "def said(x):\n    return f'cannot read {x}'\nraise SomeError(said(1))",
            ["cannot read ..."],
        ),
        ("FULL = 'disk is full'\nraise SomeError(FULL)", ["disk is full"]),
        ("raise SomeError(str(error))", []),
        ("print('not an error')", []),
    ],
)
def test_messages(source, expected):
    assert list_errors.messages(source) == expected


def on_page(message: str) -> bool:
    """Whether a line of the page, its gaps filled, is in the message."""
    for line in re.findall(r"^- `+ ?(.*?) ?`+$", PAGE, re.MULTILINE):
        parts = [re.escape(part) for part in line.split("...")]
        # A line that is mostly gaps would be in any message.
        if len("".join(line.split("..."))) > 12 and re.search(".*".join(parts), message):
            return True
    return False


@pytest.mark.parametrize(
    "command",
    [
        "cast_serve.cli.model check nowhere",
        "cast_serve.cli.model pack tests -o out",
        "cast_serve.trainer.main assess",
        "cast_serve.trainer.main --data x --output y",
        "cast_serve.trainer.main --model nowhere --data x --output y --steps 1 --pattern 4:2",
        "cast_serve.trainer.main evaluate nowhere --text x",
        "cast_serve.trainer.main estimate --model nowhere --gpu h100 --processes 1 --tokens 1",
    ],
)
def test_what_commands_say_is_on_the_page(command):
    module, *arguments = command.split()
    name = {"cast_serve.cli.model": "app", "cast_serve.trainer.main": "main"}[module]
    program = f"import sys; from {module} import {name}; sys.exit({name}({arguments}))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode in (1, 2)
    assert on_page(" ".join(done.stderr.split())), done.stderr
    assert not on_page("a text that nothing raises")
