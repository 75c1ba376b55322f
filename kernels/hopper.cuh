// Hopper's instructions as functions: barriers, clusters, the copy engine (TMA), wgmma's operands.
//
//   Source   PTX ISA 8.x: "mbarrier", "barrier.cluster", "cp.async.bulk.tensor",
//            "wgmma.mma_async" ("Matrix-Descriptor Format"), "stmatrix".
//
// Shared memory is addressed by its 32-bit address; a barrier by that of its 8 bytes.

#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

struct alignas(64) TensorMap {
    char opaque[128];
};

#define DEVICE __device__ __forceinline__

// L2 policies, as createpolicy.fractional gives them.
constexpr u64 EVICT_FIRST = 0x12F0000000000000ull;
constexpr u64 EVICT_NORMAL = 0x1000000000000000ull;
constexpr u64 EVICT_LAST = 0x14F0000000000000ull;

DEVICE u32 shared_address(const void* pointer) { return static_cast<u32>(__cvta_generic_to_shared(pointer)); }

DEVICE u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

DEVICE u32 remote_address(u32 address, u32 rank) {
    u32 remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    return remote;
}

// All threads of the cluster meet in two halves: who has waited knows that all have arrived. It is no
// wait for memory, but barriers initialised (and fenced) before it are seen after it.
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }

// As `cluster_arrive`, and what was written to shared memory before it is seen after the wait.
DEVICE void cluster_release() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }

DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// Two floats into the shared memory of a CTA of the cluster; its barrier counts the 8 bytes.
DEVICE void push_pair(u32 to, u32 barrier, u32 rank, float first, float second) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(
            remote_address(to, rank)),
        "f"(first), "f"(second), "r"(remote_address(barrier, rank))
        : "memory");
}

DEVICE void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// Makes what was initialised known to the copy engine and to the cluster.
DEVICE void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}

DEVICE void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

DEVICE void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

DEVICE void barrier_arrive_remote(u32 barrier, u32 rank) {
    // Not .release.cluster: that waits for all memory traffic of the thread (2x slower as a whole), and
    // nothing was written that the other side reads.
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(remote_address(barrier, rank)) : "memory");
}

DEVICE void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "AGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra READY;\nbra AGAIN;\nREADY:\n}" ::"r"(barrier), "r"(parity)
        : "memory");
}

// For what other CTAs of the cluster have pushed. Not for every wait: it empties the L1 cache.
DEVICE void barrier_wait_cluster(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "AGAIN:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@done bra READY;\nbra AGAIN;\nREADY:\n}" ::"r"(barrier), "r"(parity)
        : "memory");
}

DEVICE void group_sync(int group) { asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory"); }

// A map is 128 bytes of parameters that the copy engine would fetch at its first load.
DEVICE void prefetch_map(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

DEVICE void load_2d(u32 to, const TensorMap* map, u32 barrier, int column, int row, u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to), "l"(map), "r"(barrier), "r"(column), "r"(row), "l"(policy)
        : "memory");
}

DEVICE void load_2d_multicast(u32 to, const TensorMap* map, u32 barrier, int column, int row, u16 ctas, u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        ".L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5, %6;" ::"r"(to), "l"(map), "r"(barrier), "r"(column),
        "r"(row), "h"(ctas), "l"(policy)
        : "memory");
}

DEVICE void load_3d(u32 to, const TensorMap* map, u32 barrier, int x, int y, int z, u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(to), "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "l"(policy)
        : "memory");
}

// K-major operand with rows of `row_bytes`, swizzled to their width: 8 rows to the next group of 8.
DEVICE u64 matrix_descriptor(u32 address, int row_bytes) {
    u64 swizzle = row_bytes == 128 ? 1 : 2;
    return (u64)((address & 0x3FFFF) >> 4) | 1ull << 16 | (u64)(row_bytes * 8 >> 4) << 32 | swizzle << 62;
}

template <int PENDING>
DEVICE void multiply_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

DEVICE void store_matrices(u32 to, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
}

DEVICE void store_matrices(u32 to, u32 a, u32 b) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(to), "r"(a), "r"(b) : "memory");
}
