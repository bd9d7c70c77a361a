// PTX instructions by name: `asm volatile("a.b.c %0, [%1];" : "=r"(x) : "r"(p))` becomes emu::ptx::a_b_c(x, p). An
// instruction that is not here does not compile.
#pragma once

#include "emulator/machine.h"

// Inlined, so that a report names the kernel's line.
#define EMU_INLINE inline __attribute__((always_inline))

namespace emu::ptx {

// An operand has the size that its constraint says.
template <char kConstraint, class T>
T operand(T value) {
  constexpr size_t kBytes = kConstraint == 'h' ? 2 : kConstraint == 'l' || kConstraint == 'd' ? 8 : 4;
  static_assert(kConstraint == 'n' || sizeof(T) == kBytes, "the operand's size is not that of its constraint");
  constexpr bool kFloating = kConstraint == 'f' || kConstraint == 'd';
  static_assert(kConstraint == 'n' || std::is_pointer_v<T> || std::is_floating_point_v<T> == kFloating,
                "the operand's type is not that of its constraint");
  return value;
}

// ---------------------------------------------------------------------------------------------------------------------
// Asynchronous copies
// ---------------------------------------------------------------------------------------------------------------------

template <class S, class G>
EMU_INLINE void cp_async_cg_shared_global(S to, G from, int bytes) {
  copy_async(shared_pointer(to), (const void*)from, bytes, bytes);
}
template <class S, class G>
EMU_INLINE void cp_async_cg_shared_global(S to, G from, int bytes, unsigned source_bytes) {
  if (bytes != 16) fail("cp.async.cg copies 16 bytes, not %d", bytes);
  copy_async(shared_pointer(to), (const void*)from, bytes, source_bytes);
}
template <class S, class G>
EMU_INLINE void cp_async_ca_shared_global(S to, G from, int bytes, unsigned source_bytes) {
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("cp.async.ca copies 4, 8 or 16 bytes, not %d", bytes);
  copy_async(shared_pointer(to), (const void*)from, bytes, source_bytes);
}
template <class S, class G>
EMU_INLINE void cp_async_ca_shared_global(S to, G from, int bytes) {
  cp_async_ca_shared_global(to, from, bytes, bytes);
}
template <class S, class G>
EMU_INLINE void cp_async_cg_shared_global_L2_128B(S to, G from, int bytes, unsigned source_bytes) {
  cp_async_cg_shared_global(to, from, bytes, source_bytes);
}
inline void cp_async_commit_group() { copy_async_commit(); }
inline void cp_async_wait_group(int n) { copy_async_wait(n); }
inline void cp_async_wait_all() { copy_async_wait_all(); }

// ---------------------------------------------------------------------------------------------------------------------
// Barriers
// ---------------------------------------------------------------------------------------------------------------------

inline void bar_sync(unsigned id) { block_barrier(id); }
inline void bar_sync(unsigned id, unsigned threads) { block_barrier(id, threads); }
inline void barrier_sync(unsigned id, unsigned threads) { block_barrier(id, threads); }

template <class S>
uint64_t* barrier_at(S address) {
  return static_cast<uint64_t*>(shared_pointer(address));
}
template <class S>
EMU_INLINE void mbarrier_init_shared_cta_b64(S barrier, unsigned count) {
  mbarrier_init(barrier_at(barrier), count);
}
template <class S>
EMU_INLINE void mbarrier_init_shared_b64(S barrier, unsigned count) {
  mbarrier_init(barrier_at(barrier), count);
}
template <class S>
EMU_INLINE void mbarrier_arrive_shared_cta_b64(uint64_t& state, S barrier) {
  state = mbarrier_arrive(barrier_at(barrier));
}
template <class S>
EMU_INLINE void mbarrier_arrive_shared_b64(uint64_t& state, S barrier) {
  state = mbarrier_arrive(barrier_at(barrier));
}
template <class S>
void cp_async_mbarrier_arrive_noinc_shared_cta_b64(S barrier) {
  mbarrier_arrive_after_copies(barrier_at(barrier), true);
}
template <class S>
void cp_async_mbarrier_arrive_noinc_shared_b64(S barrier) {
  mbarrier_arrive_after_copies(barrier_at(barrier), true);
}
template <class P, class S>
void mbarrier_test_wait_parity_shared_cta_b64(P& passed, S barrier, unsigned parity) {
  passed = mbarrier_passed(barrier_at(barrier), parity & 1);
}
template <class P, class S>
void mbarrier_test_wait_parity_shared_b64(P& passed, S barrier, unsigned parity) {
  mbarrier_test_wait_parity_shared_cta_b64(passed, barrier, parity);
}
template <class P, class S>
void mbarrier_try_wait_parity_shared_cta_b64(P& passed, S barrier, unsigned parity) {
  mbarrier_test_wait_parity_shared_cta_b64(passed, barrier, parity);
}
template <class P, class S>
void mbarrier_try_wait_parity_shared_b64(P& passed, S barrier, unsigned parity) {
  mbarrier_test_wait_parity_shared_cta_b64(passed, barrier, parity);
}

// ---------------------------------------------------------------------------------------------------------------------
// Predicates and small arithmetic, for instructions that need a predicate register
// ---------------------------------------------------------------------------------------------------------------------

template <class T>
void selp_u32(T& to, unsigned a, unsigned b, bool p) {
  to = p ? a : b;
}
template <class T>
void selp_b32(T& to, unsigned a, unsigned b, bool p) {
  to = p ? a : b;
}
template <class T>
void setp_ne_b32(bool& p, T a, T b) {
  p = a != b;
}
template <class T, class U>
void setp_ne_b32(bool& p, T a, U b) {
  p = a != static_cast<T>(b);
}

// ---------------------------------------------------------------------------------------------------------------------
// Loads and stores with cache hints
// ---------------------------------------------------------------------------------------------------------------------

template <class R, class G>
void load_words(G from, R* const (&to)[4], int words) {
  touch((const void*)from, 4 * words, Access::kRead);
  for (int i = 0; i < words; ++i) read_quietly(to[i], (const char*)from + 4 * i, 4);
}
template <class R, class G>
void ld_global_nc_L1_no_allocate_v4_b32(R& a, R& b, R& c, R& d, G from) {
  load_words<R, G>(from, {&a, &b, &c, &d}, 4);
}
template <class R, class G>
void ld_global_nc_v4_b32(R& a, R& b, R& c, R& d, G from) {
  load_words<R, G>(from, {&a, &b, &c, &d}, 4);
}
template <class R, class G>
void st_global_v4_b32(G to, R a, R b, R c, R d) {
  touch((const void*)to, 16, Access::kWrite);
  const R words[4] = {a, b, c, d};
  write_quietly((void*)to, words, 16);
}

// ---------------------------------------------------------------------------------------------------------------------
// Matrices. Fragment layouts are those of the PTX manual, "Matrix Fragments for mma.m16n8k16" and its neighbours.
// ---------------------------------------------------------------------------------------------------------------------

constexpr unsigned kFullMask = 0xffffffffu;

// 8x8 matrices of 2-byte elements: lanes 8j to 8j+7 give the rows of matrix j, each lane gets two neighbours of one
// row.
template <int kMatrices, bool kTransposed, class S>
void load_matrices(uint32_t* const (&to)[4], S row_address) {
  const void* row = shared_pointer(row_address);
  const unsigned lane = lane_index();
  if (lane < 8 * kMatrices) touch(row, 16, Access::kRead);
  const Exchange& all = exchange("ldmatrix", kFullMask, &row, sizeof row);
  const auto element = [&](int matrix, unsigned r, unsigned c) {
    const char* source;
    uint16_t value;
    read_slot(all, 8 * matrix + r, &source, sizeof source);
    read_quietly(&value, source + 2 * c, 2);
    return uint32_t{value};
  };
  for (int j = 0; j < kMatrices; ++j) {
    const unsigned r = lane / 4, c = lane % 4 * 2;
    *to[j] =
        kTransposed ? element(j, c, r) | element(j, c + 1, r) << 16 : element(j, r, c) | element(j, r, c + 1) << 16;
  }
}
#define EMU_LDMATRIX(suffix, transposed)                                                                      \
  template <class S>                                                                                          \
  void ldmatrix_sync_aligned_m8n8_x1##suffix(uint32_t& a, S address) {                                        \
    load_matrices<1, transposed>({&a, nullptr, nullptr, nullptr}, address);                                   \
  }                                                                                                           \
  template <class S>                                                                                          \
  void ldmatrix_sync_aligned_m8n8_x2##suffix(uint32_t& a, uint32_t& b, S address) {                           \
    load_matrices<2, transposed>({&a, &b, nullptr, nullptr}, address);                                        \
  }                                                                                                           \
  template <class S>                                                                                          \
  void ldmatrix_sync_aligned_m8n8_x4##suffix(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, S address) { \
    load_matrices<4, transposed>({&a, &b, &c, &d}, address);                                                  \
  }
EMU_LDMATRIX(_shared_b16, false)
EMU_LDMATRIX(_shared_cta_b16, false)
EMU_LDMATRIX(_trans_shared_b16, true)
EMU_LDMATRIX(_trans_shared_cta_b16, true)
#undef EMU_LDMATRIX

inline float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline float half_bits_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000u | mantissa << 13);
  if (exponent == 0) return bits_to_float(sign | 0x3f800000u) * (static_cast<float>(mantissa) * 0x1p-24f);
  return bits_to_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

struct BFloat16Pairs {
  static constexpr int kPerWord = 2;
  static float get(uint32_t word, int i) { return bits_to_float((i ? word >> 16 : word & 0xffff) << 16); }
};
struct HalfPairs {
  static constexpr int kPerWord = 2;
  static float get(uint32_t word, int i) { return half_bits_to_float(static_cast<uint16_t>(i ? word >> 16 : word)); }
};
struct TensorFloats {
  static constexpr int kPerWord = 1;
  static float get(uint32_t word, int) { return bits_to_float(word & 0xffffe000u); }  // 10 bits of mantissa are read
};

template <int kWordsA, int kWordsB>
struct Fragments {
  uint32_t a[kWordsA], b[kWordsB];
};

// products[lane][i] = A B: rows lane / 4 and 8 below, columns 2 (lane % 4) and 1 to the right.
template <class E, int kWordsA, int kWordsB>
__attribute__((no_sanitize("thread"))) void multiply(const Slots& slots, Products& products) {
  constexpr int kDepth = kWordsB * 4 * E::kPerWord, kPer = E::kPerWord;
  float a[16][kDepth], b[8][kDepth];
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    Fragments<kWordsA, kWordsB> words;
    memcpy(&words, slots[lane], sizeof words);
    const int group = static_cast<int>(lane / 4), place = static_cast<int>(lane % 4) * kPer;
    for (int i = 0; i < kPer; ++i) {
      // Word w of A: rows 8 below for odd w, the second half of the depth for w >= 2.
      for (int w = 0; w < kWordsA; ++w) a[group + w % 2 * 8][place + i + w / 2 * 4 * kPer] = E::get(words.a[w], i);
      for (int w = 0; w < kWordsB; ++w) b[group][place + i + w * 4 * kPer] = E::get(words.b[w], i);
    }
  }
  for (unsigned lane = 0; lane < kWarp; ++lane)
    for (unsigned i = 0; i < 4; ++i) {
      float sum = 0;
      for (int k = 0; k < kDepth; ++k) sum += a[lane / 4 + i / 2 * 8][k] * b[lane % 4 * 2 + i % 2][k];
      products[lane][i] = sum;
    }
}

template <class E, int kWordsA, int kWordsB>
void multiply_add(const char* what, float* const (&d)[4], const Fragments<kWordsA, kWordsB>& mine,
                  const float (&c)[4]) {
  const Exchange& all = exchange(what, kFullMask, &mine, sizeof mine, multiply<E, kWordsA, kWordsB>);
  float products[4];
  read_products(all, lane_index(), products);
  for (int i = 0; i < 4; ++i) *d[i] = c[i] + products[i];
}

#define EMU_MMA_4_2(name, elements)                                                                                \
  inline void name(float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, \
                   uint32_t b0, uint32_t b1, float c0, float c1, float c2, float c3) {                             \
    multiply_add<elements, 4, 2>(#name, {&d0, &d1, &d2, &d3}, {{a0, a1, a2, a3}, {b0, b1}}, {c0, c1, c2, c3});     \
  }
#define EMU_MMA_2_1(name, elements)                                                                             \
  inline void name(float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t b0, float c0, \
                   float c1, float c2, float c3) {                                                              \
    multiply_add<elements, 2, 1>(#name, {&d0, &d1, &d2, &d3}, {{a0, a1}, {b0}}, {c0, c1, c2, c3});              \
  }
EMU_MMA_4_2(mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32, BFloat16Pairs)
EMU_MMA_4_2(mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32, HalfPairs)
EMU_MMA_4_2(mma_sync_aligned_m16n8k8_row_col_f32_tf32_tf32_f32, TensorFloats)
EMU_MMA_2_1(mma_sync_aligned_m16n8k8_row_col_f32_bf16_bf16_f32, BFloat16Pairs)
EMU_MMA_2_1(mma_sync_aligned_m16n8k8_row_col_f32_f16_f16_f32, HalfPairs)
EMU_MMA_2_1(mma_sync_aligned_m16n8k4_row_col_f32_tf32_tf32_f32, TensorFloats)
#undef EMU_MMA_4_2
#undef EMU_MMA_2_1

inline void cvt_rna_tf32_f32(uint32_t& to, float from) {
  memcpy(&to, &from, 4);
  if ((to & 0x7f800000u) != 0x7f800000u) to = (to + 0x1000u) & 0xffffe000u;
}

}  // namespace emu::ptx

#undef EMU_INLINE
