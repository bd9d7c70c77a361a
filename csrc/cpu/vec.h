// One vector type per instruction set, with the same operations: kernels are written once over `Vec` and compiled three
// times (FUSEDRES_ISA = scalar, avx2, avx512). Everything has internal linkage, so that the linker can never merge code
// that was compiled for a wider instruction set into the baseline.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(FUSEDRES_ISA_AVX2) || defined(FUSEDRES_ISA_AVX512)
#include <immintrin.h>
#endif

#define FR_INLINE inline __attribute__((always_inline))

namespace fusedres {
namespace FUSEDRES_ISA {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// ---------------------------------------------------------------------------------------------------------------------
// Scalar conversions, round to nearest even
// ---------------------------------------------------------------------------------------------------------------------

template <class To, class From>
FR_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

FR_INLINE float to_float(float v) { return v; }
FR_INLINE float to_float(uint8_t v) { return v; }
FR_INLINE float to_float(BFloat16 v) { return bit_cast<float>(uint32_t{v.bits} << 16); }
FR_INLINE float to_float(Float16 v) {
  const uint32_t sign = uint32_t{v.bits & 0x8000u} << 16;
  const uint32_t magnitude = v.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Scaling by 2^112 rebiases the exponent and normalises subnormals alike.
  const float scaled = bit_cast<float>(magnitude << 13) * 0x1p112f;
  return bit_cast<float>(bit_cast<uint32_t>(scaled) | sign);
}

template <class T>
T from_float(float v);
template <>
FR_INLINE float from_float<float>(float v) {
  return v;
}
template <>
FR_INLINE uint8_t from_float<uint8_t>(float v) {
  return static_cast<uint8_t>(v);
}
template <>
FR_INLINE BFloat16 from_float<BFloat16>(float v) {
  const uint32_t bits = bit_cast<uint32_t>(v);
  if (v != v) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
FR_INLINE Float16 from_float<Float16>(float v) {
  const uint32_t bits = bit_cast<uint32_t>(v);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to 2^16 or beyond
  if (magnitude < 0x38800000u) {  // subnormal: adding 1/2 lets the adder round at the right bit
    const float shifted = bit_cast<float>(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u;
  return {static_cast<uint16_t>(sign | (rounded >> 13))};
}

// ---------------------------------------------------------------------------------------------------------------------
// The vector: kWidth floats
// ---------------------------------------------------------------------------------------------------------------------

#if defined(FUSEDRES_ISA_AVX512)

struct Vec {
  static constexpr int kWidth = 16;
  __m512 v;
  FR_INLINE Vec() : v(_mm512_setzero_ps()) {}
  FR_INLINE Vec(float x) : v(_mm512_set1_ps(x)) {}
  FR_INLINE Vec(__m512 x) : v(x) {}
};
FR_INLINE Vec operator+(Vec a, Vec b) { return _mm512_add_ps(a.v, b.v); }
FR_INLINE Vec operator-(Vec a, Vec b) { return _mm512_sub_ps(a.v, b.v); }
FR_INLINE Vec operator*(Vec a, Vec b) { return _mm512_mul_ps(a.v, b.v); }
FR_INLINE Vec operator/(Vec a, Vec b) { return _mm512_div_ps(a.v, b.v); }
FR_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
// As the instructions: the second operand wherever one is NaN.
FR_INLINE Vec vmax(Vec a, Vec b) { return _mm512_max_ps(a.v, b.v); }
FR_INLINE Vec vmin(Vec a, Vec b) { return _mm512_min_ps(a.v, b.v); }
FR_INLINE Vec select_gt(Vec a, Vec b, Vec x, Vec y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), y.v, x.v);
}
FR_INLINE Vec select_le(Vec a, Vec b, Vec x, Vec y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ), y.v, x.v);
}
FR_INLINE Vec select_eq(Vec a, Vec b, Vec x, Vec y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ), y.v, x.v);
}
// x where a is greater than b, or NaN.
FR_INLINE Vec select_gt_or_nan(Vec a, Vec b, Vec x, Vec y) {
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ) | nan, y.v, x.v);
}
FR_INLINE bool any_nan(Vec a) { return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q) != 0; }
FR_INLINE Vec round_to_int(Vec a) { return _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
FR_INLINE Vec scale_by_power_of_two(Vec a, Vec n) { return _mm512_scalef_ps(a.v, n.v); }

// a in the lanes whose bit is set, of the bits from number `at` on; else zero.
FR_INLINE Vec where_bits(const uint8_t* bits, int64_t at, Vec a) {
  uint32_t word;
  std::memcpy(&word, bits + (at >> 3), sizeof(word));
  return _mm512_maskz_mov_ps(static_cast<__mmask16>(word >> (at & 7)), a.v);
}

FR_INLINE __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
// A bfloat16 is the upper half of a float: each word goes there, or comes from there, in one permutation. Word 16, of
// what lies behind the sixteen, is zero.
FR_INLINE Vec widen(__m256i half, BFloat16) {
  const __m512i to_upper = _mm512_set_epi16(15, 16, 14, 16, 13, 16, 12, 16, 11, 16, 10, 16, 9, 16, 8, 16, 7, 16, 6, 16,
                                            5, 16, 4, 16, 3, 16, 2, 16, 1, 16, 0, 16);
  return _mm512_castsi512_ps(_mm512_permutexvar_epi16(to_upper, _mm512_zextsi256_si512(half)));
}
FR_INLINE Vec widen(__m256i half, Float16) { return _mm512_cvtph_ps(half); }
FR_INLINE __m256i narrow(Vec a, BFloat16) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  __m512i rounded = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  rounded = _mm512_mask_add_epi32(rounded, odd, bits, _mm512_set1_epi32(0x8000));
  rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));  // stays one, quiet
  const __m512i from_upper = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 31, 29, 27, 25, 23, 21,
                                              19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return _mm512_castsi512_si256(_mm512_permutexvar_epi16(from_upper, rounded));
}
FR_INLINE __m256i narrow(Vec a, Float16) { return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

FR_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
FR_INLINE Vec load(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
FR_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
FR_INLINE void store(float* p, Vec a, int64_t n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
template <class T>
FR_INLINE Vec load(const T* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{});
}
template <class T>
FR_INLINE Vec load(const T* p, int64_t n) {
  return widen(_mm256_maskz_loadu_epi16(first(n), p), T{});
}
template <class T>
FR_INLINE void store(T* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a, T{}));
}
template <class T>
FR_INLINE void store(T* p, Vec a, int64_t n) {
  _mm256_mask_storeu_epi16(p, first(n), narrow(a, T{}));
}

// Bytes as numbers from 0 to 255.
FR_INLINE Vec load(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
FR_INLINE Vec load(const uint8_t* p, int64_t n) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first(n), p)));
}
FR_INLINE void store(uint8_t* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
}
FR_INLINE void store(uint8_t* p, Vec a, int64_t n) {
  _mm_mask_storeu_epi8(p, first(n), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
}

// As many doubles as a Vec has floats, to sum in.
struct Wide {
  __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
};
FR_INLINE Wide operator+(Wide a, Vec b) {
  return {_mm512_add_pd(a.low, _mm512_cvtps_pd(_mm512_castps512_ps256(b.v))),
          _mm512_add_pd(a.high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(b.v, 1)))};
}
FR_INLINE Vec rounded(Wide a) {
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(a.low)), _mm512_cvtpd_ps(a.high), 1);
}
FR_INLINE void store(double* p, Wide a) {
  _mm512_storeu_pd(p, a.low);
  _mm512_storeu_pd(p + 8, a.high);
}

#elif defined(FUSEDRES_ISA_AVX2)

struct Vec {
  static constexpr int kWidth = 8;
  __m256 v;
  FR_INLINE Vec() : v(_mm256_setzero_ps()) {}
  FR_INLINE Vec(float x) : v(_mm256_set1_ps(x)) {}
  FR_INLINE Vec(__m256 x) : v(x) {}
};
FR_INLINE Vec operator+(Vec a, Vec b) { return _mm256_add_ps(a.v, b.v); }
FR_INLINE Vec operator-(Vec a, Vec b) { return _mm256_sub_ps(a.v, b.v); }
FR_INLINE Vec operator*(Vec a, Vec b) { return _mm256_mul_ps(a.v, b.v); }
FR_INLINE Vec operator/(Vec a, Vec b) { return _mm256_div_ps(a.v, b.v); }
FR_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
FR_INLINE Vec vmax(Vec a, Vec b) { return _mm256_max_ps(a.v, b.v); }
FR_INLINE Vec vmin(Vec a, Vec b) { return _mm256_min_ps(a.v, b.v); }
FR_INLINE Vec select_gt(Vec a, Vec b, Vec x, Vec y) {
  return _mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ));
}
FR_INLINE Vec select_le(Vec a, Vec b, Vec x, Vec y) {
  return _mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ));
}
FR_INLINE Vec select_eq(Vec a, Vec b, Vec x, Vec y) {
  return _mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ));
}
FR_INLINE Vec select_gt_or_nan(Vec a, Vec b, Vec x, Vec y) {
  const __m256 nan = _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q);
  return _mm256_blendv_ps(y.v, x.v, _mm256_or_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ), nan));
}
FR_INLINE bool any_nan(Vec a) { return _mm256_movemask_ps(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)) != 0; }
FR_INLINE Vec round_to_int(Vec a) { return _mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
FR_INLINE Vec scale_by_power_of_two(Vec a, Vec n) {
  // In two halves, so that results near the ends of the exponent's range are reached without overflow on the way.
  const __m256i whole = _mm256_cvtps_epi32(n.v);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  const auto power = [](__m256i e) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23));
  };
  return _mm256_mul_ps(_mm256_mul_ps(a.v, power(half)), power(_mm256_sub_epi32(whole, half)));
}

FR_INLINE Vec where_bits(const uint8_t* bits, int64_t at, Vec a) {
  uint16_t word;
  std::memcpy(&word, bits + (at >> 3), sizeof(word));
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi32(word >> (at & 7)), lane);
  return _mm256_and_ps(a.v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane)));
}

FR_INLINE Vec widen(__m128i half, BFloat16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
FR_INLINE Vec widen(__m128i half, Float16) { return _mm256_cvtph_ps(half); }
FR_INLINE __m128i narrow(Vec a, BFloat16) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
FR_INLINE __m128i narrow(Vec a, Float16) { return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

FR_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
FR_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
FR_INLINE Vec load(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
FR_INLINE void store(uint8_t* p, Vec a) {
  const __m256i whole = _mm256_cvtps_epi32(a.v);
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}
template <class T>
FR_INLINE Vec load(const T* p) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), T{});
}
template <class T>
FR_INLINE void store(T* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(a, T{}));
}
template <class T>
FR_INLINE Vec load(const T* p, int64_t n) {
  T padded[Vec::kWidth] = {};
  std::memcpy(padded, p, n * sizeof(T));
  return load(padded);
}
template <class T>
FR_INLINE void store(T* p, Vec a, int64_t n) {
  T padded[Vec::kWidth];
  store(padded, a);
  std::memcpy(p, padded, n * sizeof(T));
}

struct Wide {
  __m256d low = _mm256_setzero_pd(), high = _mm256_setzero_pd();
};
FR_INLINE Wide operator+(Wide a, Vec b) {
  return {_mm256_add_pd(a.low, _mm256_cvtps_pd(_mm256_castps256_ps128(b.v))),
          _mm256_add_pd(a.high, _mm256_cvtps_pd(_mm256_extractf128_ps(b.v, 1)))};
}
FR_INLINE Vec rounded(Wide a) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm256_cvtpd_ps(a.low)), _mm256_cvtpd_ps(a.high), 1);
}
FR_INLINE void store(double* p, Wide a) {
  _mm256_storeu_pd(p, a.low);
  _mm256_storeu_pd(p + 4, a.high);
}

#else

struct Vec {
  static constexpr int kWidth = 1;
  float v;
  FR_INLINE Vec() : v(0.f) {}
  FR_INLINE Vec(float x) : v(x) {}
};
FR_INLINE Vec operator+(Vec a, Vec b) { return a.v + b.v; }
FR_INLINE Vec operator-(Vec a, Vec b) { return a.v - b.v; }
FR_INLINE Vec operator*(Vec a, Vec b) { return a.v * b.v; }
FR_INLINE Vec operator/(Vec a, Vec b) { return a.v / b.v; }
FR_INLINE Vec fma(Vec a, Vec b, Vec c) { return a.v * b.v + c.v; }
FR_INLINE Vec vmax(Vec a, Vec b) { return a.v > b.v ? a.v : b.v; }
FR_INLINE Vec vmin(Vec a, Vec b) { return a.v < b.v ? a.v : b.v; }
FR_INLINE Vec select_gt(Vec a, Vec b, Vec x, Vec y) { return a.v > b.v ? x : y; }
FR_INLINE Vec select_le(Vec a, Vec b, Vec x, Vec y) { return a.v <= b.v ? x : y; }
FR_INLINE Vec select_eq(Vec a, Vec b, Vec x, Vec y) { return a.v == b.v ? x : y; }
FR_INLINE Vec select_gt_or_nan(Vec a, Vec b, Vec x, Vec y) { return a.v > b.v || a.v != a.v ? x : y; }
FR_INLINE bool any_nan(Vec a) { return a.v != a.v; }
FR_INLINE Vec where_bits(const uint8_t* bits, int64_t at, Vec a) { return bits[at >> 3] >> (at & 7) & 1 ? a : Vec(); }
template <class T>
FR_INLINE Vec load(const T* p) {
  return to_float(*p);
}
template <class T>
FR_INLINE void store(T* p, Vec a) {
  *p = from_float<T>(a.v);
}
template <class T>
FR_INLINE Vec load(const T* p, int64_t) {
  return load(p);
}
template <class T>
FR_INLINE void store(T* p, Vec a, int64_t) {
  store(p, a);
}

struct Wide {
  double v = 0;
};
FR_INLINE Wide operator+(Wide a, Vec b) { return {a.v + static_cast<double>(b.v)}; }
FR_INLINE Vec rounded(Wide a) { return static_cast<float>(a.v); }
FR_INLINE void store(double* p, Wide a) { *p = a.v; }

#endif

// ---------------------------------------------------------------------------------------------------------------------
// What follows from the operations above
// ---------------------------------------------------------------------------------------------------------------------

// What sums of T are kept in: those of narrower types are as good as exact in a float.
template <class T>
using Sum = std::conditional_t<sizeof(T) == sizeof(float), Wide, Vec>;

FR_INLINE Vec rounded(Vec a) { return a; }

FR_INLINE double horizontal_sum(Wide a) {
  double lanes[Vec::kWidth];
  store(lanes, a);
  for (int width = Vec::kWidth / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

FR_INLINE float horizontal_sum(Vec a) {
  float lanes[Vec::kWidth];
  store(lanes, a);
  for (int width = Vec::kWidth / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

template <class Function>
FR_INLINE Vec map_lanes(Vec a, Function f) {
  float lanes[Vec::kWidth];
  store(lanes, a);
  for (float& lane : lanes) lane = f(lane);
  return load(lanes);
}

// e^x by range reduction x = n ln 2 + r and a polynomial in r; within 1 ulp over the normal range.
FR_INLINE Vec vexp(Vec x) {
#if defined(FUSEDRES_ISA_SCALAR)
  return ::expf(x.v);
#else
  const Vec clamped = vmin(Vec(88.72284f), vmax(Vec(-103.972f), x));  // NaN stays: it is the second operand
  const Vec n = round_to_int(clamped * Vec(1.44269504f));
  Vec r = fma(n, Vec(-0.693359375f), clamped);
  r = fma(n, Vec(2.12194440e-4f), r);
  Vec p(1.9875691500e-4f);
  p = fma(p, r, Vec(1.3981999507e-3f));
  p = fma(p, r, Vec(8.3334519073e-3f));
  p = fma(p, r, Vec(4.1665795894e-2f));
  p = fma(p, r, Vec(1.6666665459e-1f));
  p = fma(p, r, Vec(5.0000001201e-1f));
  p = fma(p, r * r, r + Vec(1.f));
  return scale_by_power_of_two(p, n);
#endif
}

FR_INLINE Vec verf(Vec x) {
  return map_lanes(x, [](float lane) { return ::erff(lane); });
}

}  // namespace
}  // namespace FUSEDRES_ISA
}  // namespace fusedres
