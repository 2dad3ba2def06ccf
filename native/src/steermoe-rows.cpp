#include "steermoe-rows.h"

#include "ggml-backend.h"
#include "ggml.h"
#include "llama-batch.h"

#include "steermoe-sequences.h"

steermoe_columns steermoe_rows::columns(ggml_context * ctx, int64_t n) {
    for (const steermoe_columns & c : all) {
        if (c.row->ne[0] == n) {
            return c;
        }
    }
    const steermoe_columns c = {
        /*.row     =*/ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n),
        /*.epsilon =*/ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 1, n),
    };
    for (ggml_tensor * t : { c.row, c.epsilon }) {
        ggml_set_input(t);
        ggml_format_name(t, "steermoe.%s", t == c.row ? "row" : "epsilon");
    }
    all.push_back(c);
    return c;
}

void steermoe_rows::set_input(const llama_ubatch * ubatch) {
    for (const steermoe_columns & c : all) {
        const auto           n          = (size_t) c.row->ne[0];
        const bool           all_tokens = n == ubatch->n_tokens;
        std::vector<int32_t> row;
        std::vector<float>   epsilon;
        for (uint32_t i = 0; i < ubatch->n_tokens; i++) {
            if (all_tokens || ubatch->output[i]) {
                row.push_back(sequences.row_of(*ubatch, i));
                epsilon.push_back(sequences.epsilon_of(*ubatch, i));
            }
        }
        if (row.size() != n) {
            sequences.failure = "steering: a router has " + std::to_string(n) + " columns for " +
                                std::to_string(ubatch->n_tokens) + " tokens, " + std::to_string(row.size()) +
                                " of them outputs; decode differently steered sequences one after the other";
            return;
        }
        // what no node reads has no memory
        if (c.row->buffer != nullptr) {
            ggml_backend_tensor_set(c.row, row.data(), 0, ggml_nbytes(c.row));
        }
        if (c.epsilon->buffer != nullptr) {
            ggml_backend_tensor_set(c.epsilon, epsilon.data(), 0, ggml_nbytes(c.epsilon));
        }
    }
}
