// From the sums of a tile to y: `store_tile` where a CTA has all of K; where a cluster has split it,
// `push_sums` and `add_pieces` if they are few, `leave_sums` and `add_left_sums` if they are many.

#pragma once

#include "hopper.cuh"
#include "wgmma_sp_sizes.cuh"

// Two floats as two 16-bit values, the first in the low half.
DEVICE u32 pack_pair(float first, float second) {
    u32 packed;
#if OUTPUT_IS_BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
#endif
    return packed;
}

DEVICE float to_float(u16 bits) {
    float value;
#if OUTPUT_IS_BF16
    value = __uint_as_float((u32)bits << 16);
#else
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
#endif
    return value;
}

// 64 rows x TOKENS of sums to y, through this warpgroup's staging: an accumulator holds two tokens of
// one row, a row of y has consecutive weight rows, so stmatrix transposes.
DEVICE void store_tile(float (&sums)[ACCUMULATORS], u32 staging, int group, const u16* bias, u16* y, int row,
                       int token, int M, int N) {
    int thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32;
    int bias_row = row + warp * 16 + lane / 4;
    float low = bias && bias_row < N ? to_float(bias[bias_row]) : 0.f;
    float high = bias && bias_row + 8 < N ? to_float(bias[bias_row + 8]) : 0.f;
    // Lane l gives the address of row l % 8 of matrix l / 8; matrices: (tokens, rows), (tokens, rows + 8),
    // then the next 8 tokens.
    int matrix_token = lane / 16 * 8 + lane % 8;
    int chunk = warp * 2 + lane / 8 % 2;
#pragma unroll
    for (int first = 0; first < TOKENS; first += STAGING_TOKENS) {
        if (token + first >= M) break;
        group_sync(group);
#pragma unroll
        for (int at = 0; at < STAGING_TOKENS; at += 16) {
            float* d = &sums[(first + at) / 2];
            u32 a = pack_pair(d[0] + low, d[1] + low), b = pack_pair(d[2] + high, d[3] + high);
            // 16-byte chunks are swizzled by the token, so neither side has bank conflicts.
            u32 to = staging + (at + matrix_token) * 128 + ((chunk ^ matrix_token % 8) * 16);
            if constexpr (TOKENS % 16 == 0) {
                u32 c = pack_pair(d[4] + low, d[5] + low), e = pack_pair(d[6] + high, d[7] + high);
                store_matrices(to, a, b, c, e);
            } else {
                static_assert(TOKENS % 16 == 0 || TOKENS == 8, "stage 8 tokens or multiples of 16");
                store_matrices(staging + (lane % 8) * 128 + ((chunk ^ lane % 8) * 16), a, b);
            }
        }
        group_sync(group);
#pragma unroll
        for (int index = thread; index < STAGING_TOKENS * 8; index += 128) {
            int staged = index / 8, piece = index % 8;
            int at_token = token + first + staged, at_row = row + piece * 8;
            if (at_token < M && at_row < N) {
                u32 a, b, c, d;
                asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                             : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
                             : "r"(staging + staged * 128 + ((piece ^ staged % 8) * 16)));
                asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(y + (u64)at_token * N + at_row), "r"(a),
                             "r"(b), "r"(c), "r"(d)
                             : "memory");
            }
        }
    }
}

// Pieces of the first `live` tokens that a part has to add.
DEVICE int pieces_of(u32 part, int live) { return ((live + 7) / 8 * PIECES_A_BLOCK - (int)part + SPLIT - 1) / SPLIT; }

// 64 rows of this warpgroup's sums to the parts they belong to.
DEVICE void push_sums(float (&sums)[ACCUMULATORS], Ring ring, u32 part, u32 member, int row, int live) {
    int thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        int piece = (row + warp * 16) / 8 + half;
        int owner = piece % SPLIT, place = piece / SPLIT;
#pragma unroll
        for (int block = 0; block < TOKENS / 8; ++block) {
            if (block * 8 >= live) break;
            // A row of the piece has its 8 tokens side by side. Rows are swizzled by the place: a warp
            // reads one row of four pieces at once.
            u32 to = ring.base + INBOX_AT + (part * PIECES_A_PART + place) * PIECE_BYTES +
                     (lane / 4 ^ place % 4) * 32 + lane % 4 * 8;
            float* pair = &sums[block * 4 + half * 2];
            push_pair(to, ring.inbox_full(), owner * SHARE + member, pair[0], pair[1]);
            // To the same rows of the next 8 tokens. Hidden from the compiler, which would have the
            // addresses of all at once, and run out of registers.
            asm volatile("" : "+r"(owner), "+r"(place));
            owner += PIECES_A_BLOCK % SPLIT;
            place += PIECES_A_BLOCK / SPLIT;
            if (owner >= SPLIT) {
                owner -= SPLIT;
                ++place;
            }
        }
    }
}

// Adds the pieces of this part and stores them, 8 rows of one token a thread.
DEVICE void add_pieces(Ring ring, u32 part, const u16* bias, u16* y, int row, int token, int live, int N) {
    for (int index = threadIdx.x; index < pieces_of(part, live) * 8; index += COMPUTE_WARPS * 32) {
        u32 place = index / 8, piece = place * SPLIT + part;
        int at_token = piece / PIECES_A_BLOCK * 8 + index % 8, at_row = row + piece % PIECES_A_BLOCK * 8;
        if (at_token >= live || at_row >= N) continue;
        u32 from = ring.base + INBOX_AT + place * PIECE_BYTES + index % 8 * 4;
        float sum[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            sum[i] = bias ? to_float(bias[at_row + i]) : 0.f;
#pragma unroll
            for (int other = 0; other < SPLIT; ++other) {
                float value;
                asm volatile("ld.shared.f32 %0, [%1];"
                             : "=f"(value)
                             : "r"(from + other * PIECES_A_PART * PIECE_BYTES + (i ^ place % 4) * 32));
                sum[i] += value;
            }
        }
        asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(y + (u64)(token + at_token) * N + at_row),
                     "r"(pack_pair(sum[0], sum[1])), "r"(pack_pair(sum[2], sum[3])), "r"(pack_pair(sum[4], sum[5])),
                     "r"(pack_pair(sum[6], sum[7]))
                     : "memory");
    }
}

// 64 rows of this warpgroup's sums, to where the cluster reads them.
DEVICE void leave_sums(float (&sums)[ACCUMULATORS], Ring ring, int row, int live) {
    int thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32;
    u32 at = ring.base + (lane % 4 * 2 * PARTIAL_STRIDE + row + warp * 16 + lane / 4) * 4;
#pragma unroll
    for (int block = 0; block < TOKENS / 8; ++block) {
        if (block * 8 >= live) break;
        float* d = &sums[block * 4];
        u32 to = at + block * 8 * PARTIAL_STRIDE * 4;
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(d[0]) : "memory");
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(to + PARTIAL_STRIDE * 4), "f"(d[1]) : "memory");
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(to + 32), "f"(d[2]) : "memory");
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(to + PARTIAL_STRIDE * 4 + 32), "f"(d[3]) : "memory");
    }
}

// Adds this part's share of what all have left and stores it, four rows of one token a thread.
DEVICE void add_left_sums(Ring ring, u32 part, u32 member, const u16* bias, u16* y, int row, int token, int live,
                          int N) {
    constexpr int QUADS = ROWS / 4, ADDING = COMPUTE_WARPS * 32;
    for (int index = part * ADDING + threadIdx.x; index < live * QUADS; index += SPLIT * ADDING) {
        int at_token = index / QUADS, at_row = index % QUADS * 4;
        if (row + at_row >= N) continue;
        u32 address = ring.base + (at_token * PARTIAL_STRIDE + at_row) * 4;
        float sums[SPLIT][4];
#pragma unroll
        for (int other = 0; other < SPLIT; ++other)
            asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                         : "=f"(sums[other][0]), "=f"(sums[other][1]), "=f"(sums[other][2]), "=f"(sums[other][3])
                         : "r"(remote_address(address, other * SHARE + member)));
        float sum[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            sum[i] = bias ? to_float(bias[row + at_row + i]) : 0.f;
#pragma unroll
            for (int other = 0; other < SPLIT; ++other) sum[i] += sums[other][i];
        }
        asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(y + (u64)(token + at_token) * N + row + at_row),
                     "r"(pack_pair(sum[0], sum[1])), "r"(pack_pair(sum[2], sum[3]))
                     : "memory");
    }
}
