#pragma once

// What flash attention does with a tile between its two products, several values at a time. Included by ops.cpp.
//
// The results have the bits of loops over single values: each value is converted and scaled as there, and a maximum does not
// depend on the order, if no value is NaN.

#include <cmath>
#include <cstddef>
#include <cstdint>

#if defined(__AVX2__) && defined(__F16C__)
#    define ATTENTION_TILES_AVX2 1
#    include <immintrin.h>
#endif

namespace ggml::cpu::attention {

// Writes the mask of a query in a tile, times the slope of its head. Says whether it lets any key through.
static inline bool mask_row(const ggml_fp16_t * mask, float slope, int n, float * row) {
    ggml_cpu_fp16_to_fp32(mask, row, n);
    int n_seen = 0;
    for (int i = 0; i < n; i++) {
        row[i] *= slope;
        n_seen += row[i] != -INFINITY;
    }
    return n_seen > 0;
}

// The largest of n values, n a multiple of 16: in lanes, because a single one waits for each comparison.
static inline float largest(const float * x, int n) {
    float lanes[16];
    for (float & lane : lanes) {
        lane = -INFINITY;
    }
    for (int i = 0; i < n; i += 16) {
        for (int j = 0; j < 16; j++) {
            lanes[j] = lanes[j] > x[i + j] ? lanes[j] : x[i + j];
        }
    }
    float max = -INFINITY;
    for (const float lane : lanes) {
        max = max > lane ? max : lane;
    }
    return max;
}

static inline float to_f32(const float * x) {
    return *x;
}

static inline float to_f32(const ggml_fp16_t * x) {
    return GGML_CPU_FP16_TO_FP32(*x);
}

#if ATTENTION_TILES_AVX2

static inline __m256 load8(const float * x) {
    return _mm256_loadu_ps(x);
}

static inline __m256 load8(const ggml_fp16_t * x) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) x));
}

// Transposes 8 x 8 values; rows of x are `nb` bytes apart, rows of y `stride` floats.
template <typename T> static inline void transpose8(const char * x, size_t nb, float * y, int64_t stride) {
    __m256 a[8];
    __m256 b[8];
    for (int i = 0; i < 8; i++) {
        a[i] = load8((const T *) (x + i * nb));
    }
    for (int i = 0; i < 8; i += 2) {
        b[i]     = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        a[i]     = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
        a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
        a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
        a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(y + i * stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
        _mm256_storeu_ps(y + (i + 4) * stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
    }
}

#endif

// Writes n keys of n_embd values, `nb` bytes apart, as columns: value d of key k to columns[d * stride + k].
template <typename T>
static inline void transpose_keys(const char * keys, size_t nb, int n, int64_t n_embd, float * columns,
                                  int64_t stride) {
    const auto one_by_one = [&](int k0, int k1, int64_t d0) {
        for (int k = k0; k < k1; k++) {
            for (int64_t d = d0; d < n_embd; d++) {
                columns[d * stride + k] = to_f32((const T *) (keys + k * nb) + d);
            }
        }
    };
    int k = 0;
#if ATTENTION_TILES_AVX2
    for (; k + 8 <= n; k += 8) {
        int64_t d = 0;
        for (; d + 8 <= n_embd; d += 8) {
            transpose8<T>(keys + k * nb + d * sizeof(T), nb, columns + d * stride + k, stride);
        }
        one_by_one(k, k + 8, d);
    }
#endif
    one_by_one(k, n, 0);
}

} // namespace ggml::cpu::attention
