// What kernels of kappaquant/kernels/cuda ask of CUDA, on a CPU: a thread block is so many fibers, which take turns wherever they wait
// for each other. Copies that a GPU makes in its own time are made at once.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __align__(n) __attribute__((aligned(n)))

using std::max;
using std::min;

struct uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct Dimensions { unsigned x, y, z; };

inline Dimensions threadIdx, blockIdx, blockDim, gridDim;

template <typename To, typename From> To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
inline float __uint_as_float(uint32_t bits) { return bits_as<float>(bits); }
inline float __int_as_float(int bits) { return bits_as<float>(bits); }
inline uint32_t __float_as_uint(float v) { return bits_as<uint32_t>(v); }
inline int __float_as_int(float v) { return bits_as<int>(v); }
inline float __fsqrt_rn(float v) { return sqrtf(v); }
inline uint32_t __brev(uint32_t v) {
    uint32_t out = 0;
    for (int i = 0; i < 32; i++) out |= (v >> i & 1) << (31 - i);
    return out;
}
inline int __float2int_rn(float v) { return (int)nearbyintf(v); }
inline float rsqrtf(float v) { return 1.f / sqrtf(v); }
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, int by) { return by ? high << by | low >> (32 - by) : high; }
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, int by) { return by ? low >> by | high << (32 - by) : low; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fadd_rz(float a, float b) {
    const double sum = (double)a + b;
    const float nearest = (float)sum;
    return fabs(nearest) > fabs(sum) ? nextafterf(nearest, 0.f) : nearest;
}
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline int __popc(uint32_t v) { return __builtin_popcount(v); }
template <typename T> T __ldg(const T* from) { return *from; }
template <typename T> void __stcs(T* to, T v) { *to = v; }

inline float host_from_half(uint16_t bits) { return (float)bits_as<_Float16>(bits); }
inline uint16_t host_half(float v) { return bits_as<uint16_t>((_Float16)v); }
inline uint16_t host_bfloat(float v) {
    const uint32_t bits = bits_as<uint32_t>(v);
    return v != v ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// Fibers, and the memory they share

alignas(16) inline char host_shared[256 << 10];

constexpr int MOST_THREADS = 1024;
struct Meeting { int there = 0, turn = 0; };
struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done = false;
};
inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline int running;
inline Meeting of_block, of_warps[MOST_THREADS / 32];
inline const std::function<void()>* body;
inline uint32_t exchanged[MOST_THREADS][8];

inline void meet(Meeting& at, int count) {
    const int turn = at.turn;
    if (++at.there == count) {
        at.there = 0;
        at.turn++;
        return;
    }
    while (at.turn == turn) swapcontext(&fibers[running].context, &scheduler);
}

inline void enter() {
    (*body)();
    fibers[running].done = true;
    swapcontext(&fibers[running].context, &scheduler);
}

inline void __syncthreads() { meet(of_block, (int)fibers.size()); }
inline void __syncwarp() { meet(of_warps[running / 32], 32); }

template <typename T> T __shfl_sync(uint32_t, T v, int lane) {
    memcpy(exchanged[running], &v, sizeof v);
    __syncwarp();
    T other;
    memcpy(&other, exchanged[running / 32 * 32 + lane], sizeof other);
    __syncwarp();
    return other;
}
template <typename T> T __shfl_xor_sync(uint32_t mask, T v, int lanes) { return __shfl_sync(mask, v, running % 32 ^ lanes); }
template <typename T> T __shfl_up_sync(uint32_t mask, T v, int lanes) {
    const int lane = running % 32;
    return __shfl_sync(mask, v, lane < lanes ? lane : lane - lanes);
}

template <typename T, typename Both> T of_warp(T v, Both both) {
    memcpy(exchanged[running], &v, sizeof v);
    __syncwarp();
    T all;
    memcpy(&all, exchanged[running / 32 * 32], sizeof all);
    for (int lane = 1; lane < 32; lane++) {
        T other;
        memcpy(&other, exchanged[running / 32 * 32 + lane], sizeof other);
        all = both(all, other);
    }
    __syncwarp();
    return all;
}
inline uint32_t __ballot_sync(uint32_t, bool v) {
    return of_warp<uint32_t>((uint32_t)v << running % 32, [](uint32_t a, uint32_t b) { return a | b; });
}
template <typename T> T __reduce_min_sync(uint32_t, T v) { return of_warp(v, [](T a, T b) { return std::min(a, b); }); }

inline int atomicAdd(int* at, int v) {
    const int before = *at;
    *at += v;
    return before;
}

// Every block of the grid, one after another
inline void launch(const unsigned* grid, int threads, const std::function<void()>& run) {
    body = &run;
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {(unsigned)threads, 1, 1};
    for (unsigned z = 0; z < grid[2]; z++)
        for (unsigned y = 0; y < grid[1]; y++)
            for (unsigned x = 0; x < grid[0]; x++) {
                blockIdx = {x, y, z};
                memset(host_shared, 0xff, sizeof host_shared);  // what a block has not written is no number
                fibers = std::vector<Fiber>(threads);
                for (auto& fiber : fibers) {
                    fiber.stack.reset(new char[1 << 16]);
                    getcontext(&fiber.context);
                    fiber.context.uc_stack.ss_sp = fiber.stack.get();
                    fiber.context.uc_stack.ss_size = 1 << 16;
                    fiber.context.uc_link = nullptr;
                    makecontext(&fiber.context, enter, 0);
                }
                for (int left = threads; left;) {
                    for (running = 0; running < threads; running++) {
                        if (fibers[running].done) continue;
                        threadIdx = {(unsigned)running, 0, 0};
                        swapcontext(&scheduler, &fibers[running].context);
                        left -= fibers[running].done;
                    }
                }
            }
}

// Instructions

inline uint32_t host_permute(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = (uint64_t)b << 32 | a;
    uint32_t out = 0;
    for (int i = 0; i < 4; i++) {
        const uint32_t nibble = selector >> 4 * i & 15, byte = bytes >> 8 * (nibble & 7) & 255;
        out |= (nibble & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
    }
    return out;
}

inline uint32_t host_logic(int table, uint32_t a, uint32_t b, uint32_t c) {
    uint32_t out = 0;
    for (int i = 0; i < 32; i++) out |= (uint32_t)(table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i;
    return out;
}

// float16 times 1, of a number that is finite
inline uint32_t host_high_half(uint32_t selectors) {
    if ((selectors >> 26 & 31) == 31) return 0x7fff7fffu;
    return selectors >> 16 | selectors >> 16 << 16;
}

// the halves of `a` times the lower two bytes of b, and c
inline uint32_t __dp2a_lo(uint32_t a, uint32_t b, uint32_t c) { return (a & 0xffff) * (b & 255) + (a >> 16) * (b >> 8 & 255) + c; }

// of two float16 with two
inline uint32_t host_products(uint32_t a, uint32_t b) {
    const auto one = [](uint16_t a, uint16_t b) { return (uint32_t)host_half(host_from_half(a) * host_from_half(b)); };
    return one(a, b) | one(a >> 16, b >> 16) << 16;
}

// value(word, i) of operands that the lanes of a warp hold: d += a b for 16 rows and 8 columns; a lane's words are of rows r and r + 8, then
// the same for the second half of the products, PER of these in a word
template <int PER, typename Sum, typename Value>
void host_mma(Sum* d, const uint32_t (&a)[4], const uint32_t (&b)[2], Value value) {
    const int lane = running % 32, warp = running - lane;
    for (int i = 0; i < 4; i++) exchanged[running][i] = a[i];
    for (int i = 0; i < 2; i++) exchanged[running][4 + i] = b[i];
    __syncwarp();
    for (int i = 0; i < 4; i++)
        for (int half = 0; half < 2; half++)
            for (int t = 0; t < 4; t++) {
                const uint32_t mine = exchanged[warp + lane / 4 * 4 + t][2 * half + i / 2];
                const uint32_t other = exchanged[warp + (2 * (lane % 4) + i % 2) * 4 + t][4 + half];
                for (int j = 0; j < PER; j++) d[i] += value(mine, j) * value(other, j);
            }
    __syncwarp();
}
inline void host_mma(int* d, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    host_mma<4>(d, {a0, a1, a2, a3}, {b0, b1}, [](uint32_t word, int i) { return (int)(int8_t)(word >> 8 * i); });
}
inline void host_mma(float* d, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    host_mma<2>(d, {a0, a1, a2, a3}, {b0, b1}, [](uint32_t word, int i) { return host_from_half(word >> 16 * i); });
}

// launch.cuh

inline uint32_t __cvta_generic_to_shared(const void* p) { return (uint32_t)((const char*)p - host_shared); }
inline void wait_for_earlier() {}
inline void wait_for_earlier(const void*) {}
inline void let_next_start() {}
template <typename T> T stream(const T* from) { return *from; }
template <bool WAITED, typename T> T stream_part(const T* from) { return *from; }
inline void copy_async(uint32_t to, const void* from, uint32_t wanted) {
    if (wanted) memcpy(host_shared + to, from, wanted);
    memset(host_shared + to + wanted, 0, 16 - wanted);
}
inline void copies_commit() {}
template <int PENDING> void copies_wait() {}
inline uint4 load_shared(uint32_t address) { return *reinterpret_cast<const uint4*>(host_shared + address); }
inline uint2 load_shared_two(uint32_t address) { return *reinterpret_cast<const uint2*>(host_shared + address); }

// wgmma.cuh: of blocks that are clusters of one

typedef unsigned long long u64;
struct Barrier { int needed, there = 0, phase = 0; };
inline std::map<uint32_t, Barrier> barriers;

inline uint32_t shared_address(const void* p) { return __cvta_generic_to_shared(p); }
inline void barrier_init(uint32_t barrier, uint32_t arrivals) { barriers[barrier] = {(int)arrivals}; }
inline void barrier_arrive(uint32_t barrier) {
    Barrier& at = barriers[barrier];
    if (++at.there == at.needed) at.there = 0, at.phase++;
}
inline void barrier_expect(uint32_t barrier, uint32_t) { barrier_arrive(barrier); }  // no fiber runs before the bytes are there
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
    while ((barriers[barrier].phase & 1) == (int)parity) swapcontext(&fibers[running].context, &scheduler);
}
inline void bulk_copy(uint32_t to, const void* from, uint32_t bytes, uint32_t) { memcpy(host_shared + to, from, bytes); }
inline void bulk_copy_to_pair(uint32_t, const void*, uint32_t, uint32_t) { abort(); }
inline void copy_word(void* to, const void* from) { memcpy(to, from, 4); }
inline void copies_wait() {}
inline void cluster_sync() { __syncthreads(); }
inline void cluster_arrive() { abort(); }
inline void cluster_wait() { abort(); }
inline void barrier_arrive_in(uint32_t, uint32_t) { abort(); }
inline uint32_t load_remote(uint32_t address, uint32_t) { return *reinterpret_cast<const uint32_t*>(host_shared + address); }
inline float4 load_remote_four(uint32_t address, uint32_t) { return *reinterpret_cast<const float4*>(host_shared + address); }
template <int N, typename T> void keep_before(T*) {}
inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int PENDING> void wgmma_wait() {}
inline u64 swizzled(uint32_t address, uint32_t along_n) { return address >> 4 | (u64)(along_n >> 4) << 32; }

// A warp's 16 rows by N tokens, 32 bytes of each
template <int N, int PER, typename Sum, typename Value> void host_wgmma(Sum* d, const uint32_t* a, u64 b, Value value) {
    const int lane = running % 32, warp = running - lane;
    for (int i = 0; i < 4; i++) exchanged[running][i] = a[i];
    __syncwarp();
    for (int i = 0; i < N / 2; i++)
        for (int half = 0; half < 2; half++)
            for (int t = 0; t < 4; t++) {
                uint32_t at = ((uint32_t)b << 4) + i / 4 * ((uint32_t)(b >> 32) << 4) + (2 * (lane % 4) + i % 2) * 128 + 16 * half + 4 * t;
                at ^= (at >> 7 & 7) << 4;
                const uint32_t mine = exchanged[warp + lane / 4 * 4 + t][2 * half + i / 2 % 2];
                const uint32_t other = *reinterpret_cast<const uint32_t*>(host_shared + at);
                for (int j = 0; j < PER; j++) d[i] += value(mine, j) * value(other, j);
            }
    __syncwarp();
}
template <int N> void wgmma(float* d, const uint32_t* a, u64 b) {
    host_wgmma<N, 2>(d, a, b, [](uint32_t word, int i) { return host_from_half(word >> 16 * i); });
}
template <int N, bool ADD> void wgmma(int* d, const uint32_t* a, u64 b) {
    if (!ADD) std::fill(d, d + N / 2, 0);
    host_wgmma<N, 4>(d, a, b, [](uint32_t word, int i) { return (int)(int8_t)(word >> 8 * i); });
}
