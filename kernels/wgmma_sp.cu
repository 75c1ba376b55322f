// y[M, N] = x[M, K] @ W[N, K].T + bias, W 2:4, on Hopper: wgmma.mma_async.sp fed by TMA.
//
//   Roles    The weight is the sparse operand A (64 rows an instruction), the tokens are B
//            (TOKENS an instruction). One warp loads; GROUPS warpgroups compute, each
//            TILES x 64 rows of the weight against the same TOKENS tokens.
//   Stage    WIDTH bytes of a row of x: values [ROWS, WIDTH/2 bytes], x [TOKENS, WIDTH bytes],
//            metadata [ROWS/64, words, 128].
//   Cluster  SPLIT x SHARE CTAs; CTA `rank` is member rank % SHARE of part rank / SHARE.
//            The parts each take a piece of K and exchange their sums through shared memory; each
//            adds its share of them in order, so results do not vary. The members of a part take
//            neighbouring rows of the weight and load each tile of x once for all of them (TMA
//            multicast).
//   Source   PTX ISA 8.x: "wgmma.mma_async.sp", "Matrix-Descriptor Format", "Tensor copy".
//
// Defined by wgmma_sp_source.py: GROUPS TILES TOKENS WIDTH STAGES SPLIT SHARE CTAS_PER_SM;
// ELEMENT_BYTES, STEPS_A_WORD and OUTPUT_IS_BF16, of the element type; COMPUTE_REGISTERS and
// LOAD_REGISTERS a thread of either role, or 0 to leave them equal; PULLS, how partial sums change
// hands. instruction.cuh, made there too, holds wgmma_sp<SELECTOR>() for TOKENS and the element type.

#include "hopper.cuh"
#include "instruction.cuh"
#include "wgmma_sp_output.cuh"
#include "wgmma_sp_sizes.cuh"

struct Tile {
    int row, token;
};

// Tiles in bands of 8 token tiles: the ~132 tiles at work read few enough different rows of x and W
// for L2 to serve both, however large M is.
DEVICE Tile tile_at(int index, int row_tiles, int token_tiles) {
    constexpr int BAND = 8;
    int band = index / (BAND * row_tiles);
    int width = min(BAND, token_tiles - band * BAND);
    int inside = index - band * BAND * row_tiles;
    return {inside / width, band * BAND + inside % width};
}

// A position in the ring of stages.
struct Cursor {
    int stage = 0;
    u32 parity = 0;

    DEVICE void advance() {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
};

struct Loads {
    const TensorMap *values_map, *meta_map, *x_map;
    Ring ring;
    u32 part, member;
    u64 weight_policy;

    DEVICE void weight(int stage, int row, int k) const {
        barrier_expect(ring.full(stage), STAGE_BYTES);
#pragma unroll
        for (int box = 0; box < VALUES_BOXES; ++box)
            load_2d(ring.values(stage) + box * VALUES_BOX, values_map, ring.full(stage),
                    k * (COLUMNS / 2) + box * (VALUES_ROW / ELEMENT_BYTES), row * ROWS, weight_policy);
        load_3d(ring.meta(stage), meta_map, ring.full(stage), 0, k * META_WORDS, row * (ROWS / 64), weight_policy);
    }

    DEVICE void x(int stage, int token, int k) const {
#pragma unroll
        for (int box = 0; box < X_BOXES; ++box) {
            int column = k * COLUMNS + box * (128 / ELEMENT_BYTES);
            if constexpr (SHARE == 1) {
                load_2d(ring.x(stage) + box * X_BOX, x_map, ring.full(stage), column, token * TOKENS, EVICT_LAST);
            } else {
                // Each member loads a piece of the tokens, for all members.
                constexpr int PIECE = TOKENS / SHARE;
                load_2d_multicast(ring.x(stage) + box * X_BOX + member * PIECE * 128, x_map, ring.full(stage), column,
                                  token * TOKENS + member * PIECE, ((1 << SHARE) - 1) << part * SHARE, EVICT_LAST);
            }
        }
    }
};

// This thread's words of metadata, of every tile and along K.
typedef u32 Meta[TILES][META_WORDS];

DEVICE void load_meta(Meta& meta, u32 address) {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (int word = 0; word < META_WORDS; ++word) {
            u32 codes;
            asm volatile("ld.shared.u32 %0, [%1];" : "=r"(codes) : "r"(address + (tile * META_WORDS + word) * 512));
            // Zero is what lies outside of the tensor, and as metadata undefined. 0100 is columns 0 and 1.
            meta[tile][word] = codes ? codes : 0x44444444;
        }
}

// The instructions read their metadata registers while they run: they must stay until the wait.
DEVICE void keep(Meta& meta) {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (int word = 0; word < META_WORDS; ++word) asm volatile("" ::"r"(meta[tile][word]));
}

DEVICE void multiply(float (&sums)[TILES][ACCUMULATORS], Meta& meta, u32 values, u32 x) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        // A step is 64 bytes of a row of x and the 32 bytes of values kept of as many columns.
        int values_at = step * 32 / VALUES_ROW * VALUES_BOX + step * 32 % VALUES_ROW;
        int x_at = step / 2 * X_BOX + step % 2 * 64;
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            u64 a = matrix_descriptor(values + tile * 64 * VALUES_ROW + values_at, VALUES_ROW);
            u64 b = matrix_descriptor(x + x_at, 128);
            if (step % STEPS_A_WORD == 0)
                wgmma_sp<0>(sums[tile], a, b, meta[tile][step / STEPS_A_WORD]);
            else
                wgmma_sp<1>(sums[tile], a, b, meta[tile][step / STEPS_A_WORD]);
        }
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

#if SPLIT * SHARE > 1
#define ATTRIBUTES __launch_bounds__(THREADS, CTAS_PER_SM) __cluster_dims__(CLUSTER, 1, 1)
#else
#define ATTRIBUTES __launch_bounds__(THREADS, CTAS_PER_SM)
#endif

// values_map: [N, K/2] 16-bit; meta_map: [ceil(N/64), K/64 padded, 128] 32-bit; x_map: [M, K] 16-bit.
// N % 16 == 0; bias [N] or null; y [M, N] contiguous. K beyond the tensors reads as zero.
extern "C" __global__ void ATTRIBUTES wgmma_sp(const __grid_constant__ TensorMap values_map,
                                               const __grid_constant__ TensorMap meta_map,
                                               const __grid_constant__ TensorMap x_map, const u16* bias, u16* y, int M,
                                               int N, int K) {
    extern __shared__ __align__(1024) unsigned char shared[];
    Ring ring{shared_address(shared)};
    int warp = threadIdx.x / 32;
    u32 rank = CLUSTER > 1 ? cluster_rank() : 0;
    u32 part = rank / SHARE, member = rank % SHARE;

    int k_tiles = (K + COLUMNS - 1) / COLUMNS;
    int row_tiles = (N + ROWS * SHARE - 1) / (ROWS * SHARE), token_tiles = (M + TOKENS - 1) / TOKENS;
    int tiles = row_tiles * token_tiles;
    int first_tile = blockIdx.x / CLUSTER, stride = gridDim.x / CLUSTER;
    int k_first = k_tiles * part / SPLIT, k_end = k_tiles * (part + 1) / SPLIT;

    // One token tile: nobody else reads this part of the weight.
    Loads loads{&values_map, &meta_map, &x_map, ring, part, member, token_tiles == 1 ? EVICT_FIRST : EVICT_NORMAL};
    int early = 0;
    if (threadIdx.x == COMPUTE_WARPS * 32) {
        prefetch_map(&values_map);
        prefetch_map(&meta_map);
        prefetch_map(&x_map);
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(ring.full(stage), 1);
            barrier_init(ring.empty(stage), COMPUTE_WARPS * SHARE);
        }
        if constexpr (PUSHES) {
            barrier_init(ring.inbox_full(), 1);
            int live = min(TOKENS, M - tile_at(first_tile, row_tiles, token_tiles).token * TOKENS);
            barrier_expect(ring.inbox_full(), pieces_of(part, live) * SPLIT * PIECE_BYTES);
        }
        barrier_init_fence();
        // The weight depends on no kernel before this one and on nobody else here: first of all, it is
        // sent for.
        if (first_tile < tiles) {
            int row = tile_at(first_tile, row_tiles, token_tiles).row * SHARE + member;
            early = min(STAGES, k_end - k_first);
#pragma unroll 1
            for (int i = 0; i < early; ++i) loads.weight(i, row, k_first + i);
        }
    }
    if constexpr (CLUSTER > 1) cluster_arrive();
    if constexpr (SHARE > 1)
        cluster_wait();
    else
        __syncthreads();

    if (warp >= COMPUTE_WARPS) {
#if COMPUTE_REGISTERS
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(LOAD_REGISTERS));
#endif
        if (threadIdx.x == COMPUTE_WARPS * 32) {
            Cursor cursor;
            asm volatile("griddepcontrol.wait;" ::: "memory");
            // Not before: the kernel after this one may then start, which counts on the one ahead of
            // this to have ended. A launch's cost is so hidden behind this kernel's work.
            asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
            if (first_tile < tiles) {
                int token = tile_at(first_tile, row_tiles, token_tiles).token;
#pragma unroll 1
                for (int i = 0; i < early; ++i) {
                    loads.x(i, token, k_first + i);
                    cursor.advance();
                }
            }
            for (int index = first_tile; index < tiles; index += stride) {
                Tile tile = tile_at(index, row_tiles, token_tiles);
                int row = tile.row * SHARE + member;
#pragma unroll 1
                for (int k = k_first + early; k < k_end; ++k) {
                    barrier_wait(ring.empty(cursor.stage), cursor.parity ^ 1);
                    loads.weight(cursor.stage, row, k);
                    loads.x(cursor.stage, tile.token, k);
                    cursor.advance();
                }
                early = 0;
            }
            // This CTA's shared memory must outlive what the others of the cluster send to it: the
            // last of that is their release of every stage.
            if constexpr (SHARE > 1) {
#pragma unroll 1
                for (int i = 0; i < STAGES; ++i) {
                    barrier_wait(ring.empty(cursor.stage), cursor.parity ^ 1);
                    cursor.advance();
                }
            }
        }
        // Every arrival wants its wait.
        if constexpr (SPLIT > 1 && SHARE == 1) cluster_wait();
    } else {
#if COMPUTE_REGISTERS
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COMPUTE_REGISTERS));
#endif
        int group = warp / 4, lane = threadIdx.x % 32;
        Cursor cursor;
        Meta even = {}, odd = {};
        for (int index = first_tile; index < tiles; index += stride) {
            float sums[TILES][ACCUMULATORS] = {};
            int before = -1;
            auto release = [&](int stage) {
                if constexpr (SHARE == 1) {
                    if (lane == 0) barrier_arrive(ring.empty(stage));
                } else {
                    if (lane < SHARE) barrier_arrive_remote(ring.empty(stage), part * SHARE + lane);
                }
            };
            // The stage before this one is released when its instructions are done: one stays in flight.
            auto step = [&](Meta& meta, Meta& meta_before) {
                barrier_wait(ring.full(cursor.stage), cursor.parity);
                load_meta(meta, ring.meta(cursor.stage) + group * TILES * META_WORDS * 512 + threadIdx.x % 128 * 4);
                multiply(sums, meta, ring.values(cursor.stage) + group * TILES * 64 * VALUES_ROW,
                         ring.x(cursor.stage));
                multiply_wait<1>();
                keep(meta_before);
                if (before >= 0) release(before);
                before = cursor.stage;
                cursor.advance();
            };
            int k = k_first;
            for (; k + 1 < k_end; k += 2) {
                step(even, odd);
                step(odd, even);
            }
            if (k < k_end) step(even, odd);
            multiply_wait<0>();
            keep(even);
            keep(odd);
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
                for (int i = 0; i < ACCUMULATORS; ++i) asm volatile("" : "+f"(sums[tile][i])::"memory");
            if (before >= 0) release(before);

            Tile tile = tile_at(index, row_tiles, token_tiles);
            int token = tile.token * TOKENS;
            if constexpr (SPLIT == 1) {
                int row = (tile.row * SHARE + member) * ROWS + group * TILES * 64;
                u32 staging = ring.base + STAGING_AT + group * STAGING_BYTES;
#pragma unroll
                for (int i = 0; i < TILES; ++i)
                    store_tile(sums[i], staging, group, bias, y, row + i * 64, token, M, N);
            } else {
                int row = (tile.row * SHARE + member) * ROWS, live = min(TOKENS, M - token);
                // The others' barriers are there.
                if constexpr (SHARE == 1) cluster_wait();
                if constexpr (PUSHES) {
#pragma unroll
                    for (int i = 0; i < TILES; ++i)
                        push_sums(sums[i], ring, part, member, (group * TILES + i) * 64, live);
                    barrier_wait_cluster(ring.inbox_full(), 0);
                    add_pieces(ring, part, bias, y, row, token, live, N);
                } else {
                    // All warps must be done with the stages.
                    asm volatile("bar.sync 15, %0;" ::"n"(COMPUTE_WARPS * 32) : "memory");
#pragma unroll
                    for (int i = 0; i < TILES; ++i) leave_sums(sums[i], ring, (group * TILES + i) * 64, live);
                    // The warps that load have left, or will: that counts as arrival.
                    cluster_release();
                    cluster_wait();
                    add_left_sums(ring, part, member, bias, y, row, token, live, N);
                    // A CTA's shared memory must outlive the others' reads of it.
                    cluster_arrive();
                    cluster_wait();
                }
            }
        }
    }
}
