"""deploy/docker: hadolint has nothing to say, and the build finds what it copies."""

import re
import subprocess

import pytest
from deploy_files import DEPLOY, changed

DOCKERFILE = DEPLOY / "docker" / "Dockerfile"
ROOT = DEPLOY.parent


def test_dockerfile(tool):
    linted = tool("hadolint")(DOCKERFILE)
    assert (linted.returncode, linted.stdout) == (0, "")


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("FROM debian:bookworm-slim AS python", "FROM debian AS python", "DL3006"),
        ("WORKDIR /var/cache/cast-serve", "RUN cd /var/cache", "DL3003"),
        ("EXPOSE 8000", "EXPOSE 80000", "DL3011"),
        ("FROM run AS cuda", "FROM runs AS cuda COPY", ""),
    ],
)
def test_hadolint_sees_mistakes(tool, tmp_path, old, new, rule):
    linted = tool("hadolint")(changed(DOCKERFILE, tmp_path, old, new))
    assert linted.returncode != 0
    assert rule in linted.stdout + linted.stderr


def test_context_has_what_is_copied():
    ignored = (ROOT / ".dockerignore").read_text().split()
    for source in re.findall(r"^COPY (?!--from)(\S+)", DOCKERFILE.read_text(), re.MULTILINE):
        assert (ROOT / source).exists()
        assert source not in ignored


def test_context_has_what_the_version_is_made_of():
    """Without .git there is no version; without a tracked file the checkout counts as changed."""
    assert ".git" not in (ROOT / ".dockerignore").read_text().split()
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--ignored", "--exclude-from", ".dockerignore"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert listed.stdout == ""
