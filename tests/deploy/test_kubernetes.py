"""deploy/kubernetes: valid for the API, and its probes and periods fit the server's."""

import copy
from typing import Any

import pytest
import yaml
from deploy_files import DEPLOY

validator = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")

# The oldest and the newest version that is looked at.
VERSIONS = ["1.30", "1.35"]
OBJECTS = list(yaml.safe_load_all((DEPLOY / "kubernetes" / "cast-serve.yaml").read_text()))

# Is started by hand, to copy models.
COPIER = yaml.safe_load((DEPLOY / "kubernetes" / "models.yaml").read_text())


def by_kind(kind: str) -> dict[str, Any]:
    (found,) = (thing for thing in OBJECTS if thing["kind"] == kind)
    return copy.deepcopy(found)


@pytest.fixture
def deployment() -> dict[str, Any]:
    return by_kind("Deployment")


@pytest.fixture
def pod(deployment) -> dict[str, Any]:
    return deployment["spec"]["template"]["spec"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("thing", [*OBJECTS, COPIER], ids=lambda thing: thing["kind"])
def test_schema(thing, version):
    validator.validate(thing, version, strict=True)


def test_schema_sees_mistakes(deployment, pod):
    pod["containers"][0]["livenessProbes"] = {}
    with pytest.raises(validator.ValidationError, match="livenessProbes"):
        validator.validate(deployment, VERSIONS[-1], strict=True)


def test_stop_outlasts_the_drain(pod, drain_seconds):
    (container,) = pod["containers"]
    command, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    assert pod["terminationGracePeriodSeconds"] > int(seconds) + drain_seconds


def test_probes_ask_the_servers_port(pod):
    (container,) = pod["containers"]
    ports = {port["name"] for port in container["ports"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] in ports
    assert by_kind("Service")["spec"]["ports"][0]["targetPort"] in ports


def test_rollout_waits_for_loading(deployment, pod):
    startup = pod["containers"][0]["startupProbe"]
    loading = startup["periodSeconds"] * startup["failureThreshold"]
    assert deployment["spec"]["progressDeadlineSeconds"] > loading


def test_names_agree(deployment, pod):
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert by_kind("Service")["spec"]["selector"].items() <= labels.items()
    (container,) = pod["containers"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    claims = {
        v["persistentVolumeClaim"]["claimName"]
        for v in pod["volumes"]
        if len(v) == 2 and "persistentVolumeClaim" in v
    }
    assert claims == {by_kind("PersistentVolumeClaim")["metadata"]["name"]}


def test_models_are_copied_to_where_the_server_reads_them(pod):
    (volume,), (container,) = COPIER["spec"]["volumes"], COPIER["spec"]["containers"]
    assert volume in pod["volumes"]
    (mount,) = container["volumeMounts"]
    (read,) = (m for m in pod["containers"][0]["volumeMounts"] if m["name"] == mount["name"])
    assert read == mount | {"readOnly": True}


def test_runs_as_the_images_user(pod):
    """Every folder that is written is a volume: the root is read-only."""
    dockerfile = (DEPLOY / "docker" / "Dockerfile").read_text()
    user, home = pod["securityContext"]["runAsUser"], "/var/cache/cast-serve"
    assert f"--uid {user} --create-home --home-dir {home} " in dockerfile
    mounts = {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert {home, "/tmp", "/dev/shm"} <= mounts
