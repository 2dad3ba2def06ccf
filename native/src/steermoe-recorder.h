// Counts which experts the chosen tokens select, through the scheduler's eval callback. Knows nothing of steering.
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
    void set_stop(bool stop);                              // stop each graph behind the last router
    void set_mask(const int32_t * bins, int32_t n_tokens); // throws steermoe_error
    void reset();

    bool eval(const ggml_tensor * t, bool ask);

    const int32_t n_bins;
    const int32_t n_layer;
    const int32_t n_expert;

    std::vector<int64_t> counts;  // [n_bins][n_layer][n_expert]
    std::vector<int64_t> tokens;  // [n_bins][n_layer]
    std::string          failure; // the first thing that went wrong, "" if nothing did

  private:
    void begin_ubatch();
    bool rows_of(int64_t n_rows); // fill row_bins; false: the rows are not the ubatch's tokens
    void count(const ggml_tensor * topk, int il);
    void fail(const std::string & what);

    steermoe_hook * hook       = nullptr;
    bool            stop_early = false;

    std::vector<int32_t> mask;       // [batch tokens] bin or -1; -1 again once the token was in a ubatch
    std::vector<int32_t> token_bins; // [ubatch tokens]
    std::vector<int32_t> row_bins;   // [rows of the tensor]
    std::vector<char>    scratch;    // rows read from the device
    std::vector<bool>    layer_done; // [n_layer] counted in this ubatch
    uint64_t             cur_ubatch = 0;
    bool                 any        = false; // does this ubatch hold a counted token
    bool                 finished   = false; // the last router of this ubatch was seen
};
