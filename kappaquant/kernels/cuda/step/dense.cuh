// Products of up to 16 tokens with 16-bit weights as they lie in memory, on tensor cores.
//
// Tokens are operand A and weight rows operand B. The order of inputs inside a block of 32 is free as long as both agree, so
// a lane's share of each is 16 neighbouring bytes. Warps of a block split the input axis.

#include "step.cuh"

struct Rows {
    const void* weight;   // [rows, inputs]
    const void* bias;     // [rows] or null
    void* out;            // [tokens, rows]
    int rows, first_block;
};

struct Tokens {
    const void* x;        // [tokens, inputs]
    long long stride;     // elements from one token to the next
    int tokens, inputs;
};

constexpr int PITCH = 17;  // tokens of a row of sums in shared memory

// sums[warp][8 * TILES rows][PITCH] of x with rows `row` on; AHEAD blocks of 32 inputs are read before the first is used
template <int KIND, int TILES, int WARPS, bool MANY>
__device__ __forceinline__ void multiply(const Rows& w, const Tokens& in, int row, int first_token, float* sums) {
    constexpr int AHEAD = TILES == 1 ? 8 : TILES == 2 ? 8 : 4;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const unsigned short* weight = reinterpret_cast<const unsigned short*>(w.weight) + (size_t)(row + g) * in.inputs;
    const unsigned short* x = reinterpret_cast<const unsigned short*>(in.x) + (size_t)(first_token + g) * in.stride;
    const bool token = first_token + g < in.tokens, other_token = MANY && first_token + g + 8 < in.tokens;
    const int blocks = (in.inputs + 31) / 32;
    float total[TILES][4] = {};
    for (int first = warp * AHEAD; first < blocks; first += WARPS * AHEAD) {
        uint4 b[AHEAD][TILES], a[AHEAD], a8[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            int k = 32 * (first + i) + 8 * t;
#pragma unroll
            for (int j = 0; j < TILES; j++) {
                b[i][j] = make_uint4(0, 0, 0, 0);
                if (k < in.inputs && row + 8 * j + g < w.rows) b[i][j] = stream16(weight + (size_t)8 * j * in.inputs + k);
            }
        }
        after_previous();  // weights do not change, the tokens do
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            int k = 32 * (first + i) + 8 * t;
            a[i] = a8[i] = make_uint4(0, 0, 0, 0);
            if (k < in.inputs && token) a[i] = read16(x + k);
            if (k < in.inputs && other_token) a8[i] = read16(x + 8 * in.stride + k);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
#pragma unroll
            for (int j = 0; j < TILES; j++) {
                mma<KIND>(total[j], a[i].x, a8[i].x, a[i].y, a8[i].y, b[i][j].x, b[i][j].y);
                mma<KIND>(total[j], a[i].z, a8[i].z, a[i].w, a8[i].w, b[i][j].z, b[i][j].w);
            }
    }
    after_previous();  // of a warp without inputs, too: its block writes
    float* mine = sums + warp * 8 * TILES * PITCH;
#pragma unroll
    for (int j = 0; j < TILES; j++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (MANY || i < 2) mine[(8 * j + 2 * t + (i & 1)) * PITCH + g + 8 * (i >> 1)] = total[j][i];
}

// the sum of all warps for one row of the block's and one token
template <int TILES, int WARPS>
__device__ __forceinline__ float gather(const float* sums, int row, int token) {
    float y = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) y += sums[(w * 8 * TILES + row) * PITCH + token];
    return y;
}
