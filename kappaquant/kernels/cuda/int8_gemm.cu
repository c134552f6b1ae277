// y = x W^T for many tokens with int8 inputs: weights of 2 to 5 bits in the layout of tiles.py, on Hopper's warpgroups.
//
// As gemm.cu, but codes become int8, products run at twice the rate, and int32 sums of a group leave the tensor cores to be
// scaled by the input's scale and the weight's norm, which other warpgroups hide.

#include "gemm.cuh"

constexpr int UNIT = 1024;  // bytes of 128 inputs of 8 tokens

// of rows of a tile that a warp multiplies by so many tokens
__device__ constexpr int pairs(int tokens) { return tokens == 128 ? 1 : 2; }

// Operand A of a unit, and its norms
template <int FORMAT, int GROUP, int PAIRS>
__device__ __forceinline__ void decode(const Unit<FORMAT, GROUP, PAIRS>& unit, const Table& table, u32 (&a)[PAIRS][16],
                                       u32 (&norm)[PAIRS][Unit<FORMAT, GROUP, PAIRS>::GROUPS]) {
#pragma unroll
    for (int pair = 0; pair < PAIRS; pair++) {
#pragma unroll
        for (int row = 0; row < 2; row++) {
            u32 mine[bits_of(FORMAT)], decoded[8];
            row_words<FORMAT, 2 * PAIRS>(unit.words, 2 * pair + row, mine);
            decode_int8<FORMAT, GROUP>(mine, unit.before.of(2 * pair + row), table, decoded);
#pragma unroll
            for (int w = 0; w < 8; w++) a[pair][2 * w + row] = decoded[w];
        }
#pragma unroll
        for (int g = 0; g < Unit<FORMAT, GROUP, PAIRS>::GROUPS; g++) norm[pair][g] = unit.norm[pair][g];
        keep_before<16>(a[pair]);
    }
}

template <int FORMAT, int GROUP, int N, int WARPGROUPS, int SPLIT, int STAGES, bool ITEMS>
__device__ __forceinline__ void product(const Gemm& p, const Segment& s, const Block& block, const int4& item, char* memory, u32 barriers,
                                        Targets<N, ITEMS>& targets) {
    constexpr int PAIRS = pairs(N);
    constexpr int GROUPS = GROUP < 128 ? 128 / GROUP : 1, STEPS = 4 / GROUPS;  // in a unit; products of a group
    constexpr int SLACK = STAGES > 3 ? 1 : 0;     // rounds that other warps may lag before this one waits to refill
    constexpr int VALUES = N / 8 * UNIT, SCALES = 8 * N;  // bytes of a stage, of a group
    const Place<PAIRS, WARPGROUPS> place(s, block, item.x);
    const int lane = threadIdx.x & 31, t = lane & 3, rank = block.rank, step = block.ranks, rounds = block.rounds(p);
    const Reader<FORMAT, GROUP, PAIRS> reader(s.weight, place.tile, place.pair0, p.k);
    const u32 values = shared_address(memory), scales = values + STAGES * VALUES, full = barriers, empty = barriers + 8 * STAGES;

    const int blocks = (item.z + 7) / 8;          // of tokens
    auto fetch = [&](int round) {
        const int stage = round % STAGES, unit = rank + round * step;
        const u32 barrier = full + 8 * stage;
        barrier_expect(barrier, blocks * (UNIT + 64 * GROUPS));
        bulk_copy(values + stage * VALUES, p.x + ((size_t)unit * p.blocks + item.y / 8) * UNIT, blocks * UNIT, barrier);
#pragma unroll
        for (int g = 0; g < GROUPS; g++)
            bulk_copy(scales + (stage * GROUPS + g) * SCALES, p.scales + ((size_t)(unit * 128 / GROUP + g) * p.blocks + item.y / 8) * 16,
                      blocks * 64, barrier);
    };

    float sums[PAIRS][N / 2] = {};
    int part[PAIRS][N / 2];
    u32 a[PAIRS][16], norm[PAIRS][GROUPS];
    const int last = max(rank + (rounds - 1) * step, 0);  // unit
    Unit<FORMAT, GROUP, PAIRS> next = reader.template read<false>(min(rank, last));
    decode<FORMAT, GROUP, PAIRS>(next, s.weight.table, a, norm);
    next = reader.template read<false>(min(rank + step, last));
    wait_for_earlier();
    let_next_start();
    if (threadIdx.x == 0)
        for (int i = 0; i < STAGES && i < rounds; i++) fetch(i);
    targets.template fill<128 * WARPGROUPS>(p, item, nullptr);
    for (int round = 0; round < rounds; round++) {
        const int stage = round % STAGES, unit = rank + round * step;
        const u64 b = swizzled(values + stage * VALUES, UNIT);
        barrier_wait(full + 8 * stage, round / STAGES & 1);
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            wgmma_fence();
#pragma unroll
            for (int pair = 0; pair < PAIRS; pair++) {
#pragma unroll
                for (int i = 0; i < STEPS; i++) {
                    const int at = g * STEPS + i;
                    if (i == 0) wgmma<N, false>(part[pair], a[pair] + 4 * at, b + 2 * at);
                    else wgmma<N, true>(part[pair], a[pair] + 4 * at, b + 2 * at);
                }
                wgmma_commit();
            }
            // half the sum of a group's inputs, times their scale, makes up for halves of a code's value (see decode.cuh);
            // a group of 256 is met twice and corrected once
            const bool corrected = has_signs(FORMAT) && (GROUP <= 128 || unit % 2 == 0);
            const char* at = memory + STAGES * VALUES + (stage * GROUPS + g) * SCALES + 16 * t;
#pragma unroll
            for (int pair = 0; pair < PAIRS; pair++) {
                if (pair + 1 < PAIRS) wgmma_wait<PAIRS - 1>();
                else wgmma_wait<0>();
                keep_before<N / 2>(part[pair]);
                const u32 both = norm[pair][g];
                const float n0 = widen<1>((unsigned short)both), n1 = widen<1>((unsigned short)(both >> 16));
#pragma unroll
                for (int i = 0; i < N / 8; i++) {
                    const float2* from = reinterpret_cast<const float2*>(at + 64 * i);  // of tokens 8 * i + 2 * t and the next
                    const float2 scale = from[0], half = corrected ? from[1] : float2{0.f, 0.f};
                    sums[pair][4 * i] += ((float)part[pair][4 * i] * scale.x + half.x) * n0;
                    sums[pair][4 * i + 1] += ((float)part[pair][4 * i + 1] * scale.y + half.y) * n0;
                    sums[pair][4 * i + 2] += ((float)part[pair][4 * i + 2] * scale.x + half.x) * n1;
                    sums[pair][4 * i + 3] += ((float)part[pair][4 * i + 3] * scale.y + half.y) * n1;
                }
            }
        }
        decode<FORMAT, GROUP, PAIRS>(next, s.weight.table, a, norm);
        next = reader.template read<true>(min(unit + 2 * step, last));
        __syncwarp();
        if (lane == 0) barrier_arrive(empty + 8 * stage);
        const int old = round - SLACK;
        if (threadIdx.x == 0 && old >= 0 && old + STAGES < rounds) {
            barrier_wait(empty + 8 * (old % STAGES), old / STAGES & 1);
            fetch(old + STAGES);
        }
    }
    copies_wait();
    __syncthreads();
    collect_sums<N, PAIRS, WARPGROUPS, SPLIT>(p, s, block, item, place, sums, targets, reinterpret_cast<float*>(memory));
}

// F1..F4: format of each output that reads this input (trellis.cuh), 0 for none. ITEMS: tokens of experts; few of them take half a block's time.
template <int F1, int F2, int F3, int F4, int GROUP, bool ITEMS, int N, int WARPGROUPS, int SPLIT, int STAGES, int RESIDENT>
__global__ void __launch_bounds__(128 * WARPGROUPS, RESIDENT) __cluster_dims__(SPLIT, 1, 1) int8_gemm(const __grid_constant__ Gemm p) {
    constexpr int BODY = STAGES * (N / 8 * UNIT + (GROUP < 128 ? 128 / GROUP : 1) * 8 * N);
    constexpr int SUMS = N * (Place<pairs(N), WARPGROUPS>::ROWS + 4) * 4;
    extern __shared__ __align__(1024) char memory[];  // inputs or sums, barriers, targets
    const Block block = Block::mine<SPLIT, false>(p);
    char* behind = memory + (BODY > SUMS ? BODY : SUMS);
    const u32 barriers = shared_address(behind);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(barriers + 8 * i, 1);
            barrier_init(barriers + 8 * (STAGES + i), 4 * WARPGROUPS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    if constexpr (ITEMS) wait_for_earlier();  // for the items
    const int first_token = block.tokens * N;
    const int4 item = ITEMS ? __ldg(p.items + block.tokens) : int4{0, first_token, min(N, p.tokens - first_token), 0};
    if (ITEMS && item.z == 0) return;
    __syncthreads();
    for_output<F1, F2, F3, F4>(p.segments, block.rows, [&](auto format, const Segment& s) {
        const auto multiply = [&](auto tokens) {
            constexpr int T = decltype(tokens)::value;
            product<decltype(format)::value, GROUP, T, WARPGROUPS, SPLIT, STAGES, ITEMS>(p, s, block, item, memory, barriers,
                                                                                    *reinterpret_cast<Targets<T, ITEMS>*>(behind + 128));
        };
        if constexpr (ITEMS && N == 64) {
            if (item.z <= N / 2) return multiply(Constant<N / 2>{});
        }
        multiply(Constant<N>{});
    });
}
