// y = x W^T for many tokens: rotated float16 inputs and weights in the layout of tiles.py, on Hopper's warpgroups.
//
// A warpgroup multiplies four tiles of 32 rows, or with 256 tokens half the rows of each, by N tokens: codes times norms
// become operand A in registers, tokens are operand B in shared memory. While tensor cores work on a part of a unit the next
// is decoded, and warpgroups hide each other. Blocks of rows are counted over all outputs that read the same input, blocks of
// tokens may be those of experts. Where SPLIT blocks of a cluster share the input axis, their sums meet in shared memory.

#include "gemm.cuh"

constexpr int UNIT = 2048;  // bytes of 128 inputs of 8 tokens

// two float16 of `pair`, each times `norm`
__device__ __forceinline__ u32 scaled(u32 pair, u32 norm) {
    u32 out;
    asm("mul.f16x2 %0, %1, %2;" : "=r"(out) : "r"(pair), "r"(norm));
    return out;
}

// Table entries of two rows of a unit, as operand A of WORDS / 2 products wants them: words first and up of each
template <int WORDS, int FORMAT, int GROUP, int PAIRS>
__device__ __forceinline__ void entries(const Unit<FORMAT, GROUP, PAIRS>& unit, const Table& table, const u32* lut, int pair, int first,
                                        u32* raw) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
        u32 mine[bits_of(FORMAT)], decoded[16];
        row_words<FORMAT, 2 * PAIRS>(unit.words, 2 * pair + row, mine);
        decode_half<FORMAT, GROUP>(mine, unit.before.of(2 * pair + row), table, lut, decoded);
#pragma unroll
        for (int w = 0; w < WORDS; w++) raw[2 * w + row] = decoded[first + w];
    }
}

// those entries times their norms: of each group, those of both rows
template <int GROUP, int WORDS>
__device__ __forceinline__ void scale(const u32* raw, const u32* norms, int first, u32* a) {
    constexpr int PER_GROUP = GROUP < 128 ? GROUP / 8 : 16;  // words of a row's codes
#pragma unroll
    for (int w = 0; w < WORDS; w++)
#pragma unroll
        for (int row = 0; row < 2; row++)
            a[2 * w + row] = scaled(raw[2 * w + row], permute(norms[(first + w) / PER_GROUP], 0, row ? 0x3232u : 0x1010u));
}

// Whether the two neighbours of a cluster fetch inputs for each other: where these are most of what a block reads
__device__ constexpr bool paired(int tokens, int split) { return tokens == 256 && split == 2; }

// A block of the output.
template <int FORMAT, int GROUP, int N, int WARPGROUPS, int SPLIT, int STAGES, bool ITEMS>
__device__ __forceinline__ void product(const Gemm& p, const Segment& s, const Block& block, const int4& item, const u32* lut,
                                        char* memory, u32 barriers, Targets<N, ITEMS>& targets) {
    constexpr bool PAIRED = paired(N, SPLIT);
    constexpr int PAIRS = N == 256 ? 1 : 2;                 // pairs of rows of a tile that a warp multiplies
    constexpr int WORDS = N <= 128 ? 16 : 8;                // of a row between two waits, as registers allow
    constexpr int SLACK = STAGES > 3 ? 1 : 0;               // rounds that other warps may lag before this one waits to refill
    const Place<PAIRS, WARPGROUPS> place(s, block, item.x);
    const int lane = threadIdx.x & 31, rank = block.rank, step = block.ranks, rounds = block.rounds(p);
    const Reader<FORMAT, GROUP, PAIRS> reader(s.weight, place.tile, place.pair0, p.k);
    const u32 stages = shared_address(memory), full = barriers, empty = barriers + 8 * STAGES;

    // of what a pair multiplies each fetches half; of the halves of an input axis all
    const char* x = p.x + (size_t)(item.y / 8) * UNIT;
    const u32 bytes = (item.z + 7) / 8 * UNIT;
    const u32 first_half = bytes / UNIT / 2 * UNIT, begin = blockIdx.x % 2 ? first_half : 0, half = blockIdx.x % 2 ? bytes - first_half : first_half;
    auto fetch = [&](int round) {
        const int stage = round % STAGES;
        const u32 to = stages + stage * (N / 8 * UNIT);
        const char* from = x + (size_t)(rank + round * step) * p.blocks * UNIT;
        barrier_expect(full + 8 * stage, bytes);
        if (!PAIRED || step == 2) bulk_copy(to, from, bytes, full + 8 * stage);
        else if (half) bulk_copy_to_pair(to + begin, from + begin, half, full + 8 * stage);
    };
    // a stage is left by the warps of all blocks that it was fetched with; by each twice where a pair splits the input axis
    auto leave = [&](int stage) {
        if constexpr (PAIRED) {
            if (lane < 2) barrier_arrive_in(empty + 8 * stage, step == 1 ? lane : rank);
        } else if (lane == 0) {
            barrier_arrive(empty + 8 * stage);
        }
    };

    float sums[PAIRS][N / 2] = {};
    u32 a[2 * WORDS];
    const int last = max(rank + (rounds - 1) * step, 0);  // unit
    Unit<FORMAT, GROUP, PAIRS> next = reader.template read<false>(min(rank, last));
    wait_for_earlier(reader.codes);
    let_next_start();
    if (threadIdx.x == 0)
        for (int i = 0; i < STAGES && i < rounds; i++) fetch(i);
    targets.template fill<128 * WARPGROUPS>(p, item, p.scales);
    for (int round = 0; round < rounds; round++) {
        const Unit<FORMAT, GROUP, PAIRS> now = next;
        next = reader.template read<true>(min(rank + (round + 1) * step, last));  // without a branch, which would part the lanes
        const int stage = round % STAGES;
        const u64 b = swizzled(stages + stage * (N / 8 * UNIT), UNIT);
        barrier_wait(full + 8 * stage, round / STAGES & 1);
#pragma unroll
        for (int phase = 0; phase < 16 * PAIRS / WORDS; phase++) {
            const int pair = phase % PAIRS, first = phase / PAIRS * WORDS;
            u32 raw[2 * WORDS];
            entries<WORDS>(now, s.weight.table, lut, pair, first, raw);
            keep_before<2 * WORDS>(raw);
            wgmma_wait<0>();  // a is free; defined any earlier, and the compiler would let no two products overlap
            scale<GROUP, WORDS>(raw, now.norm[pair], first, a);
            if (phase == 0 && round) leave((round - 1) % STAGES);
            keep_before<2 * WORDS>(a);
            wgmma_fence();
#pragma unroll
            for (int i = 0; i < WORDS / 2; i++) {
                int chunk = first / 2 + i;  // of 32 bytes
                wgmma<N>(sums[pair], a + 4 * i, b + chunk / 4 * 64 + chunk % 4 * 2);
            }
            wgmma_commit();
            const int old = round - 1 - SLACK;
            if (phase == 0 && threadIdx.x == 0 && old >= 0 && old + STAGES < rounds) {
                barrier_wait(empty + 8 * (old % STAGES), old / STAGES & 1);
                fetch(old + STAGES);
            }
        }
    }
    wgmma_wait<0>();
    copies_wait();
    __syncthreads();  // targets are there, and the stages have been read
    collect_sums<N, PAIRS, WARPGROUPS, SPLIT>(p, s, block, item, place, sums, targets, reinterpret_cast<float*>(memory));
}

// F1..F4: format of each output that reads this input (trellis.cuh), 0 for none. ITEMS: tokens of experts; few of them take half a block's time.
template <int F1, int F2, int F3, int F4, int GROUP, bool ITEMS, int N, int WARPGROUPS, int SPLIT, int STAGES, int RESIDENT>
__global__ void __launch_bounds__(128 * WARPGROUPS, RESIDENT) __cluster_dims__(SPLIT, 1, 1) gemm(const __grid_constant__ Gemm p) {
    constexpr bool PAIRED = paired(N, SPLIT);
    static_assert(!ITEMS || !PAIRED, "pairs do not fetch inputs of experts");
    constexpr int BODY = STAGES * N / 8 * UNIT, SUMS = N * (64 * (N == 256 ? 1 : 2) * WARPGROUPS + 4) * 4;
    extern __shared__ __align__(1024) char memory[];  // inputs or sums, barriers, targets, table
    char* behind = memory + (BODY > SUMS ? BODY : SUMS);
    char* targets = behind + 128;
    u32* lut = reinterpret_cast<u32*>(targets + sizeof(Targets<N, ITEMS>));
    const u32 barriers = shared_address(behind);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(barriers + 8 * i, 1);
            barrier_init(barriers + 8 * (STAGES + i), 4 * WARPGROUPS * (PAIRED ? 2 : 1));
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    if constexpr (PAIRED) cluster_arrive();
    const Block block = Block::mine<SPLIT, PAIRED>(p);
    if constexpr (ITEMS) wait_for_earlier();  // for the items
    const int first_token = block.tokens * N;
    const int4 item = ITEMS ? __ldg(p.items + block.tokens) : int4{0, first_token, min(N, p.tokens - first_token), 0};
    if (ITEMS && item.z == 0) return;
    for_output<F1, F2, F3, F4>(p.segments, block.rows, [&](auto format, const Segment& s) {
        constexpr int F = decltype(format)::value;
        copy_table<F, true, 128 * WARPGROUPS>(s.weight.table, lut);
        if constexpr (PAIRED) cluster_wait();  // the other one's barriers are ready too
        __syncthreads();
        constexpr int HALF = ITEMS && N > 8 && N <= 128 ? N / 2 : N;
        auto multiply = [&](auto tokens) {
            constexpr int T = decltype(tokens)::value;
            product<F, GROUP, T, WARPGROUPS, SPLIT, STAGES>(p, s, block, item, lut, memory, barriers, *reinterpret_cast<Targets<T, ITEMS>*>(targets));
        };
        if (HALF < N && item.z <= HALF) multiply(Constant<HALF>{});
        else multiply(Constant<N>{});
    });
    if constexpr (PAIRED) cluster_sync();  // what this one does to the other one's barriers is done before either ends
}
