// Which tokens a ubatch has and which of them a router sees. Knows llama.cpp's ubatch, not steering and not recording.
#pragma once

#include <cstdint>
#include <vector>

struct llama_ubatch;

// The tokens behind n columns of router logits, as indices into the ubatch: all tokens or, behind the last attention,
// only the outputs (llama.cpp: build_inp_out_ids). Empty if n is neither number.
std::vector<uint32_t> steermoe_routed_tokens(const llama_ubatch & ubatch, int64_t n);

// The values of a ubatch's tokens, from those of all tokens of its batch: llama.cpp splits and reorders a batch. `none`
// for tokens that `values` does not reach.
std::vector<int32_t> steermoe_values_of(const llama_ubatch & ubatch, const std::vector<int32_t> & values, int32_t none);

// Set the values of a ubatch's tokens in those of its batch to `none`.
void steermoe_clear_values_of(const llama_ubatch & ubatch, std::vector<int32_t> & values, int32_t none);
