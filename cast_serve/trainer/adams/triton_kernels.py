"""The Triton kernels of AdamS; `fused.py` launches them.

A launch takes all weights of a parameter group, of whatever sizes: row i of `table` holds the
addresses and size of weight i, `owner` the weight that each program works on. One launch a weight
would not do: the 482 tensors of SmolLM2-135M move 3.9 GB, 2 us each, and a launch takes longer.

Bytes a weight of an update: read w, g, mu, nu (fp32) and the mask (1), write w, mu, nu: 29, against
28 of AdamW. A refresh reads w and the mask and writes the mask: 6, every T1 = 10 steps.
"""

# Triton's types are its own: arguments are tensors inside and pointers outside, tuples grow.
# mypy: ignore-errors

import triton
import triton.language as tl

# Columns of `table`: of an update w, mu, nu, mask, entries, first program; of a refresh w, mask,
# groups along the input dimension, columns, first program. int64. Gradients have a table of their
# own, because they alone move from step to step.
UPDATE_COLUMNS = 6
REFRESH_COLUMNS = 5

# |w| of a NaN as an integer: above infinity, and all of them equal, as torch sorts them.
NAN_KEY = tl.constexpr(0x7F800001)


@triton.jit
def _address(row, column: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    ptr = tl.load(row + column).to(tl.pointer_type(TYPE))
    # Without this hint an address from memory is read by single elements.
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def _load(ptr, place, size, FULL: tl.constexpr):
    # A bound that is not known to be a multiple of 4 would cut 16-byte accesses into single ones.
    if FULL:
        return tl.load(ptr + place)
    else:
        return tl.load(ptr + place, mask=place < size, other=0)


@triton.jit
def _store(ptr, place, value, size, FULL: tl.constexpr):
    if FULL:
        tl.store(ptr + place, value)
    else:
        tl.store(ptr + place, value, mask=place < size)


@triton.jit
def _update(
    ptrs,
    start,
    size,
    numbers,
    MASKED: tl.constexpr,
    OF_GRADIENT: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Eq. 7-8 for UNROLL * BLOCK entries from `start` on."""
    w_ptr, g_ptr, mu_ptr, nu_ptr, mask_ptr = ptrs
    moments, kept, pull, correction, eps, rate, fast = numbers
    beta1, one_less_beta1, beta2, one_less_beta2 = moments
    # All loads before the first store: what is stored might be what is loaded next, for all that
    # the compiler knows, so it would not do it.
    loaded = ()
    for u in tl.static_range(UNROLL):
        place = start + (u * BLOCK + tl.arange(0, BLOCK))
        loaded += (_load(w_ptr, place, size, FULL),)
        loaded += (_load(g_ptr, place, size, FULL),)
        loaded += (_load(mu_ptr, place, size, FULL),)
        loaded += (_load(nu_ptr, place, size, FULL),)
        if MASKED:
            loaded += (_load(mask_ptr, place, size, FULL),)
        else:
            loaded += (0,)
    for u in tl.static_range(UNROLL):
        place = start + (u * BLOCK + tl.arange(0, BLOCK))
        w = loaded[5 * u]
        grad = loaded[5 * u + 1]
        mu = beta1 * loaded[5 * u + 2] + one_less_beta1 * grad
        blended = mu
        squared = grad
        pace = rate
        if MASKED:
            survives = loaded[5 * u + 4] != 0
            sign = tl.where(w > 0, 1.0, tl.where(w < 0, -1.0, 0.0))
            blended = tl.where(survives, mu, kept * mu + pull * sign)
            squared = tl.where(survives, grad, kept * grad + pull * sign)
            pace = tl.where(survives, rate, fast)
        if not OF_GRADIENT:
            squared = blended
        nu = beta2 * loaded[5 * u + 3] + one_less_beta2 * (squared * squared)
        # Rounded as torch rounds them; the approximate ones are no faster where bytes bind.
        w -= pace * tl.div_rn(blended, tl.sqrt_rn(nu * correction) + eps)
        _store(w_ptr, place, w, size, FULL)
        _store(mu_ptr, place, mu, size, FULL)
        _store(nu_ptr, place, nu, size, FULL)


@triton.jit
def update_kernel(
    table_ptr,
    owner_ptr,
    grads_ptr,
    beta1,
    one_less_beta1,
    beta2,
    one_less_beta2,
    kept,
    pull,
    correction,
    eps,
    rate,
    fast,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
    OF_GRADIENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """mu, nu and w of BLOCK * UNROLL * ROUNDS entries of one weight; grid [programs].

    kept = 1 - a_t, pull = a_t * lambda, correction = 1 / (1 - beta2^t),
    rate = lr_t / (1 - beta1^t), fast = s_t * rate, that of masked weights. OF_GRADIENT: see
    StepNumbers.
    """
    CHUNK: tl.constexpr = BLOCK * UNROLL * ROUNDS
    program = tl.program_id(0)
    tensor = tl.load(owner_ptr + program)
    row = table_ptr + tensor.to(tl.int64) * COLUMNS
    start = (program - tl.load(row + 5)) * CHUNK
    # Places within the chunk are 32 bits, which saves a third of the registers.
    size = tl.minimum(tl.load(row + 4) - start, CHUNK).to(tl.int32)
    ptrs = (
        _address(row, 0, tl.float32, ALIGNED) + start,
        _address(grads_ptr + tensor, 0, tl.float32, ALIGNED) + start,
        _address(row, 1, tl.float32, ALIGNED) + start,
        _address(row, 2, tl.float32, ALIGNED) + start,
        _address(row, 3, tl.int8, ALIGNED) + start,
    )
    moments = (beta1, one_less_beta1, beta2, one_less_beta2)
    numbers = (moments, kept, pull, correction, eps, rate, fast)
    STEP: tl.constexpr = BLOCK * UNROLL
    if size == CHUNK:
        for turn in range(ROUNDS):
            _update(ptrs, turn * STEP, size, numbers, MASKED, OF_GRADIENT, True, BLOCK, UNROLL)
    else:
        for turn in range(tl.cdiv(size, STEP)):
            _update(ptrs, turn * STEP, size, numbers, MASKED, OF_GRADIENT, False, BLOCK, UNROLL)


@triton.jit
def _key(w):
    """|w| as an integer of the same order: denormals and zeros apart, -0 and 0 equal."""
    return tl.minimum(w.to(tl.int32, bitcast=True) & 0x7FFFFFFF, NAN_KEY)


@triton.jit
def _survives(keys, i: tl.constexpr, KEPT: tl.constexpr, GROUP: tl.constexpr):
    """1 where fewer than KEPT of a group's keys come before key i; of equals the leftmost does."""
    before = tl.zeros(keys[i].shape, tl.int32)
    for j in tl.static_range(GROUP):
        if j < i:
            before += (keys[j] >= keys[i]).to(tl.int32)
        elif j > i:
            before += (keys[j] > keys[i]).to(tl.int32)
    return (before < KEPT).to(tl.int32)


@triton.jit
def refresh_rows_kernel(
    table_ptr,
    owner_ptr,
    changed_ptr,
    COLUMNS: tl.constexpr,
    KEPT: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """Masks of LANES * UNROLL * ROUNDS groups that lie along rows; grid [programs].

    A lane holds whole groups, read by 16 bytes and compared in registers: LANES = 32 * num_warps.
    `changed` int32 [programs] gets the number of entries that differ from before.
    """
    VECTORS: tl.constexpr = GROUP // 4
    program = tl.program_id(0)
    row = table_ptr + tl.load(owner_ptr + program).to(tl.int64) * COLUMNS
    w_ptr = _address(row, 0, tl.float32, ALIGNED)
    mask_ptr = _address(row, 1, tl.int32, ALIGNED)
    groups = tl.load(row + 2)
    first = (program - tl.load(row + 4)) * (LANES * UNROLL * ROUNDS)
    last = tl.minimum(groups, first + LANES * UNROLL * ROUNDS)
    changed = tl.zeros((LANES,), tl.int32)
    for start in range(first, last, LANES * UNROLL):
        keys = ()
        words = ()
        for u in tl.static_range(UNROLL):
            group = start + u * LANES + tl.arange(0, LANES)
            live = group < groups
            for v in tl.static_range(VECTORS):
                place = (group * GROUP + v * 4)[:, None] + tl.arange(0, 4)[None, :]
                w = _key(tl.load(w_ptr + place, mask=live[:, None], other=0))
                even, odd = tl.split(tl.reshape(w, (LANES, 2, 2)))
                key0, key2 = tl.split(even)
                key1, key3 = tl.split(odd)
                keys += (key0, key1, key2, key3)
                words += (tl.load(mask_ptr + (group * VECTORS + v), mask=live, other=0),)
        for u in tl.static_range(UNROLL):
            group = start + u * LANES + tl.arange(0, LANES)
            live = group < groups
            own = keys[u * GROUP : (u + 1) * GROUP]
            for v in tl.static_range(VECTORS):
                # Four bytes of the mask, 0 or 1 each.
                word = _survives(own, v * 4, KEPT, GROUP)
                for byte in tl.static_range(1, 4):
                    word |= _survives(own, v * 4 + byte, KEPT, GROUP) << (8 * byte)
                tl.store(mask_ptr + (group * VECTORS + v), word, mask=live)
                # The product's top byte is the sum of the four.
                flips = ((word ^ words[u * VECTORS + v]) * 0x01010101) >> 24
                changed += tl.where(live, flips, 0)
    tl.store(changed_ptr + program, tl.sum(changed, 0))


@triton.jit
def refresh_columns_kernel(
    table_ptr,
    owner_ptr,
    changed_ptr,
    COLUMNS: tl.constexpr,
    KEPT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """Masks of ROUNDS groups each in BLOCK neighbouring columns, down which they run."""
    program = tl.program_id(0)
    row = table_ptr + tl.load(owner_ptr + program).to(tl.int64) * COLUMNS
    w_ptr = _address(row, 0, tl.float32, False)
    mask_ptr = _address(row, 1, tl.int8, False)
    groups = tl.load(row + 2)
    columns = tl.load(row + 3)
    tile = program - tl.load(row + 4)
    across = (columns + BLOCK - 1) // BLOCK
    column = tile % across * BLOCK + tl.arange(0, BLOCK)
    first = tile // across * ROUNDS
    changed = tl.zeros((BLOCK,), tl.int32)
    live = column < columns
    for group in range(first, tl.minimum(groups, first + ROUNDS)):
        keys = ()
        for j in tl.static_range(GROUP):
            place = (group * GROUP + j) * columns + column
            keys += (_key(tl.load(w_ptr + place, mask=live, other=0)),)
        for j in tl.static_range(GROUP):
            place = (group * GROUP + j) * columns + column
            survives = _survives(keys, j, KEPT, GROUP)
            before = tl.load(mask_ptr + place, mask=live, other=0).to(tl.int32)
            tl.store(mask_ptr + place, survives.to(tl.int8), mask=live)
            changed += tl.where(live, survives ^ before, 0)
    tl.store(changed_ptr + program, tl.sum(changed, 0))
