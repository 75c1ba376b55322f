"""deploy/compose: `docker-compose config` resolves both variants, and what they mount is there."""

from pathlib import Path

import pytest
import yaml
from deploy_files import DEPLOY, changed

CPU = DEPLOY / "compose" / "compose.yaml"
CUDA = DEPLOY / "compose" / "compose.cuda.yaml"
TARGETS = {"cpu": [CPU], "cuda": [CPU, CUDA]}


@pytest.fixture
def config(tool):
    def of(*files: Path):
        flags = [flag for file in files for flag in ("-f", file)]
        return tool("docker-compose")(*flags, "config")

    return of


@pytest.mark.parametrize("target", TARGETS)
def test_compose(config, target):
    resolved = config(*TARGETS[target])
    assert resolved.returncode == 0, resolved.stderr
    services = yaml.safe_load(resolved.stdout)["services"]
    assert set(services) == {"cast-serve", "prometheus", "grafana"}
    built = services["cast-serve"]["build"]
    assert built["target"] == target
    dockerfile = (Path(built["context"]) / built["dockerfile"]).read_text()
    assert f"\nFROM run AS {target}\n" in dockerfile
    assert ("deploy" in services["cast-serve"]) == (target == "cuda")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("    ports:\n      - 127.0.0.1:8000:8000", "    port:\n      - 127.0.0.1:8000:8000"),
        ("retries: 3", "retries: thrice"),
        ("depends_on: [prometheus]", "depends_on: [prometeus]"),
    ],
)
def test_config_sees_mistakes(config, tmp_path, old, new):
    assert config(changed(CPU, tmp_path, old, new)).returncode != 0


def test_stop_outlasts_the_drain(drain_seconds):
    service = yaml.safe_load(CPU.read_text())["services"]["cast-serve"]
    assert int(service["stop_grace_period"].removesuffix("s")) > drain_seconds


def test_mounted_files_exist():
    """Docker would make an empty folder of the name of a file that is missing."""
    services = yaml.safe_load(CPU.read_text())["services"]
    mounts = [mount for service in services.values() for mount in service["volumes"]]
    sources = [mount.split(":")[0] for mount in mounts if mount.startswith(".")]
    assert len(sources) == 5
    for source in sources:
        assert (CPU.parent / source).exists(), source


def test_ports_are_this_machines_alone():
    for name, service in yaml.safe_load(CPU.read_text())["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
