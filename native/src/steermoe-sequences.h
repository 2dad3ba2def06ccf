// Which steering each sequence of a context has, and what follows for the graph of a ubatch. Knows llama.cpp's batches
// and graphs, not recording.
#pragma once

#include "steermoe-bank.h"
#include "steermoe-bias.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

class llm_graph_result;
class steermoe_rows_input;
struct llama_batch;
struct llama_model;
struct llama_ubatch;

struct steermoe_sequences {
    using layers_t = std::vector<steermoe_layer>; // [n_layer]

    explicit steermoe_sequences(const llama_model & model);
    ~steermoe_sequences();

    //
    // Changes. nullptr and a bias without values: unsteered. The context must be synchronized. They throw
    // steermoe_error and change nothing then. They return true if the context must reserve its graphs again.
    //

    bool attach(const steermoe_bias & bias, const layers_t & layers); // to the context
    bool attach_seq(int32_t seq, const steermoe_bias * bias, const layers_t & layers);
    bool detach_seq(int32_t seq); // the sequence uses the context's steering again
    bool detach();                // the context and all sequences

    bool steers(int il) const; // does the context or any sequence steer the layer?

    // Why a batch cannot be computed, "" if it can.
    std::string obstacle(const llama_batch & batch) const;

    //
    // graphs
    //

    // Choose the edits of the next graph: what the ubatch's tokens need or, with nullptr, the largest in all layers.
    // Returns a number of the graph's topology; the same number twice in a row means the same nodes.
    uint64_t begin_graph(const llama_ubatch * ubatch);

    ggml_tensor * edit_logits(ggml_context * ctx, llm_graph_result * res, ggml_tensor * logits, int il);
    ggml_tensor * edit_selection(ggml_context * ctx, ggml_tensor * scores, int il); // after edit_logits

    // Upper bound for the nodes that steering adds to a graph.
    uint32_t n_nodes() const;

    // Bank row of each token of a ubatch.
    std::vector<int32_t> rows_of(const llama_ubatch & ubatch) const;

    std::string failure; // of the graph inputs of the current ubatch, "" if there is none

  private:
    using edits_t = std::vector<steermoe_edit>; // [n_layer]; empty: no layer is steered

    // A bias in the bank. Equal biases share one.
    struct steering {
        steermoe_bias bias;
        edits_t       edits;
        int32_t       row;
    };

    // What is attached to the context or to a sequence.
    struct attachment {
        bool                      attached = false; // of a sequence; false: it uses the context's steering
        std::shared_ptr<steering> to;               // nullptr: unsteered
    };

    bool set(attachment & a, bool attached, const steermoe_bias * bias, const layers_t & layers);

    std::shared_ptr<steering> find(const steermoe_bias & bias) const;
    std::vector<steering *>   steerings(const attachment * without = nullptr) const; // each once
    const steering *          steering_of(int32_t seq) const;
    int32_t                   free_row(const std::vector<steering *> & all) const;
    edits_t                   edits_of(const llama_ubatch & ubatch) const;

    const llama_model & model;

    std::vector<attachment> seqs; // [LLAMA_MAX_SEQ]
    attachment              context;

    std::unique_ptr<steermoe_bank> bank; // from the first steering on, until detach()

    // the graph that is being built
    edits_t               edits;
    uint64_t              topology = 0;
    steermoe_rows_input * input    = nullptr;
};
