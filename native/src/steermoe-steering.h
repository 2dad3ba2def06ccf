// The edit of the routers' logits where all tokens are under one steering: its tensors and graph nodes. Knows ggml,
// nothing of recording.
#pragma once

#include "steermoe-bias.h"
#include "steermoe-tensors.h"

#include <cstdint>
#include <vector>

// How a layer of the model makes its choice.
struct steermoe_layer {
    bool steerable = false; // its router chooses
    bool edited    = false; // from scores that have to be edited, too, under the hard rule
    bool masked    = false; // and those of groups that are out are -inf
};

// What is added to the selection scores of a +1 expert and taken from those of a -1 expert: beyond any score, so that
// it alone decides. Scores do not enter the weights, so it does not matter what is left of them.
inline constexpr float STEERMOE_RANK = 1e30f;

// Below any score and above -STEERMOE_RANK: stands for -inf in the scores of groups that are out, since +STEERMOE_RANK
// would not lift -inf, nor could a -1 expert stand below it.
inline constexpr float STEERMOE_MASKED = -1e20f;

struct steermoe_steering {
    // Puts the tensors of every steered layer on the buffer type of that layer. layers: [n_layer].
    // Throws steermoe_error.
    steermoe_steering(const steermoe_bias & bias, const llama_model & model, std::vector<steermoe_layer> layers);

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
    struct masks {
        ggml_tensor * bias  = nullptr; // soft: b
        ggml_tensor * keep  = nullptr; // hard: 1 where the sign is 0
        ggml_tensor * plus  = nullptr; // hard: 1 where the sign is +1
        ggml_tensor * minus = nullptr; // hard: 1 where the sign is -1
        ggml_tensor * rank  = nullptr; // hard, where the selection is edited: sign * RANK

        bool any() const { return bias != nullptr || keep != nullptr; }
    };

    ggml_tensor * edit_hard(ggml_context * ctx, ggml_tensor * logits, const masks & l) const;

    steermoe_mode mode;
    float         epsilon;

    std::vector<masks>          masks_of; // [n_layer]
    std::vector<steermoe_layer> layers;   // [n_layer]
    steermoe_tensors            tensors;
};
