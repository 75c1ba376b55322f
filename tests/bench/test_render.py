from collections.abc import Callable
from pathlib import Path

import pytest

from cast_serve.bench.linear_results import Results, Row
from cast_serve.bench.render import (
    BEGIN,
    END,
    KERNELS_README,
    README,
    RESULTS,
    headline_table,
    kernel_table,
    markdown,
    render,
    update_readme,
)


def test_render(result_file: Path) -> None:
    text, plot = render(result_file)
    assert text.name == "linear-h200.md" and "(linear-h200.png)" in text.read_text()
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_markdown_sums(results: Results) -> None:
    lines = markdown(results, "plot.png").splitlines()
    assert lines[0] == "# 2:4 linear layers on NVIDIA H200"
    (floor,) = [line for line in lines if line.startswith("| *floor* |")]
    assert floor.startswith("| *floor* | *1.65* | *1.60* |")
    (llama,) = [line for line in lines if line.startswith("| Llama-3.1-8B | 1.25 ✗ |")]
    # 1.25 everywhere: the floors of M = 256 and 512 are met.
    assert [cell.strip() for cell in llama.split("|")][2:-1] == [
        *["1.25 ✗"] * 6,
        *["1.25"] * 2,
        *["1.25 ✗"] * 3,
    ]


def test_markdown_layers(results: Results) -> None:
    text = markdown(results, "plot.png")
    lines = [line for line in text.splitlines() if "| gate_up 28672x4096 | 16 |" in line]
    assert len(lines) == 1
    assert "| 1.25 | mma_sp | 3200 (80%) |" in lines[0] and "| 80% | 0.5625 |" in lines[0]


def test_markdown_leaves_gaps(results: Results) -> None:
    fewer = Results(
        env=results.env,
        runs=results.runs,
        rows=tuple(row for row in results.rows if (row.layer, row.M) != ("o", 1)),
    )
    assert "| Llama-2-7B |  | 1.25 ✗ |" in markdown(fewer, "plot.png")


def test_markdown_forced(results: Results) -> None:
    assert "## Kernels that were forced" in markdown(results, "plot.png")
    assert "| qkv | 64 | bfloat16 | cusparselt | `r128` |" in markdown(results, "plot.png")


def test_kernel_table(result_file: Path) -> None:
    _, _, first, second = kernel_table([result_file])
    link = "[linear-h200](../bench/results/linear-h200.md)"
    assert first == f"| mma_sp | NVIDIA H200 | 1-64 | 40 of 40 | 1.25 / 1.25 / 1.25 | {link} |"
    assert second.startswith("| wgmma_sp | NVIDIA H200 | 128-16384 | 48 of 48 |")


def test_kernel_table_splits_ranges(tmp_path: Path, env, row: Callable[..., Row]) -> None:
    rows = [row(M=M, kernel="a" if M in (1, 8, 64) else "b") for M in (1, 8, 16, 64)]
    path = tmp_path / "linear-h200.json"
    Results().merge(env("one"), rows).save(path)
    ranges = [line.split(" | ")[2] for line in kernel_table([path])[2:]]
    assert ranges == ["1-8", "64", "16"]


def test_update_readme(result_file: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"# Kernels\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    update_readme(readme, kernel_table([result_file]))
    written = readme.read_text()
    assert "old" not in written and "| mma_sp | NVIDIA H200 |" in written
    assert written.startswith(f"# Kernels\n\n{BEGIN}\n") and written.endswith(f"{END}\n\nafter\n")
    update_readme(readme, kernel_table([result_file]))
    assert readme.read_text() == written


def test_update_readme_refuses(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("# Kernels\n")
    with pytest.raises(ValueError, match="lacks the lines"):
        update_readme(readme, [])


def test_headline_table(result_file: Path) -> None:
    header, _, line = headline_table([result_file])
    assert header.startswith("| tokens M | 1 | 8 |")
    assert line.startswith(
        "| [NVIDIA H200](bench/results/linear-h200.md), bfloat16 | 1.25 | 1.25 |"
    )


@pytest.mark.parametrize(
    ("readme", "table"),
    [(README, headline_table), (KERNELS_README, kernel_table)],
    ids=["README", "kernels"],
)
def test_readmes_are_up_to_date(tmp_path: Path, readme: Path, table: Callable) -> None:
    """They hold what the results in the checkout say."""
    copy = tmp_path / "README.md"
    copy.write_text(readme.read_text())
    update_readme(copy, table(sorted(RESULTS.glob("linear-*.json"))))
    assert copy.read_text() == readme.read_text()
