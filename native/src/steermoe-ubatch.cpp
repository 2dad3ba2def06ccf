#include "steermoe-ubatch.h"

#include "llama-batch.h"

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
