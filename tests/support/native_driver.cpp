// Runs the native core on what it reads, for builds that Python cannot load: another processor's, or one with sanitizers. From stdin come
// "products", with numbers, signs, and two weights of experts with a bias for the first, "encoding", with a weight and tables, "feedback",
// with tables and a group of inputs, or "stepping", with the layers of a step; to stdout goes what the functions made of them. Each array is
// allocated at its exact size, so that a byte read beyond it is seen.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "core.h"
#include "encode.h"
#include "feedback.h"
#include "step.h"

extern "C" {
void kq_encode(int32_t, int32_t, const kq::Encoding*);
void kq_feedback(int32_t, int32_t, const kq::Encoding*, const kq::Feedback*);
int32_t kq_levels();
int32_t kq_level_runs(int32_t);
void kq_prepare(int32_t, int32_t, const void*, int32_t, int64_t, int64_t, int64_t, int32_t, const float*, float*, int8_t*, float*, float*);
void kq_linear(int32_t, int32_t, const kq::Weight*, const int8_t*, const float*, const float*, const float*, int64_t, const float*, void*,
               int32_t);
void kq_grouped(int32_t, int32_t, const kq::Weight*, const int8_t*, const float*, const float*, const float*, const int64_t*, int64_t,
                int64_t, float*);
void kq_experts(int32_t, int32_t, const kq::Weight*, const kq::Weight*, const int8_t*, const float*, const float*, const float*,
                const int64_t*, const float*, int64_t, int64_t, const float*, void*, int32_t);
void kq_attention(int32_t, int32_t, const kq::Hidden*, const kq::Attention*, const kq::Rotary*, const kq::Cache*, int64_t);
void kq_deltanet(int32_t, int32_t, const kq::Hidden*, const kq::DeltaNet*, void*, int32_t, int64_t, float*);
void kq_mlp(int32_t, int32_t, const kq::Hidden*, const kq::Mlp*);
void kq_moe(int32_t, int32_t, const kq::Hidden*, const kq::Moe*);
}

namespace {

template <class T>
std::unique_ptr<T[]> take(int64_t count) {
  std::unique_ptr<T[]> made(new T[static_cast<size_t>(count)]);
  if (std::fread(made.get(), sizeof(T), static_cast<size_t>(count), stdin) != static_cast<size_t>(count)) std::exit(2);
  return made;
}

struct Held {
  std::unique_ptr<uint8_t[]> codes;
  std::unique_ptr<uint16_t[]> norms;
  std::unique_ptr<float[]> book, signs;
  kq::Weight weight;
  int64_t inputs;
};

Held take_weight() {
  const auto n = take<int64_t>(7);  // experts, rows, inputs, groups, bits, group, kind
  Held held;
  held.weight = {};
  held.weight.experts = n[0], held.weight.rows = n[1], held.inputs = n[2], held.weight.groups = n[3];
  held.weight.bits = static_cast<int32_t>(n[4]), held.weight.group = static_cast<int32_t>(n[5]);
  held.weight.kind = static_cast<int32_t>(n[6]);
  held.codes = take<uint8_t>(n[0] * n[1] * kq::row_bytes(held.weight));
  held.norms = take<uint16_t>(n[0] * n[1] * n[3]);
  held.book = take<float>(kq::entries(held.weight));
  held.signs = take<float>(2 * n[5]);
  held.weight.codes = held.codes.get(), held.weight.norms = held.norms.get(), held.weight.book = held.book.get();
  return held;
}

template <class T>
void give(const std::vector<T>& values) {
  if (!values.empty()) std::fwrite(values.data(), sizeof(T), values.size(), stdout);
}

int encode(int32_t level) {
  // rows, width, groups, dtype, group, wide norms, trials, codebooks, whether codes are wanted, states of a trellis code
  const auto n = take<int64_t>(10);
  const auto bits = take<int32_t>(n[7]);
  kq::Encoding e = {};
  e.rows = n[0], e.width = n[1], e.groups = n[2];
  e.dtype = static_cast<int32_t>(n[3]), e.group = static_cast<int32_t>(n[4]), e.wide_norms = static_cast<int32_t>(n[5]);
  e.trials = static_cast<int32_t>(n[6]), e.count = static_cast<int32_t>(n[7]);
  e.states = static_cast<int32_t>(n[9]);
  int64_t values = 0;
  for (int b = 0; b < e.count; ++b) values += 1 << ((e.bits[b] = bits[b]) + (e.states > 0));
  const auto weight = take<uint8_t>(e.rows * e.width * (e.dtype == kq::kFloat32 ? 4 : 2));
  const auto signs = take<float>(2 * e.group), books = take<float>(values), magnitudes = take<float>(e.states ? 0 : kq::kMagnitudes);
  const auto scales = take<float>(e.trials), steps = take<float>(e.trials);
  const auto subsets = take<uint8_t>(e.states / 2);
  e.subsets = subsets.get();
  e.weight = weight.get(), e.signs = signs.get(), e.books = books.get(), e.magnitudes = magnitudes.get();
  e.scales = scales.get(), e.steps = steps.get();
  const int64_t groups = e.rows * e.groups;
  std::vector<uint8_t> packed(n[8] ? groups * e.group * bits[0] / 8 : 0), norms(n[8] ? groups * (e.wide_norms ? 4 : 2) : 0);
  std::vector<float> errors(e.count * groups), energies(groups);
  e.packed = n[8] ? packed.data() : nullptr, e.norms = n[8] ? norms.data() : nullptr;
  e.errors = errors.data(), e.energies = energies.data();
  kq_encode(level, 2, &e);
  give(packed);
  give(norms);
  give(errors);
  give(energies);
  return 0;
}

int feed_back(int32_t level) {
  // matrices, group, rows, bits, wide norms, trials, norms that are tried, of which none is for values of before; states of a trellis code
  const auto n = take<int64_t>(8);
  kq::Encoding e = {};
  e.group = static_cast<int32_t>(n[1]), e.bits[0] = static_cast<int32_t>(n[3]), e.wide_norms = static_cast<int32_t>(n[4]);
  e.trials = static_cast<int32_t>(n[5]), e.count = 1;
  e.states = static_cast<int32_t>(n[7]);
  const auto books = take<float>(1 << (n[3] + (e.states > 0))), magnitudes = take<float>(e.states ? 0 : kq::kMagnitudes);
  const auto scales = take<float>(e.trials), steps = take<float>(e.trials);
  const auto subsets = take<uint8_t>(e.states / 2);
  e.subsets = subsets.get();
  e.books = books.get(), e.magnitudes = magnitudes.get(), e.scales = scales.get(), e.steps = steps.get();
  kq::Feedback f = {};
  f.matrices = n[0], f.rows = n[2], f.tried = static_cast<int32_t>(n[6]), f.first_matrix = f.now_matrix = n[1] * n[2];
  const int64_t all = n[0] * n[1] * n[2];
  const bool again = f.tried == 0;
  const auto first = take<float>(all), across = take<float>(n[0] * n[1] * n[1]), tried = take<float>(f.tried);
  const auto now = take<float>(again ? all : 0), inverses = take<float>(again ? n[0] * n[1] : 0);
  std::vector<float> norms(n[0] * n[2]), values(again ? all : 0), spread(all);
  std::vector<uint8_t> codes(all);
  if (again) {
    const auto given = take<float>(n[0] * n[2]);
    norms.assign(given.get(), given.get() + n[0] * n[2]);
  }
  f.first = first.get(), f.now = again ? now.get() : nullptr, f.across = across.get(), f.inverses = inverses.get();
  f.scales = tried.get(), f.norms = norms.data(), f.codes = codes.data(), f.values = values.data(), f.spread = spread.data();
  kq_feedback(level, 2, &e, &f);
  give(codes);
  give(again ? values : norms);
  give(spread);
  return 0;
}

int multiply(int32_t level) {
  const Held first = take_weight(), second = take_weight();
  const auto n = take<int64_t>(2);  // tokens, experts of each
  const int64_t tokens = n[0], k = n[1], width = first.weight.groups * first.weight.group;
  const auto x = take<float>(tokens * first.inputs);
  const auto bias = take<float>(first.weight.rows);
  const auto index = take<int64_t>(tokens * k);
  const auto shares = take<float>(tokens * k);
  for (const bool exact : {false, true}) {
    const int64_t padded = kq::padded_groups(first.weight.groups);
    std::unique_ptr<float[]> floats(exact ? new float[tokens * width] : nullptr);
    std::unique_ptr<int8_t[]> values(exact ? nullptr : new int8_t[tokens * width]);
    std::unique_ptr<float[]> scales(exact ? nullptr : new float[tokens * padded]), offsets(exact ? nullptr : new float[tokens * padded]);
    kq_prepare(level, 2, x.get(), 0, tokens, first.inputs, first.weight.groups, first.weight.group, first.signs.get(), floats.get(),
               values.get(), scales.get(), offsets.get());
    std::vector<float> linear(static_cast<size_t>(tokens * first.weight.rows));
    kq_linear(level, 2, &first.weight, values.get(), scales.get(), offsets.get(), floats.get(), tokens, bias.get(), linear.data(), 0);
    give(linear);
    std::vector<float> grouped(static_cast<size_t>(tokens * k * first.weight.rows));
    kq_grouped(level, 2, &first.weight, values.get(), scales.get(), offsets.get(), floats.get(), index.get(), tokens, k, grouped.data());
    give(grouped);
    std::vector<float> block(static_cast<size_t>(tokens * second.weight.rows));
    kq_experts(level, 2, &first.weight, &second.weight, values.get(), scales.get(), offsets.get(), floats.get(), index.get(), shares.get(),
               tokens, k, second.signs.get(), block.data(), 0);
    give(block);
  }
  return 0;
}

template <class T>
void give(const T* values, int64_t count) {
  std::fwrite(values, sizeof(T), static_cast<size_t>(count), stdout);
}

// All of a step, of 16-bit matrices in attention and float32 ones elsewhere, with float32 inputs.
int step(int32_t level) {
  const auto n = take<int64_t>(13);
  const int64_t tokens = n[0], size = n[1], heads = n[2], kv = n[3], dim = n[4], room = n[5], slot = n[6], key_heads = n[7], value_heads = n[8],
                key_dim = n[9], value_dim = n[10], taps = n[11], k = n[12];
  const auto x = take<float>(tokens * size), gain = take<float>(size), head_gain = take<float>(dim), value_gain = take<float>(value_dim);
  std::vector<float> out(static_cast<size_t>(tokens * size));
  const kq::Hidden hidden = {x.get(), out.data(), tokens, size, kq::kFloat32, 1};
  const kq::Norm before = {gain.get(), 1e-5f, kq::kFloat32, 0, 0}, over_heads = {head_gain.get(), 1e-5f, kq::kFloat32, 1, 0};
  std::vector<std::unique_ptr<uint16_t[]>> halves;
  std::vector<std::unique_ptr<float[]>> wholes;
  const auto half = [&](int64_t rows, int64_t in) {
    halves.push_back(take<uint16_t>(rows * in));
    return kq::Matrix{{}, halves.back().get(), nullptr, nullptr, rows, in, kq::kBfloat16, 0};
  };
  const auto whole = [&](int64_t rows, int64_t in) {
    wholes.push_back(take<float>(rows * in));
    return kq::Matrix{{}, wholes.back().get(), nullptr, nullptr, rows, in, kq::kFloat32, 0};
  };
  {
    const kq::Matrix q = half(2 * heads * dim, size), key = half(kv * dim, size), value = half(kv * dim, size), last = half(size, heads * dim);
    const kq::Attention layer = {q, key, value, last, before, over_heads, over_heads, heads, kv, dim, 0.3f, 1};
    const auto cos = take<float>(dim / 2), sin = take<float>(dim / 2);
    const auto keys = take<uint16_t>(tokens * kv * room * dim), values = take<uint16_t>(tokens * kv * room * dim);
    const auto mask = take<float>(tokens * room);
    const kq::Cache cache = {keys.get(), values.get(), {kv * room * dim, room * dim, dim}, {kv * room * dim, room * dim, dim},
                             mask.get(), room,         kq::kFloat16,                       kq::kFloat32};
    const kq::Rotary rotary = {cos.get(), sin.get(), dim / 2, 0};
    kq_attention(level, 2, &hidden, &layer, &rotary, &cache, slot);
    give(out);
  }
  {
    const int64_t columns = value_heads * value_dim, channels = 2 * key_heads * key_dim + columns;
    const kq::Matrix qkv = whole(channels, size), z = whole(columns, size), b = whole(value_heads, size), a = whole(value_heads, size),
                     last = whole(size, columns);
    const auto conv = take<float>(channels * taps), a_log = take<float>(value_heads), dt_bias = take<float>(value_heads);
    const kq::DeltaNet layer = {qkv, z, b, a, last, before, {value_gain.get(), 1e-5f, kq::kFloat32, 0, 0}, conv.get(), nullptr, a_log.get(),
                                dt_bias.get(), key_heads, value_heads, key_dim, value_dim, taps, kq::kFloat32, kq::kFloat32, kq::kFloat32, 0};
    const auto window = take<uint16_t>(tokens * channels * taps);
    const auto state = take<float>(tokens * value_heads * key_dim * value_dim);
    kq_deltanet(level, 2, &hidden, &layer, window.get(), kq::kBfloat16, taps, state.get());
    give(out);
    give(state.get(), tokens * value_heads * key_dim * value_dim);
  }
  const Held gate_up = take_weight(), down = take_weight();
  const int64_t inner = gate_up.weight.rows / 2;
  kq::Mlp mlp = {whole(inner, size), whole(inner, size), whole(size, inner), before};
  kq_mlp(level, 2, &hidden, &mlp);
  give(out);
  const kq::Matrix router = whole(gate_up.weight.experts, size), one = whole(1, size);
  const kq::Moe moe = {router, one, mlp, gate_up.weight, down.weight, gate_up.signs.get(), down.signs.get(), k, 1, 0};
  kq_moe(level, 2, &hidden, &moe);
  give(out);
  return 0;
}

}  // namespace

int main() {
  int32_t level = 0;
  while (level < kq_levels() && !kq_level_runs(level)) ++level;
  if (level == kq_levels()) return 3;
  const auto what = take<char>(8);
  if (std::memcmp(what.get(), "encoding", 8) == 0) return encode(level);
  if (std::memcmp(what.get(), "feedback", 8) == 0) return feed_back(level);
  return std::memcmp(what.get(), "stepping", 8) == 0 ? step(level) : multiply(level);
}
