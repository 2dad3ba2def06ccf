// Products of weights that are not repacked with many rows of activations at once, for MUL_MAT_ID.
//
// vec_dot reads, unpacks and scales a column of weights again for every row. Here a few columns and a few rows are
// multiplied together, so that each block is loaded, unpacked and scaled once for all of them.
//
// The results have the bits of vec_dot: sums of integers are exact in any order, and the floats are multiplied and added
// in the same order, in the same lanes (docs/upstream/moe-prompts-plain.md). Those of Q6_K have the bits of tiled/ where that
// would compute them.
//
// On x86 with AVX2, for Q8_0, Q5_0, Q4_1, Q5_1, F16, BF16, Q4_0 that is not repacked, and Q6_K with up to MAX_TILED_ROWS rows.
// Other types and processors keep vec_dot. GGML_CPU_NO_FAST_EXPERTS leaves all of it out.

#define GGML_COMMON_DECL_CPP
#include "dot-rows.h"

#include "ggml-common.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "simd-mappings.h"
#include "vec.h"

#include <algorithm>
#include <utility>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && !defined(GGML_CPU_NO_FAST_EXPERTS)
#    include "vectors.h"

#    if defined(__GNUC__) && !defined(__clang__)
#        pragma GCC diagnostic ignored "-Wuninitialized" // of GCC 12's own headers: `__Y`
#        pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#    endif

namespace {

constexpr int64_t ROWS_CHUNK = 64; // rows whose addresses are kept
constexpr int64_t COLS_STEP  = 16; // columns are divided among threads by so many

// for more, tiled/ is faster: measured
#    if FAST_EXPERTS_512
constexpr int64_t MAX_TILED_ROWS = 60;
#    else
constexpr int64_t MAX_TILED_ROWS = 28;
#    endif

// rows of activations, and where their results of the first column go
struct row_list {
    const char * values[ROWS_CHUNK];
    float *      results[ROWS_CHUNK];
};

// SIZE bytes of each of the N columns behind the N that start at `p`: several are read side by side, and the processor
// itself only sees one such sequence ahead.
template <int N, size_t SIZE> inline void prefetch_next(const void * p, size_t stride) {
    for (int c = N; c < 2 * N; c++) {
        for (size_t i = 0; i < SIZE; i += 64) {
            _mm_prefetch((const char *) p + c * stride + i, _MM_HINT_T0);
        }
    }
}

// in the order in which vec_dot adds them
inline float sum_of_lanes(__m256 x) {
    __m128 res = _mm_add_ps(_mm256_extractf128_ps(x, 1), _mm256_castps256_ps128(x));
    res        = _mm_add_ps(res, _mm_movehl_ps(res, res));
    res        = _mm_add_ss(res, _mm_movehdup_ps(res));
    return _mm_cvtss_f32(res);
}

//
// Q8_0, Q4_0, Q5_0, Q4_1, Q5_1: blocks of 32 values
//

template <typename BLOCK> struct quants;

inline __m256i nibbles(const uint8_t * qs) {
    const __m128i raw = _mm_loadu_si128((const __m128i *) qs);
    return _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(raw, 4), raw), _mm256_set1_epi8(0x0F));
}

// of 32 bits: 16 where one is set
inline __m256i fifth_bits(const uint8_t * qh) {
    uint32_t bits;
    memcpy(&bits, qh, sizeof(bits));
    const __m256i which = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
    const __m256i mask  = _mm256_set1_epi64x((long long) 0x8040201008040201);
    const __m256i bytes = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32((int) bits), which), mask);
    return _mm256_and_si256(_mm256_cmpeq_epi8(bytes, mask), _mm256_set1_epi8(16));
}

template <> struct quants<block_q8_0> {
    using row = block_q8_0;

    static constexpr bool is_signed = true;
    static constexpr bool has_min   = false;

    static __m256i unpack(const block_q8_0 & x) { return _mm256_loadu_si256((const __m256i *) x.qs); }
};

template <> struct quants<block_q4_0> {
    using row = block_q8_0;

    static constexpr bool is_signed = true;
    static constexpr bool has_min   = false;

    static __m256i unpack(const block_q4_0 & x) { return _mm256_sub_epi8(nibbles(x.qs), _mm256_set1_epi8(8)); }
};

template <> struct quants<block_q5_0> {
    using row = block_q8_0;

    static constexpr bool is_signed = true;
    static constexpr bool has_min   = false;

    static __m256i unpack(const block_q5_0 & x) {
        return _mm256_sub_epi8(_mm256_or_si256(nibbles(x.qs), fifth_bits(x.qh)), _mm256_set1_epi8(16));
    }
};

template <> struct quants<block_q4_1> {
    using row = block_q8_1;

    static constexpr bool is_signed = false;
    static constexpr bool has_min   = true;

    static __m256i unpack(const block_q4_1 & x) { return nibbles(x.qs); }
};

template <> struct quants<block_q5_1> {
    using row = block_q8_1;

    static constexpr bool is_signed = false;
    static constexpr bool has_min   = true;

    static __m256i unpack(const block_q5_1 & x) { return _mm256_or_si256(nibbles(x.qs), fifth_bits(x.qh)); }
};

inline float scale_of(const block_q8_0 & y) {
    return GGML_CPU_FP16_TO_FP32(y.d);
}

inline float scale_of(const block_q8_1 & y) {
    return GGML_CPU_FP16_TO_FP32(y.GGML_COMMON_AGGR_U.GGML_COMMON_AGGR_S.d);
}

inline float scale_of(const block_q6_K & x) {
    return GGML_CPU_FP16_TO_FP32(x.d);
}

inline float scale_of(const block_q4_0 & x) {
    return GGML_CPU_FP16_TO_FP32(x.d);
}

inline float scale_of(const block_q5_0 & x) {
    return GGML_CPU_FP16_TO_FP32(x.d);
}

template <typename BLOCK> inline float scale_of(const BLOCK & x) {
    return GGML_CPU_FP16_TO_FP32(x.GGML_COMMON_AGGR_U.GGML_COMMON_AGGR_S.d);
}

// acc + a*b as the kernel of tiled/ that is compiled. The one for VNNI leaves it to the compiler to fuse them, and keeps its
// sums in memory. In a register, GCC would not fuse them for some processors (-mtune), where it finds a chain of sums;
// behind the empty statement it finds none.
#    if defined(__AVX512VNNI__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
template <typename V> inline V unchained(V acc) {
#        if defined(__GNUC__)
    __asm__("" : "+v"(acc));
#        endif
    return acc;
}

inline __m128 add_product(__m128 acc, __m128 a, __m128 b) {
    return _mm_add_ps(unchained(acc), _mm_mul_ps(a, b));
}

inline __m512 add_product(__m512 acc, __m512 a, __m512 b) {
    return _mm512_add_ps(unchained(acc), _mm512_mul_ps(a, b));
}
#    else
inline __m128 add_product(__m128 acc, __m128 a, __m128 b) {
    return _mm_fmadd_ps(a, b, acc);
}
#    endif

// A column in a vector. Where one instruction multiplies unsigned bytes and signed ones, signed values get 128 added:
// sum(x*y) = sum((x + 128)*y) - sum(128*y).
struct vec256 : simd256 {
    static constexpr int n_cols = 1;

    static ints load_row(const void * y) { return _mm256_loadu_si256((const __m256i *) y); }

    // 32 bytes of a column; 16 bytes as 16-bit values; two of the 16, the pair i, eight times each
    static ints load(const void * x, size_t) { return load_row(x); }
    static ints load_widened(const int8_t * x, size_t) {
        return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *) x));
    }
    static ints pair_of(ints, const int8_t * x, int i) {
        const __m128i which = _mm_set_epi64x(0x0101010101010101 * (2 * i + 1), 0x0101010101010101 * (2 * i));
        return _mm256_cvtepi8_epi16(_mm_shuffle_epi8(_mm_loadu_si128((const __m128i *) x), which));
    }

    template <typename BLOCK> static ints unpack(const BLOCK * x, int64_t) { return quants<BLOCK>::unpack(*x); }

    template <typename BLOCK> static floats scales(const BLOCK * x, int64_t) { return set_ps(scale_of(*x)); }

    template <int NV> static void reduce(const floats * acc, float * out) {
        for (int v = 0; v < NV; v++) {
            out[v] = sum_of_lanes(acc[v]);
        }
    }

    // A quad: the products of the columns of n_quad vectors with four rows, a float each.
    static constexpr int n_quad = 1;

    using quad = __m128;

    static quad zero_quad() { return _mm_setzero_ps(); }
    static quad quad_scales(const block_q6_K * x, int64_t) { return _mm_set1_ps(scale_of(*x)); }

    // the first N of four rows, with the sums in `sums` and the scales `dy`
    template <int N> static quad add_quad(quad acc, quad d, const float * dy, const ints (*sums)[n_quad]) {
        __m128i four[4] = {};
        for (int r = 0; r < N; r++) {
            four[r] = _mm_add_epi32(_mm256_castsi256_si128(sums[r][0]), _mm256_extracti128_si256(sums[r][0], 1));
        }
        const __m128i sum = _mm_hadd_epi32(_mm_hadd_epi32(four[0], four[1]), _mm_hadd_epi32(four[2], four[3]));
        return add_product(acc, _mm_mul_ps(_mm_cvtepi32_ps(sum), d), _mm_loadu_ps(dy));
    }

    template <int N> static void store_quad(quad x, float * const * results) {
        float found[4];
        _mm_storeu_ps(found, x);
        for (int r = 0; r < N; r++) {
            results[r][0] = found[r];
        }
    }
};

#    if FAST_EXPERTS_512

// two columns in a vector
struct vec512 : simd512 {
    static constexpr int n_cols = 2;

    static ints   load_row(const void * y) { return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *) y)); }
    static ints   join(__m256i a, __m256i b) { return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1); }
    static floats join(__m256 a, __m256 b) { return _mm512_insertf32x8(_mm512_castps256_ps512(a), b, 1); }

    // of two columns, `stride` bytes apart
    static ints load(const void * x, size_t stride) {
        return join(vec256::load_row(x), vec256::load_row((const char *) x + stride));
    }
    static ints load_widened(const int8_t * x, size_t stride) {
        return join(vec256::load_widened(x, 0), vec256::load_widened(x + stride, 0));
    }
    static ints pair_of(ints widened, const int8_t *, int i) {
        const __m256i which = _mm256_set_m128i(_mm_set1_epi16((short) (2 * i + 1)), _mm_set1_epi16((short) (2 * i)));
        return _mm512_permutexvar_epi16(join(which, _mm256_add_epi16(which, _mm256_set1_epi16(16))), widened);
    }

    template <typename BLOCK> static ints unpack(const BLOCK * x, int64_t stride) {
        return join(quants<BLOCK>::unpack(*x), quants<BLOCK>::unpack(x[stride]));
    }

    template <typename BLOCK> static floats scales(const BLOCK * x, int64_t stride) {
        return join(vec256::set_ps(scale_of(*x)), vec256::set_ps(scale_of(x[stride])));
    }

    // as sum_of_lanes adds them
    template <int NV> static void reduce(const floats * acc, float * out) {
        if constexpr (NV != 4) {
            for (int v = 0; v < NV; v++) {
                out[2 * v]     = sum_of_lanes(_mm512_castps512_ps256(acc[v]));
                out[2 * v + 1] = sum_of_lanes(_mm512_extractf32x8_ps(acc[v], 1));
            }
            return;
        }
        floats fours[2]; // of columns 0 1 2 3, and of 4 5 6 7
        for (int i = 0; i < 2; i++) {
            fours[i] = _mm512_add_ps(_mm512_shuffle_f32x4(acc[2 * i], acc[2 * i + 1], 0x88),
                                     _mm512_shuffle_f32x4(acc[2 * i], acc[2 * i + 1], 0xDD));
        }
        const floats twos =
            _mm512_add_ps(_mm512_shuffle_ps(fours[0], fours[1], 0x44), _mm512_shuffle_ps(fours[0], fours[1], 0xEE));
        const floats ones  = _mm512_add_ps(twos, _mm512_movehdup_ps(twos));
        const ints   order = _mm512_setr_epi32(0, 4, 8, 12, 2, 6, 10, 14, 0, 0, 0, 0, 0, 0, 0, 0);
        _mm256_storeu_ps(out, _mm512_castps512_ps256(_mm512_permutexvar_ps(order, ones)));
    }

    static constexpr int n_quad = 2;

    using quad = __m512; // a column in each quarter

    static quad zero_quad() { return _mm512_setzero_ps(); }
    static quad quad_scales(const block_q6_K * x, int64_t stride) {
        const __m128 d =
            _mm_setr_ps(scale_of(x[0]), scale_of(x[stride]), scale_of(x[2 * stride]), scale_of(x[3 * stride]));
        return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3),
                                     _mm512_castps128_ps512(d));
    }

    template <int N> static quad add_quad(quad acc, quad d, const float * dy, const ints (*sums)[n_quad]) {
        __m512i four[4] = {};
        for (int r = 0; r < N; r++) {
            four[r] = _mm512_add_epi32(_mm512_shuffle_i32x4(sums[r][0], sums[r][1], 0x88),
                                       _mm512_shuffle_i32x4(sums[r][0], sums[r][1], 0xDD));
        }
        const __m512i two[2] = { add_pairs(four[0], four[1]), add_pairs(four[2], four[3]) };
        const __m512i sum =
            _mm512_add_epi32(_mm512_unpacklo_epi64(two[0], two[1]), _mm512_unpackhi_epi64(two[0], two[1]));
        const __m512 scale = _mm512_broadcast_f32x4(_mm_loadu_ps(dy));
        return add_product(acc, _mm512_mul_ps(_mm512_cvtepi32_ps(sum), d), scale);
    }

    template <int N> static void store_quad(quad x, float * const * results) {
        const ints order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        float      found[16];
        _mm512_storeu_ps(found, _mm512_permutexvar_ps(order, x));
        for (int r = 0; r < N; r++) {
            memcpy(results[r], found + 4 * r, 4 * sizeof(float));
        }
    }

    static __m512i add_pairs(__m512i a, __m512i b) {
        return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    }
};
#    endif

// The products of NV vectors of columns, the first at `x`, with NR rows.
template <typename V, int NV, int NR, typename BLOCK>
void multiply_quants(int64_t nb, const BLOCK * x, int64_t stride, const char * const * values, float * const * results,
                     bool prefetch) {
    using type = quants<BLOCK>;
    using row  = typename type::row;

    constexpr int n_cols = NV * V::n_cols;

    typename V::floats acc[NR][NV];
    for (int r = 0; r < NR; r++) {
        for (int v = 0; v < NV; v++) {
            acc[r][v] = V::zero_ps();
        }
    }
    for (int64_t b = 0; b < nb; b++) {
        typename V::ints   q[NV];
        typename V::floats d[NV];
        if (prefetch) {
            prefetch_next<n_cols, sizeof(BLOCK)>(x + b, stride * sizeof(BLOCK));
        }
        for (int v = 0; v < NV; v++) {
            q[v] = V::unpack(x + v * V::n_cols * stride + b, stride);
            d[v] = V::scales(x + v * V::n_cols * stride + b, stride);
        }
#    if FAST_EXPERTS_VNNI
        if constexpr (type::is_signed) {
            for (int v = 0; v < NV; v++) {
                q[v] = V::bits_xor(q[v], V::set8(-128));
            }
        }
#    endif
        for (int r = 0; r < NR; r++) {
            const row &              y     = ((const row *) values[r])[b];
            const typename V::ints   qy    = V::load_row(y.qs);
            const typename V::floats dy    = V::set_ps(scale_of(y));
            typename V::ints         start = V::zero();
#    if FAST_EXPERTS_VNNI
            if constexpr (type::is_signed) {
                start = V::sub32(start, V::dot(start, V::set8(-128), qy));
            }
#    endif
            for (int v = 0; v < NV; v++) {
#    if FAST_EXPERTS_VNNI
                const typename V::ints sum = V::dot(start, q[v], qy);
#    else
                const auto u   = type::is_signed ? _mm256_sign_epi8(q[v], q[v]) : q[v];
                const auto s   = type::is_signed ? _mm256_sign_epi8(qy, q[v]) : qy;
                const auto sum = _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1));
#    endif
                acc[r][v] = V::fmadd(V::mul(d[v], dy), V::to_float(sum), acc[r][v]);
            }
        }
    }
    float found[NR][n_cols];
    for (int r = 0; r < NR; r++) {
        V::template reduce<NV>(acc[r], found[r]);
    }
    if constexpr (type::has_min) {
        float sums[NR][n_cols] = {};
        for (int64_t b = 0; b < nb; b++) {
            float mins[n_cols];
            for (int c = 0; c < n_cols; c++) {
                mins[c] = GGML_CPU_FP16_TO_FP32(x[c * stride + b].GGML_COMMON_AGGR_U.GGML_COMMON_AGGR_S.m);
            }
            for (int r = 0; r < NR; r++) {
                const row & y = ((const row *) values[r])[b];
                const float s = GGML_CPU_FP16_TO_FP32(y.GGML_COMMON_AGGR_U.GGML_COMMON_AGGR_S.s);
                for (int c = 0; c < n_cols; c++) {
                    sums[r][c] += mins[c] * s; // as vec_dot, which leaves it to the compiler to fuse them
                }
            }
        }
        for (int r = 0; r < NR; r++) {
            for (int c = 0; c < n_cols; c++) {
                found[r][c] += sums[r][c];
            }
        }
    }
    for (int r = 0; r < NR; r++) {
        memcpy(results[r], found[r], sizeof(found[r]));
    }
}

//
// Q6_K: blocks of 256 values, in sixteen sub-blocks of 16 with a scale each
//

#    if (defined(__AVX512VNNI__) && defined(__AVX512VL__))
inline __m256i add_madd16(__m256i acc, __m256i a, __m256i b) {
    return _mm256_dpwssd_epi32(acc, a, b);
}
#    else
inline __m256i add_madd16(__m256i acc, __m256i a, __m256i b) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b));
}
#    endif
#    if FAST_EXPERTS_512
inline __m512i add_madd16(__m512i acc, __m512i a, __m512i b) {
    return _mm512_dpwssd_epi32(acc, a, b);
}
#    endif

// The integer sums of a block, of NV vectors of columns and NR rows; the lanes of a product still have to be added.
template <typename V, int NV, int NR>
inline void sums_of_q6_K(const block_q6_K * x, int64_t stride, const block_q8_K * const (&rows)[NR],
                         typename V::ints (&sums)[NR][NV]) {
    const size_t bytes = stride * sizeof(block_q6_K);
    const auto   low   = V::set8(0x0F);

    typename V::ints scales[NV];
    for (int v = 0; v < NV; v++) {
        // values are 32 too large: sum((q - 32)*y) = sum(q*y) - 32*sum(y)
        scales[v]          = V::load_widened(x[v * V::n_cols * stride].scales, bytes);
        const auto minus32 = V::left16(V::sub16(V::zero(), scales[v]), 5);
        for (int r = 0; r < NR; r++) {
            sums[r][v] = V::madd16(V::load_row(rows[r]->bsums), minus32);
        }
    }
    for (int half = 0; half < 2; half++) {
        typename V::ints q[NV][4];
        for (int v = 0; v < NV; v++) {
            const block_q6_K & w = x[v * V::n_cols * stride];

            const auto l0 = V::load(w.ql + 64 * half, bytes), l1 = V::load(w.ql + 64 * half + 32, bytes);
            const auto h = V::load(w.qh + 32 * half, bytes);
            q[v][0]      = V::bits_or(V::bits_and(l0, low), V::left16(V::bits_and(h, V::set8(0x03)), 4));
            q[v][1]      = V::bits_or(V::bits_and(l1, low), V::left16(V::bits_and(h, V::set8(0x0C)), 2));
            q[v][2]      = V::bits_or(V::bits_and(V::right16(l0, 4), low), V::bits_and(h, V::set8(0x30)));
            q[v][3] =
                V::bits_or(V::bits_and(V::right16(l1, 4), low), V::right16(V::bits_and(h, V::set8((int8_t) 0xC0)), 2));
        }
        for (int i = 0; i < 4; i++) {
            typename V::ints scale[NV];
            for (int v = 0; v < NV; v++) {
                scale[v] = V::pair_of(scales[v], x[v * V::n_cols * stride].scales, 4 * half + i);
            }
            for (int r = 0; r < NR; r++) {
                const auto y = V::load_row(rows[r]->qs + 128 * half + 32 * i);
                for (int v = 0; v < NV; v++) {
                    sums[r][v] = add_madd16(sums[r][v], V::maddubs(q[v][i], y), scale[v]);
                }
            }
        }
    }
}

// in the bits of vec_dot, which keeps floats in the lanes of a product
template <typename V, int NV, int NR>
void multiply_q6_K(int64_t nb, const block_q6_K * x, int64_t stride, const char * const * values,
                   float * const * results, bool prefetch) {
    typename V::floats acc[NR][NV];
    for (int r = 0; r < NR; r++) {
        for (int v = 0; v < NV; v++) {
            acc[r][v] = V::zero_ps();
        }
    }
    for (int64_t b = 0; b < nb; b++, x++) {
        if (prefetch) {
            prefetch_next<NV * V::n_cols, sizeof(block_q6_K)>(x, stride * sizeof(block_q6_K));
        }
        const block_q8_K * rows[NR];
        for (int r = 0; r < NR; r++) {
            rows[r] = (const block_q8_K *) values[r] + b;
        }
        typename V::ints sums[NR][NV];
        sums_of_q6_K<V, NV, NR>(x, stride, rows, sums);
        for (int v = 0; v < NV; v++) {
            const auto d = V::scales(x + v * V::n_cols * stride, stride);
            for (int r = 0; r < NR; r++) {
                const auto dy = V::set_ps(rows[r]->d);
                acc[r][v]     = V::fmadd(V::mul(d, dy), V::to_float(sums[r][v]), acc[r][v]);
            }
        }
    }
    for (int r = 0; r < NR; r++) {
        V::template reduce<NV>(acc[r], results[r]);
    }
}

// in the bits of tiled/, which has one integer and one float for a product
template <typename V, int NR>
void multiply_q6_K_tiled(int64_t nb, const block_q6_K * x, int64_t stride, const char * const * values,
                         float * const * results, bool prefetch) {
    constexpr int NV = V::n_quad, N0 = std::min(NR, 4), N1 = NR - N0;

    typename V::quad acc0 = V::zero_quad(), acc1 = V::zero_quad(); // of rows 0 to 3 and 4 to 7
    for (int64_t b = 0; b < nb; b++, x++) {
        if (prefetch) {
            prefetch_next<NV * V::n_cols, sizeof(block_q6_K)>(x, stride * sizeof(block_q6_K));
        }
        const block_q8_K * rows[NR];
        for (int r = 0; r < NR; r++) {
            rows[r] = (const block_q8_K *) values[r] + b;
        }
        typename V::ints sums[NR][NV];
        sums_of_q6_K<V, NV, NR>(x, stride, rows, sums);
        const auto d     = V::quad_scales(x, stride);
        float      dy[8] = {};
        for (int r = 0; r < NR; r++) {
            dy[r] = rows[r]->d;
        }
        acc0 = V::template add_quad<N0>(acc0, d, dy, sums);
        if constexpr (N1 > 0) {
            acc1 = V::template add_quad<N1>(acc1, d, dy + 4, sums + 4);
        }
    }
    V::template store_quad<N0>(acc0, results);
    if constexpr (N1 > 0) {
        V::template store_quad<N1>(acc1, results + 4);
    }
}

//
// F16, BF16: several sums for every product, of every n-th vector of values
//

struct floats_f16 {
    using value = ggml_fp16_t;
    using vec   = GGML_F16_DOT_VEC;

    static constexpr int n_sums   = GGML_F16_DOT_ARR;
    static constexpr int n_values = GGML_F16_DOT_EPR; // in a vector

    static vec   zero() { return GGML_F16_DOT_VEC_ZERO; }
    static vec   load(const value * p) { return GGML_F16_DOT_VEC_LOAD(p, 0); }
    static vec   fmadd(vec acc, vec x, vec y) { return GGML_F16_DOT_VEC_FMA(acc, x, y); }
    static float reduce(vec * sums) {
        ggml_float sum = 0;
        GGML_F16_DOT_VEC_REDUCE(sum, sums);
        return (float) sum;
    }
};

struct floats_bf16 {
    using value = ggml_bf16_t;

#    if defined(__AVX512F__)
    using vec = __m512;

    static constexpr int n_sums = 2;

    static vec   zero() { return _mm512_setzero_ps(); }
    static float reduce(const vec * sums) {
        ggml_float sum = 0;
        sum += (ggml_float) _mm512_reduce_add_ps(sums[0]);
        sum += (ggml_float) _mm512_reduce_add_ps(sums[1]);
        return (float) sum;
    }
#        if defined(__AVX512BF16__)
    static constexpr int n_values = 32;

    static __m512i load(const value * p) { return _mm512_loadu_si512(p); }
    static vec     fmadd(vec acc, __m512i x, __m512i y) { return _mm512_dpbf16_ps(acc, m512bh(x), m512bh(y)); }
#        else
    static constexpr int n_values = 16;

    static vec load(const value * p) {
        return _mm512_castsi512_ps(
            _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *) p)), 16));
    }
    // as vec_dot, which leaves it to the compiler to fuse them
    static vec fmadd(vec acc, vec x, vec y) { return _mm512_add_ps(_mm512_mul_ps(x, y), acc); }
#        endif
#    else
    using vec = __m256;

    static constexpr int n_sums   = 4;
    static constexpr int n_values = 8;

    static vec zero() { return _mm256_setzero_ps(); }
    static vec load(const value * p) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *) p)), 16));
    }
    static vec   fmadd(vec acc, vec x, vec y) { return _mm256_add_ps(_mm256_mul_ps(x, y), acc); }
    static float reduce(const vec * sums) {
        return sum_of_lanes(_mm256_add_ps(_mm256_add_ps(sums[0], sums[2]), _mm256_add_ps(sums[1], sums[3])));
    }
#    endif
};

// The products of NC columns with NR rows.
template <typename TYPE, int NC, int NR>
void multiply_floats(int64_t n, const char * x, size_t stride, const char * const * values, float * const * results) {
    using value = typename TYPE::value;
    using vec   = typename TYPE::vec;

    constexpr int64_t step = TYPE::n_sums * TYPE::n_values;

    vec sums[NR][NC][TYPE::n_sums];
    for (int j = 0; j < TYPE::n_sums; j++) { // one after the other: registers
        vec acc[NR][NC];
        for (int r = 0; r < NR; r++) {
            for (int c = 0; c < NC; c++) {
                acc[r][c] = TYPE::zero();
            }
        }
        for (int64_t i = j * TYPE::n_values; i < n; i += step) {
            if (j == 0) { // for all rows, again and again: measured
                prefetch_next<NC, step * sizeof(value)>(x + i * sizeof(value), stride);
            }
            decltype(TYPE::load(nullptr)) w[NC];
            for (int c = 0; c < NC; c++) {
                w[c] = TYPE::load((const value *) (x + c * stride) + i);
            }
            for (int r = 0; r < NR; r++) {
                const auto y = TYPE::load((const value *) values[r] + i);
                for (int c = 0; c < NC; c++) {
                    acc[r][c] = TYPE::fmadd(acc[r][c], w[c], y);
                }
            }
        }
        for (int r = 0; r < NR; r++) {
            for (int c = 0; c < NC; c++) {
                sums[r][c][j] = acc[r][c];
            }
        }
    }
    for (int r = 0; r < NR; r++) {
        for (int c = 0; c < NC; c++) {
            results[r][c] = TYPE::reduce(sums[r][c]);
        }
    }
}

//
// all columns and rows
//

// f(first, count) for a range in parts of MAX and one with the rest
template <int MAX, typename F> void in_parts(int64_t n, const F & f, int64_t first = 0) {
    for (; first + MAX <= n; first += MAX) {
        f(first, std::integral_constant<int, MAX>());
    }
    if constexpr (MAX > 1) {
        in_parts<MAX - 1>(n, f, first);
    }
}

// some columns, and at most ROWS_CHUNK rows
struct product {
    int64_t      k, n_cols, n_rows;
    const char * columns;
    size_t       stride; // bytes from a column to the next
    row_list *   rows;

    // where the results of column `col` with `n` rows go
    float * const * results_of(int64_t row, int64_t col, float ** out, int n) const {
        for (int r = 0; r < n; r++) {
            out[r] = rows->results[row + r] + col;
        }
        return out;
    }
};

template <typename V, int NV, typename BLOCK> void quants_at(const product & p, int64_t col) {
    in_parts<4>(p.n_rows, [&](int64_t row, auto n) {
        float * results[n];
        multiply_quants<V, NV, n>(p.k / 32, (const BLOCK *) (p.columns + col * p.stride),
                                  (int64_t) (p.stride / sizeof(BLOCK)), p.rows->values + row,
                                  p.results_of(row, col, results, n), row == 0);
    });
}

template <typename BLOCK> void all_quants(const product & p) {
    int64_t col = 0;
#    if FAST_EXPERTS_512
    for (; col + 8 <= p.n_cols; col += 8) {
        quants_at<vec512, 4, BLOCK>(p, col);
    }
#    endif
    for (; col + 2 <= p.n_cols; col += 2) {
        quants_at<vec256, 2, BLOCK>(p, col);
    }
    for (; col < p.n_cols; col++) {
        quants_at<vec256, 1, BLOCK>(p, col);
    }
}

template <typename V, int NV> void q6_K_at(const product & p, int64_t col) {
    in_parts<4>(p.n_rows, [&](int64_t row, auto n) {
        float * results[n];
        multiply_q6_K<V, NV, n>(p.k / QK_K, (const block_q6_K *) (p.columns + col * p.stride),
                                (int64_t) (p.stride / sizeof(block_q6_K)), p.rows->values + row,
                                p.results_of(row, col, results, n), row == 0);
    });
}

void all_q6_K(const product & p) {
    int64_t col = 0;
#    if FAST_EXPERTS_512
    for (; col + 4 <= p.n_cols; col += 4) {
        q6_K_at<vec512, 2>(p, col);
    }
#    endif
    for (; col < p.n_cols; col++) {
        q6_K_at<vec256, 1>(p, col);
    }
}

template <typename V, int MAX_ROWS> void q6_K_tiled_at(const product & p, int64_t col) {
    in_parts<MAX_ROWS>(p.n_rows, [&](int64_t row, auto n) {
        float * results[n];
        multiply_q6_K_tiled<V, n>(p.k / QK_K, (const block_q6_K *) (p.columns + col * p.stride),
                                  (int64_t) (p.stride / sizeof(block_q6_K)), p.rows->values + row,
                                  p.results_of(row, col, results, n), row == 0);
    });
}

void all_q6_K_tiled(const product & p) {
    int64_t col = 0;
#    if FAST_EXPERTS_512
    for (; col + 4 <= p.n_cols; col += 4) {
        q6_K_tiled_at<vec512, 8>(p, col);
    }
#    endif
    for (; col < p.n_cols; col++) {
        q6_K_tiled_at<vec256, 4>(p, col);
    }
}

template <typename TYPE> void all_floats(const product & p) {
#    if defined(__AVX512F__)
    constexpr int n_cols = 4;
#    else
    constexpr int n_cols = 2; // of 16 registers
#    endif
    in_parts<n_cols>(p.n_cols, [&](int64_t col, auto nc) {
        in_parts<4>(p.n_rows, [&](int64_t row, auto nr) {
            float * results[nr];
            multiply_floats<TYPE, nc, nr>(p.k, p.columns + col * p.stride, p.stride, p.rows->values + row,
                                          p.results_of(row, col, results, nr));
        });
    });
}

template <typename TYPE> constexpr int64_t step_of() {
    return TYPE::n_sums * TYPE::n_values;
}

using kernel = void (*)(const product &);

// The kernel for the rows `first` to `last` of an expert; none where vec_dot is as fast (measured).
kernel kernel_of(ggml_type type, int64_t k, int64_t first, int64_t last) {
#    if FAST_EXPERTS_512
    // eight columns and the next eight have to stay in the cache of a core
    const bool one_is_slow = 16 * ggml_row_size(type, k) > 40 * 1024;
#    else
    const bool one_is_slow = true;
#    endif
    if (last - first == 1 && one_is_slow) {
        return nullptr;
    }
    const bool few_rows = first == 0 && last < 6; // floats are read in several passes

    switch (type) {
        case GGML_TYPE_Q8_0:
            return all_quants<block_q8_0>;
        case GGML_TYPE_Q4_0:
            return all_quants<block_q4_0>;
        case GGML_TYPE_Q5_0:
            return all_quants<block_q5_0>;
        case GGML_TYPE_Q4_1:
            return all_quants<block_q4_1>;
        case GGML_TYPE_Q5_1:
            return all_quants<block_q5_1>;
        case GGML_TYPE_Q6_K:
            return last - first == 1 ? nullptr : all_q6_K;
        // for values left over, vec_dot has a sum of its own
        case GGML_TYPE_F16:
            return few_rows || k % step_of<floats_f16>() != 0 ? nullptr : all_floats<floats_f16>;
        case GGML_TYPE_BF16:
            return few_rows || k % step_of<floats_bf16>() != 0 ? nullptr : all_floats<floats_bf16>;
        default:
            return nullptr;
    }
}

// of the rows of activations, when they are quantized
ggml_type packed_type(const ggml_tensor * dst) {
    return ggml_get_type_traits_cpu(dst->src[0]->type)->vec_dot_type;
}

// The products of some columns of an expert with some of its rows.
void multiply_expert(kernel run, const ggml_tensor * dst, const char * expert, int64_t first_col, int64_t last_col,
                     const int32_t * expert_rows, int64_t first_row, int64_t last_row, const void * rows) {
    const ggml_tensor * src0     = dst->src[0];
    const ggml_tensor * src1     = dst->src[1];
    const int64_t       k        = src0->ne[0];
    const size_t        row_size = ggml_row_size(packed_type(dst), k);
    row_list            list;
    for (int64_t row = first_row; row < last_row; row += ROWS_CHUNK) {
        const int64_t n = std::min(last_row - row, ROWS_CHUNK);
        for (int64_t i = 0; i < n; i++) {
            const int64_t slot  = expert_rows[2 * (row + i)];
            const int64_t token = expert_rows[2 * (row + i) + 1];
            list.values[i]      = (const char *) rows + (slot % src1->ne[1] + token * src1->ne[1]) * row_size;
            list.results[i]     = (float *) ((char *) dst->data + slot * dst->nb[1] + token * dst->nb[2]) + first_col;
        }
        run({ k, last_col - first_col, n, expert + first_col * src0->nb[1], src0->nb[1], &list });
    }
}

} // namespace

bool ggml_dot_rows(const ggml_tensor * dst, const char * expert, int64_t first_col, int64_t last_col,
                   const int32_t * expert_rows, int64_t first_row, int64_t last_row, const void * rows) {
    const kernel run = kernel_of(dst->src[0]->type, dst->src[0]->ne[0], first_row, last_row);
    if (run == nullptr || dst->src[1]->type == packed_type(dst)) {
        return false;
    }
    multiply_expert(run, dst, expert, first_col, last_col, expert_rows, first_row, last_row, rows);
    return true;
}

bool ggml_dot_rows_tiled(const ggml_compute_params * params, const ggml_tensor * dst, int64_t expert,
                         const int32_t * expert_rows, int64_t n_rows) {
    const ggml_tensor * src0 = dst->src[0];
    if (src0->type != GGML_TYPE_Q6_K || n_rows > MAX_TILED_ROWS || dst->src[1]->type == packed_type(dst)) {
        return false;
    }
    const int64_t n_steps = (src0->ne[1] + COLS_STEP - 1) / COLS_STEP;
    const int64_t first   = n_steps * params->ith / params->nth * COLS_STEP;
    const int64_t last    = std::min(n_steps * (params->ith + 1) / params->nth * COLS_STEP, src0->ne[1]);
    multiply_expert(all_q6_K_tiled, dst, (const char *) src0->data + expert * src0->nb[2], first, last, expert_rows, 0,
                    n_rows, params->wdata);
    return true;
}

#else

bool ggml_dot_rows(const ggml_tensor *, const char *, int64_t, int64_t, const int32_t *, int64_t, int64_t,
                   const void *) {
    return false;
}

bool ggml_dot_rows_tiled(const ggml_compute_params *, const ggml_tensor *, int64_t, const int32_t *, int64_t) {
    return false;
}

#endif
