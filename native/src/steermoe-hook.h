// The patch's pointer: what a llama_context knows of steering and recording. Included by the patched upstream files,
// so it declares as little as it can.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

struct ggml_context;
struct ggml_tensor;
struct llama_model;
struct llama_ubatch;
struct steermoe_bias;
struct steermoe_steering;

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
    // or `logits` itself where the layer is not steered.
    ggml_tensor * edit_router(ggml_context * ctx, ggml_tensor * logits, int il, const steermoe_router & router);

    // Before the top-k of the same layer: the scores [n_expert, n_tokens] that decide the choice, edited where the
    // logits alone do not decide it.
    ggml_tensor * edit_selection(ggml_context * ctx, ggml_tensor * scores, int il);

    // Before a graph is computed: remember the tokens behind its rows.
    void begin_ubatch(const llama_ubatch & ubatch);

    // Changes when steering changes the nodes of the graph: a graph of another topology must not be reused.
    uint64_t topology() const { return cur_topology; }

    // Upper bound for the nodes that steering adds to a graph.
    uint32_t n_nodes() const;

    // Attach what STEERMOE_BIAS names. Returns true if it steers. Throws steermoe_error.
    bool attach_env();

    //
    // called by the C interface and by the recorder
    //

    // Replace what is attached; nullptr or an empty bias ends steering. Returns true if the topology changed, so that
    // the context must reserve again. The context must be synchronized. Throws steermoe_error, changes nothing then.
    bool attach(const steermoe_bias * bias, bool force);

    bool is_steered(int il) const;

    const steermoe_router * router(int il) const; // nullptr: no router seen in this layer
    int                     last_router() const;  // the last layer with a router, -1: none
    int                     n_layer() const { return (int) routers.size(); }

    const llama_model & model;

    bool has_logits = true; // false while a recorder stops the graphs behind the last router: there are none to keep

    const llama_ubatch * ubatch   = nullptr; // valid while a graph is computed
    uint64_t             n_ubatch = 0;       // counts graph computations

  private:
    std::vector<std::unique_ptr<steermoe_router>> routers; // [n_layer]
    std::unique_ptr<steermoe_steering>            steering;
    uint64_t                                      cur_topology = 0; // 0: not steered
    uint64_t                                      n_topologies = 0;
};
