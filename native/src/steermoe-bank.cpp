#include "steermoe-bank.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <cmath>

namespace {

// x + NOTHING has the bits of x; 0 would turn -0 into 0.
constexpr float NOTHING = -0.0f;

template <typename T> void write_rows(ggml_tensor * t, int32_t row, const std::vector<T> & values) {
    static_assert(sizeof(T) == 4, "I32 or F32");
    ggml_backend_tensor_set(t, values.data(), (size_t) row * t->nb[1], values.size() * sizeof(T));
}

} // namespace

steermoe_bank::steermoe_bank(const llama_model & model, const std::vector<steermoe_layer> & model_layers,
                             int32_t n_expert, int32_t n_rows)
    : n_rows(n_rows), n_expert(n_expert), layers(model_layers), tables(layers.size()),
      written((size_t) n_rows, std::vector<char>(layers.size())), tensors(model, 3 * layers.size()) {
    for (int il = 0; il < (int) layers.size(); il++) {
        if (layers[il].steerable) {
            table & t = tables[il];
            t.place   = tensors.make(GGML_TYPE_I32, n_expert, n_rows, il, "bank_place");
            t.bias    = tensors.make(GGML_TYPE_F32, n_expert, n_rows, il, "bank_bias");
            t.rank    = layers[il].edited ? tensors.make(GGML_TYPE_F32, n_expert, n_rows, il, "bank_rank") : nullptr;
        }
    }
    tensors.allocate();

    std::vector<int32_t>     places((size_t) n_rows * n_expert);
    const std::vector<float> nothing(places.size(), NOTHING);
    for (size_t i = 0; i < places.size(); i++) {
        places[i] = (int32_t) (i % n_expert);
    }
    for (const table & t : tables) {
        if (t.place != nullptr) {
            write_rows(t.place, 0, places);
            write_rows(t.bias, 0, nothing);
        }
        if (t.rank != nullptr) {
            write_rows(t.rank, 0, nothing);
        }
    }
}

void steermoe_bank::write(int32_t row, const steermoe_bias & bias) {
    std::vector<int32_t> places(n_expert);
    std::vector<float>   added(n_expert);
    std::vector<float>   ranks(n_expert);
    for (int il = 0; il < bias.n_layer; il++) {
        const bool    steers = !bias.layer_is_zero(il);
        char &        dirty  = written[row][il];
        const table & t      = tables[il];
        if (t.place == nullptr || (!steers && !dirty)) {
            continue;
        }
        const bool hard = steers && bias.mode == STEERMOE_MODE_HARD;
        for (int32_t e = 0; e < n_expert; e++) {
            const float v = steers ? bias.layers[il][e] : 0.0f;
            places[e]     = !hard || v == 0.0f ? e : v > 0.0f ? n_expert : n_expert + 1;
            ranks[e]      = hard ? v * STEERMOE_RANK : NOTHING;
            added[e]      = steers && !hard ? v : NOTHING;
        }
        write_rows(t.place, row, places);
        write_rows(t.bias, row, added);
        if (t.rank != nullptr) {
            write_rows(t.rank, row, ranks);
        }
        dirty = steers;
    }
}

// z'_e = [z | max z + eps | min z - eps] at the place that the token's row names for expert e, plus the row's b_e.
//
// Copied, not multiplied by 0 and 1: an infinite or undefined logit of a token must not spread in it, for it may be an
// unsteered token. Extremes are computed with the same rounding as in steermoe_steering.
ggml_tensor * steermoe_bank::edit_logits(ggml_context * ctx, ggml_tensor * z, int il, rules r,
                                         const steermoe_columns & columns) const {
    const table & t = tables[il];
    if (!r.any() || t.place == nullptr) {
        return z;
    }
    const int64_t n_columns = z->ne[1];

    ggml_tensor * out = z; // [n_expert, n_columns]
    if (r.hard) {
        const int n = n_expert;

        ggml_tensor * max     = ggml_pool_1d(ctx, z, GGML_OP_POOL_MAX, n, n, 0); // [1, n_columns]
        ggml_tensor * neg_min = ggml_pool_1d(ctx, ggml_neg(ctx, z), GGML_OP_POOL_MAX, n, n, 0);
        ggml_tensor * high    = ggml_add(ctx, max, columns.epsilon);
        ggml_tensor * low     = ggml_neg(ctx, ggml_add(ctx, neg_min, columns.epsilon));
        ggml_tensor * all     = ggml_concat(ctx, ggml_concat(ctx, z, high, 0), low, 0); // [n_expert + 2, n_columns]
        ggml_tensor * places  = ggml_get_rows(ctx, t.place, columns.row);               // [n_expert, n_columns]

        out = ggml_get_rows(ctx, ggml_reshape_3d(ctx, all, 1, n + 2, n_columns), places); // [1, n_expert, n_columns]
        out = ggml_reshape_2d(ctx, out, n, n_columns);
    }
    if (r.soft) {
        out = ggml_add(ctx, out, ggml_get_rows(ctx, t.bias, columns.row));
    }
    return ggml_format_name(out, "ffn_moe_logits_steered-%d", il);
}

ggml_tensor * steermoe_bank::edit_selection(ggml_context * ctx, ggml_tensor * scores, int il, rules r,
                                            const steermoe_columns & columns) const {
    const table & t = tables[il];
    if (!r.hard || t.rank == nullptr) {
        return scores;
    }
    if (layers[il].masked) {
        // also of tokens that are not steered: what was last in the choice stays last
        scores = ggml_clamp(ctx, scores, STEERMOE_MASKED, INFINITY);
    }
    ggml_tensor * ranks = ggml_get_rows(ctx, t.rank, columns.row);
    return ggml_format_name(ggml_add(ctx, scores, ranks), "ffn_moe_probs_steered-%d", il);
}

uint32_t steermoe_bank::n_nodes() const {
    uint32_t n = 4; // rows and epsilons, of all tokens and of the outputs
    for (size_t il = 0; il < layers.size(); il++) {
        n += 14 * (tables[il].place != nullptr) + 2 * (tables[il].rank != nullptr) + layers[il].masked;
    }
    return n;
}
