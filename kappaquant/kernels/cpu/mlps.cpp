// The part of a layer that sees one token: a gated MLP, or routed experts beside a shared one.
#include <cmath>

#include "experts.h"
#include "step.h"

using namespace kq;

namespace {

// The k largest of `count` logits, by softmax over all of them, or over those k.
void choose(const float* logits, int64_t count, int64_t k, bool renormalize, int64_t* index, float* weights) {
  std::vector<char> taken(static_cast<size_t>(count));
  for (int64_t i = 0; i < k; ++i) {
    int64_t best = -1;
    for (int64_t e = 0; e < count; ++e)
      if (!taken[e] && (best < 0 || logits[e] > logits[best])) best = e;
    taken[best] = 1;
    index[i] = best;
  }
  float sum = 0;
  for (int64_t i = 0; i < k; ++i) sum += weights[i] = std::exp(logits[index[i]] - logits[index[0]]);
  if (!renormalize)
    for (int64_t e = 0; e < count; ++e)
      if (!taken[e]) sum += std::exp(logits[e] - logits[index[0]]);
  for (int64_t i = 0; i < k; ++i) weights[i] /= sum;
}

}  // namespace

// down(silu(gate) * up) of the hidden states' norm, added to them.
KQ_API void kq_mlp(int32_t level, int32_t threads, const Hidden* hidden, const Mlp* mlp) {
  const Level& with = *levels()[level];
  std::vector<float> gate(static_cast<size_t>(hidden->tokens * mlp->gate.rows)), up(gate.size());
  Reading reading = normed(with, threads, *hidden, mlp->before);
  Products products(with, threads);
  reading.add(products, mlp->gate, gate.data());
  reading.add(products, mlp->up, up.data());
  products.run();
  with.steps.silu(gate.data(), up.data(), static_cast<int64_t>(gate.size()), gate.data());
  project(with, threads, *hidden, std::move(gate), mlp->down);
}

// Routed experts of the hidden states' norm, and the shared one times sigmoid of its gate, added to them.
KQ_API void kq_moe(int32_t level, int32_t threads, const Hidden* hidden, const Moe* moe) {
  const Level& with = *levels()[level];
  const int64_t tokens = hidden->tokens, k = moe->top_k, count = moe->router.rows, inner = moe->shared.gate.rows;
  std::vector<float> logits(static_cast<size_t>(tokens * count)), gate(static_cast<size_t>(tokens * inner)), up(gate.size()),
      share(static_cast<size_t>(tokens)), weights(static_cast<size_t>(tokens * k)), found(static_cast<size_t>(tokens * hidden->size));
  std::vector<int64_t> index(weights.size());
  Reading reading = normed(with, threads, *hidden, moe->shared.before);
  Products products(with, threads);
  reading.add(products, moe->router, logits.data());
  if (inner) {
    reading.add(products, moe->shared.gate, gate.data());
    reading.add(products, moe->shared.up, up.data());
    reading.add(products, moe->shared_gate, share.data());
  }
  products.run();
  for (int64_t t = 0; t < tokens; ++t) choose(logits.data() + t * count, count, k, moe->renormalize != 0, index.data() + t * k, weights.data() + t * k);
  with.steps.sigmoid(share.data(), nullptr, tokens, share.data());
  const SharedExpert shared = {&moe->shared.down, gate.data(), up.data(), share.data()};
  experts(with, threads, moe->gate_up, moe->down, moe->down_signs, reading.prepared(moe->gate_up, moe->gate_up_signs).prepared(),
          index.data(), weights.data(), tokens, k, inner ? &shared : nullptr, found.data());
  leave(threads, *hidden, found.data());
}

// Sizes of what Python gives, to be compared with its own: Matrix, Norm, Attention, DeltaNet, Mlp, Moe, Hidden, Cache, Rotary, Mask, Layer.
KQ_API int64_t kq_step_bytes(int32_t number) {
  constexpr int64_t sizes[] = {sizeof(Matrix), sizeof(Norm), sizeof(Attention), sizeof(DeltaNet), sizeof(Mlp),
                               sizeof(Moe),    sizeof(Hidden), sizeof(Cache),  sizeof(Rotary),
                               sizeof(Mask),   sizeof(Layer)};
  return sizes[number];
}
