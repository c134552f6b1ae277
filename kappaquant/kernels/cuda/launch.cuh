// Kernels of one stream that overlap (Kernel(..., early=True) of nvrtc.py): the next one is launched while this one runs,
// reads what no kernel writes, such as weights, and waits before it touches anything else.
#pragma once

__device__ __forceinline__ void wait_for_earlier() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
