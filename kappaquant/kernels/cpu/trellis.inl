// How vectors decode trellis codes: a byte's eight bits of each plane, for all of a vector's bytes, are a step. Four bits of the path at a time
// are looked up in tables of what they give to the sums of their own four weights and of the four and eight after them, and of the other
// planes in tables that spread them. A part has one weight of each eight: its numbers lie between those of another, four bits each.
// Included by the file that compiles for an instruction set and has defined `Planes`:
//
//   Vector, kBytes            bytes of a plane
//   load<G>, before<G>        those of G groups that lie so many bytes apart; each byte's neighbour before it on the ring of its group
//   table, look, low, high    16 entries, looked up by what has made an index of the lower or the upper four bits of bytes
//   sum, up, down             of bits; shifts by bits, which may bring some from one byte to the next
//   with, swap                for `kPairs`, the lower two of each four bits: those and some above them; two vectors' in place of each
//                             other's upper
//   turn_lanes, unpack        lane i of row l in place of lane l of row i; pairs of bytes of two vectors in turn
//   together, apart           of each lane's eight and eight bytes one of each in turn, and back

constexpr int kEights = 8, kStep = kEights * Planes::kBytes;

// Numbers of the levels of a step's weights.
template <int BITS>
class Indices {
 public:
  typedef typename Planes::Vector Vector;

  Indices() {
    for (int back = 0; back < 3; ++back)
      path_[back] = spread([back](int bit, int weight) {
        const int taken = weight - bit + 4 * back;
        return taken < 0 ? 0 : (kLowerTaps >> taken & 1) | (kUpperTaps >> taken & 1) << 1;
      });
    for (int i = 0; i < 2; ++i) {
      pairs_[i] = spread([i](int bit, int weight) { return (bit == weight) << i; });
      above_[i] = spread([i](int bit, int weight) { return weight % 2 == 0 && bit == weight + i ? 4 : 0; });
    }
  }

  // Parts' numbers, of which the lower four bits count: of 4 bits a weight the last plane's, which is left in `last`, are above them.
  template <int G>
  void operator()(const uint8_t* p, Vector* found, Vector* last) const {
    constexpr int kPlane = Planes::kBytes / G, kStride = kPlane * BITS;
    const Vector path = Planes::template load<G>(p, kStride), past = Planes::template before<G>(path);
    const Vector first = Planes::template load<G>(p + kPlane, kStride);
    const Vector paths[] = {Planes::low(past), Planes::high(past), Planes::low(path), Planes::high(path)};
    for (int half = 0; half < 2; ++half) {
      Vector sums = Planes::sum(Planes::look(path_[0], paths[2 + half]), Planes::look(path_[1], paths[1 + half]));
      if constexpr (kTaps >> 5) sums = Planes::sum(sums, Planes::look(path_[2], paths[half]));
      const Vector some = half ? Planes::high(first) : Planes::low(first);
      Vector even, odd;
      if constexpr (BITS == 2) {
        even = Planes::with(sums, Planes::look(above_[0], some));
        odd = Planes::with(Planes::template down<2>(sums), Planes::look(above_[1], some));
      } else {
        const Vector second = Planes::template load<G>(p + 2 * kPlane, kStride);
        even = sums;
        odd = Planes::sum(Planes::look(pairs_[0], some), Planes::look(pairs_[1], half ? Planes::high(second) : Planes::low(second)));
        Planes::swap(even, odd);
      }
      Vector* to = found + 4 * half;
      if constexpr (BITS == 2) {  // where nothing lies in between
        to[0] = even, to[1] = odd, to[2] = Planes::template down<4>(even), to[3] = Planes::template down<4>(odd);
      } else {
        to[0] = Planes::low(even), to[1] = Planes::low(odd), to[2] = Planes::high(even), to[3] = Planes::high(odd);
      }
    }
    if constexpr (BITS == 4) *last = Planes::template load<G>(p + 3 * kPlane, kStride);
  }

 private:
  // A table by four bits: the sum over those that are set of what each gives to each of four weights, two bits of a byte.
  template <class F>
  static Vector spread(const F& given) {
    uint8_t made[16] = {};
    for (int four = 0; four < 16; ++four)
      for (int bit = 0; bit < 4; ++bit)
        for (int weight = 0; weight < 4; ++weight)
          if (four >> bit & 1) made[four] ^= static_cast<uint8_t>(given(bit, weight) << 2 * weight);
    return Planes::table(made);
  }

  Vector path_[3], pairs_[2], above_[2];
};

// Between the order of weights and that of parts.
struct Turned {
  typedef Planes::Vector Vector;
  static constexpr int kLanes = Planes::kBytes / 16, kApart = kEights / kLanes;

  static void arrange(Vector* v) {
    Vector some[kEights];
    for (int i = 0; i < kApart; ++i) {
      for (int lane = 0; lane < kLanes; ++lane) some[kLanes * i + lane] = v[i + kApart * lane];
      Planes::turn_lanes(some + kLanes * i);
    }
    for (int i = 0; i < kEights; ++i) v[i] = Planes::together(some[i]);
    turn(v);
  }

  static void restore(Vector* v) {
    turn(v);
    Vector some[kEights];
    for (int i = 0; i < kEights; ++i) some[i] = Planes::apart(v[i]);
    for (int i = 0; i < kApart; ++i) {
      Planes::turn_lanes(some + kLanes * i);
      for (int lane = 0; lane < kLanes; ++lane) v[i + kApart * lane] = some[kLanes * i + lane];
    }
  }

 private:
  // In each lane eight times eight pairs: a place is six bits, of which a round brings the first to the end.
  static void turn(Vector* v) {
    for (int round = 0; round < 3; ++round) {
      Vector next[kEights];
      for (int i = 0; i < 4; ++i) Planes::unpack(v[i], v[4 + i], next + 2 * i);
      for (int i = 0; i < kEights; ++i) v[i] = next[i];
    }
  }
};
