"""deploy/systemd: systemd takes every line, and leaves a stopping server the time that it needs."""

import re
import sys
from pathlib import Path

import pytest
from deploy_files import DEPLOY, changed

UNIT = DEPLOY / "systemd" / "cast-serve@.service"
INSTALLED = "/opt/cast-serve/bin/cast-serve"
HERE = str(Path(sys.executable).with_name("cast-serve"))


@pytest.fixture
def unit(tmp_path) -> Path:
    """The unit with the cast-serve of this environment: verify looks whether the command exists."""
    return changed(UNIT, tmp_path, INSTALLED, HERE)


def setting(name: str) -> str:
    (value,) = re.findall(rf"^{name}=(.*)$", UNIT.read_text(), re.MULTILINE)
    return value


def test_unit(tool, unit):
    verified = tool("systemd-analyze")("verify", unit)
    assert (verified.returncode, verified.stderr) == (0, "")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("KillMode=mixed", "KillMode=gentle", "gentle"),
        ("DynamicUser=yes", "DynamicUsers=yes", "DynamicUsers"),
        (HERE, "/nowhere/cast-serve", "/nowhere/cast-serve"),
    ],
)
def test_verify_sees_mistakes(tool, unit, tmp_path, old, new, said):
    folder = tmp_path / "broken"
    folder.mkdir()
    verified = tool("systemd-analyze")("verify", changed(unit, folder, old, new))
    assert said in verified.stderr


def test_sandbox(tool):
    """At most 3 of 10, systemd's "exposure": 2.0 as it was written, 9.2 for a unit without any."""
    rated = tool("systemd-analyze")("security", "--offline=true", "--threshold=30", UNIT)
    assert rated.returncode == 0, rated.stdout


def test_stop_outlasts_the_drain(drain_seconds):
    assert int(setting("TimeoutStopSec")) > drain_seconds
    # Else SIGTERM would end the engine under the requests that drain.
    assert setting("KillMode") == "mixed"


def test_example_sets_what_the_unit_reads():
    named = set(re.findall(r"\$\{?([A-Z]+)\}?", setting("ExecStart")))
    example = (DEPLOY / "systemd" / "example.env").read_text()
    assert named <= set(re.findall(r"^([A-Z_]+)=", example, re.MULTILINE))
