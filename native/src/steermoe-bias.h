// The validated contents of a bias file. Knows ggml's GGUF reader, not models and contexts.
#pragma once

#include "steermoe.h"

#include <cstdint>
#include <string>
#include <vector>

struct steermoe_bias {
    std::string   name; // in messages: the path of the file
    std::string   architecture;
    std::string   router_sha256;
    steermoe_mode mode          = STEERMOE_MODE_HARD;
    float         epsilon       = 0.0f;
    float         cap           = 0.0f; // of the capped rule
    int32_t       n_layer       = 0;
    int32_t       n_expert      = 0;
    int32_t       n_expert_used = 0;

    std::vector<std::vector<float>> layers; // [n_layer], each [n_expert], or empty: the layer is not steered

    // What the rule does to logits: an infinite cap is the hard rule.
    bool is_hard() const;   // promoted experts above all others, suppressed ones below them
    bool is_capped() const; // the same, but only as far as a finite cap allows

    // All of these throw steermoe_error.
    static steermoe_bias from_file(const std::string & path);
    static steermoe_bias from_buffer(const void * data, size_t size, const std::string & name);
    static steermoe_bias from_info(const steermoe_bias_info & info);

    void set_layer(int32_t il, const float * values, int32_t n);

    // Does it change nothing in the layer? Values that are all 0, or a cap of 0.
    bool layer_is_zero(int32_t il) const;

    // Requires the same architecture and shape and, unless `force`, the same router hash.
    void require_model(const std::string & architecture, int32_t n_layer, int32_t n_expert, int32_t n_expert_used,
                       const std::string & router_sha256, bool force) const;

  private:
    void set_shape(int64_t layer_count, int64_t expert_count, int64_t expert_used_count);
    void check_header() const;
};
