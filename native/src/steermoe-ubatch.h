// Which tokens of a ubatch a router sees. Knows llama.cpp's ubatch, not steering and not recording.
#pragma once

#include <cstdint>
#include <vector>

struct llama_ubatch;

// The tokens behind n columns of router logits, as indices into the ubatch: all tokens or, behind the last attention,
// only the outputs (llama.cpp: build_inp_out_ids). Empty if n is neither number.
std::vector<uint32_t> steermoe_routed_tokens(const llama_ubatch & ubatch, int64_t n);
