// The identity of a loaded llama_model: hash of its routers, and its shape.
#pragma once

#include <string>

struct llama_model;
struct steermoe_bias;

// SHA-256 over blk.<il>.ffn_gate_inp.weight as little-endian F32, in layer order; hex. The first call of
// any thread computes it; the model keeps it. Throws steermoe_error.
const std::string & steermoe_router_sha256(const llama_model & model);

// Throws steermoe_error unless the bias was made for the model. With force, router_sha256 is not compared.
void steermoe_require_model(const steermoe_bias & bias, const llama_model & model, const std::string & router_sha256,
                            bool force);
