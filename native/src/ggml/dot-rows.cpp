// Products of weights that are not repacked with many rows of activations at once, for MUL_MAT_ID.
//
// vec_dot reads, unpacks and scales a column of weights again for every row. Here a few columns and a few rows are
// multiplied together, so that each block is loaded, unpacked and scaled once for all of them.
//
// The results have the bits of vec_dot: sums of integers are exact in any order, and the floats are multiplied and added
// in the same order, in the same lanes (docs/upstream/moe-prompts-plain.md).
//
// For Q8_0, Q5_0, Q4_1, Q5_1, F16, BF16, and Q4_0 that is not repacked, on x86 with AVX2. (K-quants have kernels in tiled/.)
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
#    include <immintrin.h>

#    if defined(__GNUC__) && !defined(__clang__)
#        pragma GCC diagnostic ignored "-Wuninitialized" // of GCC 12's own headers: `__Y`
#        pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#    endif

namespace {

constexpr int64_t ROWS_CHUNK = 16; // rows whose addresses are kept

// rows of activations, and where their results of the first column go
struct row_list {
    const char * values[ROWS_CHUNK];
    float *      results[ROWS_CHUNK];
};

// The columns that come next: several are read side by side, and the processor only sees one such sequence ahead.
template <size_t SIZE> inline void prefetch_next(const void * p) {
    for (size_t i = 0; i < SIZE; i += 64) {
        _mm_prefetch((const char *) p + i, _MM_HINT_T0);
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

inline float scale_of(const block_q4_0 & x) {
    return GGML_CPU_FP16_TO_FP32(x.d);
}

inline float scale_of(const block_q5_0 & x) {
    return GGML_CPU_FP16_TO_FP32(x.d);
}

template <typename BLOCK> inline float scale_of(const BLOCK & x) {
    return GGML_CPU_FP16_TO_FP32(x.GGML_COMMON_AGGR_U.GGML_COMMON_AGGR_S.d);
}

#    if (defined(__AVX512VNNI__) && defined(__AVX512VL__)) || defined(__AVXVNNI__) || defined(FAST_EXPERTS_EMULATE_VNNI)
#        define DOT_ROWS_VNNI 1
#    endif

// A column in a vector. Where one instruction multiplies unsigned bytes and signed ones, signed values get 128 added:
// sum(x*y) = sum((x + 128)*y) - sum(128*y).
struct vec256 {
    using ints   = __m256i;
    using floats = __m256;

    static constexpr int n_cols = 1;

    static floats zero() { return _mm256_setzero_ps(); }
    static floats set(float x) { return _mm256_set1_ps(x); }
    static floats to_float(ints a) { return _mm256_cvtepi32_ps(a); }
    static floats mul(floats a, floats b) { return _mm256_mul_ps(a, b); }
    static floats fmadd(floats a, floats b, floats c) { return _mm256_fmadd_ps(a, b, c); }
    static ints   zero_ints() { return _mm256_setzero_si256(); }
    static ints   sub32(ints a, ints b) { return _mm256_sub_epi32(a, b); }
    static ints   set8(int8_t x) { return _mm256_set1_epi8(x); }
    static ints   bits_xor(ints a, ints b) { return _mm256_xor_si256(a, b); }
    static ints   load_row(const int8_t * y) { return _mm256_loadu_si256((const __m256i *) y); }

    template <typename BLOCK> static ints unpack(const BLOCK * x, int64_t) { return quants<BLOCK>::unpack(*x); }

    template <typename BLOCK> static floats scales(const BLOCK * x, int64_t) { return set(scale_of(*x)); }

    template <int NV> static void reduce(const floats * acc, float * out) {
        for (int v = 0; v < NV; v++) {
            out[v] = sum_of_lanes(acc[v]);
        }
    }

#    if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    static ints dot(ints acc, ints u, ints s) { return _mm256_dpbusd_epi32(acc, u, s); }
#    elif defined(__AVXVNNI__)
    static ints dot(ints acc, ints u, ints s) { return _mm256_dpbusd_avx_epi32(acc, u, s); }
#    elif defined(FAST_EXPERTS_EMULATE_VNNI) // exact, as the instruction is: tests without it
    static ints dot(ints acc, ints u, ints s) {
        const ints even = _mm256_madd_epi16(_mm256_and_si256(u, _mm256_set1_epi16(0xFF)),
                                            _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8));
        const ints odd  = _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(s, 8));
        return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
    }
#    endif
};

#    if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VNNI__)
#        define DOT_ROWS_512 1

// two columns in a vector
struct vec512 {
    using ints   = __m512i;
    using floats = __m512;

    static constexpr int n_cols = 2;

    static floats zero() { return _mm512_setzero_ps(); }
    static floats set(float x) { return _mm512_set1_ps(x); }
    static floats to_float(ints a) { return _mm512_cvtepi32_ps(a); }
    static floats mul(floats a, floats b) { return _mm512_mul_ps(a, b); }
    static floats fmadd(floats a, floats b, floats c) { return _mm512_fmadd_ps(a, b, c); }
    static ints   zero_ints() { return _mm512_setzero_si512(); }
    static ints   sub32(ints a, ints b) { return _mm512_sub_epi32(a, b); }
    static ints   set8(int8_t x) { return _mm512_set1_epi8(x); }
    static ints   bits_xor(ints a, ints b) { return _mm512_xor_si512(a, b); }
    static ints   dot(ints acc, ints u, ints s) { return _mm512_dpbusd_epi32(acc, u, s); }

    static ints load_row(const int8_t * y) { return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *) y)); }

    static floats join(__m256 a, __m256 b) { return _mm512_insertf32x8(_mm512_castps256_ps512(a), b, 1); }

    template <typename BLOCK> static ints unpack(const BLOCK * x, int64_t stride) {
        return _mm512_inserti64x4(_mm512_castsi256_si512(quants<BLOCK>::unpack(*x)), quants<BLOCK>::unpack(x[stride]),
                                  1);
    }

    template <typename BLOCK> static floats scales(const BLOCK * x, int64_t stride) {
        return join(vec256::set(scale_of(*x)), vec256::set(scale_of(x[stride])));
    }

    // of eight columns, as sum_of_lanes adds them
    template <int NV> static void reduce(const floats * acc, float * out) {
        static_assert(NV == 4);
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
};
#    endif

// The products of NV vectors of columns, the first at `x`, with NR rows.
template <typename V, int NV, int NR, typename BLOCK>
void multiply_quants(int64_t nb, const BLOCK * x, int64_t stride, const char * const * values,
                     float * const * results) {
    using type = quants<BLOCK>;
    using row  = typename type::row;

    constexpr int n_cols = NV * V::n_cols;

    typename V::floats acc[NR][NV];
    for (int r = 0; r < NR; r++) {
        for (int v = 0; v < NV; v++) {
            acc[r][v] = V::zero();
        }
    }
    for (int64_t b = 0; b < nb; b++) {
        typename V::ints   q[NV];
        typename V::floats d[NV];
        for (int c = 0; c < n_cols; c++) {
            prefetch_next<sizeof(BLOCK)>(x + (n_cols + c) * stride + b);
        }
        for (int v = 0; v < NV; v++) {
            q[v] = V::unpack(x + v * V::n_cols * stride + b, stride);
            d[v] = V::scales(x + v * V::n_cols * stride + b, stride);
        }
#    if DOT_ROWS_VNNI
        if constexpr (type::is_signed) {
            for (int v = 0; v < NV; v++) {
                q[v] = V::bits_xor(q[v], V::set8(-128));
            }
        }
#    endif
        for (int r = 0; r < NR; r++) {
            const row &              y     = ((const row *) values[r])[b];
            const typename V::ints   qy    = V::load_row(y.qs);
            const typename V::floats dy    = V::set(scale_of(y));
            typename V::ints         start = V::zero_ints();
#    if DOT_ROWS_VNNI
            if constexpr (type::is_signed) {
                start = V::sub32(start, V::dot(start, V::set8(-128), qy));
            }
#    endif
            for (int v = 0; v < NV; v++) {
#    if DOT_ROWS_VNNI
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
            if (j == 0) {
                for (int c = NC; c < 2 * NC; c++) {
                    prefetch_next<step * sizeof(value)>(x + c * stride + i * sizeof(value));
                }
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
                                  p.results_of(row, col, results, n));
    });
}

template <typename BLOCK> void all_quants(const product & p) {
    int64_t col = 0;
#    if DOT_ROWS_512
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
#    if !DOT_ROWS_512
    if (last - first == 1) {
        return nullptr;
    }
#    endif
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
        // for values left over, vec_dot has a sum of its own
        case GGML_TYPE_F16:
            return few_rows || k % step_of<floats_f16>() != 0 ? nullptr : all_floats<floats_f16>;
        case GGML_TYPE_BF16:
            return few_rows || k % step_of<floats_bf16>() != 0 ? nullptr : all_floats<floats_bf16>;
        default:
            return nullptr;
    }
}

} // namespace

bool ggml_dot_rows(const ggml_tensor * dst, const char * expert, int64_t first_col, int64_t last_col,
                   const int32_t * expert_rows, int64_t first_row, int64_t last_row, const void * rows) {
    const ggml_tensor * src0   = dst->src[0];
    const ggml_tensor * src1   = dst->src[1];
    const int64_t       k      = src0->ne[0];
    const kernel        run    = kernel_of(src0->type, k, first_row, last_row);
    const ggml_type     packed = ggml_get_type_traits_cpu(src0->type)->vec_dot_type;
    if (run == nullptr || src1->type == packed) {
        return false;
    }
    const size_t row_size = ggml_row_size(packed, k);
    row_list     list;
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
    return true;
}

#else

bool ggml_dot_rows(const ggml_tensor *, const char *, int64_t, int64_t, const int32_t *, int64_t, int64_t,
                   const void *) {
    return false;
}

#endif
