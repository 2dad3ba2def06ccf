// Counts the experts that each layer selects for chosen tokens, sums what their routers computed, and traces single
// tokens, in the scheduler's eval callback. Does not know steering.
#pragma once

#include "steermoe.h"

#include "steermoe-trace.h"

#include <cstdint>
#include <string>
#include <vector>

struct ggml_tensor;
struct steermoe_hook;
struct steermoe_note;

struct steermoe_recorder {
    // n_used: the most experts that a layer selects.
    steermoe_recorder(int32_t n_bins, int32_t n_layer, int32_t n_expert, int32_t n_used);

    void bind(steermoe_hook * hook);
    void set_stop(bool stop);                              // true: stop each graph behind the last router
    void set_sums(bool sums);                              // sets everything to zero
    void set_mask(const int32_t * bins, int32_t n_tokens); // throws steermoe_error
    void set_trace(const bool * wanted, int32_t n_tokens, bool weights, bool logits);
    void reset();

    bool eval(const ggml_tensor * t, bool ask);

    const int32_t n_bins;
    const int32_t n_layer;
    const int32_t n_expert;

    std::vector<int64_t> counts; // [n_bins][n_layer][n_expert]
    std::vector<int64_t> tokens; // [n_bins][n_layer]

    // Sums over the counted tokens; empty unless they are asked for.
    bool                sums = false;
    std::vector<double> logits;  // [n_bins][n_layer][n_expert] of the router, before it is steered
    std::vector<double> spread;  // [n_bins][n_layer] squared deviations of logits from the mean of their token
    std::vector<double> weights; // [n_bins][n_layer][n_expert] with which the selected experts are mixed

    // Why the sums are not those of the counted tokens, "" if they are.
    std::string missing_sums() const;

    steermoe_trace trace; // of the last decode for which one was asked

    std::string failure; // the first one, "" if there is none

  private:
    void     allocate(); // everything at zero
    void     begin_ubatch();
    bool     find_routed(int64_t n); // fill routed; false, with a failure: the n columns are not the ubatch's tokens
    bool     find_bins();            // fill routed_bins; false, with a failure: a counted token is not routed
    void     count(const ggml_tensor * topk, int il);
    void     keep_logits(const ggml_tensor * t, int il);
    void     add_logits(int il);
    void     add_weights(const ggml_tensor * t, int il);
    void     sum_logits(int il);
    void     sum_weights(int il, const float * mixed, size_t n_used);
    bool     reads(const steermoe_note & note) const; // are the logits or weights of this ubatch read?
    uint64_t next_batch() const;
    bool     is_end(const ggml_tensor * t, int topk_il) const; // is t the last tensor that is read of a graph?
    // The values of t, read from its device into `memory` if they are not in this process's.
    const char * read(const ggml_tensor * t, size_t n_bytes, std::vector<char> & memory) const;
    void         fail(const std::string & what);

    steermoe_hook * hook       = nullptr;
    bool            stop_early = false;

    std::vector<int32_t>  mask;            // [batch tokens] bin or -1; -1 again once the token was in a ubatch
    uint64_t              mask_batch  = 0; // number of the batch that it is of
    uint64_t              trace_batch = 0; // and that of which tokens are traced
    std::vector<int32_t>  token_bins;      // [ubatch tokens]
    std::vector<uint32_t> routed;          // [tokens that the layer routes] index in the ubatch
    std::vector<int32_t>  routed_bins;     // [tokens that the layer routes]
    std::vector<char>     scratch;         // what was read from the device
    std::vector<float>    z;               // [tokens that the layer routes][n_expert] logits of layer z_layer
    std::vector<int32_t>  chosen;          // [tokens that the layer routes][n_used] experts of layer chosen_layer
    int                   z_layer      = -1;
    int                   chosen_layer = -1;
    std::vector<bool>     written;    // [n_bins][n_layer] may the row differ from zero?
    std::vector<int64_t>  summed;     // [2][n_bins][n_layer] tokens in `logits`, and in `weights`
    std::vector<bool>     layer_done; // [n_layer] counted in this ubatch
    uint64_t              cur_ubatch = 0;
    bool                  any        = false; // does this ubatch have a counted token?
    bool                  finished   = false; // was the last router of this ubatch seen?
};
