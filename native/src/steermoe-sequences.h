// Which steering each token of a batch has, by its sequence or by a row that the caller names, and what follows for the
// graph of a ubatch. Knows llama.cpp's batches and graphs, not recording.
#pragma once

#include "steermoe-bank.h"
#include "steermoe-bias.h"

#include <array>
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
    bool attach_row(int32_t row, const steermoe_bias & bias, const layers_t & layers);
    bool detach_row(int32_t row);
    bool detach(); // the context, all sequences and all rows

    bool steers(int il) const; // does the context, any sequence or any row steer the layer?

    //
    // batches
    //

    // The row of each token of the next batch, -1: unsteered; n_tokens 0: the sequences decide. Throws steermoe_error
    // and changes nothing then.
    void set_token_rows(const int32_t * rows, int32_t n_tokens);

    // The rows that were set are now those of this batch; of none with nullptr. Returns why it cannot be computed, "" if
    // it can.
    std::string begin_batch(const llama_batch * batch);

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

    // The inputs of a ubatch are set: its tokens need their rows no more.
    void end_inputs(const llama_ubatch & ubatch);

    std::string failure; // of the graph inputs of the current ubatch, "" if there is none

  private:
    using edits_t = std::vector<steermoe_edit>; // [n_layer]; empty: no layer is steered

    // A bias in the bank. Equal biases share one.
    struct steering {
        steermoe_bias bias;
        edits_t       edits;
        int32_t       row;
    };

    // What is attached to the context, to a sequence or to a row.
    struct attachment {
        bool attached = false;        // false: a sequence uses the context's steering, and no token may have the row
        std::shared_ptr<steering> to; // nullptr: unsteered
    };

    bool set(attachment & a, bool attached, const steermoe_bias * bias, const layers_t & layers);

    std::shared_ptr<steering> find(const steermoe_bias & bias) const;
    std::vector<steering *>   steerings(const attachment * without = nullptr) const; // each once
    const steering *          steering_of(int32_t seq) const;
    int32_t                   free_row(const std::vector<steering *> & all) const;

    std::vector<const steering *> steerings_of(const llama_ubatch & ubatch) const; // of each token
    edits_t                       edits_of(const llama_ubatch & ubatch) const;

    edits_t with_recent(const edits_t & next, uint32_t n_tokens);

    std::string obstacle_of_rows(const std::vector<int32_t> & rows) const;
    std::string obstacle_of_sequences(const llama_batch & batch) const;

    const llama_model & model;

    std::vector<attachment> seqs; // [LLAMA_MAX_SEQ]
    std::vector<attachment> rows; // [STEERMOE_MAX_ROWS]
    attachment              context;

    // The row of each token of a batch, -1: unsteered; empty: the sequences decide.
    std::vector<int32_t> next_rows;
    std::vector<int32_t> token_rows;    // of the batch that is being computed
    size_t               n_waiting = 0; // tokens of token_rows whose inputs are not set yet

    std::unique_ptr<steermoe_bank> bank; // from the first steering on, until detach()

    // What graphs of few tokens needed lately, see with_recent().
    struct recent {
        uint32_t n_tokens = 0; // of these graphs; 0: there are none
        uint64_t n_graph  = 0; // counts them

        std::vector<std::array<uint64_t, STEERMOE_EDIT_CAPPED + 1>> last; // [n_layer][edit] the last to need it, or 0
    };

    recent lately;

    // the graph that is being built
    edits_t               edits;
    uint64_t              topology = 0;
    steermoe_rows_input * input    = nullptr;
};
