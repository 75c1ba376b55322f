"""What NVRTC compiles for wgmma_sp: tile sizes by the name of a config, and element types."""

import re
from dataclasses import dataclass
from importlib import resources

import torch

from cast_serve.kernels.nvrtc import Source

# Shared memory of a Hopper multiprocessor is 228 KB; a block may have 227 KB, and each block
# costs 1 KB more (CUDA C++ Programming Guide, compute capability 9.0).
_SHARED_PER_SM = 228 * 1024
_SHARED_PER_BLOCK = 227 * 1024

# Bytes of partial sums in a CTA's inbox up to which they are pushed (wgmma_sp_sizes.cuh).
_LARGEST_INBOX = 16384

_HEADERS = ("hopper.cuh", "wgmma_sp_output.cuh", "wgmma_sp_sizes.cuh")

_NAME = re.compile(r"g(\d+)x(\d+)-t(\d+)-w(\d+)-k(\d+)(?:c(\d+))?-o(\d+)")


@dataclass(frozen=True, kw_only=True)
class Element:
    """An element type, as the instruction takes it.

    Attributes:
        name: in PTX.
        bytes: of a value.
        columns: of K an instruction, 64 bytes of x.
        steps_a_word: instructions along K that a word of metadata serves, by its selector.
    """

    name: str
    bytes: int
    columns: int
    steps_a_word: int


# FP8 is Element(name="e4m3", bytes=1, columns=64, steps_a_word=1): its words of metadata are in
# another order (see `metadata_layout`), and its sums want scales.
ELEMENTS = {
    torch.bfloat16: Element(name="bf16", bytes=2, columns=32, steps_a_word=2),
    torch.float16: Element(name="f16", bytes=2, columns=32, steps_a_word=2),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tile sizes, as macros of wgmma_sp.cu; the name "g2x1-t64-w256-k4-o1" holds all of them.

    Attributes:
        groups: warpgroups that compute.
        tiles: 64-row tiles of the weight a warpgroup.
        tokens: of a tile: 8, or a multiple of 16 up to 256.
        width: bytes of a row of x a stage: 128 to 1024, a power of two.
        split: parts that K is cut into, in a cluster of CTAs (in the name "k").
        share: CTAs of a part that load x together (in the name "c", 1 where there is none).
        ctas: a multiprocessor holds (in the name "o", for occupancy).
    """

    groups: int
    tiles: int
    tokens: int
    width: int
    split: int
    share: int
    ctas: int

    @classmethod
    def parse(cls, name: str) -> "Config":
        """The config of a name.

        Raises:
            ValueError: it is no such name.
        """
        found = _NAME.fullmatch(name)
        if found is None:
            raise ValueError(f"wgmma_sp: {name!r} is no config; one is g2x1-t64-w256-k4-o1")
        groups, tiles, tokens, width, split, share, ctas = (int(n or 1) for n in found.groups())
        return cls(
            groups=groups,
            tiles=tiles,
            tokens=tokens,
            width=width,
            split=split,
            share=share,
            ctas=ctas,
        )

    @property
    def rows(self) -> int:
        """Of the weight a CTA."""
        return self.groups * self.tiles * 64

    @property
    def registers(self) -> tuple[int, int]:
        """Registers a thread that computes, and one that loads; (0, 0): as the compiler divides.

        ptxas rounds the block up to whole warpgroups and gives each thread the same share of 64 K:
        168 for two and 128 for three beside the loading one, too few for large tiles.
        """
        if self.ctas > 1 or self.tiles * self.tokens < 192:
            return 0, 0
        return {2: (232, 40), 3: (152, 56)}.get(self.groups, (0, 0))

    @property
    def threads(self) -> int:
        return self.groups * 128 + (128 if self.registers[0] else 32)

    @property
    def stage_bytes(self) -> int:
        """Values, their metadata (an eighth of them) and x."""
        values = self.rows * self.width // 2
        return values + values // 8 + self.tokens * self.width

    @property
    def fixed_bytes(self) -> int:
        """Shared memory beside the stages: barriers of up to 32, and room for outputs or sums."""
        if self.split == 1:
            return 1024 + self.groups * min(self.tokens, 32) * 128
        # Where sums are left, they take the place of stages.
        return 1024 + (0 if self.leaves_sums else self._inbox_bytes)

    @property
    def leaves_sums(self) -> bool:
        """Whether partial sums are left for the cluster to read, being too many to be pushed."""
        return self.split > 1 and self._inbox_bytes > _LARGEST_INBOX

    @property
    def _inbox_bytes(self) -> int:
        """Room for pieces of 8 x 8 sums in fp32, from each part as many as a part adds."""
        pieces = -(-(self.rows * self.tokens // 64) // self.split)
        return self.split * pieces * 256

    @property
    def stages(self) -> int:
        budget = min(_SHARED_PER_BLOCK, _SHARED_PER_SM // self.ctas - 1024)
        return min(32, (budget - self.fixed_bytes) // self.stage_bytes)

    @property
    def shared_bytes(self) -> int:
        return self.stages * self.stage_bytes + self.fixed_bytes

    def blocks(self, M: int, N: int, multiprocessors: int) -> int:
        """CTAs to start: all tiles if K is split, else at most what the GPU holds at once."""
        rows = self.rows * self.share
        tiles = -(-N // rows) * -(-M // self.tokens)
        if self.split > 1:
            return tiles * self.split * self.share
        return min(tiles, multiprocessors * self.ctas // self.share) * self.share


def _instruction(tokens: int, element: Element) -> str:
    """instruction.cuh: wgmma_sp<SELECTOR>(sums, a, b, metadata) for `tokens` columns of B."""
    count = tokens // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    shape, kind = f"m64n{tokens}k{element.columns}", f"{element.name}.{element.name}"
    # 16-bit operands may be transposed: neither is.
    transpose = ", 0, 0" if element.bytes == 2 else ""
    return f"""
template <int SELECTOR>
DEVICE void wgmma_sp(float (&d)[{count}], u64 a, u64 b, u32 meta) {{
    asm volatile(
        "wgmma.mma_async.sp.sync.aligned.{shape}.f32.{kind} "
        "{{{sums}}}, %{count}, %{count + 1}, %{count + 2}, %{count + 3}, 1, 1, 1{transpose};"
        : {outputs}
        : "l"(a), "l"(b), "r"(meta), "n"(SELECTOR));
}}
"""


def _read(name: str) -> str:
    return resources.files("cast_serve.kernels").joinpath(name).read_text()


def source(config: Config, element: Element, output: torch.dtype) -> Source:
    """The source of one config, for the output type bfloat16 or float16."""
    registers, load_registers = config.registers
    return Source(
        name="wgmma_sp.cu",
        text=_read("wgmma_sp.cu"),
        headers=(
            *((name, _read(name)) for name in _HEADERS),
            ("instruction.cuh", _instruction(config.tokens, element)),
        ),
        defines=(
            ("GROUPS", config.groups),
            ("TILES", config.tiles),
            ("TOKENS", config.tokens),
            ("WIDTH", config.width),
            ("STAGES", config.stages),
            ("SPLIT", config.split),
            ("SHARE", config.share),
            ("CTAS_PER_SM", config.ctas),
            ("ELEMENT_BYTES", element.bytes),
            ("STEPS_A_WORD", element.steps_a_word),
            ("OUTPUT_IS_BF16", int(output is torch.bfloat16)),
            ("COMPUTE_REGISTERS", registers),
            ("LOAD_REGISTERS", load_registers),
            ("PULLS", int(config.leaves_sums)),
        ),
        # a: wgmma is no part of what later architectures keep.
        arch="sm_90a",
    )
