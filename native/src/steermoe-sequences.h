// Which sequence of a context is under which steering, and what follows for the graph of a ubatch. Knows llama.cpp's
// batches and graphs, nothing of recording.
#pragma once

#include "steermoe-bank.h"
#include "steermoe-bias.h"
#include "steermoe-steering.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

class llm_graph_result;
class steermoe_rows;
struct llama_batch;
struct llama_model;
struct llama_ubatch;

struct steermoe_sequences {
    using layers_t = std::vector<steermoe_layer>; // [n_layer]

    explicit steermoe_sequences(const llama_model & model);
    ~steermoe_sequences();

    //
    // who is under what; nullptr and a bias without values: unsteered. The context must be synchronized. These throw
    // steermoe_error and change nothing then. They return true if the context must reserve its graphs again.
    //

    bool attach(const steermoe_bias & bias, const layers_t & layers); // all sequences without steering of their own
    bool attach_seq(int32_t seq, const steermoe_bias * bias, const layers_t & layers);
    bool detach_seq(int32_t seq); // back to the context's own
    bool detach();                // all

    bool steers(int il) const; // any sequence

    // Why a batch cannot be computed, "" if it can.
    std::string obstacle(const llama_batch & batch) const;

    //
    // a graph
    //

    // Choose the path of the next graph; nullptr: the largest there may be. Returns its topology.
    uint64_t begin_graph(const llama_ubatch * ubatch);

    ggml_tensor * edit_logits(ggml_context * ctx, llm_graph_result * res, ggml_tensor * logits, int il);
    ggml_tensor * edit_selection(ggml_context * ctx, ggml_tensor * scores, int il); // after edit_logits

    // Upper bound for the nodes that steering adds to a graph.
    uint32_t n_nodes() const;

    // Bank row and epsilon for token i of a ubatch.
    int32_t row_of(const llama_ubatch & ubatch, uint32_t i) const;
    float   epsilon_of(const llama_ubatch & ubatch, uint32_t i) const;

    std::string failure; // of the inputs of the current ubatch, "" if there is none

  private:
    // A steering that at least one sequence, or the context itself, is under. Equal ones are one.
    struct entry {
        entry(const steermoe_bias & bias, const llama_model & model, const layers_t & layers, uint64_t topology)
            : bias(bias), plain(bias, model, layers), topology(topology) {}

        steermoe_bias     bias;
        steermoe_steering plain;
        const uint64_t    topology; // of graphs for this steering alone
        int32_t           row = steermoe_bank::UNSTEERED;
    };

    struct slot {
        bool                   given = false; // false: as the context
        std::shared_ptr<entry> under;         // nullptr: unsteered
    };

    bool                   set(slot & s, bool given, const steermoe_bias * bias, const layers_t & layers);
    std::shared_ptr<entry> find(const steermoe_bias & bias) const;
    std::vector<entry *>   entries(const slot * without = nullptr) const; // each once
    int32_t                free_row(const std::vector<entry *> & all) const;
    const entry *          entry_of(const llama_ubatch & ubatch, uint32_t i) const;
    const entry *          entry_of(int32_t seq) const;
    void                   refresh();
    steermoe_columns       columns(ggml_context * ctx, llm_graph_result * res, int64_t n);

    const llama_model & model;

    std::vector<slot> seqs; // [LLAMA_MAX_SEQ]
    slot              own;  // the context's

    // Only once a sequence is under another steering than the context, and until detach().
    std::unique_ptr<steermoe_bank>    bank;
    std::vector<steermoe_bank::rules> rules;             // [n_layer] that the rows follow
    uint64_t                          bank_topology = 0; // of graphs for several steerings
    uint64_t                          n_topologies  = 0; // 0: unsteered

    // the graph that is being built
    const entry *   plain = nullptr; // for all its tokens
    bool            mixed = false;   // or by the bank
    bool            full  = false;   // with all rules in all layers
    steermoe_rows * rows  = nullptr; // its inputs
};
