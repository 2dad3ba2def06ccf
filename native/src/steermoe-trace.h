// What chosen tokens of one decode were routed to: their experts, and what the routers computed for them. Knows neither
// steering nor which tensors of a graph hold it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

struct llama_ubatch;

struct steermoe_trace {
    // n_used: the most experts that a layer selects.
    steermoe_trace(int32_t n_layer, int32_t n_expert, int32_t n_used);

    // Trace the wanted tokens of the next decode, [n_tokens] in the order of the batch; forgets the last trace.
    void set(const bool * wanted, int32_t n_tokens, bool weights, bool logits);
    void clear();

    void end_batch(); // tokens that were not computed until now will not be

    void begin_ubatch(const llama_ubatch & ubatch);

    bool has_weights() const { return with_weights; }

    bool has_logits() const { return with_logits; }

    // Does the ubatch have a traced token, and is this kept of it?
    bool is_on() const { return any; }

    bool keeps_weights() const { return any && with_weights; }

    bool keeps_logits() const { return any && with_logits; }

    // Keep what layer il did. tokens: [n_routed] index of each routed token in the ubatch. The values of routed token r
    // are at r * stride, in values: n_chosen experts or weights, or n_expert logits.
    void add_experts(int il, const std::vector<uint32_t> & tokens, const int32_t * chosen, int64_t stride,
                     int64_t n_chosen);
    void add_weights(int il, const std::vector<uint32_t> & tokens, const float * mixed, int64_t stride,
                     int64_t n_chosen);
    void add_logits(int il, const std::vector<uint32_t> & tokens, const float * z, int64_t stride);

    // Why there is no whole trace, "" if there is one.
    std::string missing() const;

    const int32_t n_layer;
    const int32_t n_expert;
    const int32_t n_used;

    std::vector<int32_t> experts; // [n_wanted][n_layer][n_used], -1: none
    std::vector<float>   weights; // the same, 0: none; empty unless it is kept
    std::vector<float>   logits;  // [n_wanted][n_layer][n_expert], NaN: none; empty unless it is kept

  private:
    // Copy the values of the traced ones of a layer's tokens; counts them in `seen`, [n_layer].
    template <typename T>
    void add(std::vector<T> & to, int32_t width, std::vector<int32_t> & seen, int il,
             const std::vector<uint32_t> & tokens, const T * from, int64_t stride, int64_t n);

    bool given        = false; // was a trace asked for?
    bool with_weights = false;
    bool with_logits  = false;
    bool any          = false; // does this ubatch have a traced token?

    std::vector<int32_t> batch_places;  // [batch tokens] place in the trace, -1: not traced, or computed
    std::vector<int32_t> ubatch_places; // [ubatch tokens]
    size_t               n_wanted   = 0;
    size_t               n_computed = 0;

    // tokens of which there are experts, weights and logits, [n_layer]
    std::vector<int32_t> with_experts;
    std::vector<int32_t> weighted;
    std::vector<int32_t> with_z;
};
