// Flash attention and operations with two operands, computed by the CPU backend of any library: what is compared are bits.
//   tile_ops LIBRARY            one line of results (print_results) for each case on stdin
//   tile_ops LIBRARY time N     CPU time besides: the least of N runs
// LIBRARY is a libggml-cpu that uses the libggml-base of this program. A case is a line of words:
//   attention TYPE DK DV heads kv_heads queries keys sequences mask slopes softcap sinks values threads seed
//     TYPE      of keys and values
//     mask      none, causal, window, sequences (tokens of several, in any order), empty (a third of the rows sees no key),
//               noise (any values)
//     slopes    1: a slope for each head; softcap, sinks: 1 with them
//     values    normal, large (few keys count), equal (all keys count the same, zeros of both signs)
//   OP A B n rows planes n1 rows1 apart threads seed
//     OP        add, sub, mul, div
//     A B       types of the operands; the result has A's
//     n1 rows1  of the second operand, which is repeated
//     apart     1: rows of the second operand are columns of a transposed one
#include "cpu_library.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>

namespace {

ggml_type type_named(const std::string & name) {
    for (const ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16 }) {
        if (name == ggml_type_name(type)) {
            return type;
        }
    }
    fail("unknown type " + name);
}

// A graph's operands are made in one context, filled once they are allocated.
struct operands {
    context_ptr ctx{ ggml_init({ 32 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }) };
    generator   rng;

    std::vector<std::pair<ggml_tensor *, std::vector<float>>> values;

    explicit operands(uint64_t seed) : rng{ seed } {}

    template <typename F>
    ggml_tensor * make(ggml_type type, int64_t n0, int64_t n1, int64_t n2, int64_t n3, const F & value) {
        ggml_tensor *      t = ggml_new_tensor_4d(ctx.get(), type, n0, n1, n2, n3);
        std::vector<float> x;
        for (int64_t i3 = 0; i3 < n3; i3++) {
            for (int64_t i2 = 0; i2 < n2; i2++) {
                for (int64_t i1 = 0; i1 < n1; i1++) {
                    for (int64_t i0 = 0; i0 < n0; i0++) {
                        x.push_back(value(i0, i1, i3));
                    }
                }
            }
        }
        values.emplace_back(t, std::move(x));
        return t;
    }

    void set() const {
        for (const auto & [t, x] : values) {
            if (t->type == GGML_TYPE_F32) {
                ggml_backend_tensor_set(t, x.data(), 0, x.size() * sizeof(float));
                continue;
            }
            std::vector<uint16_t> halves(x.size());
            if (t->type == GGML_TYPE_F16) {
                ggml_fp32_to_fp16_row(x.data(), (ggml_fp16_t *) halves.data(), (int64_t) x.size());
            } else {
                ggml_fp32_to_bf16_row(x.data(), (ggml_bf16_t *) halves.data(), (int64_t) x.size());
            }
            ggml_backend_tensor_set(t, halves.data(), 0, halves.size() * sizeof(uint16_t));
        }
    }
};

ggml_tensor * attention(operands & o, std::istringstream & in) {
    std::string type, mask, values;
    int         dk, dv, heads, kv_heads, queries, keys, sequences, slopes, softcap, sinks;
    in >> type >> dk >> dv >> heads >> kv_heads >> queries >> keys >> sequences >> mask >> slopes >> softcap >> sinks >>
        values;
    if (!in || heads % std::max(kv_heads, 1) != 0) {
        return nullptr;
    }
    generator & rng   = o.rng;
    const auto  value = [&](int64_t, int64_t, int64_t) {
        return values == "equal" ? rng.normal() * 0.0f : values == "large" ? rng.normal() * 8 : rng.normal();
    };
    const auto finite = [&](int64_t, int64_t, int64_t) { return rng.normal(); };

    // as llama.cpp's: the heads of a token lie side by side
    const auto rows = [&](ggml_type t, int n, int n_heads, int n_tokens, const auto & f) {
        return ggml_permute(o.ctx.get(), o.make(t, n, n_heads, n_tokens, sequences, f), 0, 2, 1, 3);
    };
    ggml_tensor * q = rows(GGML_TYPE_F32, dk, heads, queries, value);
    ggml_tensor * k = rows(type_named(type), dk, kv_heads, keys, value);
    ggml_tensor * v = rows(type_named(type), dv, kv_heads, keys, finite);

    ggml_tensor *    m      = nullptr;
    const float      hidden = -std::numeric_limits<float>::infinity();
    std::vector<int> query_of(queries), key_of(keys);
    for (int & s : query_of) {
        s = rng.below(3);
    }
    for (int & s : key_of) {
        s = rng.below(3);
    }
    if (mask != "none") {
        m = o.make(GGML_TYPE_F16, keys, queries, 1, sequences, [&](int64_t key, int64_t query, int64_t sequence) {
            const int64_t at   = query + std::max(keys - queries, 0) - 5 * sequence;
            bool          sees = key <= at;
            if (mask == "window") {
                sees = sees && key > at - 37;
            } else if (mask == "sequences") {
                sees = sees && key_of[key] == query_of[query];
            } else if (mask == "empty") {
                sees = query_of[query] != 0;
            } else if (mask == "noise") {
                sees = !rng.one_in(3);
            } else if (mask != "causal") {
                fail("unknown mask " + mask);
            }
            return !sees ? hidden : mask == "noise" ? 4 * rng.normal() : slopes ? (float) (key - at) : 0.0f;
        });
    }
    ggml_tensor * y = ggml_flash_attn_ext(o.ctx.get(), q, k, v, m, 1 / std::sqrt((float) dk), slopes ? 8.0f : 0.0f,
                                          softcap ? 20.0f : 0.0f);
    if (sinks) {
        ggml_flash_attn_ext_add_sinks(y, o.make(GGML_TYPE_F32, heads, 1, 1, 1, finite));
    }
    return y;
}

ggml_tensor * binary(operands & o, const std::string & op, std::istringstream & in) {
    std::string a_type, b_type;
    int         n, rows, planes, n1, rows1, apart;
    in >> a_type >> b_type >> n >> rows >> planes >> n1 >> rows1 >> apart;
    if (!in || n % n1 != 0 || rows % rows1 != 0) {
        return nullptr;
    }
    const auto value = [&](int64_t, int64_t, int64_t) {
        return o.rng.one_in(9) ? o.rng.normal() * 0.0f
                               : std::exp(4 * o.rng.normal()) * (o.rng.one_in(2) ? 1.0f : -1.0f);
    };
    ggml_tensor * a = o.make(type_named(a_type), n, rows, planes, 1, value);
    ggml_tensor * b = apart ? ggml_transpose(o.ctx.get(), o.make(type_named(b_type), rows1, n1, planes, 1, value))
                            : o.make(type_named(b_type), n1, rows1, planes, 1, value);
    return op == "mul"   ? ggml_mul(o.ctx.get(), a, b)
           : op == "add" ? ggml_add(o.ctx.get(), a, b)
           : op == "sub" ? ggml_sub(o.ctx.get(), a, b)
           : op == "div" ? ggml_div(o.ctx.get(), a, b)
                         : nullptr;
}

void compute(const library & lib, const std::string & line, int n_timed) {
    // A backend for each case: its work buffer has the size that this graph asked for.
    const backend_ptr  backend(ggml_backend_dev_init(lib.device, nullptr));
    std::istringstream in(line), last(line);
    std::string        op, word;
    uint64_t           seed = 0;
    while (last >> word) {
        seed = strtoull(word.c_str(), nullptr, 10);
    }
    in >> op;
    operands      o(seed);
    ggml_tensor * y       = op == "attention" ? attention(o, in) : binary(o, op, in);
    int           threads = 0;
    if (y == nullptr || !(in >> threads >> seed) || threads < 1 || in >> word) {
        fail("not a case: " + line);
    }
    lib.set_n_threads(backend.get(), threads);
    ggml_cgraph * graph = ggml_new_graph(o.ctx.get());
    ggml_build_forward_expand(graph, y);
    const buffer_ptr buffer(ggml_backend_alloc_ctx_tensors(o.ctx.get(), backend.get()));
    o.set();
    ggml_backend_tensor_memset(y, 0xA5, 0, ggml_nbytes(y)); // what is not written stays this pattern

    double least = std::numeric_limits<double>::infinity();
    for (int i = 0; i <= n_timed; i++) {
        const double begin = cpu_time();
        if (ggml_backend_graph_compute(backend.get(), graph) != GGML_STATUS_SUCCESS) {
            fail("not computed");
        }
        least = std::min(least, cpu_time() - begin);
    }
    std::vector<uint32_t> bits(ggml_nelements(y));
    if (y->type == GGML_TYPE_F32) {
        ggml_backend_tensor_get(y, bits.data(), 0, bits.size() * sizeof(uint32_t));
    } else { // the values are distinct, so their bits are
        std::vector<uint16_t> halves(bits.size());
        ggml_backend_tensor_get(y, halves.data(), 0, halves.size() * sizeof(uint16_t));
        std::copy(halves.begin(), halves.end(), bits.begin());
    }
    print_results(bits, 1, std::vector<bool>(bits.size(), true));
    if (n_timed > 0) {
        printf(" %.4f ms", least * 1e3);
    }
    printf("\n");
    fflush(stdout);
}

} // namespace

int main(int argc, char ** argv) {
    return run_cases(argc, argv, compute);
}
