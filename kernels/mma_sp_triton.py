"""The Triton kernels of mma_sp; `mma_sp.py` launches them, `mma_sp_layout.py` explains the layout.

Triton has no sparse matrix instruction, but inline assembly on 1-D tensors of 32 * num_warps
elements can issue one: element i is a register of thread i, so a tensor is a register across the
warps. Tuples of such tensors are register arrays. tests/kernels/test_mma_sp_compiles.py holds the
compiler to that: no layout conversion in the loop.
"""

# Triton's types are its own: arguments are tensors inside and pointers outside, tuples grow.
# mypy: ignore-errors

import triton
import triton.language as tl

# Inputs $4-$7: the two groups of x a lane loaded (low word, high, low, high); $8: lane % 2. An even
# lane holds groups of instruction 0 and needs all low words, an odd lane holds groups of
# instruction 1 and needs all high words: each sends the two words that the other lacks.
# Outputs: B registers i and i+2 of instruction 0, then of instruction 1; i = 0 for the first half
# of the step, 1 for the second.
EXCHANGE = tl.constexpr("""{
.reg .pred odd;
.reg .b32 s0, s1, r0, r1;
setp.ne.s32 odd, $8, 0;
selp.b32 s0, $4, $5, odd;
selp.b32 s1, $6, $7, odd;
shfl.sync.bfly.b32 r0, s0, 1, 31, -1;
shfl.sync.bfly.b32 r1, s1, 1, 31, -1;
selp.b32 $0, r0, $4, odd;
selp.b32 $1, r1, $6, odd;
selp.b32 $2, $5, r0, odd;
selp.b32 $3, $7, r1, odd;
}""")


# Metadata of a step past K: columns 0 and 1 of every group, since ordered metadata must ascend.
NO_GROUPS = tl.constexpr(0x44444444)


@triton.jit
def _load(
    ptr,
    offset,
    mask,
    WORDS: tl.constexpr,
    FILL: tl.constexpr,
    ZERO: tl.constexpr,
    EVICT: tl.constexpr,
):
    """WORDS consecutive words a lane by one load -> a tuple of WORDS registers.

    ZERO: lanes that `mask` leaves out get FILL; otherwise anything, which nobody may read.
    """
    # One word is no [X, 1]: Triton 3.6 would convert its layout.
    if WORDS == 1:
        ptrs = ptr + offset
    else:
        ptrs = ptr[:, None] + (offset[:, None] + tl.arange(0, WORDS)[None, :])
        mask = mask[:, None]
    if ZERO:
        v = tl.load(ptrs, mask=mask, other=FILL, eviction_policy=EVICT)
    else:
        v = tl.load(ptrs, mask=mask, eviction_policy=EVICT)
    if WORDS == 4:
        even, odd = tl.split(tl.reshape(v, (v.shape[0], 2, 2)))
        v0, v2 = tl.split(even)
        v1, v3 = tl.split(odd)
        return (v0, v1, v2, v3)
    elif WORDS == 2:
        v0, v1 = tl.split(v)
        return (v0, v1)
    else:
        return (v,)


@triton.jit
def _load_weights(
    w_ptrs, e_ptrs, step, steps, R: tl.constexpr, U: tl.constexpr, ZERO: tl.constexpr
):
    """U steps of R tiles: values [U][R][row g, row g+8][4], then metadata [R][U], as one tuple."""
    # evict_first: each weight byte is read once, so keeping it only pushes x out of L1 and L2.
    words = ()
    for u in tl.static_range(U):
        live = step + u < steps
        for r in tl.static_range(R):
            for hi in tl.static_range(2):
                words += _load(w_ptrs[2 * r + hi], (step + u) * 16, live, 4, 0, ZERO, "evict_first")
    # Four steps lie side by side in each of 32 lanes.
    offset = step // 4 * 128 + step % 4
    for r in tl.static_range(R):
        words += _load(e_ptrs[r], offset, step < steps, U, NO_GROUPS, ZERO, "evict_first")
    return words


@triton.jit
def _load_tokens(x_ptrs, step, steps, U: tl.constexpr, T: tl.constexpr, ZERO: tl.constexpr):
    """U steps of T times 8 tokens: words [U][T][half][4], as one tuple."""
    words = ()
    for u in tl.static_range(U):
        live = step + u < steps
        for t in tl.static_range(T):
            for half in tl.static_range(2):
                words += _load(
                    x_ptrs[t], (step + u) * 32 + half * 16, live, 4, 0, ZERO, "evict_last"
                )
    return words


@triton.jit
def _exchange(x, odd):
    b0, b1, b2, b3 = tl.inline_asm_elementwise(
        EXCHANGE,
        "=&r,=&r,=&r,=&r,r,r,r,r,r",
        [x[0], x[1], x[2], x[3], odd],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )
    return (b0, b1, b2, b3)


@triton.jit
def _mma(ASM: tl.constexpr, a0, a1, a2, a3, b0, b1, b2, b3, c, e):
    d0, d1, d2, d3 = tl.inline_asm_elementwise(
        ASM,
        "=f,=f,=f,=f,r,r,r,r,r,r,r,r,f,f,f,f,r",
        [a0, a1, a2, a3, b0, b1, b2, b3, c[0], c[1], c[2], c[3], e],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )
    return (d0, d1, d2, d3)


@triton.jit
def _stack(parts, COUNT: tl.constexpr, LOG: tl.constexpr):
    """COUNT = 2**LOG tensors [X] -> [X, 2, ..., 2], the axes as in a row-major [X, COUNT]."""
    for level in tl.static_range(LOG):
        joined = ()
        for i in tl.static_range(COUNT >> (level + 1)):
            joined += (tl.join(parts[i], parts[i + (COUNT >> (level + 1))]),)
        parts = joined
    return parts[0]


@triton.jit(do_not_specialize=["bias_ptr", "M", "N", "steps", "x_stride", "has_bias"])
def mma_sp_kernel(
    x_ptr,
    values_ptr,
    metadata_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    steps,
    x_stride,
    has_bias,
    ASM0: tl.constexpr,
    ASM1: tl.constexpr,
    R: tl.constexpr,
    U: tl.constexpr,
    WARPS_N: tl.constexpr,
    WARPS_K: tl.constexpr,
    T: tl.constexpr,
    SPLITS: tl.constexpr,
    AHEAD: tl.constexpr,
    ZERO: tl.constexpr,
    LOG_SUMS: tl.constexpr,
):
    """8*T tokens times 16*R*WARPS_N rows of W a program; WARPS_K warps and SPLITS programs share K.

    Grid [ceil(M / 8T), ceil(N / (16*R*WARPS_N)), SPLITS]: programs with the same weights follow
    each other. `steps` is K/64, `x_stride` in units of 16 bytes. y is [M, N], or fp32
    [SPLITS, M, N] for `reduce_kernel`. Each warp holds the weights of its next U steps in registers
    while it computes, with AHEAD also its x. ZERO: K does not divide into whole rounds.
    """
    ROWS: tl.constexpr = 16 * R * WARPS_N
    THREADS: tl.constexpr = 32 * WARPS_N * WARPS_K
    STRIDE: tl.constexpr = WARPS_K * SPLITS * U
    tid = tl.arange(0, THREADS)
    lane = tid % 32
    warp = tid // 32
    odd = lane % 2
    split = tl.program_id(2)

    # Tiles past N and tokens past M read the last one again: no lane needs a mask for them, and
    # neither reaches y, because a row and a token meet nothing but each other.
    w_ptrs = ()
    e_ptrs = ()
    for r in tl.static_range(R):
        tile = (tl.program_id(1) * WARPS_N + warp % WARPS_N) * R + r
        tile = tl.minimum(tile, N // 16 - 1).to(tl.int64)
        values = values_ptr.to(tl.pointer_type(tl.int32)) + lane % 4 * 4
        for hi in tl.static_range(2):
            w_ptrs += (values + (tile * 16 + hi * 8 + lane // 4) * (steps * 16),)
        e_ptrs += (metadata_ptr + (tile * ((steps + 3) // 4 * 128) + lane * 4),)
    x_ptrs = ()
    for t in tl.static_range(T):
        token = tl.program_id(0) * (8 * T) + t * 8 + lane // 4
        token = tl.minimum(token, M - 1).to(tl.int64)
        x_ptrs += (x_ptr.to(tl.pointer_type(tl.int32)) + (token * (x_stride * 4) + lane % 4 * 4),)

    acc = ()
    for _ in tl.static_range(R * T * 4):
        acc += (tl.zeros((THREADS,), tl.float32),)

    first = split * (WARPS_K * U)
    step = first + warp // WARPS_N * U
    w = _load_weights(w_ptrs, e_ptrs, step, steps, R, U, ZERO)
    x = ()
    if AHEAD:
        x = _load_tokens(x_ptrs, step, steps, U, T, ZERO)
    for start in range(first, steps, STRIDE):
        step = start + warp // WARPS_N * U
        # Carried by the loop: ptxas would move a load that is used in the same round down to its
        # use, and leave 1.5 KB a warp in flight. These it spreads over the round, refilling
        # registers as the matrix instructions free them.
        next_w = _load_weights(w_ptrs, e_ptrs, step + STRIDE, steps, R, U, ZERO)
        next_x = ()
        if AHEAD:
            next_x = _load_tokens(x_ptrs, step + STRIDE, steps, U, T, ZERO)
        for u in tl.static_range(U):
            if AHEAD:
                b = x[u * T * 8 : (u + 1) * T * 8]
            else:
                b = _load_tokens(x_ptrs, step + u, steps, 1, T, ZERO)
            for t in tl.static_range(T):
                p = _exchange(b[t * 8 : t * 8 + 4], odd)
                q = _exchange(b[t * 8 + 4 : t * 8 + 8], odd)
                for r in tl.static_range(R):
                    a = w[(u * R + r) * 8 : (u * R + r + 1) * 8]
                    e = w[8 * R * U + r * U + u]
                    c = acc[(t * R + r) * 4 : (t * R + r + 1) * 4]
                    c = _mma(ASM0, a[0], a[4], a[1], a[5], p[0], q[0], p[1], q[1], c, e)
                    c = _mma(ASM1, a[2], a[6], a[3], a[7], p[2], q[2], p[3], q[3], c, e)
                    acc = acc[: (t * R + r) * 4] + c + acc[(t * R + r + 1) * 4 :]
        w = next_w
        x = next_x

    # Axes (warp_k, warp_n, g, t, T, R, hi, lo): sum hi, lo is row g + 8 hi, token 2t + lo.
    y = tl.reshape(_stack(acc, R * T * 4, LOG_SUMS), (WARPS_K, WARPS_N, 8, 4, T, R, 2, 2))
    y = tl.permute(tl.sum(y, 0), (3, 2, 6, 0, 4, 5, 1))
    y = tl.reshape(y, (8 * T, ROWS))
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(0) * (8 * T) + tl.arange(0, 8 * T)
    y += tl.load(bias_ptr + row, mask=(row < N) & (has_bias != 0), other=0).to(tl.float32)[None, :]
    place = (split.to(tl.int64) * M + token)[:, None] * N + row[None, :]
    live = (token < M)[:, None] & (row < N)[None, :]
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["bias_ptr", "M", "N", "has_bias"])
def reduce_kernel(
    parts_ptr, bias_ptr, y_ptr, M, N, has_bias, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):
    """y [M, N] = bias + parts fp32 [SPLITS, M, N], summed in order; grid [M, ceil(N / BLOCK)]."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = row < N
    y = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        y += tl.load(parts_ptr + (split * M + token) * N + row, mask=live, other=0)
    y += tl.load(bias_ptr + row, mask=live & (has_bias != 0), other=0).to(tl.float32)
    tl.store(y_ptr + token * N + row, y.to(y_ptr.dtype.element_ty), mask=live)
