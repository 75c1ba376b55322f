// y[M, N] = x[M, K] @ W[N, K].T + bias, W 2:4, on Hopper: wgmma.mma_async.sp fed by TMA.
//
//   Roles    The weight is the sparse operand A (64 rows an instruction), the tokens are B
//            (TOKENS an instruction). One warp loads; GROUPS warpgroups compute, each
//            TILES x 64 rows of the weight against the same TOKENS tokens.
//   Stage    WIDTH bytes of a row of x: values [ROWS, WIDTH/2 bytes], x [TOKENS, WIDTH bytes],
//            metadata [ROWS/64, words, 128].
//   Cluster  SPLIT x SHARE CTAs; CTA `rank` is member rank % SHARE of part rank / SHARE.
//            The parts each take a piece of K and push their sums into each other's shared memory,
//            a part adding its share of them in order, so results do not vary. The members of a part take neighbouring rows of the
//            weight and load each tile of x once for all of them (TMA multicast).
//   Source   PTX ISA 8.x: "wgmma.mma_async.sp", "Matrix-Descriptor Format", "Tensor copy".
//
// Defined by wgmma_sp_source.py: GROUPS TILES TOKENS WIDTH STAGES SPLIT SHARE CTAS_PER_SM;
// ELEMENT_BYTES, STEPS_A_WORD and OUTPUT_IS_BF16, of the element type; COMPUTE_REGISTERS and
// LOAD_REGISTERS a thread of either role, or 0 to leave them equal. instruction.cuh, made there too,
// holds wgmma_sp<SELECTOR>() for TOKENS and the element type.

#include "hopper.cuh"
#include "instruction.cuh"

constexpr int ROWS = GROUPS * TILES * 64;
constexpr int ACCUMULATORS = TOKENS / 2;
constexpr int COLUMNS = WIDTH / ELEMENT_BYTES;    // of K a stage
constexpr int STEPS = WIDTH / 64;                 // instructions along K a stage
constexpr int META_WORDS = STEPS / STEPS_A_WORD;  // of a thread and 64 rows a stage
constexpr int COMPUTE_WARPS = GROUPS * 4;
// Registers move between whole warpgroups only, so the loading warp then has three idle ones beside it.
constexpr int THREADS = COMPUTE_WARPS * 32 + (COMPUTE_REGISTERS ? 128 : 32);
constexpr int CLUSTER = SPLIT * SHARE;

// A row of a box is 128 bytes, the widest swizzle; of values 64 where a stage has no more.
constexpr int VALUES_ROW = WIDTH == 128 ? 64 : 128;
constexpr int VALUES_BOXES = WIDTH / 2 / VALUES_ROW;
constexpr int VALUES_BOX = ROWS * VALUES_ROW;
constexpr int X_BOXES = WIDTH / 128;
constexpr int X_BOX = TOKENS * 128;

constexpr int VALUES_BYTES = ROWS * WIDTH / 2;
constexpr int X_BYTES = TOKENS * WIDTH;
constexpr int META_BYTES = ROWS / 64 * META_WORDS * 512;
constexpr int STAGE_BYTES = VALUES_BYTES + X_BYTES + META_BYTES;

constexpr int X_AT = STAGES * VALUES_BYTES;
constexpr int META_AT = X_AT + STAGES * X_BYTES;
constexpr int BARRIERS_AT = META_AT + STAGES * META_BYTES;
constexpr int INBOX_FULL_AT = BARRIERS_AT + 2 * STAGES * 8;
constexpr int STAGING_AT = BARRIERS_AT + ((2 * STAGES + 1) * 8 + 127) / 128 * 128;
constexpr int STAGING_TOKENS = TOKENS % 32 == 0 ? 32 : TOKENS % 16 == 0 ? 16 : 8;
constexpr int STAGING_BYTES = STAGING_TOKENS * 128;  // a warpgroup's

// Sums change hands in pieces of 8 tokens x 8 rows of fp32; piece i belongs to part i % SPLIT, which
// has room for it from every part.
constexpr int PIECES_A_BLOCK = ROWS / 8;  // of 8 tokens
constexpr int PIECE_BYTES = 8 * 8 * 4;
constexpr int PIECES_A_PART = (TOKENS / 8 * PIECES_A_BLOCK + SPLIT - 1) / SPLIT;
constexpr int INBOX_BYTES = SPLIT * PIECES_A_PART * PIECE_BYTES;
// A small one has a place of its own, and pushing waits for nothing. A large one would leave too few
// stages: it takes the place of those, once all parts are done with theirs.
constexpr bool INBOX_OVER_STAGES = INBOX_BYTES > 16384;
constexpr int INBOX_AT = INBOX_OVER_STAGES ? 0 : STAGING_AT;

static_assert(CLUSTER <= 8, "larger clusters do not fit every GPU");
static_assert(STAGES >= 2, "a stage is released once the next has begun");
static_assert(ROWS <= 256 && TOKENS <= 256, "a box of the copy engine has at most 256 rows");
static_assert(!INBOX_OVER_STAGES || INBOX_BYTES <= BARRIERS_AT, "the stages hold the inbox");
static_assert(SPLIT == 1 || PIECES_A_BLOCK >= SPLIT, "a part without a piece would not wait for the others");
static_assert(TOKENS % (8 * SHARE) == 0, "a member loads whole groups of 8 swizzled rows of x");

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

struct Ring {
    u32 base;

    DEVICE u32 values(int stage) const { return base + stage * VALUES_BYTES; }
    DEVICE u32 x(int stage) const { return base + X_AT + stage * X_BYTES; }
    DEVICE u32 meta(int stage) const { return base + META_AT + stage * META_BYTES; }
    DEVICE u32 full(int stage) const { return base + BARRIERS_AT + stage * 8; }
    DEVICE u32 empty(int stage) const { return base + BARRIERS_AT + (STAGES + stage) * 8; }
    DEVICE u32 inbox_full() const { return base + INBOX_FULL_AT; }
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
        if constexpr (SPLIT > 1) {
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
                if constexpr (INBOX_OVER_STAGES) {
                    // And their stages are done with. Warps that load have left, or will.
                    cluster_arrive();
                    cluster_wait();
                }
#pragma unroll
                for (int i = 0; i < TILES; ++i)
                    push_sums(sums[i], ring, part, member, (group * TILES + i) * 64, live);
                barrier_wait_cluster(ring.inbox_full(), 0);
                add_pieces(ring, part, bias, y, row, token, live, N);
            }
        }
    }
}
