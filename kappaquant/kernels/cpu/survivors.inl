// The search for one ring's codes with error feedback (quantizing/rounding/rings.py), in which each survivor carries its own errors: a state
// in each lane of VECTORS vectors. Included, in an unnamed namespace, after rings.inl.
//
// A step leads from states j and j + states / 2 to 2 j and 2 j + 1, which take the two's places: the state that is s after r steps is in place s
// turned right by r bits. So what a survivor carries stays where it is, or comes from the one place that differs in one bit.
//
// Errors reach the inputs to come in blocks: within a block each survivor's errors move with it, and at its end they are subtracted from
// all further targets at once.

constexpr int kBlock = 16;

template <int BITS, int VECTORS>
class Survivors {
 public:
  static constexpr int kPlaces = VECTORS * kAcross;

  // `room` has 3 * group * kPlaces floats.
  Survivors(const Encoding& e, const Tables& tables, int8_t* room)
      : group_(e.group), states_(e.states), memory_(__builtin_ctz(e.states)), rest_(reinterpret_cast<Each*>(room)),
        errors_(rest_ + group_), marks_(reinterpret_cast<Marks*>(errors_ + group_)) {
    for (int place = 0; place < kPlaces; ++place) {
      number_[place / kAcross][place % kAcross] = place;
      for (int turns = 0; turns < memory_; ++turns)
        subsets_[turns][place / kAcross][place % kAcross] = tables.trellis.subsets[state_at(place, turns) & (states_ / 2 - 1)];
    }
    // indices have a subset, and then what each step of a search by halves has found, the first lowest
    const auto level = [&](int subset, int number) { return e.books[kSubsets * number + subset]; };
    float edges[kSteps][kLevels] = {}, values[kLevels];
    for (int index = 0; index < kLevels; ++index) {
      const int subset = index % kSubsets;
      int number = 0;
      for (int step = 0; step < kSteps; ++step) {
        const int half = 1 << (kSteps - 1 - step);  // of those that are left
        edges[step][index] = (level(subset, number + half) + level(subset, number + half - 1)) / 2;
        number += (index >> (2 + step) & 1) * half;
      }
      values[index] = level(subset, number);
      codes_[index] = static_cast<uint8_t>(kSubsets * number + subset);
    }
    first_ = Values<kSubsets>(edges[0]);
    if constexpr (kSteps > 1) second_ = Values<2 * kSubsets>(edges[1]);
    if constexpr (kSteps > 2) third_ = Values<4 * kSubsets>(edges[2]);
    values_ = Values<kLevels>(values);
  }

  // Codes of targets [group], and errors over the diagonal; across [group, group]: a line for what an input takes from those before it.
  void choose(const float* targets, float norm, const float* across, uint8_t* codes, float* errors) {
    norm_ = all(norm);
    inverse_ = all(norm == 0 ? 0 : 1 / norm);
    across_ = across;
    turns_ = 0;
    for (Reals& cost : cost_) cost = Reals{};
    hide_padding();
    round(targets);
    const int begin = turns_;
    round(targets);
    const int state = state_at(trace(best(), nullptr, nullptr), begin);
    turns_ = 0;
    for (Reals& cost : cost_) cost = all(__builtin_inff());
    cost_[state / kAcross][state % kAcross] = 0;
    round(targets);
    trace(place_of(state, turns_), codes, errors);
  }

 private:
  static constexpr int kSteps = BITS - 1, kLevels = 1 << (BITS + 1), kCame = 1 << 8;
  static constexpr int kLines = VECTORS > 4 ? 1 : 2;  // that are subtracted from together
  typedef Reals Each[VECTORS];
  typedef Unsigned Marks[VECTORS];

  int state_at(int place, int turns) const {
    place &= states_ - 1;
    return (place << turns | place >> (memory_ - turns)) & (states_ - 1);
  }
  int place_of(int state, int turns) const { return state_at(state, (memory_ - turns) % memory_); }

  void hide_padding() {
    for (int place = states_; place < kPlaces; ++place) cost_[place / kAcross][place % kAcross] = __builtin_inff();
  }

  // What lies in the place that differs in a bit.
  static Reals partner(const Each& x, int v, int bit) {
    if (bit >= kAcross) return x[v ^ (bit / kAcross)];
    return Across::across(x[v], lanes() ^ bit);
  }

  static Whole lanes() {
    Whole numbers;
    for (int n = 0; n < kAcross; ++n) numbers[n] = n;
    return numbers;
  }

  // Of each place what lies in another one.
  static void from(const Each& x, const Whole* places, Each& to) {
    if constexpr (VECTORS <= 4) {
      for (int v = 0; v < VECTORS; ++v) {
        Reals found = Across::across(x[0], places[v]);
        for (int u = 1; u < VECTORS; ++u) found = selected((places[v] & (kPlaces - kAcross)) == u * kAcross, Across::across(x[u], places[v]), found);
        to[v] = found;
      }
    } else {
      alignas(64) float all_of[kPlaces], moved[kPlaces];
      alignas(64) int32_t of[kPlaces];
      std::memcpy(all_of, x, sizeof all_of);
      std::memcpy(of, places, sizeof of);
      for (int place = 0; place < kPlaces; ++place) moved[place] = all_of[of[place]];
      std::memcpy(to, moved, sizeof moved);
    }
  }

  // The nearest level of a subset, and its index.
  Reals nearest(Reals z, Whole subset, Unsigned& index) const {
    index = reinterpret_cast<Unsigned>(subset);
    const auto ask = [&](const auto& edges, uint32_t bit) {
      index = Across::marked(index, Across::exceeds(z, edges(reinterpret_cast<Whole>(index))), bit);
    };
    ask(first_, kSubsets);
    if constexpr (kSteps > 1) ask(second_, 2 * kSubsets);
    if constexpr (kSteps > 2) ask(third_, 4 * kSubsets);
    return values_(reinterpret_cast<Whole>(index));
  }

  // One round from the costs there are.
  void round(const float* targets) {
    for (int t = 0; t < group_; ++t)
      for (int v = 0; v < VECTORS; ++v) rest_[t][v] = all(targets[t]);
    for (int start = 0; start < group_; start += kBlock) {
      for (int v = 0; v < VECTORS; ++v) began_[v] = reinterpret_cast<Reals>(number_[v]);
      for (int i = 0; i < kBlock; ++i) step(start, i);
      spread(start);
    }
  }

  // Input number i of a block. A survivor's own next path bit is that which it forgets; with the other one it goes to the partner's place.
  void step(int start, int i) {
    const int t = start + i, bit = 1 << (memory_ - 1 - turns_);
    const float* line = across_ + static_cast<int64_t>(t) * group_ + start;
    const Reals diagonal = all(1 / line[i]);
    Each y, error, gone, cost;
    Marks index, other;
    from(rest_[t], reinterpret_cast<const Whole*>(began_), y);
    for (int j = 0; j < i; ++j)
      for (int v = 0; v < VECTORS; ++v) y[v] -= line[j] * block_[j][v];
    for (int v = 0; v < VECTORS; ++v) {
      const Whole subset = subsets_[turns_][v];
      const Reals z = y[v] * inverse_;
      error[v] = (y[v] - nearest(z, subset, index[v]) * norm_) * diagonal;
      gone[v] = (y[v] - nearest(z, subset ^ 2, other[v]) * norm_) * diagonal;
      cost[v] = cost_[v] + gone[v] * gone[v];
    }
    Mask came[VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
      const Reals stayed = cost_[v] + error[v] * error[v], arrived = partner(cost, v, bit);
      came[v] = Across::exceeds(stayed, arrived);
      next_[v] = Across::either(came[v], arrived, stayed);
      block_[i][v] = errors_[t][v] = Across::either(came[v], partner(gone, v, bit), error[v]);
      const Reals arrived_index = partner(reinterpret_cast<const Each&>(other), v, bit);
      const Reals taken = Across::either(came[v], arrived_index, reinterpret_cast<Reals>(index[v]));
      marks_[t][v] = Across::marked(reinterpret_cast<Unsigned>(taken), came[v], kCame);
    }
    std::memcpy(cost_, next_, sizeof cost_);
    for (int j = 0; j < i; ++j) follow(came, bit, block_[j]);
    follow(came, bit, began_);
    turns_ = (turns_ + 1) % memory_;
  }

  static void follow(const Mask* came, int bit, Each& x) {
    Each moved;
    for (int v = 0; v < VECTORS; ++v) moved[v] = Across::either(came[v], partner(x, v, bit), x[v]);
    std::memcpy(x, moved, sizeof moved);
  }

  // A block's errors over all inputs behind it.
  void spread(int start) {
    const Whole* began = reinterpret_cast<const Whole*>(began_);
    for (int t = start + kBlock; t < group_; t += kLines) {
      Each left[kLines];
      for (int k = 0; k < kLines; ++k) from(rest_[t + k], began, left[k]);
      const float* line = across_ + static_cast<int64_t>(t) * group_ + start;
      for (int j = 0; j < kBlock; ++j)
        for (int k = 0; k < kLines; ++k)
          for (int v = 0; v < VECTORS; ++v) left[k][v] -= line[k * group_ + j] * block_[j][v];
      std::memcpy(rest_ + t, left, sizeof left);
    }
  }

  // The place of the survivor of least cost.
  int best() const {
    float costs[kPlaces];
    std::memcpy(costs, cost_, sizeof costs);
    int found = 0;
    for (int place = 1; place < states_; ++place)
      if (costs[place] < costs[found]) found = place;
    return found;
  }

  // Back from the place of a survivor at the end of a round to that at its begin; codes and errors [group] where they are wanted.
  int trace(int place, uint8_t* codes, float* errors) const {
    for (int t = group_ - 1, turns = turns_; t >= 0; --t) {
      turns = (turns + memory_ - 1) % memory_;
      const uint32_t mark = reinterpret_cast<const uint32_t*>(marks_[t])[place];
      if (codes) {
        codes[t] = codes_[mark % kCame];
        errors[t] = reinterpret_cast<const float*>(errors_[t])[place];
      }
      if (mark >= kCame) place ^= 1 << (memory_ - 1 - turns);
    }
    return place;
  }

  const int group_, states_, memory_;
  Each* const rest_;    // [group]: what is left of targets after all blocks before
  Each* const errors_;  // [group]
  Marks* const marks_;  // [group]: indices, and kCame where a survivor came from its partner's place
  Whole number_[VECTORS], subsets_[6][VECTORS];
  Values<kSubsets> first_;  // edges, of each step of a search by halves
  Values<2 * kSubsets> second_;
  Values<4 * kSubsets> third_;
  Values<kLevels> values_;
  uint8_t codes_[kLevels];
  const float* across_ = nullptr;
  Reals norm_, inverse_;
  int turns_ = 0;
  Each cost_, next_, began_, block_[kBlock];  // began_: in which place a survivor was at the begin of the block
};
