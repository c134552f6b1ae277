// Searches for `Across::kGroups` groups at once, one in each lane. Included, in an unnamed namespace, by the file that has defined `Across`
// before:
//
//   kGroups, Reals, Whole, Words, Mask   groups at once; a float, int32 and uint32 of each; of each whether
//   exceeds, larger, either, less        a > b, and where neither is negative; one or the other; -1 or 0
//   marked                               words with a bit that is set where a mask says so
//   Eight, eight, pick                   eight floats, and of each group the one at an index, of which the lowest three bits count
//   across                               of each lane what another one has, of whose number only as many bits count as tell lanes apart
//   gather, whole                        entries of a table; rounded to zero

typedef Across::Reals Reals;
typedef Across::Whole Whole;
typedef Across::Words Unsigned;
typedef Across::Mask Mask;
typedef Across::Eight Eight;
constexpr int kAcross = Across::kGroups;
constexpr int kTogether = 4;  // numbers of each group that are worked on step by step, so that none waits for another

inline Reals all(float value) { return value - Reals{}; }

// A product that is rounded by itself: the compiler may not make it part of a fused multiply-add.
inline Reals rounded(Reals product) {
#if defined(__aarch64__)
  asm("" : "+w"(product));
#else
  asm("" : "+v"(product));
#endif
  return product;
}

// Finds one of 2^BITS values by halves. The first three steps make an index into tables of eight, further ones choose among tables by
// masks, and the last ones gather. Codes are made negative, for a comparison that holds is -1, and turned round at the end. POSITIVE: of numbers that are not negative, for edges that are not.
template <int BITS, bool POSITIVE>
struct Finder {
  static constexpr int kMasks = BITS > 3 ? BITS - 3 : 1;  // of the steps behind the first three
  const float* edges;
  const float* values;
  Reals first[8];
  Eight third, tables[16], book[8];

  template <int kMost>
  explicit Finder(const Searched<kMost>& s) : edges(s.edges), values(s.values) {
    for (int i = 1; i < 4 && i < 1 << BITS; ++i) first[i] = all(s.first[i]);
    if constexpr (BITS <= 2) {
      for (int i = 0; i < 1 << BITS; ++i) first[(1 << BITS) + i] = all(values[i]);
    } else {
      third = Across::eight(s.third);
      for (int i = 1; i < 1 << (BITS - 3) && i < 16; ++i) tables[i] = Across::eight(edges + 8 * i);
      for (int i = 0; i < 1 << (BITS - 3) && BITS <= kPicked; ++i) book[i] = Across::eight(values + 8 * i);
    }
  }

  static Mask exceeds(Reals x, Reals edge) {
    return POSITIVE ? Across::larger(x, edge) : Across::exceeds(x, edge);
  }

  template <int MORE>
  static Reals picked(const Eight* from, Whole index, const Mask* masks) {
    if constexpr (MORE == 0)
      return Across::pick(from[0], index);
    else
      return Across::either(masks[0], picked<MORE - 1>(from + (1 << (MORE - 1)), index, masks + 1),
                            picked<MORE - 1>(from, index, masks + 1));
  }

  // The number that STEP steps have made.
  template <int STEP>
  static Whole number(Whole index, const Mask* masks) {
    for (int i = 0; i < STEP - 3; ++i) index = index + index + Across::less(masks[i]);
    return -index;
  }

  template <int STEP>
  void descend(const Reals* x, const Whole* index, Mask (*masks)[kMasks]) const {
    if constexpr (STEP < BITS) {
      Reals edge[kTogether];
      for (int j = 0; j < kTogether; ++j)
        if constexpr (STEP <= kPicked)
          edge[j] = picked<STEP - 3>(tables + (1 << (STEP - 3)), index[j], masks[j]);
        else
          edge[j] = Across::gather(edges + (1 << STEP), number<STEP>(index[j], masks[j]));
      for (int j = 0; j < kTogether; ++j) masks[j][STEP - 3] = exceeds(x[j], edge[j]);
      descend<STEP + 1>(x, index, masks);
    }
  }

  // The values of kTogether numbers; and which ones they are, where `codes` is not null.
  inline __attribute__((always_inline)) void find(const Reals* x, Reals* found, Whole* codes) const {
    Mask top[kTogether], next[kTogether];
    Reals edge[kTogether];
    for (int j = 0; j < kTogether; ++j) top[j] = exceeds(x[j], first[1]);
    if constexpr (BITS == 1) {
      for (int j = 0; j < kTogether; ++j) {
        found[j] = Across::either(top[j], first[3], first[2]);
        if (codes) codes[j] = -Across::less(top[j]);
      }
      return;
    }
    for (int j = 0; j < kTogether; ++j) edge[j] = Across::either(top[j], first[3], first[2]);
    for (int j = 0; j < kTogether; ++j) next[j] = exceeds(x[j], edge[j]);
    if constexpr (BITS == 2) {
      for (int j = 0; j < kTogether; ++j) {
        found[j] = Across::either(top[j], Across::either(next[j], first[7], first[6]), Across::either(next[j], first[5], first[4]));
        if (codes) codes[j] = -(Across::less(top[j]) + Across::less(top[j]) + Across::less(next[j]));
      }
    } else if constexpr (BITS > 2) {
      Whole index[kTogether];
      Mask masks[kTogether][kMasks];
      for (int j = 0; j < kTogether; ++j) index[j] = Across::less(top[j]) + Across::less(top[j]) + Across::less(next[j]);
      for (int j = 0; j < kTogether; ++j) edge[j] = Across::pick(third, index[j]);
      for (int j = 0; j < kTogether; ++j) index[j] += index[j] + Across::less(exceeds(x[j], edge[j]));
      descend<3>(x, index, masks);
      for (int j = 0; j < kTogether; ++j) {
        if constexpr (BITS <= kPicked)
          found[j] = picked<BITS - 3>(book, index[j], masks[j]);
        else
          found[j] = Across::gather(values, number<BITS>(index[j], masks[j]));
        if (codes) codes[j] = number<BITS>(index[j], masks[j]);
      }
    }
  }
};
