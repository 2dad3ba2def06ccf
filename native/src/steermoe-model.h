// What a loaded llama_model says of itself: its routers' hash and its shape.
#pragma once

#include <string>

struct llama_model;
struct steermoe_bias;

// SHA-256 over blk.<il>.ffn_gate_inp.weight as little-endian F32, in layer order; hex. Computed once a model, by
// whichever thread asks first. Throws steermoe_error.
const std::string & steermoe_router_sha256(const llama_model & model);

// Throws steermoe_error unless the bias was made for the model. With force, router_sha256 is not looked at.
void steermoe_require_model(const steermoe_bias & bias, const llama_model & model, const std::string & router_sha256,
                            bool force);
