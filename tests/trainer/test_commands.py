"""`cast-train NAME ...`: the command is found, and its errors are one line and exit status 2."""

import subprocess
import sys
from pathlib import Path

import pytest

from cast_serve.trainer.arguments import Parser
from cast_serve.trainer.commands import COMMANDS, find_command
from cast_serve.trainer.main import main


def greet(arguments):
    """A command as others are: its own parser, and RunError for a mistake."""
    parser = Parser(prog="cast-train greet", allow_abbrev=False)
    parser.add_argument("name")
    print(f"hello {parser.parse_args(arguments).name}")
    return 3


@pytest.fixture
def with_greet(monkeypatch):
    monkeypatch.setitem(COMMANDS, "greet", f"{__name__}:greet")


@pytest.mark.usefixtures("with_greet")
def test_a_command_gets_its_arguments_and_gives_the_status(capsys):
    assert main(["greet", "you"]) == 3
    assert capsys.readouterr().out == "hello you\n"


@pytest.mark.usefixtures("with_greet")
def test_a_command_refuses_in_one_line(capsys):
    assert main(["greet", "you", "--loud"]) == 2
    error = capsys.readouterr().err
    assert error == (
        "cast-train greet: error: unrecognized arguments: --loud; "
        "cast-train greet --help lists the flags\n"
    )


@pytest.mark.usefixtures("with_greet")
def test_a_command_is_one_process(capsys, monkeypatch):
    """Two would write the same output."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("cast_serve.trainer.main.say_once", lambda words, say: say(words))
    assert main(["greet", "you"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "greet is one process: start it without torchrun or accelerate launch" in said.err


def test_unknown_command(capsys):
    assert main(["assess", "DIR"]) == 2
    assert "cast-train assess: error: 'assess' is no command; known: " in capsys.readouterr().err


def test_flags_alone_are_the_training_itself(capsys):
    assert main(["--data", "x", "--output", "y"]) == 2
    assert capsys.readouterr().err.startswith("cast-train: error: model: missing")


@pytest.mark.timeout(60)
def test_who_reads_the_output_may_go(tmp_path):
    """As `| head` does: here it has gone before the last line, the JSON, is written."""
    table = Path(__file__).parents[2] / "bench/results/smollm2-law-held-out.csv"
    code = (
        "import json, sys\n"
        "from cast_serve.trainer.main import main\n"
        "dumps = json.dumps\n"
        "def wait(*found, **options):\n"
        "    options or sys.stdin.read()\n"
        "    return dumps(*found, **options)\n"
        "json.dumps = wait\n"
        f"sys.exit(main(['scaling', {str(table)!r}, '--resamples', '10', '-o', 'law']))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    ) as process:
        assert any(line.startswith("wrote ") for line in iter(process.stdout.readline, ""))
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1
    assert (tmp_path / "law/results.json").is_file()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_main_and_a_quick_help(name):
    assert callable(find_command(name))
    code = (
        "import sys\nfrom cast_serve.trainer.main import main\n"
        f"try:\n    main([{name!r}, '--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, f"{name} --help imports torch or transformers\n{done.stderr}"
    assert f"cast-train {name}" in done.stdout
