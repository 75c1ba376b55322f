"""scripts/fuzz_headers.py in short: headers that once did harm, and seeded ones like its own."""

import json
import struct
from pathlib import Path

import pytest
from header_judge import judge
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

DIGITS = "9" * 4000


def entry(*, dtype: str = '"F32"', shape: str = "[0]", offsets: str = "[0,0]") -> str:
    return f'{{"a":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}}}'


def of(count: int, value: str) -> str:
    return f"[{','.join([value] * count)}]"


# The first four: an integer that Python does not print, hours of multiplication, as many of
# comparison, and a size that PyTorch has no stride for.
HARMFUL = {
    "product-not-printed": entry(shape=of(2, DIGITS)),
    "product-of-hours": entry(shape=of(20_000, DIGITS)),
    "names-compared": "{" + ",".join(f'"{i}":1' for i in range(300_000)) + ',"299999":1}',
    "strides-overflow": entry(shape="[0,4611686018427387904,4611686018427387904]"),
    "dimensions": entry(shape=of(65, "1"), offsets="[0,4]"),
    "long-dtype": entry(dtype=f'"{"F" * 1_000_000}"'),
    "long-name": entry().replace('"a"', f'"{"a" * 1_000_000}"'),
    "long-offsets": entry(offsets=of(100_000, "1")),
    "deep-shape": entry(shape="[" * 480 + "]" * 480),
    "deep-dtype": entry(dtype="[" * 480 + "]" * 480),
    "too-deep": "[" * 1_000_000,
    "half-a-character": entry().replace('"a"', r'"\ud800"'),
}


def write(folder: Path, header: bytes, data: bytes = b"") -> Path:
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return file


# Seconds are plenty; the harmful ones took minutes to days.
@pytest.mark.timeout(60)
@pytest.mark.parametrize("header", [pytest.param(text, id=id) for id, text in HARMFUL.items()])
def test_harmful(tmp_path: Path, header: str) -> None:
    assert judge(write(tmp_path, header.encode()))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_other_encodings(tmp_path: Path, encoding: str) -> None:
    """Which Python's json would read, and the safetensors library does not."""
    assert "is not valid JSON" in judge(write(tmp_path, entry().encode(encoding)))


SIZES = st.sampled_from([0, 1, 2, 8, 2**31, 2**62, 2**63 - 1, 2**63, 10**4000, -1])
ANY = st.recursive(
    st.none() | st.booleans() | SIZES | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "I64"]) | ANY,
        "shape": st.lists(SIZES, max_size=4) | ANY,
        "data_offsets": st.lists(SIZES, min_size=2, max_size=2) | st.just([0, 8]) | ANY,
    }
)
HEADERS = st.dictionaries(st.text(max_size=5), ENTRIES | ANY, max_size=3)


@settings(
    max_examples=500,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(header=HEADERS, data=st.integers(0, 16))
def test_seeded(tmp_path: Path, header: dict[str, object], data: int) -> None:
    """Refused in a line, or every tensor of it can be read."""
    judge(write(tmp_path, json.dumps(header).encode(), bytes(data)))
