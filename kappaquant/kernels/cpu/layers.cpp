// Whole layers, one after another.
#include <algorithm>

#include "step.h"

using namespace kq;

KQ_API void kq_attention(int32_t, int32_t, const Hidden*, const Attention*, const Rotary*, const Cache*, int64_t);
KQ_API void kq_deltanet(int32_t, int32_t, const Hidden*, const DeltaNet*, void*, int32_t, int64_t, float*);
KQ_API void kq_mlp(int32_t, int32_t, const Hidden*, const Mlp*);
KQ_API void kq_moe(int32_t, int32_t, const Hidden*, const Moe*);

// The hidden states through all of them, whose caches move on by one token. 0, and nothing has happened, if a cache or the mask has no room.
KQ_API int32_t kq_layers(int32_t level, int32_t threads, const Hidden* hidden, const Layer* layers, int64_t count, const Rotary* rotary,
                         const Mask* mask) {
  for (const Layer* layer = layers; layer < layers + count; ++layer)
    if (layer->attention && *layer->filled >= (mask->values ? std::min(layer->slots, mask->slots) : layer->slots)) return 0;
  Hidden at = *hidden;
  for (const Layer* layer = layers; layer < layers + count; ++layer) {
    if (layer->attention) {
      Cache cache = *layer->cache;
      cache.mask = mask->values, cache.mask_stride = mask->stride, cache.mask_dtype = mask->dtype;
      kq_attention(level, threads, &at, layer->attention, rotary, &cache, (*layer->filled)++);
    } else {
      kq_deltanet(level, threads, &at, layer->delta_net, layer->conv_state, layer->conv_dtype, layer->length, layer->state);
    }
    at.x = at.out;
    if (layer->moe)
      kq_moe(level, threads, &at, layer->moe);
    else
      kq_mlp(level, threads, &at, layer->mlp);
  }
  return 1;
}
