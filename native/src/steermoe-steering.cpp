#include "steermoe-steering.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace {

struct needs {
    bool bias  = false;
    bool plus  = false;
    bool minus = false;
};

needs needs_of(const steermoe_bias & bias, int il) {
    needs n;
    if (bias.layer_is_zero(il)) {
        return n;
    }
    if (bias.mode == STEERMOE_MODE_SOFT) {
        n.bias = true;
        return n;
    }
    for (const float v : bias.layers[il]) {
        n.plus  = n.plus || v > 0.0f;
        n.minus = n.minus || v < 0.0f;
    }
    return n;
}

template <typename F> void write(ggml_tensor * t, const std::vector<float> & values, F && f) {
    if (t == nullptr) {
        return;
    }
    std::vector<float> data(values.size());
    std::transform(values.begin(), values.end(), data.begin(), f);
    ggml_backend_tensor_set(t, data.data(), 0, ggml_nbytes(t));
}

} // namespace

steermoe_steering::steermoe_steering(const steermoe_bias & source, const llama_model & model,
                                     std::vector<steermoe_layer> model_layers)
    : mode(source.mode), epsilon(source.epsilon), masks_of(source.n_layer), layers(std::move(model_layers)),
      tensors(model, 5 * (size_t) source.n_layer) {
    const auto make = [&](bool wanted, int il, const char * what) {
        return wanted ? tensors.make(GGML_TYPE_F32, source.n_expert, 1, il, what) : nullptr;
    };
    for (int il = 0; il < source.n_layer; il++) {
        const needs n = needs_of(source, il);
        masks &     l = masks_of[il];
        l.bias        = make(n.bias, il, "bias");
        l.keep        = make(n.plus || n.minus, il, "keep");
        l.plus        = make(n.plus, il, "plus");
        l.minus       = make(n.minus, il, "minus");
        l.rank        = make((n.plus || n.minus) && layers[il].edited, il, "rank");
    }
    tensors.allocate();
    update(source);
}

bool steermoe_steering::same_topology(const steermoe_bias & bias) const {
    if (bias.mode != mode || bias.epsilon != epsilon || (size_t) bias.n_layer != masks_of.size()) {
        return false;
    }
    for (int il = 0; il < bias.n_layer; il++) {
        const needs   n = needs_of(bias, il);
        const masks & l = masks_of[il];
        if (n.bias != (l.bias != nullptr) || n.plus != (l.plus != nullptr) || n.minus != (l.minus != nullptr)) {
            return false;
        }
    }
    return true;
}

void steermoe_steering::update(const steermoe_bias & bias) {
    for (int il = 0; il < bias.n_layer; il++) {
        const auto &  values = bias.layers[il];
        const masks & l      = masks_of[il];
        write(l.bias, values, [](float v) { return v; });
        write(l.keep, values, [](float v) { return v == 0.0f ? 1.0f : 0.0f; });
        write(l.plus, values, [](float v) { return v > 0.0f ? 1.0f : 0.0f; });
        write(l.minus, values, [](float v) { return v < 0.0f ? 1.0f : 0.0f; });
        write(l.rank, values, [](float v) { return v * STEERMOE_RANK; });
    }
}

bool steermoe_steering::has(int il) const {
    return il >= 0 && (size_t) il < masks_of.size() && masks_of[il].any();
}

// Exactly what edit_logits and edit_selection add: graphs take memory for every node that they may have.
uint32_t steermoe_steering::n_nodes() const {
    uint32_t n = 0;
    for (const masks & l : masks_of) {
        n += (l.bias != nullptr) + (l.keep != nullptr) + 5 * (l.plus != nullptr) + 6 * (l.minus != nullptr) +
             2 * (l.rank != nullptr);
    }
    return n;
}

ggml_tensor * steermoe_steering::edit_logits(ggml_context * ctx, ggml_tensor * logits, int il) const {
    if (!has(il)) {
        return logits;
    }
    const masks & l   = masks_of[il];
    ggml_tensor * out = mode == STEERMOE_MODE_SOFT ? ggml_add(ctx, logits, l.bias) : edit_hard(ctx, logits, l);
    return ggml_format_name(out, "ffn_moe_logits_steered-%d", il);
}

ggml_tensor * steermoe_steering::edit_selection(ggml_context * ctx, ggml_tensor * scores, int il) const {
    if (!has(il) || masks_of[il].rank == nullptr) {
        return scores;
    }
    if (layers[il].masked) {
        scores = ggml_clamp(ctx, scores, STEERMOE_MASKED,
                            INFINITY); // in place; nothing but the choice reads the masked scores
    }
    return ggml_format_name(ggml_add(ctx, scores, masks_of[il].rank), "ffn_moe_probs_steered-%d", il);
}

// z' = keep*z + plus*(max z + eps) + minus*(min z - eps), both extremes of the unedited z.
//
// The rows of extremes are spread by repeat and multiplied, not by a K=2 matrix product: some backends round the
// inputs of F32 products (TF32, F16), and a rounded max + 0.01 may lie below the max. Multiplying by 0 and 1 and adding
// zeros is exact everywhere, so untouched logits keep their bits.
ggml_tensor * steermoe_steering::edit_hard(ggml_context * ctx, ggml_tensor * z, const masks & l) const {
    const int n_expert = (int) z->ne[0];

    ggml_tensor * out = ggml_mul(ctx, z, l.keep); // [n_expert, n_tokens]
    if (l.plus != nullptr) {
        ggml_tensor * max   = ggml_pool_1d(ctx, z, GGML_OP_POOL_MAX, n_expert, n_expert, 0); // [1, n_tokens]
        ggml_tensor * value = ggml_scale_bias(ctx, max, 1.0f, epsilon);
        out                 = ggml_add(ctx, out, ggml_mul(ctx, ggml_repeat(ctx, value, z), l.plus));
    }
    if (l.minus != nullptr) {
        ggml_tensor * neg_min = ggml_pool_1d(ctx, ggml_neg(ctx, z), GGML_OP_POOL_MAX, n_expert, n_expert, 0);
        ggml_tensor * value   = ggml_scale_bias(ctx, neg_min, -1.0f, -epsilon);
        out                   = ggml_add(ctx, out, ggml_mul(ctx, ggml_repeat(ctx, value, z), l.minus));
    }
    return out;
}
