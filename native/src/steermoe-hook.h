// The patch's pointer: what a llama_context knows of steering and recording. Included by the patched upstream files,
// so it declares as little as it can.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

class llm_graph_result;
struct ggml_context;
struct ggml_tensor;
struct llama_batch;
struct llama_model;
struct llama_ubatch;
struct steermoe_bias;
struct steermoe_layer;
struct steermoe_sequences;

// How a layer routes, as build_moe_ffn was called for it.
struct steermoe_router {
    int64_t n_expert;
    int64_t n_expert_used;
    int     gating;         // llama_expert_gating_func_type
    bool    selection_bias; // a bias is added to the probabilities for the selection only
    bool    expert_groups;  // groups of experts are selected first
    bool    own_selection;  // the architecture selects by another function than the one its weights come from
    bool    external;       // the choice comes from outside the router, for example from a table by token

    // Why the router cannot be steered, "" if it can.
    const char * obstacle() const;

    // Is the choice the top-k of the logits themselves, so that editing the logits decides it? A selection bias or
    // groups come in between; functions other than softmax round neighbouring logits to one value far from 0.
    bool selects_by_logits() const;
};

struct steermoe_hook {
    explicit steermoe_hook(const llama_model & model);
    ~steermoe_hook();

    steermoe_hook(const steermoe_hook &)             = delete;
    steermoe_hook & operator=(const steermoe_hook &) = delete;

    //
    // called by the patch
    //

    // While a graph is built: note how layer il routes, and return its edited logits [n_expert, n_tokens],
    // or `logits` itself where the layer is not steered. `res` gets the inputs that this takes.
    ggml_tensor * edit_router(ggml_context * ctx, llm_graph_result * res, ggml_tensor * logits, int il,
                              const steermoe_router & router);

    // Before the top-k of the same layer: the scores [n_expert, n_tokens] that decide the choice, edited where the
    // logits alone do not decide it.
    ggml_tensor * edit_selection(ggml_context * ctx, ggml_tensor * scores, int il);

    // Before a batch is split: false, with a message, if a token of it is under two steerings.
    bool accepts(const llama_batch & batch) const;

    // Before a graph is built or reused for a ubatch, nullptr: before memory is reserved for the largest. Returns what
    // stands for the nodes that steering makes for it: a graph of another topology must not be reused.
    uint64_t begin_graph(const llama_ubatch * ubatch);

    // Before a graph is computed, its inputs are set: remember the tokens behind its rows. False, with a message, if
    // they do not fit.
    bool begin_ubatch(const llama_ubatch & ubatch);

    // Upper bound for the nodes that steering adds to a graph.
    uint32_t n_nodes() const;

    // Attach what STEERMOE_BIAS names. Returns true if it steers. Throws steermoe_error.
    bool attach_env();

    //
    // called by the C interface and by the recorder
    //

    // Steer all sequences that have no steering of their own; one sequence (nullptr: it runs unsteered); let it have
    // that of the others again; end all steering. Return true if the context must reserve again. The context must be
    // synchronized. Throw steermoe_error, change nothing then.
    bool attach(const steermoe_bias & bias, bool force);
    bool attach_seq(int32_t seq, const steermoe_bias * bias, bool force);
    bool detach_seq(int32_t seq);
    bool detach();

    bool is_steered(int il) const; // in any sequence

    const steermoe_router * router(int il) const; // nullptr: no router seen in this layer
    int                     last_router() const;  // the last layer with a router, -1: none
    int                     n_layer() const { return (int) routers.size(); }

    const llama_model & model;

    bool has_logits = true; // false while a recorder stops the graphs behind the last router: there are none to keep

    const llama_ubatch * ubatch   = nullptr; // valid while a graph is computed
    uint64_t             n_ubatch = 0;       // counts graph computations

  private:
    // Throws steermoe_error if the bias is not for this model, or steers a layer that cannot be.
    void require_steerable(const steermoe_bias & bias, bool force) const;

    std::vector<steermoe_layer> layers() const;

    std::vector<std::unique_ptr<steermoe_router>> routers; // [n_layer]
    std::unique_ptr<steermoe_sequences>           sequences;
};
