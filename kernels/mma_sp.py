"""mma_sp: y = x @ W.T with 2:4-packed W for few tokens, by `mma.sp` from Triton.

  Shapes   x_MK, values_NH (H = K/2), metadata int32 (`mma_sp_layout`), bias_N -> y_MN
  Dtypes   bf16, fp16; fp32 accumulation, bias added in fp32, one rounding
  Needs    sm_80 to sm_90, N % 16 == 0, K % 64 == 0, rows of x at multiples of 16 bytes
  Bytes    weights go from global memory to registers once, 16 bytes a lane; x from L1 and L2
  Repeats  bit-identical: no atomics, split-K sums in order

A warp holds R tiles of 16 rows and gives each of its B registers (8 tokens) to all of them. There
is no pass that permutes x: a lane loads 16 bytes of its token as they lie, and swaps half of them
with its neighbour (`mma_sp_triton.EXCHANGE`). A kernel of its own for that would cost about 2 us of
the 5-10 us that a small layer has.

FP8 (`mma.sp.m16n8k64`, e4m3) is a row in INSTRUCTIONS with the same words a step, and 128 columns
to it; its instructions read metadata of all lanes, so it has one metadata word more a step.
"""

import importlib.util
import re
from dataclasses import dataclass
from functools import cache

import torch

from cast_serve.kernels.mma_sp_layout import STEP, TILE, TOKENS, metadata_layout
from cast_serve.kernels.problem import Problem
from cast_serve.kernels.spec import KernelSpec

__all__ = ["INSTRUCTIONS", "SPEC", "Config", "metadata_layout"]

_ASM = (
    "mma.sp::ordered_metadata.sync.aligned.{} "
    "{{$0,$1,$2,$3}},{{$4,$5,$6,$7}},{{$8,$9,$10,$11}},{{$12,$13,$14,$15}},$16,{};"
)
_SHAPES = {
    torch.bfloat16: "m16n8k32.row.col.f32.bf16.bf16.f32",
    torch.float16: "m16n8k32.row.col.f32.f16.f16.f32",
}

# Element type -> the two instructions of a step, which read metadata of lanes t = 0, 1 and 2, 3.
INSTRUCTIONS = {
    dtype: (_ASM.format(shape, "0x0"), _ASM.format(shape, "0x1"))
    for dtype, shape in _SHAPES.items()
}

_REDUCE_BLOCK = 512
# Programs that fill the SMs of an H100 or H200 once over; splits of K are for layers with fewer.
_FULL = 132

_NAME = re.compile(r"r([124])-u([124])-n([1248])-k(1|2|4|8|16)-t([1248])-s([1-9])(-x)?")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tile sizes; the name "r1-u4-n1-k8-t1-s1-x" holds all of them.

    Attributes:
        tiles: 16-row tiles a warp ("r").
        depth: steps of 64 columns whose weights a warp loads at once ("u"): 1, 2 or 4. 1.1 KB a
            tile and step are in flight while as much is computed on.
        warps_n: warps side by side along N, which read the same x through L1 ("n").
        warps_k: warps that share K and add up in shared memory ("k").
        token_tiles: tiles of 8 tokens a program ("t").
        splits: programs that share K and add up in a second kernel ("s").
        ahead: x is loaded as early as the weights, at 16 registers a step and token tile ("x").
    """

    tiles: int
    depth: int
    warps_n: int
    warps_k: int
    token_tiles: int
    splits: int
    ahead: bool

    @classmethod
    def parse(cls, name: str) -> "Config":
        """The config called `name`.

        Raises:
            ValueError: not a name of a config.
        """
        match = _NAME.fullmatch(name)
        if not match:
            raise ValueError(f"mma_sp has no config {name!r}: expected one like r1-u4-n1-k8-t1-s1")
        r, u, n, k, t, s = (int(match[i]) for i in range(1, 7))
        return cls(
            tiles=r, depth=u, warps_n=n, warps_k=k, token_tiles=t, splits=s, ahead=bool(match[7])
        )

    @property
    def warps(self) -> int:
        return self.warps_n * self.warps_k

    @property
    def rows(self) -> int:
        return TILE * self.tiles * self.warps_n

    @property
    def tokens(self) -> int:
        return TOKENS * self.token_tiles

    @property
    def steps(self) -> int:
        """Steps of K that all warps and splits take in one round of the loop."""
        return self.depth * self.warps_k * self.splits

    def constants(self, dtype: torch.dtype, K: int) -> dict[str, object]:
        """The compile-time arguments of `mma_sp_kernel`."""
        asm0, asm1 = INSTRUCTIONS[dtype]
        return {
            "ASM0": asm0,
            "ASM1": asm1,
            "R": self.tiles,
            "U": self.depth,
            "WARPS_N": self.warps_n,
            "WARPS_K": self.warps_k,
            "T": self.token_tiles,
            "SPLITS": self.splits,
            "AHEAD": self.ahead,
            "ZERO": K // STEP % self.steps != 0,
            "LOG_SUMS": (4 * self.tiles * self.token_tiles).bit_length() - 1,
        }


_parse = cache(Config.parse)

# Best guess first, by token tiles. Small layers want short programs with all of K in one (r1, k8);
# from 16 tokens on, x weighs as much as the weights, and rows side by side share it.
_CONFIGS = {
    1: (
        "r1-u4-n1-k8-t1-s1",
        "r1-u4-n1-k4-t1-s1",
        "r1-u4-n1-k8-t1-s1-x",
        "r1-u4-n1-k16-t1-s1",
        "r2-u2-n1-k8-t1-s1",
        "r2-u2-n1-k4-t1-s1",
        "r2-u4-n1-k4-t1-s1",
        "r1-u2-n1-k16-t1-s1-x",
        "r1-u4-n1-k4-t1-s1-x",
        "r1-u4-n1-k8-t1-s2",
        "r1-u4-n1-k4-t1-s4",
        "r1-u2-n1-k4-t1-s1",
    ),
    2: (
        "r1-u4-n1-k8-t2-s1",
        "r2-u2-n1-k8-t2-s1",
        "r2-u2-n1-k4-t2-s1",
        "r2-u2-n2-k4-t2-s1",
        "r2-u4-n1-k4-t2-s1",
        "r1-u4-n2-k4-t2-s1",
        "r1-u4-n1-k16-t2-s1",
        "r1-u2-n1-k8-t2-s1-x",
        "r1-u4-n1-k8-t2-s2",
        "r2-u2-n1-k8-t2-s2",
        "r1-u4-n1-k4-t2-s4",
        "r1-u2-n1-k4-t2-s1",
    ),
    4: (
        "r2-u2-n1-k4-t4-s1",
        "r2-u1-n2-k4-t4-s1",
        "r2-u1-n1-k4-t4-s1",
        "r2-u2-n2-k2-t4-s1",
        "r2-u2-n4-k1-t4-s1",
        "r4-u1-n1-k4-t4-s1",
        "r4-u1-n4-k1-t4-s1",
        "r1-u4-n1-k8-t4-s1",
        "r1-u4-n2-k4-t4-s1",
        "r2-u1-n2-k4-t4-s2",
        "r2-u1-n1-k4-t4-s4",
        "r1-u2-n1-k4-t4-s1",
    ),
    8: (
        "r2-u2-n2-k4-t8-s1",
        "r2-u1-n2-k4-t8-s1",
        "r2-u2-n4-k2-t8-s1",
        "r2-u1-n4-k2-t8-s1",
        "r4-u1-n1-k4-t4-s1",
        "r4-u1-n4-k1-t4-s1",
        "r4-u1-n2-k4-t4-s1",
        "r2-u1-n2-k4-t4-s1",
        "r2-u2-n2-k4-t8-s2",
        "r2-u1-n2-k4-t8-s4",
        "r1-u2-n1-k4-t8-s1",
    ),
}


def _supports(problem: Problem) -> str | None:
    if problem.dtype not in INSTRUCTIONS:
        names = " and ".join(str(dtype).removeprefix("torch.") for dtype in INSTRUCTIONS)
        return f"{str(problem.dtype).removeprefix('torch.')} is not one of {names}"
    if problem.sm < 80:
        return f"needs sm_80, this GPU is sm_{problem.sm}"
    if problem.sm > 90:
        return (
            f"mma.sp with ordered metadata is not verified past sm_90, this GPU is sm_{problem.sm}"
        )
    if problem.N < TILE or problem.N % TILE:
        return f"N={problem.N} is not a multiple of {TILE}"
    if problem.K < STEP or problem.K % STEP:
        return f"K={problem.K} is not a multiple of {STEP}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    return None


def _configs(problem: Problem, M: int) -> tuple[str, ...]:
    tiles = next(t for t in (1, 2, 4, 8) if t * TOKENS >= M or t == 8)
    steps = problem.K // STEP

    def fits(name: str) -> bool:
        config = _parse(name)
        programs = -(-problem.N // config.rows) * -(-M // config.tokens)
        # At least half of the warps have work, and a full GPU gains nothing from splits, which
        # cost a second kernel and its bytes.
        return config.steps < 2 * steps and (config.splits == 1 or programs < 2 * _FULL)

    # The last one, of the shortest round, serves a K too short for all others.
    return tuple(name for name in _CONFIGS[tiles] if fits(name)) or _CONFIGS[tiles][-1:]


def _prepare(problem: Problem, config: str, M: int) -> None:
    """Compile and load by a run on the least problem that takes the same compiled kernel.

    Sizes, strides and the bias are not specialised on, so one compiled kernel serves every M, N
    and bias, and all K alike in whether they divide into whole rounds of the loop.
    """
    steps = _parse(config).steps
    K = steps * STEP if problem.K // STEP % steps == 0 else STEP
    device = torch.device("cuda", torch.cuda.current_device())
    x = torch.zeros(1, K, dtype=problem.dtype, device=device)
    values = torch.zeros(TILE, K // 2, dtype=problem.dtype, device=device)
    metadata = metadata_layout(torch.full((TILE, K // 8), 0b00110011, dtype=torch.uint8)).to(device)
    _run(x, values, metadata, None, config)


def _run(
    x: torch.Tensor,
    values: torch.Tensor,
    metadata: torch.Tensor,
    bias: torch.Tensor | None,
    config: str,
) -> torch.Tensor:
    """y [M, N] for x [M, K], M >= 1; see `KernelSpec.run`.

    Raises:
        ValueError: a row of x does not start at a multiple of 16 bytes, or is not contiguous.
    """
    from cast_serve.kernels.mma_sp_triton import mma_sp_kernel, reduce_kernel

    c = _parse(config)
    M, K = x.shape
    N = values.shape[0]
    units = 16 // x.element_size()
    if x.stride(1) != 1 or x.stride(0) % units or x.data_ptr() % 16:
        raise ValueError(
            f"mma_sp reads rows of x by 16 bytes, got strides {tuple(x.stride())} and an address "
            f"of {x.data_ptr() % 16} modulo 16: pass x.contiguous()"
        )
    y = x.new_empty(M, N)
    parts = y if c.splits == 1 else x.new_empty(c.splits, M, N, dtype=torch.float32)
    has_bias = int(bias is not None)
    # Without a bias any address of its type does: it is not read.
    bias = x if bias is None else bias
    mma_sp_kernel[(-(-M // c.tokens), -(-N // c.rows), c.splits)](
        x,
        values,
        metadata,
        bias,
        parts,
        M,
        N,
        K // STEP,
        x.stride(0) // units,
        has_bias if c.splits == 1 else 0,
        **c.constants(x.dtype, K),
        num_warps=c.warps,
        num_stages=1,
    )
    if c.splits > 1:
        reduce_kernel[(M, -(-N // _REDUCE_BLOCK))](
            parts, bias, y, M, N, has_bias, SPLITS=c.splits, BLOCK=_REDUCE_BLOCK, num_warps=4
        )
    return y


SPEC = KernelSpec(
    name="mma_sp",
    metadata="mma_sp",
    supports=_supports,
    configs=_configs,
    prepare=_prepare,
    run=_run,
)
