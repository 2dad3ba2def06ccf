#pragma once

// Products of repacked weights with many rows of activations at once, for MUL_MAT_ID and MUL_MAT.
//
// gemv unpacks the weights again for every row. For few rows, a block is unpacked here once and multiplied with all of them.
// For more, a group of columns is unpacked, to bytes in the order in which one 32-bit lane holds four consecutive values of
// one column, and stays in the cache while up to ROWS_CHUNK rows pass by. A row is read as it was quantized: four of its
// bytes go to all lanes. Values are made unsigned where that lets one instruction multiply them:
// sum((u - bias)*y) = sum(u*y) - bias*sum(y).
//
// The results have the bits of gemv, of a dense product those of gemm: sums of integers are exact in any order, and the
// floats are multiplied and added in the same order.
//
// Included by repack.cpp, for weights of 8 interleaved columns in blocks of 8 values, which only AVX2 has. Other layouts and
// processors keep gemv and gemm. GGML_CPU_NO_FAST_EXPERTS leaves all of it out.

#include <algorithm>
#include <type_traits>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && !defined(GGML_CPU_NO_FAST_EXPERTS)
#    define REPACK_ROWS 1
#    include "vectors.h"
#endif

#if defined(_MSC_VER)
#    define REPACK_ROWS_NOINLINE __declspec(noinline)
#else
#    define REPACK_ROWS_NOINLINE __attribute__((noinline))
#endif

namespace ggml::cpu::repack {

static constexpr int64_t ROWS_CHUNK = 64; // rows for which columns are unpacked once
static constexpr size_t  ROWS_ALIGN = 64;

template <typename BLOC_TYPE> struct rows_product {
    static constexpr bool available = false;
};

#if REPACK_ROWS

//
// vectors of 8 or 16 columns
//

struct vec256 : simd256 {
    static constexpr int n_groups = 1; // of eight columns
    static constexpr int n_rows   = 4; // that fill the registers

    // columns 0 1 4 5 2 3 6 7, the order in which _mm256_shuffle_ps leaves them, and back
    static floats reorder(floats a) { return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(a), 0xD8)); }
};

#    if FAST_EXPERTS_512

struct vec512 : simd512 {
    static constexpr int n_groups = 2;
    static constexpr int n_rows   = 8;

    static floats reorder(floats a) { // with a mask: see vectors.h
        return _mm512_castpd_ps(_mm512_maskz_permutex_pd(0xFF, _mm512_castps_pd(a), 0xD8));
    }
};

using vec_wide = vec512;
#    else
using vec_wide = vec256;
#    endif

// four bytes of a row, for all lanes
template <typename V> static inline typename V::ints four_of(const int8_t * y) {
    int32_t v;
    memcpy(&v, y, sizeof(v));
    return V::set32(v);
}

// two vectors with eight values of four columns each => eight columns with the first four values, and with the last four
static inline __m256i first_quads(__m256i c0123, __m256i c4567) {
    return _mm256_castps_si256(_mm256_shuffle_ps(_mm256_castsi256_ps(c0123), _mm256_castsi256_ps(c4567), 0x88));
}

static inline __m256i last_quads(__m256i c0123, __m256i c4567) {
    return _mm256_castps_si256(_mm256_shuffle_ps(_mm256_castsi256_ps(c0123), _mm256_castsi256_ps(c4567), 0xDD));
}

// Of the columns that are unpacked next, as much as a block of all groups has: spread over the blocks of a product, it is
// there in time, and memory is read while the processor multiplies.
template <typename V, typename WEIGHTS> static inline void prefetch_part(const WEIGHTS * next, int64_t b) {
    if (next != nullptr) {
        const char * first = (const char *) (next + b * V::n_groups);
        for (size_t i = 0; i < V::n_groups * sizeof(WEIGHTS); i += 64) {
            _mm_prefetch(first + i, _MM_HINT_T0);
        }
    }
}

//
// Q4_0, MXFP4, IQ4_NL: one scale for a block of 32 values
//

template <typename BLOC_TYPE> struct rows_product_b32 {
    static constexpr bool available = true;

    using narrow = vec256;
    using wide   = vec_wide;

    static constexpr bool is_q4_0  = std::is_same_v<BLOC_TYPE, block_q4_0>;
    static constexpr bool is_mxfp4 = std::is_same_v<BLOC_TYPE, block_mxfp4>;

#    if FAST_EXPERTS_VNNI
    static constexpr bool is_signed = false;
#    else
    static constexpr bool is_signed = !is_q4_0 && !is_mxfp4; // 16-bit sums of unsigned values would overflow
#    endif
    static constexpr int  bias         = is_q4_0 ? 8 : is_mxfp4 ? 12 : is_signed ? 0 : 128;
    static constexpr int  n_quads_16   = is_q4_0 ? 8 : 4; // products that a 16-bit sum holds: 8*2*15*127, 4*2*24*127
    static constexpr bool gemm_differs = false;           // gemm has the bits of gemv
    static constexpr int  min_rows     = 6;               // for fewer, columns are not kept: measured

    using weights =
        std::conditional_t<is_q4_0, block_q4_0x8, std::conditional_t<is_mxfp4, block_mxfp4x8, block_iq4_nlx8>>;
    using param = block_q8_0;

    // of a row's block: its scale, and bias*sum(y)
    struct info {
        float   d;
        int32_t s;
    };

    // a block of columns, unpacked
    template <typename V> struct alignas(32 * V::n_groups) columns {
        typename V::ints   q[8];
        typename V::floats d;
    };

    static void prepare_row(const param * row, int64_t nb, info * out) {
        for (int64_t b = 0; b < nb; b++) {
            const __m256i y = _mm256_loadu_si256((const __m256i *) row[b].qs);
            const __m256i s = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), y), _mm256_set1_epi16(1));
            __m128i       t = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
            t               = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4E));
            t               = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0xB1));
            out[b].d        = GGML_CPU_FP16_TO_FP32(row[b].d);
            out[b].s        = bias * _mm_cvtsi128_si32(t);
        }
    }

    // eight columns of a block: F(i, values 4*i to 4*i + 3)
    template <typename F> static inline void unpack(const weights & w, const F & store) {
        const __m256i m4 = _mm256_set1_epi8(0x0F);
        __m256i       lo[4], hi[4];
        for (int i = 0; i < 4; i++) {
            const __m256i raw =
                _mm256_loadu_si256((const __m256i *) w.qs + i); // 0123 and 4567, k 0-7, then 8-15; high: + 16
            if constexpr (is_q4_0) {
                const __m256i u = _mm256_xor_si256(raw, _mm256_set1_epi8((char) 0x88));
                lo[i]           = _mm256_and_si256(u, m4);
                hi[i]           = _mm256_and_si256(_mm256_srli_epi16(u, 4), m4);
            } else {
                const __m128i values = _mm_loadu_si128((const __m128i *) (is_mxfp4 ? kvalues_mxfp4 : kvalues_iq4nl));
                const __m256i lut = _mm256_add_epi8(_mm256_broadcastsi128_si256(values), _mm256_set1_epi8((char) bias));
                lo[i]             = _mm256_shuffle_epi8(lut, _mm256_and_si256(raw, m4));
                hi[i]             = _mm256_shuffle_epi8(lut, _mm256_and_si256(_mm256_srli_epi16(raw, 4), m4));
            }
        }
        for (int i = 0; i < 2; i++) {
            store(2 * i, first_quads(lo[2 * i], lo[2 * i + 1]));
            store(2 * i + 1, last_quads(lo[2 * i], lo[2 * i + 1]));
            store(2 * i + 4, first_quads(hi[2 * i], hi[2 * i + 1]));
            store(2 * i + 5, last_quads(hi[2 * i], hi[2 * i + 1]));
        }
    }

    static inline __m256 scales(const weights & w) {
        if constexpr (is_mxfp4) {
            float e[8];
            for (int i = 0; i < 8; i++) {
                e[i] = GGML_CPU_E8M0_TO_FP32_HALF(w.e[i]);
            }
            return vec256::reorder(_mm256_loadu_ps(e));
        } else {
            return vec256::reorder(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) w.d)));
        }
    }

    // integer sums of a block for NR rows; q(i) is what `unpack` gave for i
    template <typename V, int NR, typename F>
    static inline void sums(const F & q, const param * const * rows, const info * const * infos, int64_t b,
                            typename V::ints * out) {
        for (int r = 0; r < NR; r++) {
            out[r] = V::set32(-infos[r][b].s);
        }
#    if FAST_EXPERTS_VNNI
        for (int i = 0; i < 8; i++) {
            const auto w = q(i);
            for (int r = 0; r < NR; r++) {
                out[r] = V::dot(out[r], w, four_of<V>(rows[r][b].qs + 4 * i));
            }
        }
#    else
        const auto ones = V::set16(1);
        if constexpr (is_signed) {
            for (int i = 0; i < 8; i++) {
                const auto w = q(i), u = V::abs8(w);
                for (int r = 0; r < NR; r++) {
                    const auto y = V::with_sign_of(four_of<V>(rows[r][b].qs + 4 * i), w);
                    out[r]       = V::add32(out[r], V::madd16(V::maddubs(u, y), ones));
                }
            }
        } else {
            typename V::ints part[NR];
            for (int first = 0; first < 8; first += n_quads_16) {
                for (int i = first; i < first + n_quads_16; i++) {
                    const auto w = q(i);
                    for (int r = 0; r < NR; r++) {
                        const auto p = V::maddubs(w, four_of<V>(rows[r][b].qs + 4 * i));
                        part[r]      = i == first ? p : V::add16(part[r], p);
                    }
                }
                for (int r = 0; r < NR; r++) {
                    out[r] = V::add32(out[r], V::madd16(part[r], ones));
                }
            }
        }
#    endif
    }

    template <typename V> static void unpack_columns(const weights * w, int64_t nb, columns<V> * out) {
        for (int g = 0; g < V::n_groups; g++, w += nb) {
            for (int64_t b = 0; b < nb; b++) {
                unpack(w[b], [&](int i, __m256i q) { _mm256_store_si256((__m256i *) &out[b].q[i] + g, q); });
                _mm256_store_ps((float *) &out[b].d + 8 * g, scales(w[b]));
            }
        }
    }

    // out of line: GCC unrolls it less
    template <typename V, int NR, bool OF_GEMM>
    REPACK_ROWS_NOINLINE static void kernel(int64_t nb, const columns<V> * c, const param * const * rows,
                                            const info * const * infos, float * const * dst, const weights * next) {
        typename V::floats acc[NR];
        for (int r = 0; r < NR; r++) {
            acc[r] = V::zero_ps();
        }
        for (int64_t b = 0; b < nb; b++) {
            prefetch_part<V>(next, b);
            typename V::ints sum[NR];
            sums<V, NR>([&](int i) { return c[b].q[i]; }, rows, infos, b, sum);
            for (int r = 0; r < NR; r++) {
                acc[r] = V::fmadd(V::to_float(sum[r]), V::mul(c[b].d, V::set_ps(infos[r][b].d)), acc[r]);
            }
        }
        for (int r = 0; r < NR; r++) {
            V::store(dst[r], V::reorder(acc[r]));
        }
    }

    // few rows: columns are unpacked and not kept, so that weights are read in one sequence
    template <int NR>
    REPACK_ROWS_NOINLINE static void few_rows(int64_t nb, const weights * w, const param * const * rows,
                                              const info * const * infos, float * const * dst, int64_t n_cols) {
        for (int64_t col = 0; col < n_cols; col += 8, w += nb) {
            __m256 acc[NR];
            for (int r = 0; r < NR; r++) {
                acc[r] = _mm256_setzero_ps();
            }
            for (int64_t b = 0; b < nb; b++) {
                __m256i q[8], sum[NR];
                unpack(w[b], [&](int i, __m256i v) { q[i] = v; });
                sums<vec256, NR>([&](int i) { return q[i]; }, rows, infos, b, sum);
                const __m256 d = scales(w[b]);
                for (int r = 0; r < NR; r++) {
                    acc[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[r]),
                                             _mm256_mul_ps(d, _mm256_set1_ps(infos[r][b].d)), acc[r]);
                }
            }
            for (int r = 0; r < NR; r++) {
                _mm256_storeu_ps(dst[r] + col, vec256::reorder(acc[r]));
            }
        }
    }
};

template <> struct rows_product<block_q4_0> : rows_product_b32<block_q4_0> {};
template <> struct rows_product<block_mxfp4> : rows_product_b32<block_mxfp4> {};
template <> struct rows_product<block_iq4_nl> : rows_product_b32<block_iq4_nl> {};

//
// Q4_K: blocks of 256 values, in eight sub-blocks of 32, each with a scale and a minimum
//

template <> struct rows_product<block_q4_K> {
    static constexpr bool available = true;

    using narrow = vec256;
    using wide   = vec_wide;

    static constexpr int  min_rows     = 6;
    static constexpr bool gemm_differs = true; // it adds to the floats after every two sub-blocks, gemv after all eight

    using weights = block_q4_Kx8;
    using param   = block_q8_K;

    // of a row's block: its scale, and the sums of the values of each sub-block, 16 bits each
    struct info {
        float   d;
        int32_t s[4];
    };

    template <typename V> struct alignas(32 * V::n_groups) columns {
        typename V::ints   q[64];
        typename V::ints   scales[8]; // of a sub-block: 16 bits, twice
        typename V::ints   mins[4];   // of two sub-blocks: 16 bits each; columns in their order
        typename V::floats d, dmin;   // dmin: columns in their order
    };

    static void prepare_row(const param * row, int64_t nb, info * out) {
        for (int64_t b = 0; b < nb; b++) {
            const __m256i bsums = _mm256_loadu_si256((const __m256i *) row[b].bsums);
            const __m128i s     = _mm_hadd_epi16(_mm256_castsi256_si128(bsums), _mm256_extracti128_si256(bsums, 1));
            out[b].d            = row[b].d;
            memcpy(out[b].s, &s, sizeof(out[b].s));
        }
    }

    // eight columns of two sub-blocks: store(i, values 4*i to 4*i + 3 of the first, i from 8 on: of the second)
    template <typename F> static inline void unpack(const weights & w, int pair, const F & store) {
        const __m256i m4 = _mm256_set1_epi8(0x0F);
        for (int j = 0; j < 4; j++) {
            const __m256i a    = _mm256_loadu_si256((const __m256i *) (w.qs + 256 * pair + 64 * j));
            const __m256i c    = _mm256_loadu_si256((const __m256i *) (w.qs + 256 * pair + 64 * j + 32));
            const __m256i a_lo = _mm256_and_si256(a, m4), a_hi = _mm256_and_si256(_mm256_srli_epi16(a, 4), m4);
            const __m256i c_lo = _mm256_and_si256(c, m4), c_hi = _mm256_and_si256(_mm256_srli_epi16(c, 4), m4);
            store(2 * j, first_quads(a_lo, c_lo));
            store(2 * j + 1, last_quads(a_lo, c_lo));
            store(2 * j + 8, first_quads(a_hi, c_hi));
            store(2 * j + 9, last_quads(a_hi, c_hi));
        }
    }

    static inline void unpack_scales(const weights & w, __m256i scales[8], __m256i mins[4]) {
        static const uint32_t kmask1 = 0x3f3f3f3f, kmask2 = 0x0f0f0f0f, kmask3 = 0x03030303;
        const __m128i         order = _mm_setr_epi8(0, 0, 1, 1, 4, 4, 5, 5, 2, 2, 3, 3, 6, 6, 7, 7);
        __m128i               both[8]; // of a sub-block: eight scales, eight minimums
        for (int i = 0; i < 8; i++) {
            uint32_t u[4];
            memcpy(u, w.scales + 12 * i, 12);
            u[3]               = ((u[2] >> 4) & kmask2) | (((u[1] >> 6) & kmask3) << 4);
            const uint32_t aux = u[1] & kmask1;
            u[1]               = (u[2] & kmask2) | (((u[0] >> 6) & kmask3) << 4);
            u[2]               = aux;
            u[0] &= kmask1;
            both[i]   = _mm_set_epi32(u[3], u[2], u[1], u[0]);
            scales[i] = _mm256_cvtepu8_epi16(_mm_shuffle_epi8(both[i], order));
        }
        for (int i = 0; i < 4; i++) {
            mins[i] = _mm256_cvtepu8_epi16(
                _mm_unpacklo_epi8(_mm_shuffle_epi32(both[2 * i], 78), _mm_shuffle_epi32(both[2 * i + 1], 78)));
        }
    }

    // adds the products of a sub-block for NR rows to `sum`; q(i) is what `unpack` gave
    template <typename V, int NR, typename F>
    static inline void add_sums(const F & q, typename V::ints scale, const int8_t * const * ys, int offset,
                                typename V::ints * sum) {
        typename V::ints s[NR];
#    if FAST_EXPERTS_VNNI
        for (int i = 0; i < 8; i++) {
            const auto w = q(i);
            for (int r = 0; r < NR; r++) {
                s[r] = V::dot(i == 0 ? V::zero() : s[r], w, four_of<V>(ys[r] + offset + 4 * i));
            }
        }
        const auto scale32 = V::bits_and(scale, V::set32(0xFFFF));
        for (int r = 0; r < NR; r++) {
            sum[r] = V::add32(sum[r], V::mul32(s[r], scale32));
        }
#    else
        for (int i = 0; i < 8; i++) {
            const auto w = q(i);
            for (int r = 0; r < NR; r++) {
                const auto p = V::maddubs(w, four_of<V>(ys[r] + offset + 4 * i));
                s[r]         = i == 0 ? p : V::add16(s[r], p); // at most 8*2*15*127
            }
        }
        for (int r = 0; r < NR; r++) {
            sum[r] = V::add32(sum[r], V::madd16(s[r], scale));
        }
#    endif
    }

    template <typename V> static void unpack_columns(const weights * w, int64_t nb, columns<V> * out) {
        for (int g = 0; g < V::n_groups; g++, w += nb) {
            for (int64_t b = 0; b < nb; b++) {
                __m256i scales[8], mins[4];
                unpack_scales(w[b], scales, mins);
                for (int i = 0; i < 8; i++) {
                    _mm256_store_si256((__m256i *) &out[b].scales[i] + g, scales[i]);
                }
                for (int i = 0; i < 4; i++) {
                    _mm256_store_si256((__m256i *) &out[b].mins[i] + g, mins[i]);
                    unpack(w[b], i,
                           [&](int j, __m256i q) { _mm256_store_si256((__m256i *) &out[b].q[16 * i + j] + g, q); });
                }
                _mm256_store_ps((float *) &out[b].d + 8 * g,
                                vec256::reorder(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) w[b].d))));
                _mm256_store_ps((float *) &out[b].dmin + 8 * g,
                                _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) w[b].dmin)));
            }
        }
    }

    template <typename V, int NR, bool OF_GEMM>
    REPACK_ROWS_NOINLINE static void kernel(int64_t nb, const columns<V> * c, const param * const * rows,
                                            const info * const * infos, float * const * dst, const weights * next) {
        typename V::floats acc[NR], acc_min[NR];
        for (int r = 0; r < NR; r++) {
            acc[r] = acc_min[r] = V::zero_ps();
        }
        for (int64_t b = 0; b < nb; b++) {
            prefetch_part<V>(next, b);
            const int8_t *   ys[NR];
            typename V::ints sum[NR];
            for (int r = 0; r < NR; r++) {
                ys[r]  = rows[r][b].qs;
                sum[r] = V::zero();
            }
            for (int i = 0; i < 8; i++) {
                add_sums<V, NR>([&](int j) { return c[b].q[8 * i + j]; }, c[b].scales[i], ys, 32 * i, sum);
                if (OF_GEMM && i % 2 == 1) {
                    for (int r = 0; r < NR; r++) {
                        acc[r] = V::fmadd(V::to_float(sum[r]), V::mul(c[b].d, V::set_ps(infos[r][b].d)), acc[r]);
                        sum[r] = V::zero();
                    }
                }
            }
            if (!OF_GEMM) {
                for (int r = 0; r < NR; r++) {
                    acc[r] = V::fmadd(V::to_float(sum[r]), V::mul(c[b].d, V::set_ps(infos[r][b].d)), acc[r]);
                }
            }
        }
        for (int64_t b = 0; b < nb; b++) { // apart: registers
            for (int r = 0; r < NR; r++) {
                const auto scale = V::mul(c[b].dmin, V::set_ps(infos[r][b].d));
                auto       m     = V::zero();
                for (int i = 0; i < 4; i++) {
                    m = V::add32(m, V::madd16(V::set32(infos[r][b].s[i]), c[b].mins[i]));
                    if (OF_GEMM) {
                        acc_min[r] = V::fmadd(V::to_float(m), scale, acc_min[r]);
                        m          = V::zero();
                    }
                }
                if (!OF_GEMM) {
                    acc_min[r] = V::fmadd(V::to_float(m), scale, acc_min[r]);
                }
            }
        }
        for (int r = 0; r < NR; r++) {
            V::store(dst[r], V::sub(V::reorder(acc[r]), acc_min[r]));
        }
    }

    template <int NR>
    REPACK_ROWS_NOINLINE static void few_rows(int64_t nb, const weights * w, const param * const * rows,
                                              const info * const * infos, float * const * dst, int64_t n_cols) {
        for (int64_t col = 0; col < n_cols; col += 8, w += nb) {
            __m256 acc[NR], acc_min[NR];
            for (int r = 0; r < NR; r++) {
                acc[r] = acc_min[r] = _mm256_setzero_ps();
            }
            for (int64_t b = 0; b < nb; b++) {
                __m256i        scales[8], mins[4], q[16], sum[NR], m[NR];
                const int8_t * ys[NR];
                unpack_scales(w[b], scales, mins);
                for (int r = 0; r < NR; r++) {
                    ys[r]  = rows[r][b].qs;
                    sum[r] = m[r] = _mm256_setzero_si256();
                }
                for (int i = 0; i < 4; i++) {
                    unpack(w[b], i, [&](int j, __m256i v) { q[j] = v; });
                    add_sums<vec256, NR>([&](int j) { return q[j]; }, scales[2 * i], ys, 64 * i, sum);
                    add_sums<vec256, NR>([&](int j) { return q[8 + j]; }, scales[2 * i + 1], ys, 64 * i + 32, sum);
                    for (int r = 0; r < NR; r++) {
                        m[r] = _mm256_add_epi32(m[r], _mm256_madd_epi16(_mm256_set1_epi32(infos[r][b].s[i]), mins[i]));
                    }
                }
                const __m256 d    = vec256::reorder(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) w[b].d)));
                const __m256 dmin = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) w[b].dmin));
                for (int r = 0; r < NR; r++) {
                    const __m256 row_d = _mm256_set1_ps(infos[r][b].d);
                    acc[r]             = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[r]), _mm256_mul_ps(d, row_d), acc[r]);
                    acc_min[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(m[r]), _mm256_mul_ps(dmin, row_d), acc_min[r]);
                }
            }
            for (int r = 0; r < NR; r++) {
                _mm256_storeu_ps(dst[r] + col, _mm256_sub_ps(vec256::reorder(acc[r]), acc_min[r]));
            }
        }
    }
};

#endif // REPACK_ROWS

// f(n) with a constant n, from 1 to MAX
template <int MAX, typename F> static inline void with_count(int64_t n, const F & f) {
    if (n == MAX) {
        f(std::integral_constant<int, MAX>());
    } else if constexpr (MAX > 1) {
        with_count<MAX - 1>(n, f);
    }
}

// The products of some columns with n_rows rows; row(i, its values, its infos, its first result) says where row i is.
template <typename BLOC_TYPE, bool OF_GEMM, typename F>
static void rows_multiply(char * scratch, int64_t nb, const char * src0, size_t nb01, int64_t n_cols, int64_t n_rows,
                          const F & row) {
    using product = rows_product<BLOC_TYPE>;
    using weights = typename product::weights;

    const typename product::param * rows[ROWS_CHUNK];
    const typename product::info *  infos[ROWS_CHUNK];
    float *                         dst[ROWS_CHUNK];

    for (int64_t first = 0; first < n_rows; first += ROWS_CHUNK) {
        const int64_t n = std::min(n_rows - first, ROWS_CHUNK);
        for (int64_t i = 0; i < n; i++) {
            row(first + i, rows[i], infos[i], dst[i]);
        }
        if (!OF_GEMM && n < product::min_rows) {
            with_count<product::min_rows - 1>(n, [&](auto nr) {
                product::template few_rows<nr>(nb, (const weights *) src0, rows, infos, dst, n_cols);
            });
            continue;
        }
        int64_t    col        = 0;
        const auto columns_of = [&](auto v) {
            using V  = decltype(v);
            auto * c = (typename product::template columns<V> *) scratch;
            product::template unpack_columns<V>((const weights *) (src0 + col * nb01), nb, c);
            const bool is_last = col + 8 * V::n_groups >= n_cols;
            const auto next    = is_last ? nullptr : (const weights *) (src0 + (col + 8 * V::n_groups) * nb01);
            for (int64_t i = 0, count; i < n; i += count) { // the last two parts are even: 9 rows are 5 and 4
                const int64_t left = n - i;
                count              = left <= V::n_rows ? left : left < 2 * V::n_rows ? (left + 1) / 2 : V::n_rows;
                with_count<V::n_rows>(count, [&](auto nr) {
                    product::template kernel<V, nr, OF_GEMM>(nb, c, rows + i, infos + i, dst + i,
                                                             i == 0 ? next : nullptr);
                });
            }
            for (int64_t i = 0; i < n; i++) {
                dst[i] += 8 * V::n_groups;
            }
            col += 8 * V::n_groups;
        };
        while (col + 8 * product::wide::n_groups <= n_cols) {
            columns_of(typename product::wide());
        }
        while (col < n_cols) {
            columns_of(typename product::narrow());
        }
    }
}

// Work data of a product behind its first `used` bytes: the infos of all rows of src1, a list, the columns of each thread.
template <typename BLOC_TYPE> struct rows_work {
    using product = rows_product<BLOC_TYPE>;
    using param   = typename product::param;
    using info    = typename product::info;

    int64_t n_rows, nb;
    size_t  used, list, scratch, scratch_size, end; // offsets; those behind `used` from the first aligned byte

    rows_work(size_t used, const ggml_tensor * src1, int64_t n_list, int n_threads) : used(used) {
        n_rows       = ggml_nrows(src1);
        nb           = src1->ne[0] / (std::is_same_v<param, block_q8_K> ? QK_K : QK8_0);
        list         = GGML_PAD(n_rows * nb * sizeof(info), ROWS_ALIGN);
        scratch      = list + GGML_PAD(n_list * sizeof(int32_t), ROWS_ALIGN);
        scratch_size = GGML_PAD(nb * sizeof(typename product::template columns<typename product::wide>), ROWS_ALIGN);
        end          = scratch + n_threads * scratch_size;
    }

    size_t size() const { return GGML_PAD(used, ROWS_ALIGN) + ROWS_ALIGN + end; }

    char * begin(const ggml_compute_params * params) const {
        char * found = (char *) GGML_PAD((uintptr_t) params->wdata + used, ROWS_ALIGN);
        GGML_ASSERT(found + end <= (const char *) params->wdata + params->wsize);
        return found;
    }

    const info * infos_of(const ggml_compute_params * params, int64_t row) const {
        return (const info *) begin(params) + row * nb;
    }

    char * scratch_of(const ggml_compute_params * params) const {
        return begin(params) + scratch + params->ith * scratch_size;
    }

    void prepare_row(const ggml_compute_params * params, int64_t row, const void * values) const {
        product::prepare_row((const param *) values, nb, (info *) begin(params) + row * nb);
    }

    // the list: how many experts have rows, then which
    void list_used(const ggml_compute_params * params, const int64_t * n_rows_of, int n_expert) const {
        int32_t * found = (int32_t *) (begin(params) + list);
        found[0]        = 0;
        for (int i = 0; i < n_expert; i++) {
            if (n_rows_of[i] > 0) {
                found[++found[0]] = i;
            }
        }
    }

    const int32_t * used_experts(const ggml_compute_params * params) const {
        return (const int32_t *) (begin(params) + list);
    }
};

// Columns of a dense product for the rows of one plane, as forward_mul_mat_one_chunk computes them.
template <typename BLOC_TYPE>
static void rows_dense(const rows_work<BLOC_TYPE> & work, const ggml_compute_params * params, const char * src0,
                       size_t nb01, int64_t n_cols, const char * src1, size_t src1_stride, int64_t first_row,
                       int64_t n_rows, char * dst, size_t nb1) {
    using product = rows_product<BLOC_TYPE>;
    using param   = typename product::param;
    using info    = typename product::info;

    int64_t    n_gemm = 0; // rows that gemm would take, and the others gemv
    const auto row    = [&](int64_t i, const param *& values, const info *& infos, float *& result) {
        values = (const param *) (src1 + i * src1_stride);
        infos  = work.infos_of(params, first_row + i);
        result = (float *) (dst + i * nb1);
    };
    if constexpr (product::gemm_differs) {
        n_gemm = n_rows > 3 ? n_rows - n_rows % 4 : 0;
        rows_multiply<BLOC_TYPE, true>(work.scratch_of(params), work.nb, src0, nb01, n_cols, n_gemm, row);
    }
    rows_multiply<BLOC_TYPE, false>(work.scratch_of(params), work.nb, src0, nb01, n_cols, n_rows - n_gemm,
                                    [&](int64_t i, const param *& values, const info *& infos, float *& result) {
                                        row(n_gemm + i, values, infos, result);
                                    });
}

// The products of all experts. A thread takes the columns of an expert by blocks, as it comes to them.
template <typename BLOC_TYPE, typename MAPPING>
static void rows_experts(const rows_work<BLOC_TYPE> & work, const ggml_compute_params * params, ggml_tensor * dst,
                         const int64_t * n_rows_of, const MAPPING * rows_of, const char * wdata) {
    using product = rows_product<BLOC_TYPE>;
    using param   = typename product::param;
    using info    = typename product::info;

    const ggml_tensor * src0 = dst->src[0];
    const ggml_tensor * src1 = dst->src[1];

    const int64_t ne01  = src0->ne[1];
    const int64_t ne11  = src1->ne[1];
    const int64_t n_max = src1->ne[2]; // rows of an expert
    const size_t  nbw1  = work.nb * sizeof(param);

    constexpr int64_t step    = 8 * product::wide::n_groups;
    const int64_t     n_steps = (ne01 + step - 1) / step;

    // Four items for each thread. With many rows of each expert: in every expert, since one may have most of the rows.
    // With few: in all experts together, since to take an item costs 0.3 us, as much as many columns of one row.
    const int64_t n_used    = work.used_experts(params)[0];
    const bool    many_rows = ggml_nrows(dst) >= 4 * n_used;
    const int64_t n_wanted  = many_rows ? 4 * params->nth : (4 * params->nth + n_used - 1) / n_used;
    const int64_t n_blocks  = params->nth == 1 ? 1 : std::min(n_steps, n_wanted);
    const int64_t n_items   = n_used * n_blocks;

    for (int64_t item = params->ith; item < n_items; item = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        const int32_t expert = work.used_experts(params)[1 + item / n_blocks];
        const int64_t block  = item % n_blocks;
        const int64_t first  = block * n_steps / n_blocks * step;
        const int64_t last   = std::min((block + 1) * n_steps / n_blocks * step, ne01);

        const char * weights = (const char *) src0->data + expert * src0->nb[2] + first * src0->nb[1];
        rows_multiply<BLOC_TYPE, false>(
            work.scratch_of(params), work.nb, weights, src0->nb[1], last - first, n_rows_of[expert],
            [&](int64_t i, const param *& values, const info *& infos, float *& result) {
                const MAPPING & m   = rows_of[expert * n_max + i];
                const int64_t   row = m.i2 * ne11 + m.i1 % ne11;
                values              = (const param *) (wdata + row * nbw1);
                infos               = work.infos_of(params, row);
                result              = (float *) ((char *) dst->data + m.i1 * dst->nb[1] + m.i2 * dst->nb[2]) + first;
            });
    }
}

} // namespace ggml::cpu::repack
