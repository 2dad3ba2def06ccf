// The edit of router logits. A bank holds one row per steering in tables on each layer's device; every token takes the
// row of its sequence. Knows ggml, not sequences and not recording.
#pragma once

#include "steermoe-bias.h"
#include "steermoe-tensors.h"

#include <cstdint>
#include <vector>

struct llama_model;

// How a layer selects its experts.
struct steermoe_layer {
    bool steerable      = false; // the selection follows from router logits
    bool edit_selection = false; // the logits alone do not decide it: the hard rule edits the selection scores, too
    bool masked         = false; // scores of expert groups that are not selected are -inf
};

// Rules that the rows of a layer use: nodes are built for these only.
using steermoe_rules = uint8_t;

inline constexpr steermoe_rules STEERMOE_RULE_HARD = 1;
inline constexpr steermoe_rules STEERMOE_RULE_SOFT = 2;

// Graph inputs: the bank row of each of the n tokens that a router sees, and the epsilon of that row.
struct steermoe_token_rows {
    ggml_tensor * row;     // I32 [n]
    ggml_tensor * epsilon; // F32 [1, n]
};

struct steermoe_bank {
    // The row of unsteered tokens. It is never written.
    static constexpr int32_t UNSTEERED = 0;

    // Allocates tables for every steerable layer, all rows unsteered. layers: [n_layer]. Throws steermoe_error.
    steermoe_bank(const llama_model & model, const std::vector<steermoe_layer> & layers, int32_t n_expert,
                  int32_t n_rows);

    // Write `bias` into a row.
    void write(int32_t row, const steermoe_bias & bias);

    float epsilon(int32_t row) const { return epsilons[row]; }

    // logits [n_expert, n] -> edited logits of the same shape. Logits that a token's row does not edit keep their bits,
    // infinite and NaN included. Returns `logits` itself if there is nothing to edit.
    ggml_tensor * edit_logits(ggml_context * ctx, ggml_tensor * logits, int il, steermoe_rules rules,
                              const steermoe_token_rows & rows) const;

    // Selection scores [n_expert, n], whose top-k is selected -> scores with +1 experts above and -1 experts below all
    // others. Returns `scores` itself if the edited logits decide the selection, and under the soft rule.
    ggml_tensor * edit_selection(ggml_context * ctx, ggml_tensor * scores, int il, steermoe_rules rules,
                                 const steermoe_token_rows & rows) const;

    // Upper bound for the nodes added to a graph.
    uint32_t n_nodes() const;

    const int32_t n_rows;

  private:
    // Each [n_expert, n_rows]; nullptr in layers that cannot be steered.
    struct table {
        ggml_tensor * index = nullptr; // I32, hard: index of the edited logit in [z | max z + eps | min z - eps]
        ggml_tensor * bias  = nullptr; // F32, soft: b
        ggml_tensor * rank  = nullptr; // F32, hard, where the selection is edited: added to the scores
    };

    const int32_t                  n_expert;
    std::vector<steermoe_layer>    layers;   // [n_layer]
    std::vector<table>             tables;   // [n_layer]
    std::vector<std::vector<char>> written;  // [n_rows][n_layer] does the row differ from the unsteered one?
    std::vector<float>             epsilons; // [n_rows]
    steermoe_tensors               tensors;
};
