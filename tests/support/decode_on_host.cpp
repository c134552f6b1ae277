// decode.cuh on a CPU: the same source, with what only GPUs have restated. Tests put copies of the headers beside it whose
// instructions are calls of functions here.

#include <cstdint>
#include <cstring>

#define __device__
#define __forceinline__ inline

struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };
static struct { uint32_t x; } threadIdx;

static uint32_t __funnelshift_l(uint32_t low, uint32_t high, int by) { return by ? high << by | low >> (32 - by) : high; }
static uint32_t __funnelshift_r(uint32_t low, uint32_t high, int by) { return by ? low >> by | high << (32 - by) : low; }
static float __uint_as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static uint32_t host_permute(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = (uint64_t)b << 32 | a;
    uint32_t out = 0;
    for (int i = 0; i < 4; i++) {
        const uint32_t nibble = selector >> 4 * i & 15, byte = bytes >> 8 * (nibble & 7) & 255;
        out |= (nibble & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
    }
    return out;
}

static uint32_t host_logic(int table, uint32_t a, uint32_t b, uint32_t c) {
    uint32_t out = 0;
    for (int i = 0; i < 32; i++) out |= (uint32_t)(table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i;
    return out;
}

// float16 times 1, of a number that is finite
static uint32_t host_high_half(uint32_t selectors) {
    if ((selectors >> 26 & 31) == 31) return 0x7fff7fffu;
    return selectors >> 16 | selectors >> 16 << 16;
}

#include "decode.cuh"

template <int FORMAT, int GROUP> static void decode(bool half, const uint32_t* words, uint32_t before, const uint32_t* entries, uint32_t* out) {
    Table table = {};
    memcpy(table.bytes, entries, sizeof table.bytes);
    if (half) decode_half<FORMAT, GROUP>(words, before, table, nullptr, out);
    else decode_int8<FORMAT, GROUP>(words, before, table, out);
}

template <int FORMAT> static void decode(int group, bool half, const uint32_t* words, uint32_t before, const uint32_t* entries, uint32_t* out) {
    if (group == 32) decode<FORMAT, 32>(half, words, before, entries, out);
    else if (group == 64) decode<FORMAT, 64>(half, words, before, entries, out);
    else if (group == 128) decode<FORMAT, 128>(half, words, before, entries, out);
    else decode<FORMAT, 256>(half, words, before, entries, out);
}

extern "C" int decode_row(int format, int group, int half, const uint32_t* words, uint32_t before, const uint32_t* entries, uint32_t* out) {
    switch (format) {
        case 2: decode<2>(group, half, words, before, entries, out); return 0;
        case 3: decode<3>(group, half, words, before, entries, out); return 0;
        case 4: decode<4>(group, half, words, before, entries, out); return 0;
        case 5: decode<5>(group, half, words, before, entries, out); return 0;
        case 18: decode<18>(group, half, words, before, entries, out); return 0;
        case 19: decode<19>(group, half, words, before, entries, out); return 0;
        case 20: decode<20>(group, half, words, before, entries, out); return 0;
    }
    return 1;
}
