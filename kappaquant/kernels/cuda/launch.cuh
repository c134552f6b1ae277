// Kernels of one stream that overlap (Kernel(..., early=True) of nvrtc.py): the next one is launched while this one runs,
// reads what no kernel writes, such as weights, and waits before it touches anything else.
#pragma once

#include "numbers.cuh"

__device__ __forceinline__ void wait_for_earlier() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The same below a read at `address`, an even one: only because the wait asks for it does the compiler let the read come first.
__device__ __forceinline__ void wait_for_earlier(const void* address) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{\n.reg .pred even;\n.reg .b64 odd;\nand.b64 odd, %0, 1;\nsetp.eq.u64 even, odd, 0;\n@even griddepcontrol.wait;\n}"
        ::"l"(address) : "memory");
#endif
}

// Weights, which may be read before the wait: L1 is left to what is read again, and holds nothing that was there before a
// weight took the place of another.
__device__ __forceinline__ uint4 stream(const uint4* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

// Eight bytes of which another warp reads the neighbours: by L1 once the wait is over, that is where WAITED
template <bool WAITED> __device__ __forceinline__ uint2 stream_part(const uint2* p) {
    if constexpr (WAITED) return __ldg(p);
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}

// 16 bytes on their way to an address in shared memory, past L1, or zeros where `wanted` is 0, not 16; groups of such copies, of which
// all but the last PENDING are there
__device__ __forceinline__ void copy_async(u32 to, const void* from, u32 wanted) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(wanted) : "memory");
}
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

__device__ __forceinline__ uint4 load_shared(u32 address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
    return v;
}
__device__ __forceinline__ uint2 load_shared_two(u32 address) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
    return v;
}

__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
