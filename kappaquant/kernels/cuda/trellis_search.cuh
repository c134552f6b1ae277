// The search for the path of least cost around a ring (formats/viterbi.py) by one warp, for kernels that know what each step costs.
//
// A step leads from states j and j + 32 to 2 j and 2 j + 1, which take the two's places: the state that is s after r steps is in place s
// turned right by r bits, and place p in register p / 32 of lane p % 32. So what a survivor carries stays where it is, or comes from the one
// place that differs in one bit. A round begins with every state in the place of its own number.
#pragma once

constexpr int MEMORY = 6, STATES = 1 << MEMORY;  // path bits
constexpr int MOST_CHOICES = 8;

// Levels are symmetric: those of subsets 3 and 1 are those of 0 and 2 of the other sign.
struct Levels {
    float values[2][MOST_CHOICES], middles[2][MOST_CHOICES];  // of subsets 0 and 2, ascending
    u32 lower, upper;  // bit j: of the number of the subset of the step from state j, whose oldest bit is 0, with path bit 0
};

__device__ __forceinline__ float infinite() { return __uint_as_float(0x7f800000); }

__device__ __forceinline__ int turned(int place, int turns) { return (place << turns | place >> (MEMORY - turns)) & (STATES - 1); }

// Of the step from a state with the path bit that it forgets.
__device__ __forceinline__ int subset_of(const Levels& levels, int state) {
    state &= STATES / 2 - 1;
    return (levels.lower >> state & 1) | (levels.upper >> state & 1) << 1;
}

__device__ __forceinline__ bool is_odd(int subset) { return subset & 1; }              // whether its levels are mirrored
__device__ __forceinline__ int side_of(int subset) { return (subset ^ subset >> 1) & 1; }  // 1: as those of subset 2

__device__ __forceinline__ float mirrored(float x, bool odd) { return __uint_as_float(__float_as_uint(x) ^ (u32)odd << 31); }

template <int BITS> __device__ __forceinline__ int number_of(float z, const float (&middles)[MOST_CHOICES]) {
    int number = 0;
#pragma unroll
    for (int i = 0; i < (1 << (BITS - 1)) - 1; i++) number += z > middles[i];
    return number;
}

template <int BITS> __device__ __forceinline__ float nearest(float z, const Levels& levels, int side) {
    float value = levels.values[side][0];
#pragma unroll
    for (int i = 0; i < (1 << (BITS - 1)) - 1; i++) value = z > levels.middles[side][i] ? levels.values[side][i + 1] : value;
    return value;
}

// The level of a known subset that is nearest, and its index.
template <int BITS> __device__ __forceinline__ float chosen(float z, const Levels& levels, int subset, int& index) {
    const bool odd = is_odd(subset), side = side_of(subset);
    z = mirrored(z, odd);
    const float values[2] = {nearest<BITS>(z, levels, 0), nearest<BITS>(z, levels, 1)};
    const int numbers[2] = {number_of<BITS>(z, levels.middles[0]), number_of<BITS>(z, levels.middles[1])};
    index = 4 * (side ? numbers[1] : numbers[0]) + 2 * side;
    if (odd) index ^= (2 << BITS) - 1;
    return mirrored(side ? values[1] : values[0], odd);
}

// A search's costs, and the way that each survivor came: for each step a word for either half of the places.
template <int GROUP> struct Costs {
    static constexpr int EACH = GROUP / 32, TURNS = GROUP % MEMORY;
    const int lane;
    uint2* const taken;  // [GROUP]
    float of[2];

    __device__ Costs(int lane, uint2* taken) : lane(lane), taken(taken) {}

    __device__ __forceinline__ void begin_anywhere() { of[0] = of[1] = 0.f; }
    __device__ __forceinline__ void begin_in(int state) {
        for (int v = 0; v < 2; v++) of[v] = lane + 32 * v == state ? 0.f : infinite();
    }

    // What lies in the place of a survivor's rival.
    static __device__ __forceinline__ float across(const float (&x)[2], int v, int turns) {
        return turns == 0 ? x[v ^ 1] : __shfl_xor_sync(~0u, x[v], (STATES / 2) >> turns);
    }
    static __device__ __forceinline__ void follow(const bool (&came)[2], int turns, float (&x)[2]) {
        const float there[2] = {across(x, 0, turns), across(x, 1, turns)};
        for (int v = 0; v < 2; v++) x[v] = came[v] ? there[v] : x[v];
    }

    // Costs of paths that go on in their place, and in their rival's.
    __device__ __forceinline__ void step(int t, int turns, const float (&stay)[2], const float (&leave)[2], bool (&came)[2]) {
        for (int v = 0; v < 2; v++) {
            const float arrived = across(leave, v, turns);
            came[v] = arrived < stay[v];
            of[v] = came[v] ? arrived : stay[v];
        }
        const uint2 words = {__ballot_sync(~0u, came[0]), __ballot_sync(~0u, came[1])};
        if (lane == 0) taken[t] = words;
    }

    // After a round: every state in the place of its own number.
    __device__ __forceinline__ void end() {
        const float old[2] = {of[0], of[1]};
        for (int v = 0; v < 2; v++) {
            const int place = turned(lane + 32 * v, MEMORY - TURNS);
            const float low = __shfl_sync(~0u, old[0], place & 31), high = __shfl_sync(~0u, old[1], place & 31);
            of[v] = place < 32 ? low : high;
        }
    }

    __device__ __forceinline__ float least() const {
        return __uint_as_float(__reduce_min_sync(~0u, min(__float_as_uint(of[0]), __float_as_uint(of[1]))));  // none is negative
    }
    __device__ __forceinline__ int best() const {
        const u32 cost = __float_as_uint(least());
        const int state = __float_as_uint(of[0]) == cost ? lane : __float_as_uint(of[1]) == cost ? lane + 32 : STATES;
        return __reduce_min_sync(~0u, state);
    }

    // From a state at the end of a round back to that at its begin, and the subsets of a lane's inputs, e * 32 + lane.
    __device__ __forceinline__ int trace(const Levels& levels, int state, int (&subsets)[EACH]) const {
        __syncwarp();
        int place = turned(state, MEMORY - TURNS), turns = TURNS;
#pragma unroll
        for (int e = EACH - 1; e >= 0; e--) {
#pragma unroll 4
            for (int owner = 31; owner >= 0; owner--) {
                const uint2 words = taken[e * 32 + owner];
                turns = turns == 0 ? MEMORY - 1 : turns - 1;
                const bool came = (place < 32 ? words.x : words.y) >> (place & 31) & 1;
                if (lane == owner) subsets[e] = subset_of(levels, turned(place, turns)) ^ (came ? 2 : 0);
                place ^= came ? (STATES / 2) >> turns : 0;
            }
        }
        __syncwarp();
        return place;
    }
};

// The search for a closed path: an open one goes round twice, and the state in which its best path enters the second round is then held at
// both ends of one last round. Left are the subsets of a lane's inputs.
template <class Search, int EACH> __device__ __forceinline__ void close(Search& search, int (&subsets)[EACH]) {
    int state = 0;
    search.costs.begin_anywhere();
#pragma unroll 1
    for (int rounds = 0; rounds < 3; rounds++) {
        search.round();
        if (rounds == 0) continue;
        if (rounds == 1) state = search.costs.best();
        state = search.costs.trace(search.levels, state, subsets);
        search.costs.begin_in(state);
    }
}
