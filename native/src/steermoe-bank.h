// The edit of router logits. A bank holds one row per steering in tables on each layer's device; every token takes the
// row that it is given. Knows ggml, not sequences and not recording.
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

// The edit that the rows of a layer need: nodes are built for no more. Each includes those above it.
enum steermoe_edit : uint8_t {
    STEERMOE_EDIT_NONE   = 0,
    STEERMOE_EDIT_SOFT   = 1,
    STEERMOE_EDIT_HARD   = 2,
    STEERMOE_EDIT_CAPPED = 3,
};

// The edit that a bias needs in the layers that it steers.
steermoe_edit steermoe_edit_of(const steermoe_bias & bias);

struct steermoe_bank {
    // The row of unsteered tokens. It is never written.
    static constexpr int32_t UNSTEERED = 0;

    // Allocates tables for every steerable layer, all rows unsteered. layers: [n_layer]. largest: the greatest edit of
    // any row, at least STEERMOE_EDIT_HARD. Throws steermoe_error.
    steermoe_bank(const llama_model & model, const std::vector<steermoe_layer> & layers, int32_t n_expert,
                  int32_t n_rows, steermoe_edit largest);

    // Write `bias` into a row.
    void write(int32_t row, const steermoe_bias & bias);

    // logits [n_expert, n] -> edited logits of the same shape. rows: I32 [n], the bank row of each token. Logits that a
    // token's row does not edit keep their bits, infinite and NaN included. Returns `logits` itself if there is nothing
    // to edit. `logits` must already be in the graph.
    ggml_tensor * edit_logits(ggml_context * ctx, ggml_tensor * logits, int il, steermoe_edit edit,
                              ggml_tensor * rows) const;

    // Selection scores [n_expert, n], whose top-k is selected -> scores with +1 experts of the hard rule above and its
    // -1 experts below all others. Returns `scores` itself if the edited logits decide the selection, and under the
    // soft rule.
    ggml_tensor * edit_selection(ggml_context * ctx, ggml_tensor * scores, int il, steermoe_edit edit,
                                 ggml_tensor * rows) const;

    // Upper bound for the nodes added to a graph.
    uint32_t n_nodes() const;

    const int32_t       n_rows;
    const steermoe_edit largest;

  private:
    // Each [n_expert, n_rows]; nullptr in layers that cannot be steered.
    struct table {
        ggml_tensor * index = nullptr; // I32, index of the logit in [z | max z | min z]
        ggml_tensor * bias  = nullptr; // F32, added to that logit: b (soft), eps or -eps (hard, capped)
        ggml_tensor * rank  = nullptr; // F32, added to the selection score (hard, where the selection is edited)

        // only in a bank for the capped rule
        ggml_tensor * against = nullptr; // F32, -1 where logits are raised, else 1
        ggml_tensor * limit   = nullptr; // F32 [1, n_rows], -cap
        ggml_tensor * choice  = nullptr; // I32, index in [edited without cap | edited with it]
    };

    // [n_expert, n]: `uncapped`, what the rows make of z without a cap, taken back to their caps.
    ggml_tensor * limit(ggml_context * ctx, ggml_tensor * z, ggml_tensor * uncapped, const table & t,
                        ggml_tensor * rows) const;

    const int32_t                  n_expert;
    std::vector<steermoe_layer>    layers;  // [n_layer]
    std::vector<table>             tables;  // [n_layer]
    std::vector<std::vector<char>> written; // [n_rows][n_layer] does the row differ from the unsteered one?
    steermoe_tensors               tensors;
};
