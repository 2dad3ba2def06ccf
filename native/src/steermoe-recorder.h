// Counts the experts that each layer selects for chosen tokens, in the scheduler's eval callback. Does not know
// steering.
#pragma once

#include "steermoe.h"

#include <cstdint>
#include <string>
#include <vector>

struct ggml_tensor;
struct steermoe_hook;

struct steermoe_recorder {
    steermoe_recorder(int32_t n_bins, int32_t n_layer, int32_t n_expert);

    void bind(steermoe_hook * hook);
    void set_stop(bool stop);                              // true: stop each graph behind the last router
    void set_mask(const int32_t * bins, int32_t n_tokens); // throws steermoe_error
    void reset();

    bool eval(const ggml_tensor * t, bool ask);

    const int32_t n_bins;
    const int32_t n_layer;
    const int32_t n_expert;

    std::vector<int64_t> counts;  // [n_bins][n_layer][n_expert]
    std::vector<int64_t> tokens;  // [n_bins][n_layer]
    std::string          failure; // the first one, "" if there is none

  private:
    void begin_ubatch();
    bool find_routed(int64_t n); // fill routed_bins; false, with a failure: the n columns are not the ubatch's tokens
    void count(const ggml_tensor * topk, int il);
    void fail(const std::string & what);

    steermoe_hook * hook       = nullptr;
    bool            stop_early = false;

    std::vector<int32_t> mask;        // [batch tokens] bin or -1; -1 again once the token was in a ubatch
    std::vector<int32_t> token_bins;  // [ubatch tokens]
    std::vector<int32_t> routed_bins; // [tokens that the layer routes]
    std::vector<char>    scratch;     // selected experts, read from the device
    std::vector<bool>    layer_done;  // [n_layer] counted in this ubatch
    uint64_t             cur_ubatch = 0;
    bool                 any        = false; // does this ubatch have a counted token?
    bool                 finished   = false; // was the last router of this ubatch seen?
};
