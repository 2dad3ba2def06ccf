#include "steermoe-ubatch.h"

#include "llama-batch.h"

namespace {

// Run f(i, index in the batch) for each token of a ubatch that is at an index below n.
template <typename F> void for_each_index(const llama_ubatch & ubatch, size_t n, F && f) {
    if (ubatch.data == nullptr) {
        return;
    }
    const auto & idxs = ubatch.data->batch_idxs;
    for (size_t i = 0; i < idxs.size() && i < ubatch.n_tokens; i++) {
        if (idxs[i] >= 0 && (size_t) idxs[i] < n) {
            f(i, (size_t) idxs[i]);
        }
    }
}

} // namespace

std::vector<int32_t> steermoe_values_of(const llama_ubatch & ubatch, const std::vector<int32_t> & values,
                                        int32_t none) {
    std::vector<int32_t> mine(ubatch.n_tokens, none);
    for_each_index(ubatch, values.size(), [&](size_t i, size_t index) { mine[i] = values[index]; });
    return mine;
}

void steermoe_clear_values_of(const llama_ubatch & ubatch, std::vector<int32_t> & values, int32_t none) {
    for_each_index(ubatch, values.size(), [&](size_t, size_t index) { values[index] = none; });
}

std::vector<uint32_t> steermoe_routed_tokens(const llama_ubatch & ubatch, int64_t n) {
    const bool            all = n == (int64_t) ubatch.n_tokens;
    std::vector<uint32_t> tokens;
    for (uint32_t i = 0; i < ubatch.n_tokens; i++) {
        if (all || ubatch.output[i]) {
            tokens.push_back(i);
        }
    }
    if ((int64_t) tokens.size() != n) {
        tokens.clear();
    }
    return tokens;
}
