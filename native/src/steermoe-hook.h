// What a llama_context knows of steering and recording. The patched llama.cpp files include this header, so it declares
// as little as possible.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

class llm_graph_result;
struct ggml_context;
struct ggml_tensor;
struct llama_batch;
struct llama_context;
struct llama_model;
struct llama_ubatch;
struct steermoe_bias;
struct steermoe_layer;
struct steermoe_sequences;

// How a layer routes: the arguments of build_moe_ffn.
struct steermoe_router {
    int64_t n_expert;
    int64_t n_expert_used;
    int     gating;         // llama_expert_gating_func_type
    bool    selection_bias; // a bias is added to the probabilities for the selection only
    bool    expert_groups;  // groups of experts are selected first
    bool    own_selection;  // the architecture selects by another function than the one that gives the mixing weights
    bool    external;       // the selection does not come from the router, but for example from a table by token

    // Why the router cannot be steered, "" if it can.
    const char * obstacle() const;

    // Is the selection the top-k of the logits, so that editing the logits decides it? Not with a selection bias or
    // with groups, nor with functions other than softmax: far from 0 they round different logits to one value.
    bool selects_by_logits() const;
};

// What a tensor of a graph holds of the routing of a layer.
struct steermoe_note {
    int  il;
    bool weights; // the mixing weights of the selected experts; else the router's logits, before they are edited
};

struct steermoe_hook {
    explicit steermoe_hook(const llama_model & model);
    ~steermoe_hook();

    steermoe_hook(const steermoe_hook &)             = delete;
    steermoe_hook & operator=(const steermoe_hook &) = delete;

    //
    // called by the patch
    //

    // While a graph is built: notes how layer il routes and returns its edited logits [n_expert, n_tokens], or `logits`
    // itself if the layer is not steered. Adds the graph inputs that this needs to `res`.
    ggml_tensor * edit_router(ggml_context * ctx, llm_graph_result * res, ggml_tensor * logits, int il,
                              const steermoe_router & router);

    // Before the top-k of the same layer: returns the selection scores [n_expert, n_tokens], edited if the logits alone
    // do not decide the selection.
    ggml_tensor * edit_selection(ggml_context * ctx, ggml_tensor * scores, int il);

    // When the mixing weights of the same layer [1 or n_expert_used, ..., n_tokens] are final.
    void note_weights(const ggml_tensor * weights, int il);

    // Before a batch is split: false, with a message, if its tokens cannot be steered as they should be, and for a
    // nullptr, a batch that llama.cpp refuses. What was given for the tokens of the next batch is taken by this one.
    bool accepts(const llama_batch * batch);

    // Before a graph is built or reused: for a ubatch or, with nullptr, the largest one, to reserve memory. Returns a
    // number of the nodes that steering adds: a graph may be reused only under the same number.
    uint64_t begin_graph(const llama_ubatch * ubatch);

    // Before a graph is computed, when its inputs are set. False, with a message, if the inputs do not fit the ubatch.
    bool begin_ubatch(const llama_ubatch & ubatch);

    // Upper bound for the nodes that steering adds to a graph.
    uint32_t n_nodes() const;

    //
    // called by the C interface and by the recorder
    //

    // Attach a bias to the context, to one sequence (nullptr: unsteered) or to a row, detach one of them, or detach all.
    // They return true if the context must reserve its graphs again. The context must be synchronized. They throw
    // steermoe_error and change nothing then.
    bool attach(const steermoe_bias & bias, bool force);
    bool attach_seq(int32_t seq, const steermoe_bias * bias, bool force);
    bool detach_seq(int32_t seq);
    bool attach_row(int32_t row, const steermoe_bias & bias, bool force);
    bool detach_row(int32_t row);
    bool detach();

    // The row that steers each token of the next batch, -1: none; n_tokens 0: the sequences decide. Throws
    // steermoe_error and changes nothing then.
    void set_token_rows(const int32_t * rows, int32_t n_tokens);

    bool is_steered(int il) const; // by the bias of the context, of any sequence or of any row

    const steermoe_router * router(int il) const; // nullptr: the layer has no router
    int                     last_router() const;  // the last layer with a router, -1: none

    // What t, a tensor of the graph built last, holds; nullptr: neither logits nor weights, or of no router.
    const steermoe_note * note(const ggml_tensor * t) const;

    int n_layer() const { return (int) routers.size(); }

    const llama_model & model;

    bool has_logits = true; // false while a recorder stops the graphs behind the last router

    const llama_ubatch * ubatch   = nullptr; // valid while a graph is computed
    uint64_t             n_ubatch = 0;       // counts graph computations
    uint64_t             n_batch  = 0;       // counts batches, those that are refused included

  private:
    // Throws steermoe_error if the bias is not for this model or steers a layer that cannot be steered.
    void require_steerable(const steermoe_bias & bias, bool force) const;

    std::vector<steermoe_layer> layers() const;

    std::vector<std::unique_ptr<steermoe_router>> routers; // [n_layer]

    // of the graph built last; a layer may route twice by the same logits (grovemoe), of which the first time counts
    std::unordered_map<const ggml_tensor *, steermoe_note> notes;
    std::vector<const ggml_tensor *>                       noted_logits;    // [n_layer]
    std::vector<const ggml_tensor *>                       noted_weights;   // [n_layer]
    uint64_t                                               n_graph     = 0; // counts graphs, built or reused
    uint64_t                                               noted_graph = 0; // the one that the notes are of

    std::unique_ptr<steermoe_sequences> sequences;
};

// Attach the bias file that STEERMOE_BIAS names, if any, to a new context. Throws steermoe_error.
void steermoe_attach_env(llama_context & ctx);
