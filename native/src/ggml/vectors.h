#pragma once

// Vectors of 256 and 512 bits under the same names, for code that is written once for both, and sums of four products of
// bytes. Included on x86 with AVX2, by repack-rows.h and dot-rows.cpp, each of which has its own order of columns in them.

#include <immintrin.h>

#include <cstdint>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) &&                 \
    defined(__AVX512VNNI__)
#    define FAST_EXPERTS_512 1 // with 512-bit registers, too
#endif

// adds to each 32-bit lane the products of its four bytes, unsigned in u and signed in s
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#    define FAST_EXPERTS_VNNI 1
static inline __m256i dot_bytes(__m256i acc, __m256i u, __m256i s) {
    return _mm256_dpbusd_epi32(acc, u, s);
}
#elif defined(__AVXVNNI__)
#    define FAST_EXPERTS_VNNI 1
static inline __m256i dot_bytes(__m256i acc, __m256i u, __m256i s) {
    return _mm256_dpbusd_avx_epi32(acc, u, s);
}
#elif defined(FAST_EXPERTS_EMULATE_VNNI) // exact, as the instruction is: tests without it
#    define FAST_EXPERTS_VNNI 1
static inline __m256i dot_bytes(__m256i acc, __m256i u, __m256i s) {
    const __m256i even =
        _mm256_madd_epi16(_mm256_and_si256(u, _mm256_set1_epi16(0xFF)), _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(s, 8));
    return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
}
#endif

struct simd256 {
    using ints   = __m256i;
    using floats = __m256;

    static ints   zero() { return _mm256_setzero_si256(); }
    static ints   set8(int8_t x) { return _mm256_set1_epi8(x); }
    static ints   set16(int16_t x) { return _mm256_set1_epi16(x); }
    static ints   set32(int32_t x) { return _mm256_set1_epi32(x); }
    static ints   add16(ints a, ints b) { return _mm256_add_epi16(a, b); }
    static ints   sub16(ints a, ints b) { return _mm256_sub_epi16(a, b); }
    static ints   add32(ints a, ints b) { return _mm256_add_epi32(a, b); }
    static ints   sub32(ints a, ints b) { return _mm256_sub_epi32(a, b); }
    static ints   mul32(ints a, ints b) { return _mm256_mullo_epi32(a, b); }
    static ints   bits_and(ints a, ints b) { return _mm256_and_si256(a, b); }
    static ints   bits_or(ints a, ints b) { return _mm256_or_si256(a, b); }
    static ints   bits_xor(ints a, ints b) { return _mm256_xor_si256(a, b); }
    static ints   left16(ints a, int n) { return _mm256_slli_epi16(a, n); }
    static ints   right16(ints a, int n) { return _mm256_srli_epi16(a, n); }
    static ints   madd16(ints a, ints b) { return _mm256_madd_epi16(a, b); }
    static ints   maddubs(ints u, ints s) { return _mm256_maddubs_epi16(u, s); }
    static ints   abs8(ints a) { return _mm256_abs_epi8(a); }
    static ints   with_sign_of(ints a, ints s) { return _mm256_sign_epi8(a, s); }
    static floats zero_ps() { return _mm256_setzero_ps(); }
    static floats set_ps(float x) { return _mm256_set1_ps(x); }
    static floats to_float(ints a) { return _mm256_cvtepi32_ps(a); }
    static floats mul(floats a, floats b) { return _mm256_mul_ps(a, b); }
    static floats sub(floats a, floats b) { return _mm256_sub_ps(a, b); }
    static floats fmadd(floats a, floats b, floats c) { return _mm256_fmadd_ps(a, b, c); }
    static void   store(float * p, floats a) { _mm256_storeu_ps(p, a); }
#if FAST_EXPERTS_VNNI
    static ints dot(ints acc, ints u, ints s) { return dot_bytes(acc, u, s); }
#endif
};

#if FAST_EXPERTS_512
struct simd512 {
    using ints   = __m512i;
    using floats = __m512;

    static ints   zero() { return _mm512_setzero_si512(); }
    static ints   set8(int8_t x) { return _mm512_set1_epi8(x); }
    static ints   set32(int32_t x) { return _mm512_set1_epi32(x); }
    static ints   sub16(ints a, ints b) { return _mm512_sub_epi16(a, b); }
    static ints   add32(ints a, ints b) { return _mm512_add_epi32(a, b); }
    static ints   sub32(ints a, ints b) { return _mm512_sub_epi32(a, b); }
    static ints   mul32(ints a, ints b) { return _mm512_mullo_epi32(a, b); }
    static ints   bits_and(ints a, ints b) { return _mm512_and_si512(a, b); }
    static ints   bits_or(ints a, ints b) { return _mm512_or_si512(a, b); }
    static ints   bits_xor(ints a, ints b) { return _mm512_xor_si512(a, b); }
    static ints   left16(ints a, int n) { return _mm512_slli_epi16(a, n); }
    static ints   right16(ints a, int n) { return _mm512_srli_epi16(a, n); }
    static ints   madd16(ints a, ints b) { return _mm512_madd_epi16(a, b); }
    static ints   maddubs(ints u, ints s) { return _mm512_maddubs_epi16(u, s); }
    static ints   dot(ints acc, ints u, ints s) { return _mm512_dpbusd_epi32(acc, u, s); }
    static floats zero_ps() { return _mm512_setzero_ps(); }
    static floats set_ps(float x) { return _mm512_set1_ps(x); }
    // a mask of all lanes: GCC 12 warns of its own headers without (`__Y` may be used uninitialized)
    static floats to_float(ints a) { return _mm512_maskz_cvtepi32_ps(0xFFFF, a); }
    static floats mul(floats a, floats b) { return _mm512_mul_ps(a, b); }
    static floats sub(floats a, floats b) { return _mm512_sub_ps(a, b); }
    static floats fmadd(floats a, floats b, floats c) { return _mm512_fmadd_ps(a, b, c); }
    static void   store(float * p, floats a) { _mm512_storeu_ps(p, a); }
};
#endif
