// What the parts of one instruction set share. Included first, in an unnamed namespace, by the file that compiles for it.

typedef float F16 __attribute__((vector_size(64)));
typedef int32_t I16 __attribute__((vector_size(64)));

// One for each width stays a function: in one for all of them compilers keep what a loop needs in memory.
#define KQ_APART __attribute__((noinline))

// no templates of the standard library: the linker would keep one copy for all instruction sets
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline F16 load16(const float* p) {
  F16 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store16(float* p, F16 v) { std::memcpy(p, &v, sizeof v); }

// Which factor of a product is shifted, so that sums lack something.
enum Shifts { kNone, kWeights, kInputs };

// An input in an order of the instruction set's own, with zeros up to the end of the last step. `offsets` are added to sums, in proportion
// to norms: they make up for products of shifted numbers.
struct Arranged {
  const int8_t* values;
  const float* scales;   // [padded groups]
  const float* offsets;  // likewise, or null
};

// A step of codes; see products.inl. Where a step is G groups and the row ends with `left` of them, which are fewer, zeros follow.
template <int G, class Codes, class... To>
inline void decode(const Codes& codes, const uint8_t* p, int64_t number, int64_t left, To... to) {
  uint8_t some[Codes::kCodes * Codes::kBits / 8];
  if (G > 1 && left < G) {
    const size_t bytes = left * (sizeof some / G);
    std::memcpy(some, p, bytes);
    std::memset(some + bytes, 0, sizeof some - bytes);
    p = some;
  }
  codes.template step<G>(p, number, to...);
}
