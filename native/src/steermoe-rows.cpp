#include "steermoe-rows.h"

#include "ggml-backend.h"
#include "ggml.h"
#include "llama-batch.h"

#include "steermoe-sequences.h"
#include "steermoe-ubatch.h"

#include <algorithm>
#include <functional>
#include <string>

namespace {

template <typename T> void set(ggml_tensor * t, const std::vector<T> & values) {
    if (t->buffer != nullptr) { // else no node reads it
        ggml_backend_tensor_set(t, values.data(), 0, ggml_nbytes(t));
    }
}

} // namespace

steermoe_token_rows steermoe_rows_input::token_rows(ggml_context * ctx, int64_t n) {
    for (const steermoe_token_rows & t : inputs) {
        if (t.row->ne[0] == n) {
            return t;
        }
    }
    const steermoe_token_rows t = {
        /*.row     =*/ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n),
        /*.epsilon =*/ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 1, n),
    };
    ggml_set_input(ggml_set_name(t.row, "steermoe.row"));
    ggml_set_input(ggml_set_name(t.epsilon, "steermoe.epsilon"));
    inputs.push_back(t);
    return t;
}

void steermoe_rows_input::set_input(const llama_ubatch * ubatch) {
    const std::vector<int32_t> of_tokens = sequences.rows_of(*ubatch);
    const bool                 uniform =
        std::adjacent_find(of_tokens.begin(), of_tokens.end(), std::not_equal_to<>()) == of_tokens.end();
    for (const steermoe_token_rows & t : inputs) {
        const int64_t        n = t.row->ne[0];
        std::vector<int32_t> rows;
        if (uniform) {
            rows.assign((size_t) n, of_tokens.front());
        } else {
            for (const uint32_t i : steermoe_routed_tokens(*ubatch, n)) {
                rows.push_back(of_tokens[i]);
            }
            if ((int64_t) rows.size() != n) {
                sequences.failure = "steering: a router has " + std::to_string(n) + " columns for " +
                                    std::to_string(ubatch->n_tokens) +
                                    " tokens; decode differently steered sequences one after the other";
                return;
            }
        }
        std::vector<float> epsilons(rows.size());
        std::transform(rows.begin(), rows.end(), epsilons.begin(),
                       [&](int32_t row) { return sequences.epsilon_of(row); });
        set(t.row, rows);
        set(t.epsilon, epsilons);
    }
}
