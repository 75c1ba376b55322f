"""What installing gives: the package alone, its links followed, and nothing that hides others."""

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from checkout import copy_checkout

ROOT = Path(__file__).parent.parent
SHIPPED = (".py", ".cu", ".cuh", ".json", ".html", ".css", ".js", ".svg")


@pytest.mark.parametrize("folder", ["bench", "kernels", "model_loaders", "tests"])
def test_no_package_at_the_top(folder):
    """Hugging Face publishes a package `kernels`: one of ours on sys.path would hide it."""
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()


def test_no_root_conftest():
    assert not (ROOT / "conftest.py").exists()


def test_top_level_kernels_is_not_ours():
    """With the checkout as working directory, as `python -c` and `python -m pytest` have it."""
    found = subprocess.run(
        [sys.executable, "-c", "import kernels; print(kernels.__file__)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    # None: a namespace, which any installed package of the name wins against.
    assert found.stdout.strip() in ("", "None") or not found.stdout.startswith(str(ROOT))


@pytest.mark.parametrize("name", ["bench", "kernels", "model_loaders"])
def test_links_are_relative(name):
    assert os.readlink(ROOT / "cast_serve" / name) == f"../{name}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = copy_checkout(folder / "checkout")
    # Without isolation, so that it needs no package index: setuptools is in the lock file.
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    subprocess.run([*command, str(source)], check=True, capture_output=True)
    return next(folder.glob("cast_serve-*.whl"))


def test_wheel_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"cast_serve"}
    for folder, prefix in (
        ("cast_serve", ""),
        ("kernels", "cast_serve/"),
        ("model_loaders", "cast_serve/"),
        ("bench", "cast_serve/"),
    ):
        for source in (ROOT / folder).rglob("*"):
            # CUDA C++, shipped plans and the page are read at run time, measurements are not.
            if source.is_relative_to(ROOT / "bench" / "results"):
                continue
            if source.suffix in SHIPPED:
                assert prefix + source.relative_to(ROOT).as_posix() in names
    assert not [name for name in names if name.startswith("cast_serve/bench/results")]


def test_wheel_in_empty_environment(wheel, tmp_path):
    """Installed alone: imports, finds the entry point, and has loaded neither torch nor vllm."""
    venv.create(tmp_path / "empty", with_pip=False)
    python = tmp_path / "empty" / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = tmp_path / "empty" / "lib" / version / "site-packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    program = """
import sys
from importlib.metadata import entry_points
(entry,) = entry_points(group="vllm.general_plugins", name="cast")
register = entry.load()
assert register.__module__ == "cast_serve", register
assert not {"torch", "vllm"} & set(sys.modules), "imported too early"
print(sorted(script.name for script in entry_points(group="console_scripts")))
"""
    done = subprocess.run(
        [str(python), "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "['cast-bench', 'cast-model', 'cast-serve', 'cast-train']"


@pytest.mark.slow
def test_wheel_imports_with_dependencies(wheel, tmp_path):
    """Every module of the wheel imports, from the wheel and not from this checkout."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    modules = [
        name.removesuffix(".py").replace("/", ".")
        for name in zipfile.ZipFile(wheel).namelist()
        if name.endswith(".py") and not name.endswith("__init__.py")
    ]
    program = (
        "import importlib, sys, cast_serve;"
        f"assert cast_serve.__file__.startswith({str(tmp_path)!r}), cast_serve.__file__;"
        f"[importlib.import_module(name) for name in {modules!r}]"
    )
    site = sysconfig.get_paths()["purelib"]
    # -S: no .pth files, so the editable install of this checkout is not on the path.
    subprocess.run(
        [sys.executable, "-S", "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), site])},
        check=True,
    )


def test_benchmarks_write_to_the_working_directory(wheel, tmp_path):
    """Installed, they leave the package alone, and name its version where there is no commit."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    program = (
        "from cast_serve.bench import environment, paths;"
        "print(paths.RESULTS, environment.describe(None)['commit'])"
    )
    site = sysconfig.get_paths()["purelib"]
    done = subprocess.run(
        [sys.executable, "-S", "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), site])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"bench-results {wheel.name.split('-')[1]}\n"


def test_kernels_import_without_what_only_gpus_need():
    program = (
        "import sys; sys.modules['triton'] = sys.modules['cuda'] = None;"
        "import cast_serve.kernels.op, cast_serve.kernels.tune"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_lock_files_pin_what_is_declared():
    """Both lock files hold every declared dependency, pinned."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [
        *project["dependencies"],
        *project["optional-dependencies"]["train"],
    ]
    names = {entry.split(">")[0].split("=")[0] for entry in declared}
    for lock in ("cpu", "cuda"):
        pinned = {
            line.split("==")[0]
            for line in (ROOT / "requirements" / f"{lock}.txt").read_text().splitlines()
            if "==" in line
        }
        assert names <= pinned, lock


@pytest.mark.parametrize("lock", ["cpu", "cuda"])
def test_lock_files_pin_what_compiles_kernels(lock):
    """Without a GPU too, so that tests compile every kernel."""
    pinned = (ROOT / "requirements" / f"{lock}.txt").read_text()
    for name in ("triton", "cuda-bindings", "nvidia-cuda-nvrtc"):
        assert f"\n{name}==" in pinned, name
