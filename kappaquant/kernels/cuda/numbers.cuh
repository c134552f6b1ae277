// Float formats without CUDA's headers, which a user's machine need not have. KIND: 0 float32, 1 float16, 2 bfloat16.

#pragma once
typedef unsigned int u32;

constexpr float ZERO = 12582912.f;  // 1 more in its bits makes it 1 larger, up to 2**22 either way

template <int KIND> struct Number { typedef unsigned short type; };
template <> struct Number<0> { typedef float type; };

template <int KIND> __device__ __forceinline__ float widen(typename Number<KIND>::type v) {
    if constexpr (KIND == 0) return v;
    else if constexpr (KIND == 2) return __uint_as_float((u32)v << 16);
    else {
        float out;
        asm("{ .reg .f16 h; mov.b16 h, %1; cvt.f32.f16 %0, h; }" : "=f"(out) : "h"(v));
        return out;
    }
}

template <int KIND> __device__ __forceinline__ typename Number<KIND>::type narrow(float v) {
    if constexpr (KIND == 0) return v;
    else {
        unsigned short bits;
        if constexpr (KIND == 1) asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(v));
        else asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(v));
        return bits;
    }
}

// two numbers of 16 bits, the first below
template <int KIND> __device__ __forceinline__ u32 pack(float a, float b) {
    static_assert(KIND != 0, "16 bits");
    u32 both;
    if constexpr (KIND == 1) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(b), "f"(a));
    else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(b), "f"(a));
    return both;
}

template <int KIND> __device__ __forceinline__ float rounded(float v) { return widen<KIND>(narrow<KIND>(v)); }

template <int KIND> __device__ __forceinline__ typename Number<KIND>::type* as(void* p) {
    return reinterpret_cast<typename Number<KIND>::type*>(p);
}

template <int KIND> __device__ __forceinline__ const typename Number<KIND>::type* as(const void* p) {
    return reinterpret_cast<const typename Number<KIND>::type*>(p);
}
