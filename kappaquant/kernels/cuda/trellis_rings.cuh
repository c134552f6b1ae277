// The search of formats/viterbi.py for many rings at once, with the subsets' nearest levels as costs.
//
// A warp takes eight rings, and four lanes, its shares, the 64 states of each, sixteen a lane. A state is six path bits, the
// newest lowest. Four steps, a period, forget those bits of states that a lane's registers differ in, so that costs change
// lanes but once a period. Compiled as groups.cuh says, codes are the CPU's.
#pragma once

#include "groups.cuh"

constexpr int RINGS = 8, STATES = 64, SHARES = 4, PLACES = STATES / SHARES, PERIOD = 4, AHEAD = 2 * PERIOD, TRIALS = 4;
#define INFINITE __int_as_float(0x7f800000)

struct Trials {
    int count;  // scales to be tried; 0 takes the closest path at the group's norm
    float scales[TRIALS], squares[TRIALS];
};

template <int GROUP, int BITS> struct Shared {
    static constexpr int LEVELS = 2 << BITS, WORDS = GROUP / 32;
    float y[GROUP][RINGS];
    uint2 came[GROUP / PERIOD][SHARES][RINGS];  // 16 bits for each step: which paths came from the second of two places
    union {
        float4 squares[AHEAD][2][RINGS];  // what each subset costs; and the same backwards
        u32 codes[TILE / GROUP][GROUP / 4];  // a byte each
    };
    u32 path[RINGS][WORDS], subsets[2][RINGS][WORDS];
    float norms[RINGS], stored[RINGS], scales[RINGS];
    float4 closest[LEVELS - 3];  // by the number of middles below, of each subset the closest level
    float middles[LEVELS - 1];   // between levels of one subset, ascending; the last three infinite
    float levels[LEVELS];
};

// levels [2 << BITS], ascending, into the warp's tables
template <int GROUP, int BITS> __device__ __forceinline__ void tabulate(Shared<GROUP, BITS>& s, const float* levels, int lane) {
    constexpr int MIDDLES = (2 << BITS) - 4;
    for (int i = lane; i < MIDDLES + 4; i += 32) s.levels[i] = levels[i];
    for (int i = lane; i < MIDDLES + 3; i += 32) s.middles[i] = i < MIDDLES ? (levels[i + 4] + levels[i]) / 2.f : INFINITE;
    for (int i = lane; i <= MIDDLES; i += 32) {
        auto level = [&](int subset) { return levels[i + ((subset - i) & 3)]; };
        s.closest[i] = {level(0), level(1), level(2), level(3)};
    }
}

// Where the cost of a state lies: in a place of a share. A place has four bits, h above g, two bits each. Before the first
// step of a period the state is (h ^ share, g, share), the oldest bit first. Step k writes the new bit where the one lay that
// it forgets, bit 3 - k of the place: two become h, two become g ^ share, and the state is (share, h, g ^ share). Then the
// costs of each g go to the share at that distance, and h and g change places: (h ^ share, g, share) again.

__device__ __forceinline__ int state_of(int place, int share) { return (place >> 2 ^ share) << 4 | (place & 3) << 2 | share; }

// two places that differ in a bit lead to the same two: the subset of step k from either to itself, if not `mirrored`
__device__ constexpr int subset(int k, int place) {
    const int h1 = place >> 3, h0 = place >> 2 & 1, g1 = place >> 1 & 1, g0 = place & 1;
    return k == 0 ? h0 ^ g1 : k == 1 ? (g1 ^ g0) + 2 * h1 : k == 2 ? (h1 ^ g0) + 2 * h0 : h0 + 2 * g1;
}

// whether the subset is 3 less that
__device__ __forceinline__ int mirrored(int k, int share) {
    return k == 1 ? share & 1 : k == 2 ? share >> 1 : (share ^ share >> 1) & 1;
}

// of how many thresholds, ascending and 2 * FIRST - 1 of them, x is above
template <int FIRST> __device__ __forceinline__ int above(float x, const float* thresholds) {
    int found = 0;
#pragma unroll
    for (int step = FIRST; step; step /= 2)
        if (x > thresholds[found + step - 1]) found += step;
    return found;
}

// a step at a weight whose subsets cost `four`; MARKED: and of each place whether its path came from the second of two
template <int K, bool MARKED>
__device__ __forceinline__ void step(float (&cost)[PLACES], const float4& four, u32& came, u32 upper_first) {
    constexpr int PAIR = 8 >> K;
    const float squares[] = {four.x, four.y, four.z, four.w};
    float next[PLACES];
#pragma unroll
    for (int place = PLACES - 1; place >= 0; place--) {
        const int same = subset(K, place) ^ (place & PAIR ? 2 : 0);
        const float first = cost[place & ~PAIR] + squares[same];
        const float second = cost[place | PAIR] + squares[same ^ 2];
        next[place] = fminf(first, second);
        if (MARKED) {
            // The sign: whether the second costs less, or where `upper_first` as much, since of equals the path from the lower
            // state is taken. Costs are in the order of their bits; where the first is the lower, less busy units subtract.
            const u32 sign = K < 2 ? __float_as_uint(second) - __float_as_uint(first) - upper_first
                                   : __float_as_uint(second - first);
            came = __funnelshift_l(sign, came, 1);
        }
    }
#pragma unroll
    for (int r = 0; r < PLACES; r++) cost[r] = next[r];
}

template <bool MARKED, int GROUP, int BITS>
__device__ __forceinline__ uint2 period(float (&cost)[PLACES], const Shared<GROUP, BITS>& s, int from, int ring, int share) {
    uint2 came = {};
    step<0, MARKED>(cost, s.squares[from][mirrored(0, share)][ring], came.x, share >> 1);
    step<1, MARKED>(cost, s.squares[from + 1][mirrored(1, share)][ring], came.x, share & 1);
    step<2, MARKED>(cost, s.squares[from + 2][mirrored(2, share)][ring], came.y, 0);
    step<3, MARKED>(cost, s.squares[from + 3][mirrored(3, share)][ring], came.y, 0);
    float exchanged[PLACES];
#pragma unroll
    for (int place = 0; place < PLACES; place++) {
        const int g = place & 3;
        exchanged[g << 2 | place >> 2] = g ? __shfl_xor_sync(~0u, cost[place], g * RINGS) : cost[place];
    }
#pragma unroll
    for (int place = 0; place < PLACES; place++) cost[place] = exchanged[place];
    return came;
}

// costs of the best paths to each state after one round at a scale from such costs; MARKED: and where they came from
template <bool MARKED, int GROUP, int BITS>
__device__ __forceinline__ void walk(float (&cost)[PLACES], float scale, Shared<GROUP, BITS>& s, int ring, int share) {
#pragma unroll 1
    for (int start = 0; start < GROUP; start += AHEAD) {
        __syncwarp();
#pragma unroll
        for (int ahead = 0; ahead < AHEAD; ahead += SHARES) {
            const int t = ahead + share;
            const float x = s.y[start + t][ring] * scale;
            const float4 level = s.closest[above<1 << BITS>(x, s.middles)];
            const float d[] = {x - level.x, x - level.y, x - level.z, x - level.w};
            const float squares[] = {d[0] * d[0], d[1] * d[1], d[2] * d[2], d[3] * d[3]};
            s.squares[t][0][ring] = {squares[0], squares[1], squares[2], squares[3]};
            s.squares[t][1][ring] = {squares[3], squares[2], squares[1], squares[0]};
        }
        __syncwarp();
#pragma unroll 1
        for (int from = 0; from < AHEAD; from += PERIOD) {
            const uint2 came = period<MARKED>(cost, s, from, ring, share);
            if (MARKED) s.came[(start + from) / PERIOD][share][ring] = came;
        }
    }
    __syncwarp();
}

__device__ __forceinline__ float least_of(const float (&cost)[PLACES]) {
    float least = cost[0];
#pragma unroll
    for (int r = 1; r < PLACES; r++) least = fminf(least, cost[r]);
#pragma unroll
    for (int step = RINGS; step < 32; step *= 2) least = fminf(least, __shfl_xor_sync(~0u, least, step));
    return least;
}

// the state of least cost, the lowest of several
__device__ __forceinline__ int first_least(const float (&cost)[PLACES], int share) {
    const float least = least_of(cost);
    int state = STATES - 1;
#pragma unroll
    for (int place = 0; place < PLACES; place++)
        if (cost[place] == least) state = min(state, state_of(place, share));
#pragma unroll
    for (int step = RINGS; step < 32; step *= 2) state = min(state, __shfl_xor_sync(~0u, state, step));
    return state;
}

// the best path that ends in a state, and the state before it
template <int GROUP, int BITS>
__device__ __forceinline__ int trace(Shared<GROUP, BITS>& s, int state, int ring, int share) {
#pragma unroll 1
    for (int w = GROUP / 32 - 1; w >= 0; w--) {
        u32 path = 0;
#pragma unroll
        for (int at = 32 / PERIOD - 1; at >= 0; at--) {
            const int ended = state >> 4;  // in which share
            const uint2 came = s.came[w * (32 / PERIOD) + at][ended][ring];
            path |= __brev(state & 15) >> 28 << at * PERIOD;
            int place = (state & 15) ^ ended;
            place = (place & ~1) | (came.y >> place & 1);
            place = (place & ~2) | (came.y >> (16 + place) & 1) << 1;
            place = (place & ~4) | (came.x >> place & 1) << 2;
            place = (place & ~8) | (came.x >> (16 + place) & 1) << 3;
            state = state_of(place, ended);
        }
        if (!share) s.path[ring][w] = path;
    }
    __syncwarp();
    return state;
}

// the scale at which an open path costs least, the earliest of equals, or the one that is given; and costs after its round
template <int GROUP, int BITS>
__device__ __forceinline__ float opened(
    Shared<GROUP, BITS>& s, const Trials& p, bool searches, float given, int ring, int share, float (&cost)[PLACES]
) {
    float best = INFINITE, scale = given;
#pragma unroll
    for (int r = 0; r < PLACES; r++) cost[r] = INFINITE;
#pragma unroll 1
    for (int trial = 0; trial < (searches ? p.count : 1); trial++) {
        const float tried = searches ? p.scales[trial] : given;
        float open[PLACES] = {};
        walk<false>(open, tried, s, ring, share);
        const float lost = least_of(open) / (searches ? p.squares[trial] : 1.f);
        if (lost < best) {
            best = lost;
            scale = tried;
#pragma unroll
            for (int r = 0; r < PLACES; r++) cost[r] = open[r];
        }
    }
    return scale;
}

// closed paths: another round from such costs, and one that is held at both ends in the state where its best path began
template <int GROUP, int BITS>
__device__ __forceinline__ void close(Shared<GROUP, BITS>& s, float scale, int ring, int share, float (&cost)[PLACES]) {
    int state = 0;
#pragma unroll 1
    for (int holds = 0; holds < 2; holds++) {
        walk<true>(cost, scale, s, ring, share);
        state = trace(s, holds ? state : first_least(cost, share), ring, share);
#pragma unroll
        for (int place = 0; place < PLACES; place++) cost[place] = state_of(place, share) == state ? 0.f : INFINITE;
    }
}

// the subsets that rings leave their weights
template <int GROUP, int BITS> __device__ __forceinline__ void find_subsets(Shared<GROUP, BITS>& s, int lane) {
    constexpr int WORDS = GROUP / 32;
    for (int i = lane; i < RINGS * WORDS; i += 32) {
        const int ring = i / WORDS, w = i % WORDS;
        const u32 now = s.path[ring][w], before = s.path[ring][(w + WORDS - 1) % WORDS];
        auto back = [=](int weights) { return __funnelshift_l(before, now, weights); };
        s.subsets[0][ring][w] = back(2) ^ back(4) ^ back(5);
        s.subsets[1][ring][w] = now ^ back(1) ^ back(6);
    }
    __syncwarp();
}

// of a ring the coordinates of a lane, their codes, and the levels they stand for
template <int GROUP, int BITS>
__device__ __forceinline__ void assigned(
    const Shared<GROUP, BITS>& s, int ring, int inner, float (&y)[EACH], int (&codes)[EACH], float (&c)[EACH]
) {
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        const int i = j * (GROUP / EACH) + inner;
        y[j] = s.y[i][ring];
        const int lowest = above<1 << BITS>(y[j] * s.scales[ring], s.middles);
        const int subset = (s.subsets[0][ring][i / 32] >> i % 32 & 1) | (s.subsets[1][ring][i / 32] >> i % 32 & 1) << 1;
        codes[j] = lowest + ((subset - lowest) & 3);  // of four levels next to each other that in the subset
        c[j] = s.levels[codes[j]];
    }
}
