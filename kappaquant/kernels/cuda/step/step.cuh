// What the kernels of one decode step share: 16-byte reads, sums over a warp, tensor cores, clusters of blocks.

#include "numbers.cuh"

__device__ __forceinline__ uint4 read16(const void* p) {
    uint4 v;
    asm volatile("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

__device__ __forceinline__ uint4 stream16(const void* p) {  // read once: L1 is left to what is read again
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

// a number in two steps: a conversion right after its read would hold up the reads that follow
__device__ __forceinline__ u32 read_bits(const void* in, size_t i, int kind) {
    return kind == 0 ? reinterpret_cast<const u32*>(in)[i] : reinterpret_cast<const unsigned short*>(in)[i];
}

__device__ __forceinline__ float number(u32 bits, int kind) {
    return kind == 0 ? __uint_as_float(bits) : kind == 1 ? widen<1>((unsigned short)bits) : widen<2>((unsigned short)bits);
}

template <int KIND> __device__ __forceinline__ float low(u32 pair) { return widen<KIND>((unsigned short)(pair & 0xffff)); }
template <int KIND> __device__ __forceinline__ float high(u32 pair) { return widen<KIND>((unsigned short)(pair >> 16)); }

__device__ __forceinline__ float sigmoid(float v) { return 1.f / (1.f + expf(-v)); }

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(0xffffffffu, v, d);
    return v;
}

// d[16 x 8] += a[16 x 16] b[16 x 8] of 16-bit numbers of that kind
template <int KIND>
__device__ __forceinline__ void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    if constexpr (KIND == 1)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Where a launch may begin while the kernel before it ends: nothing that kernel writes is touched above this line.
__device__ __forceinline__ void after_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait; griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// how many have come before, back to 0 after the last of `count`
__device__ __forceinline__ u32 arrive(u32* counter, u32 count) {
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(count - 1) : "memory");
    return before;
}

// Clusters, from compute capability 9.0 on. With CLUSTER == 1 nothing is left of these.
template <int CLUSTER> __device__ __forceinline__ void cluster_arrive() {
    if constexpr (CLUSTER > 1) asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}

template <int CLUSTER> __device__ __forceinline__ void cluster_wait() {
    if constexpr (CLUSTER > 1) asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// shared memory of the cluster's block `rank`, at the place where `mine` lies in this block's
template <int CLUSTER> __device__ __forceinline__ float peer(const float* mine, int rank) {
    if constexpr (CLUSTER == 1) return *mine;
    else {
        float v;
        u32 at = (u32)__cvta_generic_to_shared(mine);
        asm volatile("{ .reg .u32 a; mapa.shared::cluster.u32 a, %1, %2; ld.shared::cluster.f32 %0, [a]; }" : "=f"(v) : "r"(at), "r"(rank) : "memory");
        return v;
    }
}
