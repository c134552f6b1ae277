// Kernels of one stream that overlap (Kernel(..., early=True) of nvrtc.py): the next one is launched while this one runs,
// reads what no kernel writes, such as weights, and waits before it touches anything else.
#pragma once

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

__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
