// Vectors of floats and of 32-bit integers in the width that the compiler uses: AVX-512, AVX2, or the
// compiler's own vectors of four (SSE2, NEON). Everything above this file is written once, in terms of these names.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define HF_INLINE inline __attribute__((always_inline))

namespace hf {

// exp2(x) = 2^round(x) * p(x - round(x)); p has degree 5, p(0) = 1, and is within 2e-7 of 2^x on [-1/2, 1/2].
constexpr float kExp2[6] = {1.0f, 0.69314698f, 0.24022242f, 0.05550734f, 0.00967151f, 0.00132647f};

#if defined(__AVX512F__)

constexpr int kWidth = 16;
constexpr const char* kVariant = "avx512";
using Float = __m512;
using Int = __m512i;
using Mask = __mmask16;

HF_INLINE Float load(const float* p) { return _mm512_loadu_ps(p); }
HF_INLINE void store(float* p, Float x) { _mm512_storeu_ps(p, x); }
HF_INLINE Float splat(float x) { return _mm512_set1_ps(x); }
HF_INLINE Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
HF_INLINE Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
HF_INLINE Float sqrt(Float a) { return _mm512_sqrt_ps(a); }
HF_INLINE Float abs(Float a) { return _mm512_abs_ps(a); }
HF_INLINE float sum(Float a) { return _mm512_reduce_add_ps(a); }
HF_INLINE float largest(Float a) { return _mm512_reduce_max_ps(a); }
HF_INLINE Int load(const int* p) { return _mm512_loadu_si512(p); }
HF_INLINE void store(int* p, Int x) { _mm512_storeu_si512(p, x); }
HF_INLINE Int splat(int x) { return _mm512_set1_epi32(x); }
HF_INLINE Int sub(Int a, Int b) { return _mm512_sub_epi32(a, b); }
HF_INLINE Int add(Int a, Int b) { return _mm512_add_epi32(a, b); }
HF_INLINE Int mul(Int a, Int b) { return _mm512_mullo_epi32(a, b); }
HF_INLINE Int bit_xor(Int a, Int b) { return _mm512_xor_si512(a, b); }
template <int kBits> HF_INLINE Int shift_right(Int a) { return _mm512_srli_epi32(a, kBits); }
HF_INLINE Mask equal(Int a, Int b) { return _mm512_cmpeq_epi32_mask(a, b); }
HF_INLINE Mask greater(Int a, Int b) { return _mm512_cmpgt_epi32_mask(a, b); }
HF_INLINE Mask greater(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
HF_INLINE Mask at_most_unsigned(Int a, Int b) { return _mm512_cmple_epu32_mask(a, b); }
HF_INLINE Mask both(Mask a, Mask b) { return a & b; }
HF_INLINE Mask first_only(Mask a, Mask b) { return a & static_cast<Mask>(~b); }
HF_INLINE Float keep(Mask m, Float a) { return _mm512_maskz_mov_ps(m, a); }
HF_INLINE Float select(Mask m, Float a, Float b) { return _mm512_mask_blend_ps(m, b, a); }
HF_INLINE Int select(Mask m, Int a, Int b) { return _mm512_mask_blend_epi32(m, b, a); }
struct Doubles {
    __m512d low, high;
};
HF_INLINE void add(Float a, Doubles& sums) {
    sums.low += _mm512_cvtps_pd(_mm512_castps512_ps256(a));
    sums.high += _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1)));
}
HF_INLINE Float narrow(const Doubles& x) {
    const __m512d low = _mm512_castpd256_pd512(_mm256_castps_pd(_mm512_cvtpd_ps(x.low)));
    return _mm512_castpd_ps(_mm512_insertf64x4(low, _mm256_castps_pd(_mm512_cvtpd_ps(x.high)), 1));
}
HF_INLINE Float exp2(Float x) {  // any x <= 127; 0 where it underflows
    Float whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), part = x - whole;
    Float p = splat(kExp2[5]);
    for (int i = 4; i >= 0; i--) p = fma(p, part, splat(kExp2[i]));
    return _mm512_scalef_ps(p, whole);
}
HF_INLINE void transpose(const float* from, int from_stride, float* to, int to_stride) {  // kWidth x kWidth
    Float r[16], t[16];
    for (int i = 0; i < 16; i++) r[i] = load(from + i * from_stride);
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    auto low = [](Float a, Float b) { return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))); };
    auto high = [](Float a, Float b) { return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))); };
    for (int i = 0; i < 16; i += 4) {  // r[i + c], lane l: column 4 l + c of rows i … i + 3
        r[i] = low(t[i], t[i + 2]);
        r[i + 1] = high(t[i], t[i + 2]);
        r[i + 2] = low(t[i + 1], t[i + 3]);
        r[i + 3] = high(t[i + 1], t[i + 3]);
    }
    for (int c = 0; c < 4; c++) {
        Float even_0 = _mm512_shuffle_f32x4(r[c], r[4 + c], 0x88), odd_0 = _mm512_shuffle_f32x4(r[c], r[4 + c], 0xdd);
        Float even_1 = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0x88), odd_1 = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0xdd);
        store(to + c * to_stride, _mm512_shuffle_f32x4(even_0, even_1, 0x88));
        store(to + (8 + c) * to_stride, _mm512_shuffle_f32x4(even_0, even_1, 0xdd));
        store(to + (4 + c) * to_stride, _mm512_shuffle_f32x4(odd_0, odd_1, 0x88));
        store(to + (12 + c) * to_stride, _mm512_shuffle_f32x4(odd_0, odd_1, 0xdd));
    }
}

#elif defined(__AVX2__)

constexpr int kWidth = 8;
constexpr const char* kVariant = "avx2";
using Float = __m256;
using Int = __m256i;
using Mask = __m256i;  // all bits of a lane set or none

HF_INLINE Float load(const float* p) { return _mm256_loadu_ps(p); }
HF_INLINE void store(float* p, Float x) { _mm256_storeu_ps(p, x); }
HF_INLINE Float splat(float x) { return _mm256_set1_ps(x); }
HF_INLINE Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
HF_INLINE Float max(Float a, Float b) { return _mm256_max_ps(a, b); }
HF_INLINE Float sqrt(Float a) { return _mm256_sqrt_ps(a); }
HF_INLINE Float abs(Float a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
HF_INLINE float sum(Float a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
HF_INLINE float largest(Float a) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
HF_INLINE Int load(const int* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
HF_INLINE void store(int* p, Int x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
HF_INLINE Int splat(int x) { return _mm256_set1_epi32(x); }
HF_INLINE Int sub(Int a, Int b) { return _mm256_sub_epi32(a, b); }
HF_INLINE Int add(Int a, Int b) { return _mm256_add_epi32(a, b); }
HF_INLINE Int mul(Int a, Int b) { return _mm256_mullo_epi32(a, b); }
HF_INLINE Int bit_xor(Int a, Int b) { return _mm256_xor_si256(a, b); }
template <int kBits> HF_INLINE Int shift_right(Int a) { return _mm256_srli_epi32(a, kBits); }
HF_INLINE Mask equal(Int a, Int b) { return _mm256_cmpeq_epi32(a, b); }
HF_INLINE Mask greater(Int a, Int b) { return _mm256_cmpgt_epi32(a, b); }
HF_INLINE Mask greater(Float a, Float b) { return _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
HF_INLINE Mask at_most_unsigned(Int a, Int b) { return _mm256_cmpeq_epi32(_mm256_min_epu32(a, b), a); }
HF_INLINE Mask both(Mask a, Mask b) { return _mm256_and_si256(a, b); }
HF_INLINE Mask first_only(Mask a, Mask b) { return _mm256_andnot_si256(b, a); }
HF_INLINE Float keep(Mask m, Float a) { return _mm256_and_ps(_mm256_castsi256_ps(m), a); }
HF_INLINE Float select(Mask m, Float a, Float b) { return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(m)); }
HF_INLINE Int select(Mask m, Int a, Int b) { return _mm256_blendv_epi8(b, a, m); }
struct Doubles {
    __m256d low, high;
};
HF_INLINE void add(Float a, Doubles& sums) {
    sums.low += _mm256_cvtps_pd(_mm256_castps256_ps128(a));
    sums.high += _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1));
}
HF_INLINE Float narrow(const Doubles& x) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm256_cvtpd_ps(x.low)), _mm256_cvtpd_ps(x.high), 1);
}
HF_INLINE Float exp2(Float x) {  // any x <= 127; at least 2^-126
    x = max(splat(-126.0f), x);  // in this order NaN stays NaN
    Float whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), part = x - whole;
    Float p = splat(kExp2[5]);
    for (int i = 4; i >= 0; i--) p = fma(p, part, splat(kExp2[i]));
    Int exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
}
HF_INLINE void transpose(const float* from, int from_stride, float* to, int to_stride) {  // kWidth x kWidth
    Float r[8], t[8];
    for (int i = 0; i < 8; i++) r[i] = load(from + i * from_stride);
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int c = 0; c < 4; c++) {
        store(to + c * to_stride, _mm256_permute2f128_ps(r[c], r[4 + c], 0x20));
        store(to + (4 + c) * to_stride, _mm256_permute2f128_ps(r[c], r[4 + c], 0x31));
    }
}

#else

constexpr int kWidth = 4;
constexpr const char* kVariant = "portable";
typedef float Float __attribute__((vector_size(16)));
typedef int Int __attribute__((vector_size(16)));
typedef unsigned Unsigned __attribute__((vector_size(16)));
using Mask = Int;  // all bits of a lane set or none

template <typename To, typename From> HF_INLINE To as(From x) {
    To y;
    static_assert(sizeof x == sizeof y);
    std::memcpy(&y, &x, sizeof y);
    return y;
}
HF_INLINE Float load(const float* p) {
    Float x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
HF_INLINE Int load(const int* p) {
    Int x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
HF_INLINE void store(float* p, Float x) { std::memcpy(p, &x, sizeof x); }
HF_INLINE void store(int* p, Int x) { std::memcpy(p, &x, sizeof x); }
HF_INLINE Float splat(float x) { return Float{x, x, x, x}; }
HF_INLINE Int splat(int x) { return Int{x, x, x, x}; }
HF_INLINE Float fma(Float a, Float b, Float c) { return a * b + c; }  // contracted where the machine has it
HF_INLINE Float select(Mask m, Float a, Float b) { return as<Float>((m & as<Int>(a)) | (~m & as<Int>(b))); }
HF_INLINE Int select(Mask m, Int a, Int b) { return (m & a) | (~m & b); }
HF_INLINE Float max(Float a, Float b) { return select(a > b, a, b); }
HF_INLINE Float sqrt(Float a) { return Float{std::sqrt(a[0]), std::sqrt(a[1]), std::sqrt(a[2]), std::sqrt(a[3])}; }
HF_INLINE Float abs(Float a) { return as<Float>(as<Int>(a) & splat(0x7fffffff)); }
HF_INLINE float sum(Float a) { return (a[0] + a[2]) + (a[1] + a[3]); }
HF_INLINE float largest(Float a) {
    float x = a[0] > a[1] ? a[0] : a[1], y = a[2] > a[3] ? a[2] : a[3];
    return x > y ? x : y;
}
HF_INLINE Int sub(Int a, Int b) { return as<Int>(as<Unsigned>(a) - as<Unsigned>(b)); }
HF_INLINE Int add(Int a, Int b) { return as<Int>(as<Unsigned>(a) + as<Unsigned>(b)); }
HF_INLINE Int mul(Int a, Int b) { return as<Int>(as<Unsigned>(a) * as<Unsigned>(b)); }
HF_INLINE Int bit_xor(Int a, Int b) { return a ^ b; }
template <int kBits> HF_INLINE Int shift_right(Int a) { return as<Int>(as<Unsigned>(a) >> kBits); }
HF_INLINE Mask equal(Int a, Int b) { return a == b; }
HF_INLINE Mask greater(Int a, Int b) { return a > b; }
HF_INLINE Mask greater(Float a, Float b) { return a > b; }
HF_INLINE Mask at_most_unsigned(Int a, Int b) { return as<Unsigned>(a) <= as<Unsigned>(b); }
HF_INLINE Mask both(Mask a, Mask b) { return a & b; }
HF_INLINE Mask first_only(Mask a, Mask b) { return a & ~b; }
HF_INLINE Float keep(Mask m, Float a) { return as<Float>(m & as<Int>(a)); }
struct Doubles {
    double at[kWidth];
};
HF_INLINE void add(Float a, Doubles& sums) {
    for (int i = 0; i < kWidth; i++) sums.at[i] += a[i];
}
HF_INLINE Float narrow(const Doubles& x) {
    Float a;
    for (int i = 0; i < kWidth; i++) a[i] = static_cast<float>(x.at[i]);
    return a;
}
HF_INLINE Float exp2(Float x) {  // any x <= 127; at least 2^-126
    x = max(splat(-126.0f), x);  // in this order NaN stays NaN
    const Float shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    Float shifted = x + shifter, part = x - (shifted - shifter);
    Float p = splat(kExp2[5]);
    for (int i = 4; i >= 0; i--) p = fma(p, part, splat(kExp2[i]));
    return as<Float>(as<Unsigned>(p) + ((as<Unsigned>(shifted) - as<Unsigned>(shifter)) << 23));
}
HF_INLINE void transpose(const float* from, int from_stride, float* to, int to_stride) {  // kWidth x kWidth
    for (int i = 0; i < kWidth; i++)
        for (int j = 0; j < kWidth; j++) to[j * to_stride + i] = from[i * from_stride + j];
}

#endif

HF_INLINE Float zero() { return splat(0.0f); }
HF_INLINE Mask within(Int place, Int first, Int extent) { return at_most_unsigned(sub(place, first), extent); }

}  // namespace hf
