"""The site builds without a warning, and loads nothing from elsewhere."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "bench/results",
    "docs",
    "examples/tiny-llama-2of4/README.md",
    "kernels/README.md",
    "mkdocs.yml",
    "scripts/docs_site.py",
)


def build(root: Path, output: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(output)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("site")
    done = build(ROOT, output)
    assert done.returncode == 0, done.stderr
    return output


def test_pages(site):
    assert (site / "index.html").exists()
    assert (site / "kernels" / "index.html").exists()
    assert (site / "bench" / "results" / "linear-h200.png").exists()


def test_every_page_is_in_the_navigation(site):
    navigation = (site / "index.html").read_text()
    for page in site.rglob("*.html"):
        name = page.relative_to(site).as_posix()
        assert name == "404.html" or f'href="{name}"' in navigation, name


def test_loads_nothing_from_elsewhere(site):
    loaded = re.compile(
        r"""<(?:script|img|iframe)[^>]*\bsrc=["']?https?:|<link[^>]*stylesheet[^>]*https?:"""
    )
    for page in site.rglob("*.html"):
        assert not loaded.search(page.read_text()), page


def test_links_between_pages_hold_on_the_site(site):
    """As built: to files that are there, and to headings that those have."""
    checked = 0
    for page in site.rglob("*.html"):
        for target in re.findall(r'<a [^>]*href="([^"]+)"', page.read_text()):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            found = (page.parent / path).resolve() if path else page
            if page.name == "404.html":
                continue
            assert found.exists(), f"{page}: {target}"
            if anchor and found.suffix == ".html":
                assert re.search(rf'\bid="{re.escape(anchor)}"', found.read_text()), target
            checked += 1
    assert checked > 500


def test_broken_links_fail(tmp_path):
    for source in SOURCES:
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        (tmp_path / source).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / source, tmp_path / source)
    broken = ["gone.md", "formats.md#no-such-heading", "../kernels/GONE.md"]
    with (tmp_path / "docs" / "guide.md").open("a") as page:
        page.write("".join(f"\n[a link]({target})\n" for target in broken))
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode == 1
    for target in broken:
        assert f"'guide.md' contains a link '{target}'" in done.stderr, done.stderr
