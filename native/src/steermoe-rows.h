// The inputs of a graph for tokens under different steering. Knows llama.cpp's graphs, nothing of recording.
#pragma once

#include "llama-graph.h"

#include "steermoe-bank.h"

#include <vector>

struct steermoe_sequences;

// Which row of the bank each column of the routers' logits takes: all tokens of the ubatch in order or, behind the last
// attention, only those that are outputs (llama.cpp: build_inp_out_ids).
class steermoe_rows : public llm_graph_input_i {
  public:
    explicit steermoe_rows(steermoe_sequences & sequences) : sequences(sequences) {}

    void set_input(const llama_ubatch * ubatch) override;

    // graphs of one topology and one shape of the ubatch have the same inputs
    bool can_reuse(const llm_graph_params &) override { return true; }

    steermoe_columns columns(ggml_context * ctx, int64_t n);

  private:
    steermoe_sequences &          sequences;
    std::vector<steermoe_columns> all; // by number of columns
};
