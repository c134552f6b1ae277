// The part of a layer in which tokens see each other: attention over a cache, and GatedDeltaNet.
#include <algorithm>
#include <cmath>

#include "pool.h"
#include "step.h"

using namespace kq;

namespace {

constexpr int64_t kSlotsAtOnce = 256;     // that one job attends to
constexpr int64_t kChannelsAtOnce = 512;  // that one job convolves
constexpr float kHidden = -3.0e38f;       // added to the score of a slot that a mask of booleans hides

// The first `rotary` values of a head, whose halves are pairs, turned by their angles.
void turn(float* head, const float* cos, const float* sin, int64_t rotary) {
  const int64_t half = rotary / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float a = head[i], b = head[i + half];
    head[i] = a * cos[i] - b * sin[i];
    head[i + half] = b * cos[i + half] + a * sin[i + half];
  }
}

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

// The convolution of channels [first, last) with the new token's, in place, and silu of it; `state` [channels, length] moves on by one.
void convolve(const Level& with, const DeltaNet& layer, float* x, void* state, int32_t dtype, int64_t length, int64_t first, int64_t last) {
  const int64_t count = last - first, taps = layer.taps;
  std::vector<float> window(static_cast<size_t>(count * length)), weights(static_cast<size_t>(count * taps)), bias(static_cast<size_t>(count));
  read(state, static_cast<Dtype>(dtype), first * length, count * length, window.data());
  read(layer.conv, static_cast<Dtype>(layer.conv_dtype), first * taps, count * taps, weights.data());
  if (layer.conv_bias) read(layer.conv_bias, static_cast<Dtype>(layer.conv_dtype), first, count, bias.data());
  for (int64_t c = 0; c < count; ++c) {
    float* seen = window.data() + c * length;
    const float* weight = weights.data() + c * taps;
    float sum = bias[c] + weight[taps - 1] * x[first + c];
    for (int64_t j = 0; j < taps - 1; ++j) sum += weight[j] * seen[length - taps + 1 + j];
    std::copy(seen + 1, seen + length, seen);
    seen[length - 1] = x[first + c];
    x[first + c] = sum;
  }
  write(window.data(), count * length, state, static_cast<Dtype>(dtype), first * length);
  with.steps.silu(x + first, nullptr, count, x + first);
}

// Queries of a step, normed, turned and scaled, [tokens, heads * dim], and gates as wide where the layer is gated; keys and values of the
// new token go to slot `slot` of the cache.
void make_queries(const Level& with, int threads, const Hidden* hidden, const Attention& a, const Rotary& rotary, const Cache* cache,
                  int64_t slot, float* queries, float* gates) {
  const int64_t tokens = hidden->tokens, dim = a.dim, parts = a.gated ? 2 : 1;
  std::vector<float> q(static_cast<size_t>(tokens * a.q.rows)), k(static_cast<size_t>(tokens * a.k.rows)),
      v(static_cast<size_t>(tokens * a.v.rows));
  Reading reading = normed(with, threads, *hidden, a.before);
  Products products(with, threads);
  reading.add(products, a.q, q.data());
  reading.add(products, a.k, k.data());
  reading.add(products, a.v, v.data());
  products.run();

  const std::vector<float> q_gain = gain_of(a.q_norm, dim), k_gain = gain_of(a.k_norm, dim);
  for (int64_t t = 0; t < tokens; ++t) {
    std::vector<float> angles(static_cast<size_t>(2 * rotary.count));
    read(rotary.cos, static_cast<Dtype>(hidden->dtype), t * rotary.stride, rotary.count, angles.data());
    read(rotary.sin, static_cast<Dtype>(hidden->dtype), t * rotary.stride, rotary.count, angles.data() + rotary.count);
    for (int64_t h = 0; h < a.heads; ++h) {
      const float* from = q.data() + t * a.q.rows + h * parts * dim;
      float* to = queries + (t * a.heads + h) * dim;
      if (a.q_norm.gain)
        with.steps.norm(from, q_gain.data(), dim, a.q_norm.epsilon, to);
      else
        std::copy(from, from + dim, to);
      turn(to, angles.data(), angles.data() + rotary.count, rotary.count);
      for (int64_t i = 0; i < dim; ++i) to[i] *= a.scaling;
      if (a.gated) std::copy(from + dim, from + 2 * dim, gates + (t * a.heads + h) * dim);
    }
    for (int64_t h = 0; h < a.kv_heads; ++h) {
      float* key = k.data() + t * a.k.rows + h * dim;
      if (a.k_norm.gain) with.steps.norm(key, k_gain.data(), dim, a.k_norm.epsilon, key);
      turn(key, angles.data(), angles.data() + rotary.count, rotary.count);
      const int64_t* ks = cache->key_strides;
      const int64_t* vs = cache->value_strides;
      const int64_t value_dim = a.v.rows / a.kv_heads;
      write(key, dim, cache->keys, static_cast<Dtype>(cache->dtype), t * ks[0] + h * ks[1] + slot * ks[2]);
      write(v.data() + t * a.v.rows + h * value_dim, value_dim, cache->values, static_cast<Dtype>(cache->dtype),
            t * vs[0] + h * vs[1] + slot * vs[2]);
    }
  }
}

// Attention of such queries over the cache's first slots, its gate and last projection, added to the hidden states.
void attend(const Level& with, int threads, const Hidden* hidden, const Attention& a, const float* queries, const float* gates,
            const Cache* cache, int64_t slots) {
  const int64_t tokens = hidden->tokens, dim = a.dim, value_dim = a.v.rows / a.kv_heads, shared = a.heads / a.kv_heads;
  const int64_t chunks = (slots + kSlotsAtOnce - 1) / kSlotsAtOnce, size = cache->dtype == kFloat32 ? 4 : 2;
  const int64_t groups = tokens * a.kv_heads;  // of query heads
  std::vector<float> best(static_cast<size_t>(groups * chunks * shared)), totals(best.size()),
      sums(best.size() * static_cast<size_t>(value_dim));
  parallel(threads, groups * chunks, [&](int64_t job, int) {
    const int64_t chunk = job % chunks, group = job / chunks, t = group / a.kv_heads, h = group % a.kv_heads;
    const int64_t first = chunk * kSlotsAtOnce, count = std::min(kSlotsAtOnce, slots - first);
    float* scores = reinterpret_cast<float*>(room_of(4 * 5 * kSlotsAtOnce));
    float* added = nullptr;
    if (cache->mask) {
      added = scores + 4 * kSlotsAtOnce;
      const int64_t at = t * cache->mask_stride + first;
      if (cache->mask_dtype == kBool)
        for (int64_t i = 0; i < count; ++i) added[i] = static_cast<const uint8_t*>(cache->mask)[at + i] ? 0.0f : kHidden;
      else
        read(cache->mask, static_cast<Dtype>(cache->mask_dtype), at, count, added);
    }
    const int64_t* ks = cache->key_strides;
    const int64_t* vs = cache->value_strides;
    const char* keys = static_cast<const char*>(cache->keys) + size * (t * ks[0] + h * ks[1] + first * ks[2]);
    const char* values = static_cast<const char*>(cache->values) + size * (t * vs[0] + h * vs[1] + first * vs[2]);
    Attended to = {best.data() + job * shared, totals.data() + job * shared, sums.data() + job * shared * value_dim};
    with.steps.attend({keys, values, ks[2], vs[2], count, dim, value_dim, added, cache->dtype},
                      queries + (t * a.heads + h * shared) * dim, static_cast<int>(shared), to, scores);
  });

  std::vector<float> mixed(static_cast<size_t>(tokens * a.heads * value_dim));
  for (int64_t group = 0; group < groups; ++group)
    for (int64_t r = 0; r < shared; ++r) {
      float most = best[group * chunks * shared + r], total = 0;
      for (int64_t chunk = 1; chunk < chunks; ++chunk) most = std::max(most, best[(group * chunks + chunk) * shared + r]);
      float* out = mixed.data() + (group * shared + r) * value_dim;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t at = (group * chunks + chunk) * shared + r;
        const float share = std::exp(best[at] - most);
        total += share * totals[at];
        for (int64_t i = 0; i < value_dim; ++i) out[i] += share * sums[at * value_dim + i];
      }
      for (int64_t i = 0; i < value_dim; ++i) out[i] /= total;
    }
  if (a.gated) with.steps.sigmoid(gates, mixed.data(), static_cast<int64_t>(mixed.size()), mixed.data());
  project(with, threads, *hidden, std::move(mixed), a.out);
}

}  // namespace

// The two halves of attention for a cache that has its own way to keep keys and values: those of the new token go to the first slot of
// `cache`; then `cache` has all of them.
KQ_API void kq_queries(int32_t level, int32_t threads, const Hidden* hidden, const Attention* layer, const Rotary* rotary,
                       const Cache* cache, float* queries, float* gates) {
  make_queries(*levels()[level], threads, hidden, *layer, *rotary, cache, 0, queries, gates);
}

KQ_API void kq_attend(int32_t level, int32_t threads, const Hidden* hidden, const Attention* layer, const float* queries,
                      const float* gates, const Cache* cache, int64_t slots) {
  attend(*levels()[level], threads, hidden, *layer, queries, gates, cache, slots);
}

// Both, for a cache with room: the new token takes slot `slot`, and sees all up to it.
KQ_API void kq_attention(int32_t level, int32_t threads, const Hidden* hidden, const Attention* layer, const Rotary* rotary,
                         const Cache* cache, int64_t slot) {
  const size_t size = static_cast<size_t>(hidden->tokens * layer->heads * layer->dim);
  std::vector<float> queries(size), gates(layer->gated ? size : 0);
  make_queries(*levels()[level], threads, hidden, *layer, *rotary, cache, slot, queries.data(), gates.data());
  attend(*levels()[level], threads, hidden, *layer, queries.data(), gates.data(), cache, slot + 1);
}

// GatedDeltaNet: conv_state [tokens, channels, length] of `conv_dtype` and state [tokens, value heads, key dim, value dim] in float32 move
// on by one token; what comes of it is added to the hidden states.
KQ_API void kq_deltanet(int32_t level, int32_t threads, const Hidden* hidden, const DeltaNet* layer, void* conv_state,
                        int32_t conv_dtype, int64_t length, float* state) {
  const Level& with = *levels()[level];
  const DeltaNet& d = *layer;
  const int64_t tokens = hidden->tokens, channels = d.qkv.rows, keys = d.key_heads * d.key_dim;
  std::vector<float> qkv(static_cast<size_t>(tokens * channels)), z(static_cast<size_t>(tokens * d.z.rows)),
      a(static_cast<size_t>(tokens * d.value_heads)), b(a.size());
  Reading reading = normed(with, threads, *hidden, d.before);
  Products products(with, threads);
  reading.add(products, d.qkv, qkv.data());
  reading.add(products, d.z, z.data());
  reading.add(products, d.a, a.data());
  reading.add(products, d.b, b.data());
  products.run();

  const int64_t parts = (channels + kChannelsAtOnce - 1) / kChannelsAtOnce, width = conv_dtype == kFloat32 ? 4 : 2;
  parallel(threads, tokens * parts, [&](int64_t job, int) {
    const int64_t t = job / parts, first = job % parts * kChannelsAtOnce;
    convolve(with, d, qkv.data() + t * channels, static_cast<char*>(conv_state) + width * t * channels * length, conv_dtype, length,
             first, std::min(first + kChannelsAtOnce, channels));
  });

  const std::vector<float> a_log = floats_of(d.a_log, d.a_log_dtype, d.value_heads), dt_bias = floats_of(d.dt_bias, d.dt_bias_dtype, d.value_heads);
  const std::vector<float> gain = gain_of(d.norm, d.value_dim);
  // queries and keys get length 1, queries the attention's scaling as well: what `norm` does with such a gain
  const float dim = static_cast<float>(d.key_dim), epsilon = 1e-6f / dim;
  const std::vector<float> q_gain(static_cast<size_t>(d.key_dim), 1.0f / dim), k_gain(q_gain.size(), 1.0f / std::sqrt(dim));
  std::vector<float> mixed(static_cast<size_t>(tokens * d.value_heads * d.value_dim));
  parallel(threads, tokens * d.value_heads, [&](int64_t job, int) {
    const int64_t t = job / d.value_heads, h = job % d.value_heads, of = h / (d.value_heads / d.key_heads);
    const float* x = qkv.data() + t * channels;
    float* q = reinterpret_cast<float*>(room_of(8 * d.key_dim));
    float* k = q + d.key_dim;
    with.steps.norm(x + of * d.key_dim, q_gain.data(), d.key_dim, epsilon, q);
    with.steps.norm(x + keys + of * d.key_dim, k_gain.data(), d.key_dim, epsilon, k);
    const float decay = std::exp(-std::exp(a_log[h]) * softplus(a[job] + dt_bias[h]));
    float* out = mixed.data() + job * d.value_dim;
    with.steps.delta(state + job * d.key_dim * d.value_dim, d.key_dim, d.value_dim, q, k, x + 2 * keys + h * d.value_dim, decay,
                     sigmoid(b[job]), out);
    with.steps.norm(out, gain.data(), d.value_dim, d.norm.epsilon, out);
    with.steps.silu(z.data() + job * d.value_dim, out, d.value_dim, out);
  });
  project(with, threads, *hidden, std::move(mixed), d.out);
}
