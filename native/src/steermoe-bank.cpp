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

// Values of one row, or of several from `row` on. t may be nullptr.
template <typename T> void write_rows(ggml_tensor * t, int32_t row, const std::vector<T> & values) {
    static_assert(sizeof(T) == 4, "I32 or F32");
    if (t != nullptr) {
        ggml_backend_tensor_set(t, values.data(), (size_t) row * t->nb[1], values.size() * sizeof(T));
    }
}

// [ne0, n] by indices [n_expert, n] of each column -> [n_expert, n]
ggml_tensor * pick(ggml_context * ctx, ggml_tensor * from, ggml_tensor * index) {
    const int64_t n   = from->ne[1];
    ggml_tensor * out = ggml_get_rows(ctx, ggml_reshape_3d(ctx, from, 1, from->ne[0], n), index); // [1, n_expert, n]
    return ggml_reshape_2d(ctx, out, index->ne[0], n);
}

} // namespace

steermoe_edit steermoe_edit_of(const steermoe_bias & bias) {
    return bias.is_capped() ? STEERMOE_EDIT_CAPPED : bias.is_hard() ? STEERMOE_EDIT_HARD : STEERMOE_EDIT_SOFT;
}

steermoe_bank::steermoe_bank(const llama_model & model, const std::vector<steermoe_layer> & model_layers,
                             int32_t n_expert, int32_t n_rows, steermoe_edit largest)
    : n_rows(n_rows), largest(largest), n_expert(n_expert), layers(model_layers), tables(layers.size()),
      written((size_t) n_rows, std::vector<char>(layers.size())), tensors(model, 6 * layers.size()) {
    for (int il = 0; il < (int) layers.size(); il++) {
        if (layers[il].steerable) {
            table & t = tables[il];
            t.index   = tensors.make(GGML_TYPE_I32, n_expert, n_rows, il, "index");
            t.bias    = tensors.make(GGML_TYPE_F32, n_expert, n_rows, il, "bias");
            t.rank    = layers[il].edit_selection ? tensors.make(GGML_TYPE_F32, n_expert, n_rows, il, "rank") : nullptr;
            if (largest == STEERMOE_EDIT_CAPPED) {
                t.against = tensors.make(GGML_TYPE_F32, n_expert, n_rows, il, "against");
                t.limit   = tensors.make(GGML_TYPE_F32, 1, n_rows, il, "limit");
                t.choice  = tensors.make(GGML_TYPE_I32, n_expert, n_rows, il, "choice");
            }
        }
    }
    tensors.allocate();

    std::vector<int32_t>     indices((size_t) n_rows * n_expert);
    const std::vector<float> no_bias(indices.size(), NO_BIAS);
    const std::vector<float> ones(indices.size(), 1.0f);
    for (size_t i = 0; i < indices.size(); i++) {
        indices[i] = (int32_t) (i % n_expert);
    }
    for (const table & t : tables) {
        write_rows(t.index, 0, indices);
        write_rows(t.bias, 0, no_bias);
        write_rows(t.rank, 0, no_bias);
        write_rows(t.against, 0, ones);
        write_rows(t.limit, 0, std::vector<float>((size_t) n_rows, 0.0f));
        write_rows(t.choice, 0, indices);
    }
}

void steermoe_bank::write(int32_t row, const steermoe_bias & bias) {
    std::vector<int32_t> indices(n_expert);
    std::vector<float>   added(n_expert);
    std::vector<float>   ranks(n_expert);
    std::vector<float>   against(n_expert);
    std::vector<int32_t> choice(n_expert);
    for (int il = 0; il < bias.n_layer; il++) {
        const bool    steers = !bias.layer_is_zero(il);
        char &        dirty  = written[row][il];
        const table & t      = tables[il];
        if (t.index == nullptr || (!steers && !dirty)) {
            continue;
        }
        const bool hard   = steers && bias.is_hard();
        const bool capped = steers && bias.is_capped();
        const bool signs  = hard || capped;
        for (int32_t e = 0; e < n_expert; e++) {
            const float v = steers ? bias.layers[il][e] : 0.0f;
            indices[e]    = !signs || v == 0.0f ? e : v > 0.0f ? n_expert : n_expert + 1;
            added[e]      = !steers || (signs && v == 0.0f) ? NO_BIAS : signs ? v * bias.epsilon : v;
            ranks[e]      = hard ? v * RANK : NO_BIAS;
            against[e]    = capped && v > 0.0f ? -1.0f : 1.0f;
            choice[e]     = capped && v != 0.0f ? n_expert + e : e;
        }
        write_rows(t.index, row, indices);
        write_rows(t.bias, row, added);
        write_rows(t.rank, row, ranks);
        write_rows(t.against, row, against);
        write_rows(t.limit, row, std::vector<float>{ capped ? -bias.cap : 0.0f });
        write_rows(t.choice, row, choice);
        dirty = steers;
    }
}

// z'_e = [z | max z | min z][index_e] + bias_e, index and bias from the token's row; under a cap then limit().
//
// Logits are copied by index, not multiplied by 0 and 1 and not selected by a matrix product: 0 * inf is NaN, which
// would spread an infinite logit over its token, and some backends round the inputs of F32 products (TF32, F16), which
// could put max + 0.01 below the max.
//
// The biases are fetched before all other nodes but after z, whose memory is free when the sum is computed in theirs:
// the selection then goes to the place of z, and what follows needs one contiguous block less ([n_expert, n_ubatch]).
ggml_tensor * steermoe_bank::edit_logits(ggml_context * ctx, ggml_tensor * z, int il, steermoe_edit edit,
                                         ggml_tensor * rows) const {
    const table & t = tables[il];
    if (edit == STEERMOE_EDIT_NONE || t.index == nullptr) {
        return z;
    }
    ggml_tensor * out = z; // [n_expert, n_tokens]
    if (edit >= STEERMOE_EDIT_HARD) {
        const int n = n_expert;

        ggml_tensor * max = ggml_pool_1d(ctx, z, GGML_OP_POOL_MAX, n, n, 0); // [1, n_tokens]
        ggml_tensor * min = ggml_neg(ctx, ggml_pool_1d(ctx, ggml_neg(ctx, z), GGML_OP_POOL_MAX, n, n, 0));
        ggml_tensor * all = ggml_concat(ctx, z, ggml_concat(ctx, max, min, 0), 0); // [n_expert + 2, n_tokens]

        out = pick(ctx, all, ggml_get_rows(ctx, t.index, rows)); // [n_expert, n_tokens]
    }
    out = ggml_add(ctx, ggml_get_rows(ctx, t.bias, rows), out);
    if (edit == STEERMOE_EDIT_CAPPED) {
        out = limit(ctx, z, out, t, rows);
    }
    return ggml_format_name(out, "ffn_moe_logits_steered-%d", il);
}

// Where logits are raised, min(uncapped, z + cap) = -max(-uncapped, -z - cap); where they are lowered,
// max(uncapped, z - cap). So with s = -1 and s = 1, z' = s max(s uncapped, s z - cap). The product with s and the choice
// of the greater one are exact. ggml has no maximum of two tensors, but pools of pairs.
//
// What has no cap is not computed this way but copied, as in edit_logits: the pool knows no NaN and no value below the
// lowest finite one.
ggml_tensor * steermoe_bank::limit(ggml_context * ctx, ggml_tensor * z, ggml_tensor * uncapped, const table & t,
                                   ggml_tensor * rows) const {
    const int64_t n        = n_expert;
    const int64_t n_tokens = z->ne[1];

    ggml_tensor * s     = ggml_get_rows(ctx, t.against, rows);                                   // [n, n_tokens]
    ggml_tensor * bound = ggml_add(ctx, ggml_mul(ctx, z, s), ggml_get_rows(ctx, t.limit, rows)); // [n, n_tokens]
    ggml_tensor * pairs = ggml_concat(ctx, ggml_reshape_3d(ctx, ggml_mul(ctx, uncapped, s), 1, n, n_tokens),
                                      ggml_reshape_3d(ctx, bound, 1, n, n_tokens), 0); // [2, n, n_tokens]
    ggml_tensor * max   = ggml_pool_1d(ctx, ggml_reshape_2d(ctx, pairs, 2 * n, n_tokens), GGML_OP_POOL_MAX, 2, 2, 0);
    ggml_tensor * both  = ggml_concat(ctx, uncapped, ggml_mul(ctx, max, s), 0); // [2 n, n_tokens]

    return pick(ctx, both, ggml_get_rows(ctx, t.choice, rows));
}

ggml_tensor * steermoe_bank::edit_selection(ggml_context * ctx, ggml_tensor * scores, int il, steermoe_edit edit,
                                            ggml_tensor * rows) const {
    const table & t = tables[il];
    if (edit < STEERMOE_EDIT_HARD || t.rank == nullptr) {
        return scores;
    }
    if (layers[il].masked) {
        // in place: nothing but the selection reads these scores. In an unsteered token a masked score stays the
        // lowest.
        scores = ggml_clamp(ctx, scores, MASKED_SCORE, INFINITY);
    }
    // The ranks first: CUDA computes a router in one operation where the scores are the first addend, takes the second for
    // a row that all tokens share, and does not look at its size.
    ggml_tensor * steered = ggml_add(ctx, ggml_get_rows(ctx, t.rank, rows), scores);
    return ggml_format_name(steered, "ffn_moe_probs_steered-%d", il);
}

uint32_t steermoe_bank::n_nodes() const {
    uint32_t n = 2; // the rows of all tokens and of the outputs
    for (size_t il = 0; il < layers.size(); il++) {
        const table & t = tables[il];
        n += 12 * (t.index != nullptr) + 16 * (t.choice != nullptr) + 2 * (t.rank != nullptr) + layers[il].masked;
    }
    return n;
}
