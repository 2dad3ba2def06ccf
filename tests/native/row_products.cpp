// Products of weights with many rows, computed by the CPU backend of any library: what is compared are their bits.
//   row_products LIBRARY            one line of results for each case on stdin
//   row_products LIBRARY time N     CPU time besides: the least of N runs
// LIBRARY is a libggml-cpu that uses the libggml-base of this program. A case is a line of words:
//   op            id (MUL_MAT_ID) or mm (MUL_MAT)
//   type K M      of the weights: values in a column, columns; plain_q4_0 is Q4_0 that is not repacked
//   experts used  of MUL_MAT_ID; 0 0 for MUL_MAT
//   tokens        rows of activations, in each plane of MUL_MAT
//   ne11          rows that a token of MUL_MAT_ID has: 1 or `used`; planes of MUL_MAT
//   pad           floats between two rows of activations
//   threads
//   routing       even, one (one expert first, then few others), all (the same experts for every token), empty (most
//                 experts have no token), last, twice (an expert twice for one token); - for MUL_MAT
//   activations   see fill_row
//   weights       random, extreme, zero
//   seed
// Its results: a hash of the products' bytes, without those of rows of activations that hold NaN or infinity; how many
// products that are; how many of them are finite, and how many zero.
#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

#include "cpu_library.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

namespace {

struct product {
    std::string op, type_name, routing, activations, weights;
    int         k, m, experts, used, tokens, ne11, pad, threads;
    uint64_t    seed;

    bool is_id() const { return op == "id"; }

    ggml_type type() const {
        for (const ggml_type type :
             { GGML_TYPE_Q4_0, GGML_TYPE_Q4_K, GGML_TYPE_MXFP4, GGML_TYPE_IQ4_NL, GGML_TYPE_Q8_0, GGML_TYPE_Q6_K,
               GGML_TYPE_Q5_0, GGML_TYPE_Q4_1, GGML_TYPE_Q5_1, GGML_TYPE_F16, GGML_TYPE_BF16 }) {
            if (type_name == ggml_type_name(type) || type_name == std::string("plain_") + ggml_type_name(type)) {
                return type;
            }
        }
        fail("unknown type " + type_name);
    }

    bool is_repacked() const {
        const ggml_type t = type();
        return type_name.rfind("plain_", 0) != 0 &&
               (t == GGML_TYPE_Q4_0 || t == GGML_TYPE_Q4_K || t == GGML_TYPE_MXFP4 || t == GGML_TYPE_IQ4_NL);
    }
};

bool known_activations(const std::string & kind) {
    for (const char * name : { "normal", "outliers", "zeros", "tiny", "extreme", "overflow", "nan", "inf" }) {
        if (kind == name) {
            return true;
        }
    }
    return false;
}

product parse(const std::string & line) {
    std::istringstream in(line);
    product            p;
    in >> p.op >> p.type_name >> p.k >> p.m >> p.experts >> p.used >> p.tokens >> p.ne11 >> p.pad >> p.threads >>
        p.routing >> p.activations >> p.weights >> p.seed;
    std::string rest;
    if (!in || in >> rest || (p.op != "id" && p.op != "mm") ||
        std::min({ p.k, p.m, p.tokens, p.ne11, p.threads }) < 1 ||
        (p.op == "id" && (p.used < 1 || p.used > p.experts || p.used % p.ne11 != 0)) ||
        !known_activations(p.activations)) {
        fail("not a case: " + line);
    }
    return p;
}

//
// inputs
//

ggml_half random_scale(generator & rng, const std::string & kind) {
    const float x = kind == "extreme" ? 1.0f : 0.001f + rng.uniform() * 0.05f;
    return ggml_fp32_to_fp16(rng.one_in(2) ? x : -x);
}

template <typename BLOCK> void set_scales(BLOCK & block, generator & rng, const std::string & kind) {
    if constexpr (std::is_same_v<BLOCK, block_mxfp4>) {
        block.e = (uint8_t) (110 + rng.below(30));
    } else if constexpr (std::is_same_v<BLOCK, block_q4_K>) {
        block.GGML_COMMON_AGGR_U.GGML_COMMON_AGGR_S.d    = random_scale(rng, kind);
        block.GGML_COMMON_AGGR_U.GGML_COMMON_AGGR_S.dmin = random_scale(rng, kind);
    } else if constexpr (std::is_same_v<BLOCK, block_q4_1> || std::is_same_v<BLOCK, block_q5_1>) {
        block.GGML_COMMON_AGGR_U.GGML_COMMON_AGGR_S.d = random_scale(rng, kind);
        block.GGML_COMMON_AGGR_U.GGML_COMMON_AGGR_S.m = random_scale(rng, kind);
    } else {
        block.d = random_scale(rng, kind);
    }
}

// Blocks of any bytes, with scales that are finite: every value of a block is as likely.
template <typename BLOCK> std::vector<char> make_blocks(size_t n_bytes, generator & rng, const std::string & kind) {
    std::vector<char> bytes(n_bytes);
    for (size_t first = 0; first < n_bytes; first += sizeof(BLOCK)) {
        BLOCK      block;
        char *     raw     = (char *) &block;
        const bool highest = rng.one_in(2);
        for (size_t i = 0; i < sizeof(BLOCK); i += sizeof(uint64_t)) {
            uint64_t word = rng.next();
            if (kind == "extreme") {
                word = highest ? UINT64_MAX : 0;
            }
            memcpy(raw + i, &word, std::min(sizeof(word), sizeof(BLOCK) - i));
        }
        if (kind == "zero") {
            memset(raw, 0, sizeof(BLOCK));
        } else {
            set_scales(block, rng, kind);
        }
        memcpy(bytes.data() + first, raw, sizeof(BLOCK));
    }
    return bytes;
}

// Any finite values of 16 bits, most of them of ordinary size.
template <typename T, typename F>
std::vector<char> make_values(size_t n_bytes, generator & rng, const std::string & kind, const F & from_float) {
    std::vector<char> bytes(n_bytes);
    for (size_t i = 0; i < n_bytes; i += sizeof(T)) {
        const float sign = rng.one_in(2) ? 1.0f : -1.0f;
        const float x    = kind == "zero"      ? sign * 0.0f
                           : kind == "extreme" ? sign * 60000.0f
                           : rng.one_in(50)    ? std::ldexp(sign, -24 + rng.below(10))
                                               : // denormal in F16
                            rng.normal() * 0.1f;
        const T     v    = from_float(x);
        memcpy(bytes.data() + i, &v, sizeof(T));
    }
    return bytes;
}

std::vector<char> make_weights(const product & p, size_t n_bytes, generator & rng) {
    switch (p.type()) {
        case GGML_TYPE_Q4_0:
            return make_blocks<block_q4_0>(n_bytes, rng, p.weights);
        case GGML_TYPE_Q4_K:
            return make_blocks<block_q4_K>(n_bytes, rng, p.weights);
        case GGML_TYPE_MXFP4:
            return make_blocks<block_mxfp4>(n_bytes, rng, p.weights);
        case GGML_TYPE_Q8_0:
            return make_blocks<block_q8_0>(n_bytes, rng, p.weights);
        case GGML_TYPE_Q5_0:
            return make_blocks<block_q5_0>(n_bytes, rng, p.weights);
        case GGML_TYPE_Q6_K:
            return make_blocks<block_q6_K>(n_bytes, rng, p.weights);
        case GGML_TYPE_Q4_1:
            return make_blocks<block_q4_1>(n_bytes, rng, p.weights);
        case GGML_TYPE_Q5_1:
            return make_blocks<block_q5_1>(n_bytes, rng, p.weights);
        case GGML_TYPE_F16:
            return make_values<ggml_fp16_t>(n_bytes, rng, p.weights, ggml_fp32_to_fp16);
        case GGML_TYPE_BF16:
            return make_values<ggml_bf16_t>(n_bytes, rng, p.weights, ggml_fp32_to_bf16);
        default:
            return make_blocks<block_iq4_nl>(n_bytes, rng, p.weights);
    }
}

float special(generator & rng, const std::string & kind) {
    const float sign = rng.one_in(2) ? 1.0f : -1.0f;
    if (kind == "nan") {
        const uint32_t bits = 0x7F800001u + (uint32_t) rng.below(0x7FFFFF) + (sign < 0 ? 0x80000000u : 0);
        float          x;
        memcpy(&x, &bits, sizeof(x));
        return x;
    }
    if (kind == "inf") {
        return sign * std::numeric_limits<float>::infinity();
    }
    return sign * 1e30f; // "overflow": a scale that F16 does not hold
}

// The activations of a row:
//   normal      of very different sizes
//   outliers    some are 1000 times as large as the others
//   zeros       a third of the rows and a third of the blocks of 32 are zero, of either sign
//   tiny        denormal, or so small that the inverse of a block's scale overflows
//   extreme     all of one size: each is quantized to 127 or -127
//   overflow, nan, inf   few values; every fourth row is normal
void fill_row(float * x, int k, generator & rng, const std::string & kind) {
    const bool zero_row = kind == "zeros" && rng.one_in(3);
    const bool specials = (kind == "overflow" || kind == "nan" || kind == "inf") && !rng.one_in(4);
    for (int first = 0; first < k; first += 32) {
        const bool  zero_block = zero_row || (kind == "zeros" && rng.one_in(3));
        const bool  with       = specials && rng.one_in(4);
        const float size       = kind == "tiny" ? std::ldexp(1.0f, -149 + rng.below(40)) : std::exp(2 * rng.normal());
        for (int i = first; i < first + 32; i++) {
            x[i] = rng.normal() * size;
            if (zero_block) {
                x[i] *= 0.0f;
            } else if (kind == "outliers" && rng.one_in(64)) {
                x[i] *= 1e3f;
            } else if (kind == "extreme") {
                x[i] = rng.one_in(2) ? size : -size;
            } else if (with && rng.one_in(16)) {
                x[i] = special(rng, kind);
            }
        }
    }
}

// Experts of each token. ggml has room for as many rows of an expert as there are tokens.
std::vector<int32_t> make_ids(const product & p, generator & rng) {
    std::vector<int32_t> ids, rows_of(p.experts), order(p.experts);
    for (int e = 0; e < p.experts; e++) {
        order[e] = e;
    }
    const auto shuffle = [&](int first, int last) {
        for (int i = first; i + 1 < last; i++) {
            std::swap(order[i], order[i + rng.below(last - i)]);
        }
    };
    shuffle(0, p.experts);
    const int n_few = std::min(p.experts, p.used + 1);
    for (int t = 0; t < p.tokens; t++) {
        if (p.routing == "even" || p.routing == "twice") {
            shuffle(0, p.experts);
        } else if (p.routing == "one") {
            shuffle(1, p.experts);
        } else if (p.routing == "empty") {
            shuffle(0, n_few);
        } else if (p.routing == "last") {
            for (int i = 0; i < p.used; i++) {
                order[i] = p.experts - 1 - i;
            }
        } else if (p.routing != "all") {
            fail("unknown routing " + p.routing);
        }
        std::vector<int32_t> chosen(order.begin(), order.begin() + p.used);
        if (p.routing == "twice" && p.used > 1 && rows_of[chosen[0]] + 2 <= p.tokens && rng.one_in(2)) {
            chosen[p.used - 1] = chosen[0];
        }
        for (int32_t & e : chosen) {
            while (rows_of[e] == p.tokens) { // "twice" has used it up
                e = rng.below(p.experts);
            }
            rows_of[e]++;
            ids.push_back(e);
        }
    }
    return ids;
}

//
// products
//

void compute(const library & lib, const product & p, int n_timed) {
    // A backend for each case: its work buffer has the size that this product asked for.
    const backend_ptr backend(ggml_backend_dev_init(lib.device, nullptr));
    lib.set_n_threads(backend.get(), p.threads);
    generator rng{ p.seed };

    // weights
    const context_ptr wctx(ggml_init({ 4 * ggml_tensor_overhead(), nullptr, true }));
    ggml_tensor *     w = p.is_id() ? ggml_new_tensor_3d(wctx.get(), p.type(), p.k, p.m, p.experts)
                                    : ggml_new_tensor_2d(wctx.get(), p.type(), p.k, p.m);
    const buffer_ptr  wbuf(ggml_backend_alloc_ctx_tensors_from_buft(
        wctx.get(), p.is_repacked() ? lib.repacked : ggml_backend_dev_buffer_type(lib.device)));
    if (p.is_repacked() && w->extra == nullptr) {
        fail("these weights are not repacked: " + p.type_name + " " + std::to_string(p.m));
    }
    const std::vector<char> blocks = make_weights(p, ggml_nbytes(w), rng);
    ggml_backend_tensor_set(w, blocks.data(), 0, blocks.size());

    // activations, with `pad` floats behind each row
    const int         n1 = p.is_id() ? p.ne11 : p.tokens, n2 = p.is_id() ? p.tokens : p.ne11;
    const context_ptr ctx(ggml_init({ 8 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }));
    ggml_tensor *     padded = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, p.k + p.pad, n1, n2);
    ggml_tensor *     x      = ggml_view_3d(ctx.get(), padded, p.k, n1, n2, padded->nb[1], padded->nb[2], 0);
    ggml_tensor *     ids    = p.is_id() ? ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, p.used, p.tokens) : nullptr;
    ggml_tensor *     y      = p.is_id() ? ggml_mul_mat_id(ctx.get(), w, x, ids) : ggml_mul_mat(ctx.get(), w, x);
    ggml_cgraph *     graph  = ggml_new_graph(ctx.get());
    ggml_build_forward_expand(graph, y);
    const buffer_ptr buf(ggml_backend_alloc_ctx_tensors(ctx.get(), backend.get()));

    std::vector<float> rows((size_t) (p.k + p.pad) * n1 * n2, 1e9f);
    std::vector<bool>  row_is_finite;
    for (int r = 0; r < n1 * n2; r++) {
        float * row = rows.data() + (size_t) r * (p.k + p.pad);
        fill_row(row, p.k, rng, p.activations);
        row_is_finite.push_back(std::all_of(row, row + p.k, [](float v) { return std::isfinite(v); }));
    }
    ggml_backend_tensor_set(padded, rows.data(), 0, rows.size() * sizeof(float));
    if (ids != nullptr) {
        const std::vector<int32_t> chosen = make_ids(p, rng);
        ggml_backend_tensor_set(ids, chosen.data(), 0, chosen.size() * sizeof(int32_t));
    }

    // what is not written stays this pattern
    ggml_backend_tensor_memset(y, 0xA5, 0, ggml_nbytes(y));
    double least = std::numeric_limits<double>::infinity();
    for (int i = 0; i <= n_timed; i++) {
        const double begin = cpu_time();
        if (ggml_backend_graph_compute(backend.get(), graph) != GGML_STATUS_SUCCESS) {
            fail("not computed");
        }
        if (i > 0 || n_timed == 0) { // the first run allocates
            least = std::min(least, cpu_time() - begin);
        }
    }

    std::vector<uint32_t> bits(ggml_nelements(y));
    ggml_backend_tensor_get(y, bits.data(), 0, bits.size() * sizeof(uint32_t));
    std::vector<bool> finite;
    for (size_t r = 0; r < bits.size() / p.m; r++) {
        const int used = p.is_id() ? p.used : 1; // rows of products of a token
        finite.push_back(row_is_finite[p.is_id() ? r / used * n1 + r % used % n1 : r]);
    }
    print_results(bits, p.m, finite);
    if (n_timed > 0) {
        const double n_products = (double) p.k * p.m * p.tokens * (p.is_id() ? p.used : p.ne11);
        printf(" %.4f ms %.2f GMAC/s", least * 1e3, n_products / least * 1e-9);
    }
    printf("\n");
    fflush(stdout);
}

} // namespace

int main(int argc, char ** argv) {
    ggml_log_set(
        [](ggml_log_level level, const char * text, void *) {
            if (level == GGML_LOG_LEVEL_WARN || level == GGML_LOG_LEVEL_ERROR) {
                fputs(text, stderr);
            }
        },
        nullptr);
    return run_cases(argc, argv, [](const library & lib, const std::string & line, int n_timed) {
        if (lib.repacked == nullptr) {
            fail("the library is built without repacked weights");
        }
        compute(lib, parse(line), n_timed);
    });
}
