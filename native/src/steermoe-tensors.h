// Tensors that belong to layers, each in the buffer type of its layer. Knows ggml and the devices of a model's layers.
#pragma once

#include "ggml-cpp.h"

#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

struct llama_model;

class steermoe_tensors {
  public:
    // n_max: upper bound for the number of tensors.
    steermoe_tensors(const llama_model & model, size_t n_max) : model(model), n_max(n_max) {}

    // A new tensor [ne0, ne1] named steermoe.<what>.<il>, without memory until allocate(). Throws steermoe_error.
    ggml_tensor * make(ggml_type type, int64_t ne0, int64_t ne1, int il, const char * what);

    // Allocates all of them. Throws steermoe_error.
    void allocate();

  private:
    const llama_model & model;
    const size_t        n_max;

    std::map<ggml_backend_buffer_type_t, ggml_context_ptr> ctxs;
    std::vector<ggml_backend_buffer_ptr>                   bufs;
};
