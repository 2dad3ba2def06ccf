#pragma once

// Sums of four products of bytes, where the processor has an instruction for them. Included on x86 with AVX2, by
// repack-rows.h and dot-rows.cpp.

#include <immintrin.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VNNI__)
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
