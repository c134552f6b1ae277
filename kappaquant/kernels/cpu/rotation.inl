// Rotation and rounding of inputs. Included, after vectors.inl, by the file that compiles for one instruction set.

// v with its entries exchanged at distance H, plus v with signs: one stage of the transform inside of a vector
template <int H>
inline F16 exchange(F16 v) {
  I16 at;
  F16 sign;
  for (int i = 0; i < 16; ++i) {
    at[i] = i ^ H;
    sign[i] = i & H ? -1.0f : 1.0f;
  }
#if defined(__clang__)
  F16 other;
  for (int i = 0; i < 16; ++i) other[i] = v[i ^ H];
  return other + v * sign;
#else
  return __builtin_shuffle(v, at) + v * sign;
#endif
}

// s2 * H(s1 * x) / sqrt(group) of each group: butterflies in natural order, as formats/hadamard.py does them
void rotate(const float* x, int64_t in, int64_t groups, int group, const float* signs, float* out) {
  const float root = __builtin_sqrtf(static_cast<float>(group));
  const int vectors = group / 16;
  for (int64_t g = 0; g < groups; ++g) {
    F16 v[kMostCodes / 16];
    alignas(64) float padded[kMostCodes] = {};
    const float* from = x + g * group;
    const int64_t left = in - g * group;
    if (left < group) {
      std::memcpy(padded, from, sizeof(float) * (left > 0 ? left : 0));
      from = padded;
    }
    for (int i = 0; i < vectors; ++i) {
      v[i] = load16(from + 16 * i) * load16(signs + 16 * i);
      v[i] = exchange<8>(exchange<4>(exchange<2>(exchange<1>(v[i]))));
    }
    for (int h = 1; h < vectors; h *= 2)
      for (int i = 0; i < vectors; ++i)
        if (!(i & h)) {
          const F16 a = v[i], b = v[i + h];
          v[i] = a + b;
          v[i + h] = a - b;
        }
    for (int i = 0; i < vectors; ++i) store16(out + g * group + 16 * i, v[i] / (load16(signs + group + 16 * i) * root));
  }
}

// To the nearest of 255 steps between -max |x| and max |x| of each group; the scale of a group that is not finite is no number either.
void narrow(const float* rotated, int64_t groups, int group, int8_t* values, float* scales, float* offsets) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to whole numbers, ties to even
  for (int64_t g = 0; g < groups; ++g) {
    const float* x = rotated + g * group;
    F16 most = {}, zero = {};
    for (int i = 0; i < group; i += 16) {
      const F16 v = load16(x + i);
      zero += v - v;
      const F16 size = v < 0.0f ? -v : v;
      most = size > most ? size : most;
    }
    float largest = 0, poison = 0;
    for (int i = 0; i < 16; ++i) {
      largest = most[i] > largest ? most[i] : largest;
      poison += zero[i];
    }
    const float steps = largest > 0 ? 127.0f / largest : 0.0f;
    I16 total = {};
    for (int i = 0; i < group; i += 16) {
      const F16 shifted = load16(x + i) * steps + magic;
      I16 whole;
      std::memcpy(&whole, &shifted, sizeof whole);
      whole -= 0x4B400000;
      total += whole;
      for (int j = 0; j < 16; ++j) values[g * group + i + j] = static_cast<int8_t>(whole[j]);
    }
    int32_t sum = 0;
    for (int i = 0; i < 16; ++i) sum += total[i];
    scales[g] = largest / 127.0f + poison;
    offsets[g] = -128.0f * scales[g] * static_cast<float>(sum);
  }
}
