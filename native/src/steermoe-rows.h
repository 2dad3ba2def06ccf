// The graph inputs of steering: which bank row each token takes. Knows llama.cpp's graphs, not recording.
#pragma once

#include "llama-graph.h"

#include <vector>

struct steermoe_sequences;

class steermoe_rows_input : public llm_graph_input_i {
  public:
    explicit steermoe_rows_input(steermoe_sequences & sequences) : sequences(sequences) {}

    void set_input(const llama_ubatch * ubatch) override;

    // Graphs of one topology and one ubatch shape have the same inputs.
    bool can_reuse(const llm_graph_params &) override { return true; }

    // I32 [n]: the rows of the n tokens that a router sees.
    ggml_tensor * of_tokens(ggml_context * ctx, int64_t n);

  private:
    steermoe_sequences &       sequences;
    std::vector<ggml_tensor *> inputs; // one for each n
};
