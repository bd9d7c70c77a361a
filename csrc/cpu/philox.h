// Philox4x32-10 (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3", section 3.3) for several counters
// at a time, each in a 64-bit lane. A word is the lower half of its lane: multiplications read no more, and what is
// above it does no harm.
#pragma once

#include "cpu/vec.h"

namespace fusedres {
namespace FUSEDRES_ISA {
namespace {

#if defined(FUSEDRES_ISA_AVX512)

struct Lanes {
  static constexpr int kWidth = 8;
  __m512i v;
};
FR_INLINE Lanes every(uint64_t x) { return {_mm512_set1_epi64(static_cast<int64_t>(x))}; }
FR_INLINE Lanes load_lanes(const uint64_t* p) { return {_mm512_loadu_si512(p)}; }
FR_INLINE Lanes operator+(Lanes a, Lanes b) { return {_mm512_add_epi64(a.v, b.v)}; }
FR_INLINE Lanes product(Lanes a, uint32_t b) { return {_mm512_mul_epu32(a.v, _mm512_set1_epi64(b))}; }
FR_INLINE Lanes exclusive_or(Lanes a, Lanes b, Lanes c) { return {_mm512_ternarylogic_epi64(a.v, b.v, c.v, 0x96)}; }
template <int kBits>
FR_INLINE Lanes shift_right(Lanes a) {
  return {_mm512_srli_epi64(a.v, kBits)};
}

#elif defined(FUSEDRES_ISA_AVX2)

struct Lanes {
  static constexpr int kWidth = 4;
  __m256i v;
};
FR_INLINE Lanes every(uint64_t x) { return {_mm256_set1_epi64x(static_cast<int64_t>(x))}; }
FR_INLINE Lanes load_lanes(const uint64_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
FR_INLINE Lanes operator+(Lanes a, Lanes b) { return {_mm256_add_epi64(a.v, b.v)}; }
FR_INLINE Lanes product(Lanes a, uint32_t b) { return {_mm256_mul_epu32(a.v, _mm256_set1_epi64x(b))}; }
FR_INLINE Lanes exclusive_or(Lanes a, Lanes b, Lanes c) { return {_mm256_xor_si256(_mm256_xor_si256(a.v, b.v), c.v)}; }
template <int kBits>
FR_INLINE Lanes shift_right(Lanes a) {
  return {_mm256_srli_epi64(a.v, kBits)};
}

#else

struct Lanes {
  static constexpr int kWidth = 1;
  uint64_t v;
};
FR_INLINE Lanes every(uint64_t x) { return {x}; }
FR_INLINE Lanes load_lanes(const uint64_t* p) { return {*p}; }
FR_INLINE Lanes operator+(Lanes a, Lanes b) { return {a.v + b.v}; }
FR_INLINE Lanes product(Lanes a, uint32_t b) { return {uint64_t{static_cast<uint32_t>(a.v)} * b}; }
FR_INLINE Lanes exclusive_or(Lanes a, Lanes b, Lanes c) { return {a.v ^ b.v ^ c.v}; }
template <int kBits>
FR_INLINE Lanes shift_right(Lanes a) {
  return {a.v >> kBits};
}

#endif

constexpr int kPhiloxRounds = 10;

struct PhiloxKeys {
  uint32_t low[kPhiloxRounds], high[kPhiloxRounds];
  FR_INLINE explicit PhiloxKeys(uint64_t seed) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int i = 0; i < kPhiloxRounds; ++i, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      low[i] = k0;
      high[i] = k1;
    }
  }
};

// Four words per lane: of a counter, or of what it becomes.
struct Words {
  Lanes w[4];
};

FR_INLINE Words counter(Lanes low) { return {{low, shift_right<32>(low), every(0), every(0)}}; }

FR_INLINE Words philox(Words a, const PhiloxKeys& keys) {
#pragma GCC unroll 10
  for (int i = 0; i < kPhiloxRounds; ++i) {
    const Lanes p0 = product(a.w[0], 0xD2511F53u), p1 = product(a.w[2], 0xCD9E8D57u);
    a = {{exclusive_or(shift_right<32>(p1), a.w[1], every(keys.low[i])), p1,
          exclusive_or(shift_right<32>(p0), a.w[3], every(keys.high[i])), p0}};
  }
  return a;
}

// ---------------------------------------------------------------------------------------------------------------------
// Words to bits: one where the word is no less than the threshold
// ---------------------------------------------------------------------------------------------------------------------

// In which order counters must lie in the lanes, so that the words come out in theirs: lane i holds counter order(i).
FR_INLINE int order(int lane) { return lane % 2 * (Lanes::kWidth / 2) + lane / 2; }

#if defined(FUSEDRES_ISA_AVX512)

FR_INLINE uint64_t bits_in_order(const Words& a, uint32_t threshold) {
  const __m512i least = _mm512_set1_epi32(static_cast<int>(threshold));
  const __m512i w01 = _mm512_mask_shuffle_epi32(a.w[0].v, 0xAAAA, a.w[1].v, _MM_PERM_CCAA);
  const __m512i w23 = _mm512_mask_shuffle_epi32(a.w[2].v, 0xAAAA, a.w[3].v, _MM_PERM_CCAA);
  const uint32_t low = _mm512_cmpge_epu32_mask(_mm512_unpacklo_epi64(w01, w23), least);
  const uint32_t high = _mm512_cmpge_epu32_mask(_mm512_unpackhi_epi64(w01, w23), least);
  return low | high << 16;
}

// Of word index % 4 in each lane.
FR_INLINE uint64_t bits_at(const Words& a, Lanes index, uint32_t threshold) {
  const __mmask8 odd = _mm512_test_epi64_mask(index.v, _mm512_set1_epi64(1));
  const __mmask8 second = _mm512_test_epi64_mask(index.v, _mm512_set1_epi64(2));
  const __m512i w01 = _mm512_mask_blend_epi64(odd, a.w[0].v, a.w[1].v);
  const __m512i w23 = _mm512_mask_blend_epi64(odd, a.w[2].v, a.w[3].v);
  const __m512i word = _mm512_slli_epi64(_mm512_mask_blend_epi64(second, w01, w23), 32);
  return _mm512_cmpge_epu64_mask(word, _mm512_set1_epi64(static_cast<int64_t>(uint64_t{threshold} << 32)));
}

#elif defined(FUSEDRES_ISA_AVX2)

// There are only signed comparisons: both sides change their highest bit.
FR_INLINE __m256i at_least(__m256i words, uint32_t threshold) {
  const __m256i least = _mm256_set1_epi32(static_cast<int>(threshold ^ 0x80000000u));
  const __m256i less = _mm256_cmpgt_epi32(least, _mm256_xor_si256(words, _mm256_set1_epi32(INT32_MIN)));
  return _mm256_xor_si256(less, _mm256_set1_epi32(-1));
}

FR_INLINE uint64_t bits_in_order(const Words& a, uint32_t threshold) {
  const __m256i w01 = _mm256_blend_epi32(a.w[0].v, _mm256_slli_epi64(a.w[1].v, 32), 0xAA);
  const __m256i w23 = _mm256_blend_epi32(a.w[2].v, _mm256_slli_epi64(a.w[3].v, 32), 0xAA);
  const __m256i low = at_least(_mm256_unpacklo_epi64(w01, w23), threshold);
  const __m256i high = at_least(_mm256_unpackhi_epi64(w01, w23), threshold);
  const auto mask = [](__m256i a) { return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(a))); };
  return mask(low) | mask(high) << 8;
}

FR_INLINE uint64_t bits_at(const Words& a, Lanes index, uint32_t threshold) {
  const auto select = [&](int64_t bit, __m256i zero, __m256i one) {
    const __m256i chosen = _mm256_set1_epi64x(bit);
    return _mm256_blendv_epi8(zero, one, _mm256_cmpeq_epi64(_mm256_and_si256(index.v, chosen), chosen));
  };
  const __m256i word = select(2, select(1, a.w[0].v, a.w[1].v), select(1, a.w[2].v, a.w[3].v));
  const __m256i kept = _mm256_slli_epi64(at_least(word, threshold), 32);
  return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_castsi256_pd(kept)));
}

#else

FR_INLINE uint64_t bits_at(const Words& a, Lanes index, uint32_t threshold) {
  return static_cast<uint32_t>(a.w[index.v & 3].v) >= threshold;
}

FR_INLINE uint64_t bits_in_order(const Words& a, uint32_t threshold) {
  uint64_t bits = 0;
  for (uint64_t i = 0; i < 4; ++i) bits |= bits_at(a, {i}, threshold) << i;
  return bits;
}

#endif

}  // namespace
}  // namespace FUSEDRES_ISA
}  // namespace fusedres
