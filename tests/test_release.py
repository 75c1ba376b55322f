"""What a release is: a version from git, a wheel and an sdist that hold the same."""

import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from importlib.metadata import PackageMetadata
from pathlib import Path

import pytest
from build.util import project_wheel_metadata
from checkout import ROOT, copy_checkout, copy_files, git, tracked_files

CONSTRAINTS = ROOT / "requirements" / "cpu.txt"
EXAMPLE = ROOT / "examples" / "tiny-llama-2of4"


@pytest.fixture
def source(tmp_path) -> Path:
    """The files as they are now, without history."""
    return copy_files(tmp_path / "source")


def repository(source: Path, *tags: str) -> None:
    """Make `source` a repository of one commit, with these tags."""
    identity = ("-c", "user.name=test", "-c", "user.email=test@localhost")
    git("init", "--quiet", cwd=source)
    git("add", "--all", cwd=source)
    git(*identity, "commit", "--quiet", "--message", "all", cwd=source)
    for tag in tags:
        git("tag", tag, cwd=source)


def metadata(source: Path) -> PackageMetadata:
    return project_wheel_metadata(source, isolated=False)


def test_version_is_the_tag(source):
    repository(source, "v9.8.7")
    assert metadata(source)["Version"] == "9.8.7"


def test_version_of_a_checkout_without_tags(source):
    repository(source)
    assert re.fullmatch(r"0\.1\.1\.dev1\+g[0-9a-f]+", metadata(source)["Version"])


def test_version_without_history(source):
    assert metadata(source)["Version"] == "0.1.0"


def test_extras():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert set(extras) == {"cpu", "cuda", "train", "eval"}
    # An extra that names a dependency of all adds nothing.
    names = {re.split(r"[<>=]", entry)[0] for entry in project["dependencies"]}
    for extra, entries in extras.items():
        assert not names & {re.split(r"[<>=]", entry)[0] for entry in entries}, extra


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    return copy_checkout(tmp_path_factory.mktemp("release") / "checkout")


@pytest.fixture(scope="module")
def distributions(tmp_path_factory, checkout) -> tuple[Path, Path]:
    """The sdist of this checkout, and the wheel that is built from that sdist."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, checkout]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


def test_sdist_holds_what_git_tracks(distributions):
    sdist, _ = distributions
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    # Links have become what they point to.
    missing = {name for name in tracked_files() if not (ROOT / name).is_symlink()} - held
    assert not missing
    assert {"PKG-INFO", "cast_serve/kernels/wgmma_sp.cu"} <= held


def test_wheel_of_the_sdist_is_the_wheel_of_the_checkout(distributions, checkout, tmp_path):
    _, wheel = distributions
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
    subprocess.run([*command, "--outdir", tmp_path, checkout], check=True, capture_output=True)
    (direct,) = tmp_path.glob("*.whl")
    assert direct.name == wheel.name
    assert contents(direct) == contents(wheel)


def contents(wheel: Path) -> dict[str, int]:
    with zipfile.ZipFile(wheel) as archive:
        return {
            info.filename: info.CRC for info in archive.infolist() if "RECORD" not in info.filename
        }


@pytest.mark.slow
@pytest.mark.release
@pytest.mark.timeout(1200)
def test_both_install_in_an_empty_environment(distributions, tmp_path):
    """With pip, build isolation, and dependencies from the index as the lock file pins them."""
    sdist, wheel = distributions
    venv.create(tmp_path / "empty", with_pip=True)
    programs = tmp_path / "empty" / "bin"

    def run(*command: str | Path) -> str:
        done = subprocess.run(
            [programs / command[0], *command[1:]],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout

    (tmp_path / "text.txt").write_text("It was a fine day, and they walked. " * 400)
    for archive in (wheel, sdist):
        run("pip", "install", "--quiet", "--constraint", CONSTRAINTS, f"{archive}[train,eval]")
        versions = run("cast-serve", "--version")
        assert f"cast-serve         {wheel.name.split('-')[1]}\n" in versions
        assert "vLLM               not installed\n" in versions
        assert "56 sparse linears in order" in run("cast-model", "check", EXAMPLE)
        estimate = ["--model", "llama-2-7b", "--gpu", "h100", "--processes", "8", "--tokens", "1e9"]
        assert "AdamS moments" in run("cast-train", "estimate", *estimate)
        evaluated = run("cast-train", "evaluate", EXAMPLE, "--text", "text.txt", "--context", "32")
        assert "perplexity" in evaluated.lower()
        run("pip", "uninstall", "--quiet", "--yes", "cast-serve")
