#define FUSEDRES_ISA avx512bf16
#define FUSEDRES_ISA_AVX512
#include "cpu/conv_wgrad_tiles.h"

namespace fusedres {
namespace FUSEDRES_ISA {
namespace {

// Two pixels at a time: the dot product of (x[p], x[p + 1]) and (grad[p], grad[p + 1]) added to a float sum.
struct DotArithmetic {
  using Panel = BFloat16;
  static constexpr int kPixels = 2;

  static FR_INLINE void store_x(Panel* to, Vec value) {
    const __m256bh narrow = _mm512_cvtneps_pbh(value.v);
    std::memcpy(to, &narrow, sizeof(narrow));
  }

  // kTileK filters of two pixels, interleaved.
  static FR_INLINE void pack_strip(Panel* to, const BFloat16* one, const BFloat16* two) {
    static_assert(kTileK == 8, "a strip is one 128-bit register of each pixel");
    const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(one));
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(two));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi16(a, b));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + kTileK), _mm_unpackhi_epi16(a, b));
  }

  static FR_INLINE void tile(const Panel* x, int64_t x_step, const Panel* grad, const PackedRow* rows, int64_t count,
                             int64_t tap, bool first, float* sums) {
    __m512 acc[kTileK][2];
    for (int k = 0; k < kTileK; ++k)
      for (int v = 0; v < 2; ++v) acc[k][v] = _mm512_setzero_ps();
    for (int64_t row = 0; row < count; ++row) {
      const Panel* xp = x + (rows[row].x + tap) * kTileC;
      const Panel* gp = grad + rows[row].grad * kTileK;
      const int64_t pairs = rows[row].width / 2;
      for (int64_t i = 0; i < pairs; ++i, xp += 2 * x_step * kTileC, gp += 2 * kTileK)
        add_pair(_mm512_loadu_si512(xp), _mm512_loadu_si512(xp + x_step * kTileC), gp, acc);
      if (rows[row].width % 2) add_pair(_mm512_loadu_si512(xp), _mm512_setzero_si512(), gp, acc);
    }
    for (int k = 0; k < kTileK; ++k)
      for (int v = 0; v < 2; ++v) {
        float* to = sums + k * kTileC + v * 16;
        _mm512_storeu_ps(to, first ? acc[k][v] : _mm512_add_ps(_mm512_loadu_ps(to), acc[k][v]));
      }
  }

  // Unpacking works within 128-bit lanes: the tile has the low halves of every eight channels, then the high halves.
  static FR_INLINE void ordered(const float* sums, float* row) {
    for (int64_t eight = 0; eight < kTileC / 8; ++eight)
      for (int64_t half = 0; half < 2; ++half)
        _mm_storeu_ps(row + eight * 8 + half * 4, _mm_loadu_ps(sums + half * 16 + eight * 4));
  }

 private:
  static FR_INLINE void add_pair(__m512i one, __m512i two, const Panel* grad, __m512 (&acc)[kTileK][2]) {
    const auto low = (__m512bh)_mm512_unpacklo_epi16(one, two);
    const auto high = (__m512bh)_mm512_unpackhi_epi16(one, two);
    for (int k = 0; k < kTileK; ++k) {
      const auto pair = (__m512bh)_mm512_set1_epi32(bit_cast<int32_t>(load_pair(grad + 2 * k)));
      acc[k][0] = _mm512_dpbf16_ps(acc[k][0], low, pair);
      acc[k][1] = _mm512_dpbf16_ps(acc[k][1], high, pair);
    }
  }

  static FR_INLINE uint32_t load_pair(const Panel* p) {
    uint32_t pair;
    std::memcpy(&pair, p, sizeof(pair));
    return pair;
  }
};

}  // namespace

void wgrad_task(const WgradArgs& args, const WgradTask& task) { run_wgrad<DotArithmetic, BFloat16>(args, task); }

}  // namespace FUSEDRES_ISA
}  // namespace fusedres
