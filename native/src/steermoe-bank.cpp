#include "steermoe-bank.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <cmath>

namespace {

// x + NO_BIAS has the bits of x; x + 0 would turn -0 into +0.
constexpr float NO_BIAS = -0.0f;

// Added to the selection score of a +1 expert and subtracted from that of a -1 expert. Larger than any score, so it
// decides alone. Mixing weights are not computed from the selection scores.
constexpr float RANK = 1e30f;

// Replaces -inf in the scores of expert groups that are not selected: below any score and above -RANK. -inf + RANK
// would stay -inf, and no -1 expert could be below it.
constexpr float MASKED_SCORE = -1e20f;

template <typename T> void write_rows(ggml_tensor * t, int32_t row, const std::vector<T> & values) {
    static_assert(sizeof(T) == 4, "I32 or F32");
    ggml_backend_tensor_set(t, values.data(), (size_t) row * t->nb[1], values.size() * sizeof(T));
}

} // namespace

steermoe_bank::steermoe_bank(const llama_model & model, const std::vector<steermoe_layer> & model_layers,
                             int32_t n_expert, int32_t n_rows)
    : n_rows(n_rows), n_expert(n_expert), layers(model_layers), tables(layers.size()),
      written((size_t) n_rows, std::vector<char>(layers.size())), epsilons((size_t) n_rows),
      tensors(model, 3 * layers.size()) {
    for (int il = 0; il < (int) layers.size(); il++) {
        if (layers[il].steerable) {
            table & t = tables[il];
            t.index   = tensors.make(GGML_TYPE_I32, n_expert, n_rows, il, "index");
            t.bias    = tensors.make(GGML_TYPE_F32, n_expert, n_rows, il, "bias");
            t.rank    = layers[il].edit_selection ? tensors.make(GGML_TYPE_F32, n_expert, n_rows, il, "rank") : nullptr;
        }
    }
    tensors.allocate();

    std::vector<int32_t>     indices((size_t) n_rows * n_expert);
    const std::vector<float> no_bias(indices.size(), NO_BIAS);
    for (size_t i = 0; i < indices.size(); i++) {
        indices[i] = (int32_t) (i % n_expert);
    }
    for (const table & t : tables) {
        if (t.index != nullptr) {
            write_rows(t.index, 0, indices);
            write_rows(t.bias, 0, no_bias);
        }
        if (t.rank != nullptr) {
            write_rows(t.rank, 0, no_bias);
        }
    }
}

void steermoe_bank::write(int32_t row, const steermoe_bias & bias) {
    std::vector<int32_t> indices(n_expert);
    std::vector<float>   added(n_expert);
    std::vector<float>   ranks(n_expert);
    for (int il = 0; il < bias.n_layer; il++) {
        const bool    steers = !bias.layer_is_zero(il);
        char &        dirty  = written[row][il];
        const table & t      = tables[il];
        if (t.index == nullptr || (!steers && !dirty)) {
            continue;
        }
        const bool hard = steers && bias.mode == STEERMOE_MODE_HARD;
        for (int32_t e = 0; e < n_expert; e++) {
            const float v = steers ? bias.layers[il][e] : 0.0f;
            indices[e]    = !hard || v == 0.0f ? e : v > 0.0f ? n_expert : n_expert + 1;
            ranks[e]      = hard ? v * RANK : NO_BIAS;
            added[e]      = steers && !hard ? v : NO_BIAS;
        }
        write_rows(t.index, row, indices);
        write_rows(t.bias, row, added);
        if (t.rank != nullptr) {
            write_rows(t.rank, row, ranks);
        }
        dirty = steers;
    }
    epsilons[row] = bias.epsilon;
}

// z'_e = [z | max z + eps | min z - eps][index_e] + b_e, index and b from the token's row.
//
// Values are copied, not multiplied by 0 and 1 and not selected by a matrix product: 0 * inf is NaN, which would spread
// an infinite logit over its token, and some backends round the inputs of F32 products (TF32, F16), which could put
// max + 0.01 below the max.
ggml_tensor * steermoe_bank::edit_logits(ggml_context * ctx, ggml_tensor * z, int il, steermoe_rules rules,
                                         const steermoe_token_rows & rows) const {
    const table & t = tables[il];
    if (rules == 0 || t.index == nullptr) {
        return z;
    }
    const int64_t n_tokens = z->ne[1];

    ggml_tensor * out = z; // [n_expert, n_tokens]
    if (rules & STEERMOE_RULE_HARD) {
        const int n = n_expert;

        ggml_tensor * max     = ggml_pool_1d(ctx, z, GGML_OP_POOL_MAX, n, n, 0); // [1, n_tokens]
        ggml_tensor * neg_min = ggml_pool_1d(ctx, ggml_neg(ctx, z), GGML_OP_POOL_MAX, n, n, 0);
        ggml_tensor * high    = ggml_add(ctx, max, rows.epsilon);
        ggml_tensor * low     = ggml_neg(ctx, ggml_add(ctx, neg_min, rows.epsilon));
        ggml_tensor * all     = ggml_concat(ctx, ggml_concat(ctx, z, high, 0), low, 0); // [n_expert + 2, n_tokens]
        ggml_tensor * index   = ggml_get_rows(ctx, t.index, rows.row);                  // [n_expert, n_tokens]

        out = ggml_get_rows(ctx, ggml_reshape_3d(ctx, all, 1, n + 2, n_tokens), index); // [1, n_expert, n_tokens]
        out = ggml_reshape_2d(ctx, out, n, n_tokens);
    }
    if (rules & STEERMOE_RULE_SOFT) {
        out = ggml_add(ctx, out, ggml_get_rows(ctx, t.bias, rows.row));
    }
    return ggml_format_name(out, "ffn_moe_logits_steered-%d", il);
}

ggml_tensor * steermoe_bank::edit_selection(ggml_context * ctx, ggml_tensor * scores, int il, steermoe_rules rules,
                                            const steermoe_token_rows & rows) const {
    const table & t = tables[il];
    if (!(rules & STEERMOE_RULE_HARD) || t.rank == nullptr) {
        return scores;
    }
    if (layers[il].masked) {
        // in place: nothing but the selection reads these scores. In an unsteered token a masked score stays the lowest.
        scores = ggml_clamp(ctx, scores, MASKED_SCORE, INFINITY);
    }
    ggml_tensor * rank = ggml_get_rows(ctx, t.rank, rows.row);
    return ggml_format_name(ggml_add(ctx, scores, rank), "ffn_moe_probs_steered-%d", il);
}

uint32_t steermoe_bank::n_nodes() const {
    uint32_t n = 4; // rows and epsilons: of all tokens and of the outputs
    for (size_t il = 0; il < layers.size(); il++) {
        n += 14 * (tables[il].index != nullptr) + 2 * (tables[il].rank != nullptr) + layers[il].masked;
    }
    return n;
}
