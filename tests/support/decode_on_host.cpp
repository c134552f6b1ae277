// A row's codes by decode.cuh; tests compile it behind cuda_on_host.h.

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
