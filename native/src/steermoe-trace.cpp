#include "steermoe-trace.h"

#include "llama-batch.h"

#include "steermoe-ubatch.h"

#include <algorithm>
#include <cmath>

steermoe_trace::steermoe_trace(int32_t n_layer, int32_t n_expert, int32_t n_used)
    : n_layer(n_layer), n_expert(n_expert), n_used(n_used) {
    clear();
}

// Not freed: the trace of the next decode is of about the same size.
void steermoe_trace::set(const bool * wanted, int32_t n_tokens, bool new_weights, bool new_logits) {
    clear();
    given        = n_tokens > 0;
    with_weights = new_weights;
    with_logits  = new_logits;
    for (int32_t i = 0; i < n_tokens; i++) {
        batch_places.push_back(wanted[i] ? (int32_t) n_wanted++ : -1);
    }
    const size_t n_rows = n_wanted * n_layer;
    experts.assign(n_rows * n_used, -1);
    weights.assign(with_weights ? n_rows * n_used : 0, 0.0f);
    logits.assign(with_logits ? n_rows * n_expert : 0, NAN);
}

void steermoe_trace::clear() {
    given        = false;
    with_weights = false;
    with_logits  = false;
    any          = false;
    n_wanted     = 0;
    n_computed   = 0;
    batch_places.clear();
    ubatch_places.clear();
    experts.clear();
    weights.clear();
    logits.clear();
    for (std::vector<int32_t> * seen : { &with_experts, &weighted, &with_z }) {
        seen->assign(n_layer, 0);
    }
}

void steermoe_trace::end_batch() {
    batch_places.clear();
}

void steermoe_trace::begin_ubatch(const llama_ubatch & ubatch) {
    any = false;
    if (batch_places.empty()) {
        return;
    }
    ubatch_places = steermoe_values_of(ubatch, batch_places, -1);
    steermoe_clear_values_of(ubatch, batch_places, -1);
    const auto n = std::count_if(ubatch_places.begin(), ubatch_places.end(), [](int32_t place) { return place >= 0; });
    any          = n > 0;
    n_computed += n;
}

template <typename T>
void steermoe_trace::add(std::vector<T> & to, int32_t width, std::vector<int32_t> & seen, int il,
                         const std::vector<uint32_t> & tokens, const T * from, int64_t stride, int64_t n) {
    for (size_t r = 0; r < tokens.size(); r++) {
        const int32_t place = ubatch_places[tokens[r]];
        if (place >= 0) {
            std::copy_n(from + r * stride, std::min<int64_t>(n, width),
                        to.begin() + ((size_t) place * n_layer + il) * width);
            seen[il]++;
        }
    }
}

void steermoe_trace::add_experts(int il, const std::vector<uint32_t> & tokens, const int32_t * chosen, int64_t stride,
                                 int64_t n_chosen) {
    add(experts, n_used, with_experts, il, tokens, chosen, stride, n_chosen);
}

void steermoe_trace::add_weights(int il, const std::vector<uint32_t> & tokens, const float * mixed, int64_t stride,
                                 int64_t n_chosen) {
    add(weights, n_used, weighted, il, tokens, mixed, stride, n_chosen);
}

void steermoe_trace::add_logits(int il, const std::vector<uint32_t> & tokens, const float * z, int64_t stride) {
    add(logits, n_expert, with_z, il, tokens, z, stride, n_expert);
}

std::string steermoe_trace::missing() const {
    if (!given) {
        return "no trace was asked for; ask for it by steermoe_recorder_set_trace before each llama_decode";
    }
    if (n_computed != n_wanted) {
        return "the decode computed " + std::to_string(n_computed) + " of the " + std::to_string(n_wanted) +
               " tokens to trace";
    }
    for (int32_t il = 0; il < n_layer; il++) {
        const bool lost_weights = with_weights && weighted[il] != with_experts[il];
        const bool lost_logits  = with_logits && with_z[il] != with_experts[il];
        if (lost_weights || lost_logits) {
            return std::string(lost_weights ? "the mixing weights" : "the router logits") + " of layer " +
                   std::to_string(il) + " were seen for " + std::to_string(lost_weights ? weighted[il] : with_z[il]) +
                   " of " + std::to_string(with_experts[il]) + " traced tokens";
        }
    }
    return "";
}
