// The search for codes of whole rings (formats/viterbi.py): `kAcross` rings at once, one in each lane, so that all is elementwise and in
// torch's order. Included, in an unnamed namespace, after finder.inl.
//
// A state is the path bits that a trellis remembers, the newest lowest. Two steps make 4 states of 4: from i, i + quarter, i + 2 quarters
// and i + 3 quarters to 4 i, 4 i + 1, 4 i + 2 and 4 i + 3. In between costs are in registers.

typedef Reals Squares[kSubsets];  // what each subset costs at a weight
constexpr int kMostWords = 2;     // of a bit for each state

constexpr int words_of(int states) { return states > 32 ? 2 : 1; }

// Both states that states j, of cost `low`, and j + states / 2, of cost `high`, lead to. A parity counts the oldest bit and the newest.
template <int STATES, bool TAKEN>
inline void meet(const Trellis& trellis, int j, const Squares& squares, Reals low, Reals high, Reals* to, Unsigned* taken) {
  const Reals same = squares[trellis.subsets[j]], other = squares[trellis.subsets[j] ^ 2];
  const Reals from_low[] = {low + same, low + other}, from_high[] = {high + other, high + same};
  for (int b = 0; b < 2; ++b) {
    const Mask upper = Across::exceeds(from_low[b], from_high[b]);
    to[b] = Across::either(upper, from_high[b], from_low[b]);
    if (TAKEN) {
      Unsigned& word = taken[(2 * j + b) / 32];
      word = Across::marked(word, upper, uint32_t{1} << ((2 * j + b) % 32));
    }
  }
}

// Costs of the best paths to each state, after `count` weights, a multiple of four, from such costs. TAKEN: of each weight, which paths came
// from the upper of two states.
template <int STATES, bool TAKEN>
void walk(const Trellis& trellis, const Squares* squares, int count, Reals* cost, Unsigned* taken) {
  constexpr int kQuarter = STATES / 4, kWords = words_of(STATES);
  Reals spare[STATES];
  Reals *from = cost, *to = spare;
  for (int t = 0; t < count; t += 2) {
    Unsigned bits[2][kWords] = {};
#pragma GCC unroll 16
    for (int i = 0; i < kQuarter; ++i) {
      Reals a[2], b[2];  // states 2 i and 2 i + 1, and those half of all further
      meet<STATES, TAKEN>(trellis, i, squares[t], from[i], from[i + 2 * kQuarter], a, bits[0]);
      meet<STATES, TAKEN>(trellis, i + kQuarter, squares[t], from[i + kQuarter], from[i + 3 * kQuarter], b, bits[0]);
      for (int k = 0; k < 2; ++k) meet<STATES, TAKEN>(trellis, 2 * i + k, squares[t + 1], a[k], b[k], to + 4 * i + 2 * k, bits[1]);
    }
    if (TAKEN)
      for (int k = 0; k < 2; ++k)
        for (int w = 0; w < kWords; ++w) *taken++ = bits[k][w];
    Reals* const last = from;
    from = to;
    to = last;
  }
}

typedef void (*Walk)(const Trellis&, const Squares*, int, Reals*, Unsigned*);

template <bool TAKEN>
Walk walk_of(int states) {
  switch (states) {
    case 4: return walk<4, TAKEN>;
    case 8: return walk<8, TAKEN>;
    case 16: return walk<16, TAKEN>;
    case 32: return walk<32, TAKEN>;
    default: return walk<64, TAKEN>;
  }
}

// Of each lane `yes` where a whole number is -1, `no` where it is 0.
inline Reals selected(Whole mask, Reals yes, Reals no) {
  return reinterpret_cast<Reals>((reinterpret_cast<Whole>(yes) & mask) | (reinterpret_cast<Whole>(no) & ~mask));
}

// COUNT values, to be picked by index.
template <int COUNT>
struct Values {
  static constexpr int kParts = COUNT > kAcross ? COUNT / kAcross : 1;
  Reals parts[kParts];

  Values() = default;
  explicit Values(const float* values) {
    for (int i = 0; i < kParts * kAcross; ++i) parts[i / kAcross][i % kAcross] = values[i % COUNT];
  }

  Reals operator()(Whole index) const {
    Reals found[kParts];
    for (int i = 0; i < kParts; ++i) found[i] = Across::across(parts[i], index);
    for (int near = 1; near < kParts; near *= 2)
      for (int i = 0; i < kParts; i += 2 * near) found[i] = selected((index & (near * kAcross)) != 0, found[i + near], found[i]);
    return found[0];
  }
};

// The state of least cost, the lowest of several; and that cost.
inline Whole first_least(int states, const Reals* cost, Reals& least) {
  Whole state = {};
  least = cost[0];
  for (int s = 1; s < states; ++s) {
    const Mask less = Across::exceeds(least, cost[s]);
    least = Across::either(less, cost[s], least);
    state = reinterpret_cast<Whole>(Across::either(less, reinterpret_cast<Reals>(Whole{} + s), reinterpret_cast<Reals>(state)));
  }
  return state;
}

// Whether the path to a state came from the upper one, 1 or 0.
inline Whole came(int words, const Unsigned* taken, Whole state) {
  Unsigned word = taken[0];
  if (words > 1) {
    const Unsigned second = reinterpret_cast<Unsigned>(-(state >> 5));
    word = (word & ~second) | (taken[1] & second);
  }
  return reinterpret_cast<Whole>(word >> reinterpret_cast<Unsigned>(state & 31)) & 1;
}

// Level indices of rings on closed paths. BITS: of a weight.
template <int BITS>
struct Rings {
  const Encoding& e;
  const Trellis& trellis;
  const int states, words;
  const Walk open, marked;
  const Finder<BITS - 1, false> subsets[kSubsets];
  const Values<2 << BITS> levels;
  bool began = false;      // whether `first` holds what a round costs
  Reals first[kMostStates];
  Unsigned path[kMostCodes / 32];  // bits of the last search

  Rings(const Encoding& e, const Tables& tables)
      : e(e), trellis(tables.trellis), states(e.states), words(words_of(states)), open(walk_of<false>(states)),
        marked(walk_of<true>(states)),
        subsets{Finder<BITS - 1, false>(trellis.levels[0]), Finder<BITS - 1, false>(trellis.levels[1]),
                Finder<BITS - 1, false>(trellis.levels[2]), Finder<BITS - 1, false>(trellis.levels[3])},
        levels(e.books) {}

  // Of kTogether weights squared distances from the nearest level of each subset, and their indices, a byte each, where they are wanted.
  void nearest(const Reals* y, Reals scale, Squares* squares, Unsigned* indices) const {
    Reals x[kTogether];
    for (int j = 0; j < kTogether; ++j) x[j] = rounded(y[j] * scale);
    if (indices)
      for (int j = 0; j < kTogether; ++j) indices[j] = Unsigned{} + 0x03020100u;
    for (int subset = 0; subset < kSubsets; ++subset) {
      Reals level[kTogether];
      Whole found[kTogether];
      subsets[subset].find(x, level, indices ? found : nullptr);
      for (int j = 0; j < kTogether; ++j) {
        const Reals difference = x[j] - level[j];
        squares[j][subset] = rounded(difference * difference);
        if (indices) indices[j] |= reinterpret_cast<Unsigned>(found[j]) << (8 * subset + 2);
      }
    }
  }

  // The scale at which an open path costs least of y's energy, the earliest of equals. `assign` goes on from there.
  Reals searched(const Reals* y) {
    const Reals infinite = all(__builtin_inff());
    Reals best = infinite, scale = all(1.0f);
    for (int s = 0; s < states; ++s) first[s] = infinite;
    for (int trial = 0; trial < e.trials; ++trial) {
      Reals cost[kMostStates] = {}, least;
      for (int i = 0; i < e.group; i += kTogether) {
        Squares squares[kTogether];
        nearest(y + i, all(e.scales[trial]), squares, nullptr);
        open(trellis, squares, kTogether, cost, nullptr);
      }
      first_least(states, cost, least);
      const Reals lost = least / e.steps[trial];
      const Mask better = Across::exceeds(best, lost);
      best = Across::either(better, lost, best);
      scale = Across::either(better, all(e.scales[trial]), scale);
      for (int s = 0; s < states; ++s) first[s] = Across::either(better, cost[s], first[s]);
    }
    began = true;
    return scale;
  }

  // Codes of y * scale and their levels; after `searched` only at the scale that it has found.
  void assign(const Reals* y, Reals scale, Whole* codes, Reals* c) {
    Squares squares[kMostCodes];
    Unsigned indices[kMostCodes], taken[kMostCodes * kMostWords];
    for (int i = 0; i < e.group; i += kTogether) nearest(y + i, scale, squares + i, indices + i);
    if (!began) {
      for (int s = 0; s < states; ++s) first[s] = Reals{};
      open(trellis, squares, e.group, first, nullptr);
    }
    began = false;
    marked(trellis, squares, e.group, first, taken);
    Reals least;
    Whole state = first_least(states, first, least);
    const int half = states / 2;
    for (int i = e.group - 1; i >= 0; --i) state = (state >> 1) + came(words, taken + i * words, state) * half;
    for (int s = 0; s < states; ++s) first[s] = selected(state == s, Reals{}, all(__builtin_inff()));
    marked(trellis, squares, e.group, first, taken);
    for (Unsigned& bits : path) bits = Unsigned{};
    for (int i = e.group - 1; i >= 0; --i) {
      const Whole upper = came(words, taken + i * words, state), before = state >> 1;
      path[i / 32] |= reinterpret_cast<Unsigned>(state & 1) << (i % 32);
      const Unsigned at = reinterpret_cast<Unsigned>(before);
      const Whole low = reinterpret_cast<Whole>((Unsigned{} + trellis.lower) >> at) & 1;
      const Whole high = (reinterpret_cast<Whole>((Unsigned{} + trellis.upper) >> at) ^ state ^ upper) & 1;
      codes[i] = reinterpret_cast<Whole>(indices[i] >> reinterpret_cast<Unsigned>(low * 8 + high * 16)) & 255;
      c[i] = levels(codes[i]);
      state = before + upper * half;
    }
  }

  // Path bits of the group, then those of each bit of indices above the subset's, of each ring.
  void pack(const Whole* codes, int count, uint8_t* to) const {
    const int64_t bytes = e.group * BITS / 8;
    for (int plane = 0; plane < BITS; ++plane)
      for (int i = 0; i < e.group; i += 32, to += 4) {
        Unsigned bits = path[i / 32];
        if (plane > 0) {
          bits = Unsigned{};
          for (int j = 0; j < 32; ++j) bits |= reinterpret_cast<Unsigned>(codes[i + j] >> (plane + 1) & 1) << j;
        }
        for (int n = 0; n < count; ++n) {
          const uint32_t word = bits[n];
          std::memcpy(to + n * bytes, &word, sizeof word);
        }
      }
  }
};
