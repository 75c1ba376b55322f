// Sizes of wgmma_sp's tiles, and where its shared memory holds what: stages, barriers, then the place
// for sums on their way out (wgmma_sp_output.cuh), one of two: staging of outputs, or the inbox of
// partial sums where K is split and those are few.

#pragma once

#include "hopper.cuh"

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

// Where K is split, partial sums change hands in one of two ways. If they are few (not PULLS) they are
// pushed, which waits for nobody: in pieces of 8 tokens x 8 rows of fp32; piece i belongs to part
// i % SPLIT, which has room for it from every part.
constexpr bool PUSHES = SPLIT > 1 && !PULLS;
constexpr int PIECES_A_BLOCK = ROWS / 8;  // of 8 tokens
constexpr int PIECE_BYTES = 8 * 8 * 4;
constexpr int PIECES_A_PART = (TOKENS / 8 * PIECES_A_BLOCK + SPLIT - 1) / SPLIT;
constexpr int INBOX_AT = STAGING_AT;
// Many, at 8 bytes a message, would take longer than reading them: each part leaves its own in place
// of its stages, as [TOKENS, ROWS], and reads the others'. +4 floats: the 8 rows x 4 token pairs that
// a warp writes at once fall into 32 banks.
constexpr int PARTIAL_STRIDE = ROWS + 4;

static_assert(CLUSTER <= 8, "larger clusters do not fit every GPU");
static_assert(STAGES >= 2, "a stage is released once the next has begun");
static_assert(ROWS <= 256 && TOKENS <= 256, "a box of the copy engine has at most 256 rows");
static_assert(!PULLS || TOKENS * PARTIAL_STRIDE * 4 <= BARRIERS_AT, "partial sums take the place of stages");
static_assert(!PUSHES || PIECES_A_BLOCK >= SPLIT, "a part without a piece would not wait for the others");
static_assert(TOKENS % (8 * SHARE) == 0, "a member loads whole groups of 8 swizzled rows of x");

// Addresses of it.
struct Ring {
    u32 base;

    DEVICE u32 values(int stage) const { return base + stage * VALUES_BYTES; }
    DEVICE u32 x(int stage) const { return base + X_AT + stage * X_BYTES; }
    DEVICE u32 meta(int stage) const { return base + META_AT + stage * META_BYTES; }
    DEVICE u32 full(int stage) const { return base + BARRIERS_AT + stage * 8; }
    DEVICE u32 empty(int stage) const { return base + BARRIERS_AT + (STAGES + stage) * 8; }
    DEVICE u32 inbox_full() const { return base + INBOX_FULL_AT; }
};
