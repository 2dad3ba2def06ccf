// The edit of the routers' logits where tokens are under different steering: a bank of rows per layer, one for each
// steering, of which every token takes its own. Knows ggml, nothing of sequences and of recording.
#pragma once

#include "steermoe-bias.h"
#include "steermoe-steering.h"
#include "steermoe-tensors.h"

#include <cstdint>
#include <vector>

struct llama_model;

// Inputs of a graph: what each of n columns of logits takes.
struct steermoe_columns {
    ggml_tensor * row;     // I32 [n], row of the bank
    ggml_tensor * epsilon; // F32 [1, n]
};

struct steermoe_bank {
    // Which rules the rows of a layer follow: nodes are made for these alone.
    struct rules {
        bool hard = false;
        bool soft = false;

        bool any() const { return hard || soft; }
    };

    // Row 0 is that of unsteered tokens. It stays as it is made here, with all others.
    static constexpr int32_t UNSTEERED = 0;

    // Has tensors for every steerable layer. layers: [n_layer]. Throws steermoe_error.
    steermoe_bank(const llama_model & model, const std::vector<steermoe_layer> & layers, int32_t n_expert,
                  int32_t n_rows);

    // Let a row steer by `bias`.
    void write(int32_t row, const steermoe_bias & bias);

    // As those of steermoe_steering, each column under its row's steering: untouched logits keep their bits, whatever
    // they are. The same tensor where there are no rules.
    ggml_tensor * edit_logits(ggml_context * ctx, ggml_tensor * logits, int il, rules r,
                              const steermoe_columns & columns) const;
    ggml_tensor * edit_selection(ggml_context * ctx, ggml_tensor * scores, int il, rules r,
                                 const steermoe_columns & columns) const;

    // What it adds to a graph at most, which is more than any steermoe_steering adds.
    uint32_t n_nodes() const;

    const int32_t n_rows;

  private:
    // Each [n_expert, n_rows], nullptr in layers that cannot be steered.
    struct table {
        ggml_tensor * place = nullptr; // I32, where in [z | max + eps | min - eps] the edited logit stands
        ggml_tensor * bias  = nullptr; // F32, soft: b
        ggml_tensor * rank  = nullptr; // F32, where the selection is edited: sign * STEERMOE_RANK
    };

    const int32_t                  n_expert;
    std::vector<steermoe_layer>    layers;  // [n_layer]
    std::vector<table>             tables;  // [n_layer]
    std::vector<std::vector<char>> written; // [n_rows][n_layer] is the row other than that of unsteered tokens
    steermoe_tensors               tensors;
};
