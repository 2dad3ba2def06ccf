#include "steermoe-rows.h"

#include "ggml-backend.h"
#include "ggml.h"
#include "llama-batch.h"

#include "steermoe-sequences.h"
#include "steermoe-ubatch.h"

#include <algorithm>
#include <string>

ggml_tensor * steermoe_rows_input::of_tokens(ggml_context * ctx, int64_t n) {
    for (ggml_tensor * t : inputs) {
        if (t->ne[0] == n) {
            return t;
        }
    }
    ggml_tensor * t = ggml_set_name(ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n), "steermoe.rows");
    ggml_set_input(t);
    inputs.push_back(t);
    return t;
}

void steermoe_rows_input::set_input(const llama_ubatch * ubatch) {
    const std::vector<int32_t> all = sequences.rows_of(*ubatch);

    const bool uniform = std::all_of(all.begin(), all.end(), [&](int32_t row) { return row == all.front(); });
    for (ggml_tensor * t : inputs) {
        const int64_t        n = t->ne[0];
        std::vector<int32_t> rows;
        if (uniform) {
            rows.assign((size_t) n, all.front());
        } else {
            for (const uint32_t i : steermoe_routed_tokens(*ubatch, n)) {
                rows.push_back(all[i]);
            }
        }
        if ((int64_t) rows.size() != n) {
            sequences.failure = "steering: a router has " + std::to_string(n) + " columns for " +
                                std::to_string(ubatch->n_tokens) +
                                " tokens; decode differently steered ones one after the other";
            return;
        }
        if (t->buffer != nullptr) { // else no node reads it
            ggml_backend_tensor_set(t, rows.data(), 0, ggml_nbytes(t));
        }
    }
}
