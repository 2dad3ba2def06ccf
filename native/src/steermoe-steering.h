// The edit of the routers' logits: one context's tensors and graph nodes. Knows ggml, nothing of recording.
#pragma once

#include "ggml-cpp.h"

#include "steermoe-bias.h"

#include <cstdint>
#include <vector>

struct llama_model;

struct steermoe_steering {
    // How a layer's choice is made from its scores.
    struct selection {
        bool edited = false; // under the hard rule the scores have to be edited, too
        bool masked = false; // scores of groups that are out are -inf
    };

    // Puts the tensors of every steered layer on the buffer type of that layer. selections: [n_layer].
    // Throws steermoe_error.
    steermoe_steering(const steermoe_bias & bias, const llama_model & model, std::vector<selection> selections);

    // Would `bias` give the same graph, so that new values in the same tensors are enough?
    bool same_topology(const steermoe_bias & bias) const;

    // Write the values of a bias of the same topology.
    void update(const steermoe_bias & bias);

    bool has(int il) const;

    // logits [n_expert, n_tokens] -> edited logits of the same shape; the same tensor where layer il is not steered.
    ggml_tensor * edit_logits(ggml_context * ctx, ggml_tensor * logits, int il) const;

    // The scores [n_expert, n_tokens] whose top-k is the choice -> scores with +1 experts first and -1 experts last; the
    // same tensor where the edited logits decide the choice by themselves, and under the soft rule.
    ggml_tensor * edit_selection(ggml_context * ctx, ggml_tensor * scores, int il) const;

    uint32_t n_nodes() const;

  private:
    // Each [n_expert] F32, nullptr where the rule does not need it.
    struct layer {
        ggml_tensor * bias  = nullptr; // soft: b
        ggml_tensor * keep  = nullptr; // hard: 1 where the sign is 0
        ggml_tensor * plus  = nullptr; // hard: 1 where the sign is +1
        ggml_tensor * minus = nullptr; // hard: 1 where the sign is -1
        ggml_tensor * rank  = nullptr; // hard, where the selection is edited: sign * RANK

        bool any() const { return bias != nullptr || keep != nullptr; }
    };

    ggml_tensor * edit_hard(ggml_context * ctx, ggml_tensor * logits, const layer & l) const;

    steermoe_mode mode;
    float         epsilon;

    std::vector<layer>                   layers;     // [n_layer]
    std::vector<selection>               selections; // [n_layer]
    std::vector<ggml_context_ptr>        ctxs;
    std::vector<ggml_backend_buffer_ptr> bufs;
};
