"""Can a safetensors file crash or hang the reader?

    pip install atheris
    python scripts/fuzz_headers.py --seconds 3600
    python scripts/fuzz_headers.py --seconds 600 --corpus DIR     goes on where another run ended
    python scripts/fuzz_headers.py crash-0123...                  one input again

Method    libFuzzer by way of atheris, led by the branches that model_loaders takes. An input is a
          header's JSON, before which the harness puts its length and behind which it puts data, or
          else a whole file. Half of the mutations are libFuzzer's, of bytes; half put, copy or
          delete a value anywhere in the JSON, which bytes seldom get past the parser.
Judged    A file is refused by a CheckpointError of one line, of bounded length, that can be
          printed; or every tensor of it can be read. Anything else is a crash, more than
          --input-seconds a hang, more than 2 GB of memory a crash.
Status    0 if all inputs were judged well. A bad one is written to --artifacts, and the status is
          that of libFuzzer.
"""

import argparse
import json
import random
import struct
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import atheris

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "support"))
with atheris.instrument_imports(include=["cast_serve.model_loaders"]):
    from header_judge import judge

LARGEST = 1 << 16
MEMORY_MB = 2048

WORDS = [
    *('"dtype":', '"shape":', '"data_offsets":', '"__metadata__":', '"F32"', '"BF16"', '"F8_E8M0"'),
    *("[0,0]", "[]", "{}", "null", "true", "NaN", "1e400", "-1", "-0", "9223372036854775807"),
    *("18446744073709551616", "\\ud800", "\\u0000", "\\n", "999999999999999999999999999999"),
]
SEEDS = [
    {},
    {"__metadata__": {"format": "pt"}, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
    {
        "a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
        "b": {"dtype": "U8", "shape": [], "data_offsets": [12, 13]},
        "c": {"dtype": "I64", "shape": [0, 4], "data_offsets": [13, 13]},
    },
]
SIZES = [0, 1, 2, 8, 2**31, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**4000]
VALUES = [
    *(*SIZES, None, True, -1, 0.5, 1e308, [], [0, 0], [1] * 65, {}, [[]]),
    *("", "F32", "F8_E8M0", "F4", "\ud800", "\n", "\0", "a" * 2000),
]


def file_of(data: bytes) -> bytes:
    """The file that an input of the fuzzer stands for."""
    if len(data) < 2 or data[0] % 2:
        return data[1:]
    header = data[2:]
    return struct.pack("<Q", len(header)) + header + bytes(data[1])


def mutate(data: bytes, longest: int, seed: int) -> bytes:
    """Another input: `data` with its bytes changed, or a value of its JSON."""
    chance = random.Random(seed)
    try:
        header = json.loads(data[2:]) if chance.random() < 0.5 and not data[0] % 2 else None
    except (ValueError, IndexError, RecursionError):
        header = None
    if not isinstance(header, dict):
        return atheris.Mutate(data, longest)
    # Several at once: what only goes wrong together is not led to by branches.
    for _ in range(chance.choice([1, 1, 2, 4])):
        _change(header, chance)
    size = chance.choice([data[1], chance.randrange(256)])
    return (bytes([data[0], size]) + json.dumps(header).encode())[:longest]


def _change(header: dict[str, Any], chance: random.Random) -> None:
    """Put, copy or delete one value somewhere in `header`."""
    places = list(_places(header))
    values = [container[key] for container, key in places]
    container, key = chance.choice(places) if places else (header, "a")
    # In a list, a size more often than not: else shapes are seldom still shapes.
    sizes = isinstance(container, list) and chance.random() < 0.75
    new = chance.choice(SIZES if sizes else [*VALUES, *values])
    # A copy: a container put into itself would have no end.
    new = json.loads(json.dumps(new))
    match chance.randrange(4):
        case 0 if places:
            del container[key]
        case 1 if isinstance(container, list):
            container.insert(key, new)
        case 2:
            header[chance.choice(["a", "b", "c", "__metadata__", *map(str, values)])] = new
        case _:
            container[key] = new


def _places(value: object) -> Iterator[tuple[Any, Any]]:
    """Every container and key within `value`."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def main() -> None:
    """Console entry; libFuzzer ends the process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("inputs", nargs="*", help="judge these and stop")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--input-seconds", type=int, default=10)
    parser.add_argument("--corpus", type=Path, help="a folder of inputs; new ones are added to it")
    parser.add_argument("--artifacts", type=Path, default=Path("fuzz-artifacts"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"

        def one_input(data: bytes) -> None:
            file.write_bytes(file_of(data))
            judge(file)

        flags = _flags(args, Path(folder))
        atheris.Setup([sys.argv[0], *flags], one_input, custom_mutator=mutate)
        atheris.Fuzz()


def _flags(args: argparse.Namespace, folder: Path) -> list[str]:
    """libFuzzer's command line, and the files that it names."""
    args.artifacts.mkdir(parents=True, exist_ok=True)
    flags = [
        f"-artifact_prefix={args.artifacts}/",
        f"-timeout={args.input_seconds}",
        f"-rss_limit_mb={MEMORY_MB}",
    ]
    if args.inputs:
        return [*flags, *args.inputs]
    words = folder / "words"
    escaped = (word.replace("\\", "\\\\").replace('"', '\\"') for word in WORDS)
    words.write_text("".join(f'"{word}"\n' for word in escaped))
    corpus = args.corpus or folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, header in enumerate(SEEDS):
        size = max(
            (entry["data_offsets"][1] for entry in header.values() if "shape" in entry), default=0
        )
        (corpus / f"seed-{number}").write_bytes(bytes([0, size]) + json.dumps(header).encode())
    return [
        *flags,
        f"-max_total_time={args.seconds}",
        f"-max_len={LARGEST}",
        f"-dict={words}",
        "-print_final_stats=1",
        str(corpus),
    ]


if __name__ == "__main__":
    main()
