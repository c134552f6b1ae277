// Products of 8 * NT tokens with tiles of 32 rows (tiles.py), on tensor cores.
//
// A warp multiplies tiles of 32 rows x 128 inputs: codes become operand A in registers, tokens are operand B, read through
// the L1 cache.

#include "decode.cuh"
#include "launch.cuh"

__device__ constexpr int larger(int a, int b) { return a > b ? a : b; }

// of the table in shared memory: a copy for each lane
__device__ constexpr int table_words(int format) { return is_wide(format) ? 32 << bits_of(format) : 0; }

template <int N> struct Constant { static constexpr int value = N; };

struct Codes {
    const uint4* codes;   // [tiles, units, bits, 32 lanes]
    const uint2* norms;   // [tiles, groups, 8] float16 of rows r, r + 8, r + 16, r + 24
    Table table;
};

// codes of one expert among those that lie one after another
template <int FORMAT, int GROUP>
__device__ __forceinline__ Codes expert_of(const Codes& first, long long expert, int tiles, int k) {
    Codes w = first;
    w.codes += (size_t)expert * tiles * (k / 128) * bits_of(FORMAT) * 32;
    w.norms += (size_t)expert * tiles * (k / GROUP) * 8;
    return w;
}

// One of up to four outputs of a launch, whose blocks are counted one output after another
struct Segment {
    Codes weight;         // of expert 0, where there are experts
    void* out;            // [M, rows]
    const void* bias;     // [rows] in the dtype of out, or null
    int rows, first_block;
};

// run(format, segment) for the output that a block belongs to; F1..F4: formats of outputs, 0 for none
template <int F1, int F2, int F3, int F4, typename Run>
__device__ __forceinline__ void for_output(const Segment (&segments)[4], int block, Run run) {
    constexpr int FORMATS[4] = {F1, F2, F3, F4};
    int mine = 0;
#pragma unroll
    for (int i = 1; i < 4; i++)
        if (FORMATS[i] && block >= segments[i].first_block) mine = i;
    const Segment& s = segments[mine];
    if (mine == 0) run(Constant<F1>{}, s);
    if constexpr (F2 != 0) if (mine == 1) run(Constant<F2>{}, s);
    if constexpr (F3 != 0) if (mine == 2) run(Constant<F3>{}, s);
    if constexpr (F4 != 0) if (mine == 3) run(Constant<F4>{}, s);
}

struct Inputs {
    const void* x;        // [M, K] int8 or float16
    const float* scales;  // [K / GROUP, padded] of x
    const float* offsets; // the same shape, of int8: what sums need where entries have signs
    int padded, k;
};

__device__ __forceinline__ void store(void* out, size_t i, float value, int kind) {
    if (kind == 0) as<0>(out)[i] = value;
    else if (kind == 1) as<1>(out)[i] = narrow<1>(value);
    else as<2>(out)[i] = narrow<2>(value);
}

__device__ __forceinline__ float load(const void* in, size_t i, int kind) {
    return kind == 0 ? as<0>(in)[i] : kind == 1 ? widen<1>(as<1>(in)[i]) : widen<2>(as<2>(in)[i]);
}

__device__ __forceinline__ void mma(int* d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma(float* d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <bool HALF> struct Sum { typedef int type; };
template <> struct Sum<true> { typedef float type; };

// Sums of up to 128 products of int8 begin with the bits of ZERO: so they are numbers without being made such, and the offset of their
// group (rotate.cu) takes ZERO away, times the scale. It does so within an integer, where rounding of inputs costs a hundred.
constexpr int ZERO_BITS = 0x4b400000;
__device__ __forceinline__ float scaled(int sum, float scale, float offset) { return fmaf(__int_as_float(sum), scale, offset); }
__device__ __forceinline__ float scaled(int sum, float scale) { return (__int_as_float(sum) - ZERO) * scale; }
__device__ __forceinline__ float scaled(float sum, float scale) { return sum * scale; }

// this lane's share of x for one token: WORDS words in runs of RUN bytes, STRIDE bytes apart
template <int WORDS, int RUN, int STRIDE>
__device__ __forceinline__ void load_x(const char* p, u32* out) {
    constexpr int STEP = RUN >= 16 ? 16 : 8;
#pragma unroll
    for (int at = 0; at < 4 * WORDS; at += STEP) {
        const char* from = p + at / RUN * STRIDE + at % RUN;
        if constexpr (STEP == 16) *reinterpret_cast<uint4*>(out + at / 4) = __ldg(reinterpret_cast<const uint4*>(from));
        else *reinterpret_cast<uint2*>(out + at / 4) = __ldg(reinterpret_cast<const uint2*>(from));
    }
}

// The block copies the table of wide codes to shared memory.
template <int FORMAT, bool HALF, int THREADS>
__device__ __forceinline__ void copy_table(const Table& table, u32* lut) {
    if constexpr (HALF && is_wide(FORMAT)) {
        for (int i = threadIdx.x; i < table_words(FORMAT); i += THREADS) lut[i] = __ldg(table.half + i / 32);
        __syncthreads();
    }
}

// The words of ROWS / 2 pairs of rows of a unit, `first` and up, plane after plane
template <int FORMAT, int ROWS, bool WAITED>
__device__ __forceinline__ void load_words(const uint4* codes, int first, u32* words) {
    constexpr int BITS = bits_of(FORMAT), FIRST = first_plane(FORMAT);
    if constexpr (ROWS == 4) {
#pragma unroll
        for (int i = 0; i < BITS; i++) *reinterpret_cast<uint4*>(words + 4 * i) = stream(codes + 32 * i);
    } else {  // 2 * FIRST words of the first plane, then two of each further one
        constexpr int RUN = FIRST % 2 ? 2 : 4;
#pragma unroll
        for (int w = 0; w < 2 * FIRST; w += RUN) {
            const uint4* from = codes + 32 * ((first * 2 * FIRST + w) / 4);
            if constexpr (RUN == 4) *reinterpret_cast<uint4*>(words + w) = stream(from);
            else *reinterpret_cast<uint2*>(words + w) = stream_part<WAITED>(reinterpret_cast<const uint2*>(from) + (first * 2 * FIRST + w) % 4 / 2);
        }
#pragma unroll
        for (int i = FIRST; i < BITS; i++)
            *reinterpret_cast<uint2*>(words + 2 * i) = stream_part<WAITED>(reinterpret_cast<const uint2*>(codes + 32 * i) + first);
    }
}

// base[i] for elements of so many bytes, as one multiplication
template <typename T> __device__ __forceinline__ const T* element(const T* base, u32 i, u32 bytes) {
    return reinterpret_cast<const T*>(reinterpret_cast<const char*>(base) + (unsigned long long)i * bytes);
}

// The same where registers suffice: a pointer that compilers can not take apart, nor carry from one round to the next, which takes more sums
template <typename T> __device__ __forceinline__ T* whole(T* p) {
    asm("" : "+l"(p));
    return p;
}
__device__ __forceinline__ const char* whole_element(const char* base, u32 i, u32 bytes) {
    const char* at;
    asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(at) : "r"(i), "r"(bytes), "l"(base));
    return at;
}

// What a lane holds of a unit
template <int FORMAT, int GROUP, int PAIRS> struct Unit {
    static constexpr int GROUPS = GROUP < 128 ? 128 / GROUP : 1;
    u32 words[2 * PAIRS * bits_of(FORMAT)], norm[PAIRS][GROUPS];
    Before<FORMAT, GROUP, 2 * PAIRS> before;
};

// Units of a warp's rows from memory to registers.
template <int FORMAT, int GROUP, int PAIRS> struct Reader {
    typedef Unit<FORMAT, GROUP, PAIRS> Rows;
    static constexpr int BITS = bits_of(FORMAT);
    const uint4* codes;
    const uint2* norms;
    int pair0;

    __device__ __forceinline__ Reader(const Codes& w, size_t tile, int pair0, int k) : pair0(pair0) {
        const int lane = threadIdx.x & 31;
        codes = w.codes + tile * (k / 128) * BITS * 32 + lane;
        norms = w.norms + tile * (k / GROUP) * 8 + (lane >> 2);
    }

    // WAITED: not before earlier kernels have been waited for
    template <bool WAITED> __device__ __forceinline__ Rows read(int unit) const {
        Rows out;
        const uint4* from = element(codes, unit, 512 * BITS);
        load_words<FORMAT, 2 * PAIRS, WAITED>(from, pair0, out.words);
        out.before.template read<WAITED>(from, unit, 2 * pair0);
#pragma unroll
        for (int g = 0; g < Rows::GROUPS; g++) {
            const uint2 both = stream_part<WAITED>(element(norms, GROUP > 128 ? unit / 2 : unit, 64 * Rows::GROUPS) + 8 * g);
            if constexpr (PAIRS == 1) out.norm[0][g] = pair0 ? both.y : both.x;
            else out.norm[0][g] = both.x, out.norm[1][g] = both.y;
        }
        return out;
    }
};

// Units first, first + step, ... of a tile, each read while the one before it is multiplied.
template <int FORMAT, int GROUP> struct OneAhead {
    typedef Unit<FORMAT, GROUP, 2> Rows;
    Reader<FORMAT, GROUP, 2> reader;
    Rows next;
    int step, units;

    __device__ __forceinline__ OneAhead(const Codes& w, int tile, int first, int step, int k, char*)
        : reader(w, tile, 0, k), next(reader.template read<false>(min(first, k / 128 - 1))), step(step), units(k / 128) {
        wait_for_earlier(reader.codes);  // weights come first: no kernel writes them
    }

    __device__ __forceinline__ Rows take(int unit) {
        const Rows now = next;
        if (unit + step < units) next = reader.template read<true>(unit + step);
        return now;
    }
};

// The same, with STAGES - 1 of them on their way to shared memory, where the path words of the lane before are read as well.
template <int FORMAT, int GROUP, int STAGES> struct Staged {
    typedef Unit<FORMAT, GROUP, 2> Rows;
    static constexpr int BITS = bits_of(FORMAT), NORMS = 512 * BITS, EDGE = NORMS + 64 * Rows::GROUPS;
    static constexpr bool WIDE_RINGS = is_trellis(FORMAT) && GROUP > 128;
    static constexpr int BYTES = EDGE + (WIDE_RINGS ? 128 : 0);  // of a stage
    const char *codes, *norms;  // of this lane
    u32 stage, last, end;       // where its codes are in stages: in the next unit's, in that of the one before, and in the last of all
    int norms_at, before_at;    // from there to norms and to the path words of the lane before
    int step, units;

    __device__ __forceinline__ Staged(const Codes& w, int tile, int first, int step, int k, char* memory) : step(step), units(k / 128) {
        const int lane = threadIdx.x & 31, edge = EDGE - 12 * lane, around = WIDE_RINGS ? edge : 512 * (BITS - 1) + 48;
        codes = reinterpret_cast<const char*>(w.codes + (size_t)tile * units * BITS * 32 + lane);
        norms = whole(reinterpret_cast<const char*>(w.norms + (size_t)tile * (k / GROUP) * 8 + 2 * (lane % (4 * Rows::GROUPS))));
        stage = (u32)__cvta_generic_to_shared(memory) + 16 * lane;
        norms_at = NORMS + 8 * (lane >> 2) - 16 * lane;
        before_at = lane % 4 ? 512 * (BITS - 1) - 16 : around;
        last = end = stage + (STAGES - 1) * BYTES;
#pragma unroll
        for (int i = 0; i + 1 < STAGES; i++) fetch(first + i * step, stage + i * BYTES);
        wait_for_earlier();
    }

    // one group of copies, which leave memory alone past the end
    __device__ __forceinline__ void fetch(int unit, u32 to) const {
        const int lane = threadIdx.x & 31;
        const u32 wanted = unit < units ? 16 : 0;
        const char* from = whole_element(codes, unit, 512 * BITS);
#pragma unroll
        for (int i = 0; i < BITS; i++) copy_async(to + 512 * i, from + 512 * i, wanted);
        if (lane < 4 * Rows::GROUPS) copy_async(to + NORMS, element(norms, GROUP > 128 ? unit / 2 : unit, 64 * Rows::GROUPS), wanted);
        if constexpr (WIDE_RINGS)
            if (lane % 4 == 3)
                copy_async(to + EDGE - 12 * lane - 12, from + (unit % 2 ? -512 * BITS : 512 * BITS) + 512 * (BITS - 1), wanted);
        copies_commit();
    }

    __device__ __forceinline__ Rows take(int unit) {
        copies_wait<STAGES - 2>();
        __syncwarp();  // all lanes' copies are there, and the stage before has been read
        fetch(unit + (STAGES - 1) * step, last);
        Rows out;
#pragma unroll
        for (int i = 0; i < BITS; i++) *reinterpret_cast<uint4*>(out.words + 4 * i) = load_shared(stage + 512 * i);
        if constexpr (is_trellis(FORMAT)) *reinterpret_cast<uint4*>(out.before.words) = load_shared(stage + before_at);
#pragma unroll
        for (int g = 0; g < Rows::GROUPS; g++) {
            const uint2 both = load_shared_two(stage + norms_at + 64 * g);
            out.norm[0][g] = both.x, out.norm[1][g] = both.y;
        }
        last = stage;
        stage = stage == end ? end - (STAGES - 1) * BYTES : stage + BYTES;
        return out;
    }
};

template <int FORMAT, int GROUP, int STAGES> struct Ahead { typedef Staged<FORMAT, GROUP, STAGES> type; };
template <int FORMAT, int GROUP> struct Ahead<FORMAT, GROUP, 0> { typedef OneAhead<FORMAT, GROUP> type; };

// out[pair][n][i]: rows r + 16 * pair + 8 * (i >> 1), token token0 + 8 * n + 2 * t + (i & 1), over units first,
// first + step, ... of one tile. Tokens that are not there are read as the last; ONE: all are token0, at any place.
// stages: shared memory of this warp, where STAGES are not 0. OFFSETS: whether sums of int8 get them, which rounds in another place;
// of one block of tokens they do only where entries have signs, for units need the registers.
template <int FORMAT, int GROUP, bool HALF, int NT, bool ONE, int STAGES = 0, bool OFFSETS = !HALF && (has_signs(FORMAT) || NT > 1)>
__device__ __forceinline__ void accumulate(const Codes& w, const Inputs& in, const u32* lut, int tile, int token0, int tokens,
                                           int first, int step, float (&out)[2][NT][4], char* stages = nullptr) {
    typedef typename Sum<HALF>::type Acc;
    constexpr int SUB = GROUP < 128 ? GROUP : 128;        // inputs of one group in a unit
    constexpr int GROUPS = 128 / SUB;                     // groups in a unit
    constexpr int SIZE = HALF ? 2 : 1;                    // bytes of an input
    constexpr int WORDS = HALF ? 16 : 8;                  // words of a row's 32 codes, or of a token's inputs
    constexpr int STEPS = WORDS / 2 / GROUPS;             // products of one group
    const int lane = threadIdx.x & 31, r = lane >> 2, t = lane & 3, units = in.k / 128;
    const char* x[NT];
#pragma unroll
    for (int n = 0; n < NT; n++) {
        const int token = ONE ? token0 : min(token0 + 8 * n + r, tokens - 1);
        x[n] = reinterpret_cast<const char*>(in.x) + ((size_t)token * in.k + t * (SUB / 4)) * SIZE;
        if (STAGES != 0) x[n] = whole(x[n]);
    }
    const u32 padded = 4 * in.padded;
    const float *scales = in.scales + token0 + (ONE ? 0 : 2 * t), *offsets = in.offsets + (scales - in.scales);
    typename Ahead<FORMAT, GROUP, STAGES>::type ahead(w, tile, first, step, in.k, stages);
    for (int unit = first; unit < units; unit += step) {
        const Unit<FORMAT, GROUP, 2> now = ahead.take(unit);
        constexpr int ROWS = HALF || NT <= 2 ? 2 : 4;     // of a lane that are decoded at a time, as registers allow
#pragma unroll
        for (int row = 0; row < 4; row += ROWS) {
            u32 a[ROWS][WORDS];
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                u32 mine[bits_of(FORMAT)];
                row_words<FORMAT>(now.words, row + i, mine);
                if constexpr (HALF) decode_half<FORMAT, GROUP>(mine, now.before.of(row + i), w.table, lut, a[i]);
                else decode_int8<FORMAT, GROUP>(mine, now.before.of(row + i), w.table, a[i]);
            }
#pragma unroll
            for (int n = 0; n < NT; n++) {
                u32 b[WORDS];
                load_x<WORDS, SUB / 4 * SIZE, SUB * SIZE>(element(x[n], unit, 128 * SIZE), b);
#pragma unroll
                for (int g = 0; g < GROUPS; g++) {
                    const int group = GROUP > 128 ? unit / 2 : unit * GROUPS + g;
                    float2 scale, offset = {0.f, 0.f};
                    if constexpr (ONE) scale.x = scale.y = __ldg(element(scales, group, padded));
                    else scale = __ldg(reinterpret_cast<const float2*>(element(scales, group, padded) + 8 * n));
                    if constexpr (OFFSETS && !has_signs(FORMAT)) offset = {-ZERO * scale.x, -ZERO * scale.y};
                    else if constexpr (OFFSETS && ONE) offset.x = offset.y = __ldg(element(offsets, group, padded));
                    else if constexpr (OFFSETS) offset = __ldg(reinterpret_cast<const float2*>(element(offsets, group, padded) + 8 * n));
#pragma unroll
                    for (int i = 0; i < ROWS; i += 2) {
                        const int pair = (row + i) / 2;
                        const Acc zero = HALF ? Acc{} : Acc(ZERO_BITS);
                        Acc sum[4] = {zero, zero, zero, zero};
#pragma unroll
                        for (int step = g * STEPS; step < (g + 1) * STEPS; step++)
                            mma(sum, a[i][2 * step], a[i + 1][2 * step], a[i][2 * step + 1], a[i + 1][2 * step + 1], b[2 * step], b[2 * step + 1]);
                        const u32 both = now.norm[pair][g];
                        float n0 = widen<1>((unsigned short)both), n1 = widen<1>((unsigned short)(both >> 16));
                        const auto of_group = [](Acc sum, float scale, float offset) {
                            if constexpr (OFFSETS) return scaled(sum, scale, offset);
                            else return scaled(sum, scale);
                        };
                        out[pair][n][0] += of_group(sum[0], scale.x, offset.x) * n0;
                        out[pair][n][1] += of_group(sum[1], scale.y, offset.y) * n0;
                        out[pair][n][2] += of_group(sum[2], scale.x, offset.x) * n1;
                        out[pair][n][3] += of_group(sum[3], scale.y, offset.y) * n1;
                    }
                }
            }
        }
    }
}
