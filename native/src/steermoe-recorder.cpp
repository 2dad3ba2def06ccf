#include "steermoe-recorder.h"

#include "ggml-backend.h"
#include "ggml.h"
#include "llama-batch.h"

#include "steermoe-error.h"
#include "steermoe-hook.h"
#include "steermoe-ubatch.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace {

// layer of a tensor named ffn_moe_topk-<il> (llama.cpp: build_moe_ffn), or -1
int topk_layer(const ggml_tensor * t) {
    static constexpr char PREFIX[] = "ffn_moe_topk-";
    if (strncmp(t->name, PREFIX, sizeof(PREFIX) - 1) != 0) {
        return -1;
    }
    return atoi(t->name + sizeof(PREFIX) - 1);
}

// Sum of term(0) ... term(n - 1), in an order that is fixed and leaves no term waiting for the one before it.
template <typename F> double sum(int32_t n, F && term) {
    double  parts[8] = {};
    int32_t i        = 0;
    for (; i + 8 <= n; i += 8) {
        for (int32_t j = 0; j < 8; j++) {
            parts[j] += term(i + j);
        }
    }
    for (; i < n; i++) {
        parts[i % 8] += term(i);
    }
    return ((parts[0] + parts[1]) + (parts[2] + parts[3])) + ((parts[4] + parts[5]) + (parts[6] + parts[7]));
}

// Set the values of some rows of a table to 0. rows: [n] is it one of them?
template <typename T> void clear_rows(std::vector<T> & table, const std::vector<bool> & rows) {
    const size_t width = table.size() / rows.size();
    for (size_t row = 0; row < rows.size(); row++) {
        if (rows[row]) {
            std::fill_n(table.begin() + row * width, width, T());
        }
    }
}

} // namespace

steermoe_recorder::steermoe_recorder(int32_t n_bins, int32_t n_layer, int32_t n_expert, int32_t n_used)
    : n_bins(n_bins), n_layer(n_layer), n_expert(n_expert), trace(n_layer, n_expert, n_used) {
    allocate();
}

void steermoe_recorder::bind(steermoe_hook * new_hook) {
    hook             = new_hook;
    hook->has_logits = !stop_early;
    cur_ubatch       = hook->n_ubatch;
    mask_batch       = next_batch(); // if they were set before
    trace_batch      = next_batch();
}

// Batches are counted when they are begun.
uint64_t steermoe_recorder::next_batch() const {
    return hook == nullptr ? 0 : hook->n_batch + 1;
}

void steermoe_recorder::set_stop(bool stop) {
    stop_early = stop;
    if (hook != nullptr) {
        hook->has_logits = !stop;
    }
}

void steermoe_recorder::set_mask(const int32_t * bins, int32_t n_tokens) {
    for (int32_t i = 0; i < n_tokens; i++) {
        if (bins[i] < -1 || bins[i] >= n_bins) {
            throw steermoe_error(STEERMOE_ERR_ARGUMENT, "token " + std::to_string(i) + ": bin " +
                                                            std::to_string(bins[i]) + " is neither -1 nor one of the " +
                                                            std::to_string(n_bins) + " bins");
        }
    }
    mask.assign(bins, bins + n_tokens);
    mask_batch = next_batch();
}

void steermoe_recorder::set_trace(const bool * wanted, int32_t n_tokens, bool with_weights, bool with_logits) {
    trace.set(wanted, n_tokens, with_weights, with_logits);
    trace_batch = next_batch();
}

void steermoe_recorder::set_sums(bool new_sums) {
    sums = new_sums;
    allocate();
    reset();
}

void steermoe_recorder::allocate() {
    const size_t n_rows = (size_t) n_bins * n_layer;
    counts.assign(n_rows * n_expert, 0);
    tokens.assign(n_rows, 0);
    logits.assign(sums ? n_rows * n_expert : 0, 0.0);
    spread.assign(sums ? n_rows : 0, 0.0);
    weights.assign(sums ? n_rows * n_expert : 0, 0.0);
    summed.assign(sums ? 2 * n_rows : 0, 0);
    written.assign(n_rows, false);
}

// Callers have many bins and use few of them: only what was written is cleared.
void steermoe_recorder::reset() {
    clear_rows(counts, written);
    clear_rows(logits, written);
    clear_rows(weights, written);
    std::fill(tokens.begin(), tokens.end(), 0);
    std::fill(spread.begin(), spread.end(), 0.0);
    std::fill(summed.begin(), summed.end(), 0);
    written.assign(tokens.size(), false);
    mask.clear();
    trace.clear();
    failure.clear();
}

std::string steermoe_recorder::missing_sums() const {
    for (size_t i = 0; i < summed.size(); i++) {
        const size_t row = i % tokens.size();
        if (summed[i] != tokens[row]) {
            return std::string(i < tokens.size() ? "the router logits" : "the mixing weights") + " of layer " +
                   std::to_string(row % n_layer) + " were seen for " + std::to_string(summed[i]) + " of " +
                   std::to_string(tokens[row]) + " counted tokens";
        }
    }
    return "";
}

void steermoe_recorder::fail(const std::string & what) {
    if (failure.empty()) {
        failure = what;
    }
}

// Looks up the bins of the ubatch's tokens by their index in the batch and clears them in the mask: each token is
// computed once in a decode. What a decode that failed left of a mask is not the next one's.
void steermoe_recorder::begin_ubatch() {
    cur_ubatch   = hook->n_ubatch;
    finished     = false;
    any          = false;
    z_layer      = -1;
    chosen_layer = -1;
    layer_done.assign(n_layer, false);

    if (mask_batch != hook->n_batch) {
        mask.clear();
    }
    if (trace_batch != hook->n_batch) {
        trace.end_batch();
    }
    token_bins = steermoe_values_of(*hook->ubatch, mask, -1);
    any        = std::any_of(token_bins.begin(), token_bins.end(), [](int32_t bin) { return bin >= 0; });
    steermoe_clear_values_of(*hook->ubatch, mask, -1);
    trace.begin_ubatch(*hook->ubatch);
}

bool steermoe_recorder::find_routed(int64_t n) {
    const llama_ubatch & ubatch = *hook->ubatch;

    routed = steermoe_routed_tokens(ubatch, n);
    if ((int64_t) routed.size() != n) {
        fail("a router saw " + std::to_string(n) + " columns for " + std::to_string(ubatch.n_tokens) + " tokens");
        return false;
    }
    return true;
}

bool steermoe_recorder::find_bins() {
    routed_bins.clear();
    for (const uint32_t i : routed) {
        routed_bins.push_back(token_bins[i]);
    }
    const auto n_counted = [](const std::vector<int32_t> & bins) {
        return std::count_if(bins.begin(), bins.end(), [](int32_t bin) { return bin >= 0; });
    };
    const auto n_lost = n_counted(token_bins) - n_counted(routed_bins);
    if (n_lost > 0) {
        fail(std::to_string(n_lost) + " counted tokens are not outputs, so the last layer does not route them; set "
                                      "batch.logits for every counted token");
        return false;
    }
    return true;
}

void steermoe_recorder::count(const ggml_tensor * topk, int il) {
    const int64_t n_used   = topk->ne[0];
    const int64_t n_routed = topk->ne[1];
    if (topk->type != GGML_TYPE_I32 || topk->nb[0] != sizeof(int32_t) || topk->ne[2] != 1 || topk->ne[3] != 1) {
        fail(std::string(topk->name) + ": unexpected layout");
        return;
    }
    const steermoe_router * router = hook->router(il);
    if (router != nullptr && router->external) {
        return; // no router selected these
    }
    if (router != nullptr && n_used != router->n_expert_used) {
        return; // a warm-up graph routes every token through all experts
    }
    if (!find_routed(n_routed) || !find_bins() || n_routed == 0) {
        return;
    }

    // a strided view of the argsort: n_expert values for each token, of which the first n_used are selected
    const size_t n_bytes = (size_t) (n_routed - 1) * topk->nb[1] + (size_t) n_used * topk->nb[0];
    const char * data    = read(topk, n_bytes, scratch);

    const bool keep = sums || trace.keeps_weights(); // behind the weights, too

    if (trace.is_on()) {
        trace.add_experts(il, routed, (const int32_t *) data, topk->nb[1] / sizeof(int32_t), n_used);
    }
    chosen.clear();
    for (int64_t r = 0; r < n_routed; r++) {
        const int32_t bin      = routed_bins[r];
        const auto *  selected = (const int32_t *) (data + r * topk->nb[1]);
        if (keep) {
            chosen.insert(chosen.end(), selected, selected + n_used);
        }
        if (bin < 0) {
            continue;
        }
        const size_t row     = (size_t) bin * n_layer + il;
        int64_t *    sums_of = counts.data() + row * n_expert;
        written[row]         = true;
        for (int64_t k = 0; k < n_used; k++) {
            if (selected[k] < 0 || selected[k] >= n_expert) {
                fail(std::string(topk->name) + ": selected expert " + std::to_string(selected[k]) + " of " +
                     std::to_string(n_expert));
                return;
            }
            sums_of[selected[k]]++;
        }
        tokens[row]++;
    }
    if (keep) {
        chosen_layer = il;
    }
    add_logits(il);
}

const char * steermoe_recorder::read(const ggml_tensor * t, size_t n_bytes, std::vector<char> & memory) const {
    const auto * buffer = t->view_src ? t->view_src->buffer : t->buffer;
    if (ggml_backend_buffer_is_host(const_cast<ggml_backend_buffer *>(buffer))) {
        return (const char *) t->data;
    }
    memory.resize(n_bytes);
    ggml_backend_tensor_get(t, memory.data(), 0, n_bytes);
    return memory.data();
}

// The logits are read before the selection, which says whether the layer's tokens are counted.
void steermoe_recorder::keep_logits(const ggml_tensor * t, int il) {
    if (t->type != GGML_TYPE_F32 || !ggml_is_contiguous(t) || t->ne[0] != n_expert || t->ne[2] != 1 || t->ne[3] != 1) {
        fail(std::string(t->name) + ": unexpected layout of router logits");
        return;
    }
    const auto * data = (const float *) read(t, ggml_nbytes(t), scratch);
    z.assign(data, data + ggml_nelements(t));
    z_layer = il;
}

// Behind count(), whose routed_bins are those of the logits.
void steermoe_recorder::add_logits(int il) {
    if (z_layer != il || z.size() != routed_bins.size() * n_expert) {
        return;
    }
    if (trace.keeps_logits()) {
        trace.add_logits(il, routed, z.data(), n_expert);
    }
    if (sums) {
        sum_logits(il);
    }
}

void steermoe_recorder::sum_logits(int il) {
    for (size_t r = 0; r < routed_bins.size(); r++) {
        if (routed_bins[r] < 0) {
            continue;
        }
        const size_t  row  = (size_t) routed_bins[r] * n_layer + il;
        const float * mine = z.data() + r * n_expert;
        double *      to   = logits.data() + row * n_expert;
        const double  mean = sum(n_expert, [&](int32_t e) { return (double) mine[e]; }) / n_expert;
        for (int32_t e = 0; e < n_expert; e++) {
            to[e] += mine[e];
        }
        spread[row] += sum(n_expert, [&](int32_t e) { return (mine[e] - mean) * (mine[e] - mean); });
        summed[row]++;
    }
}

void steermoe_recorder::add_weights(const ggml_tensor * t, int il) {
    if (chosen_layer != il) {
        return; // not counted
    }
    if (t->type != GGML_TYPE_F32 || !ggml_is_contiguous(t) || (size_t) ggml_nelements(t) != chosen.size()) {
        fail(std::string(t->name) + ": unexpected layout of mixing weights");
        return;
    }
    const auto * data   = (const float *) read(t, ggml_nbytes(t), scratch);
    const size_t n_used = chosen.size() / routed_bins.size();
    if (trace.keeps_weights()) {
        trace.add_weights(il, routed, data, n_used, n_used);
    }
    if (sums) {
        sum_weights(il, data, n_used);
    }
}

void steermoe_recorder::sum_weights(int il, const float * mixed, size_t n_used) {
    for (size_t r = 0; r < routed_bins.size(); r++) {
        if (routed_bins[r] < 0) {
            continue;
        }
        const size_t row = (size_t) routed_bins[r] * n_layer + il;
        for (size_t k = r * n_used; k < (r + 1) * n_used; k++) {
            weights[row * n_expert + chosen[k]] += mixed[k];
        }
        summed[tokens.size() + row]++;
    }
}

bool steermoe_recorder::is_end(const ggml_tensor * t, int topk_il) const {
    const int               il     = hook->last_router();
    const steermoe_router * router = hook->router(il);
    if (!(sums || trace.keeps_weights()) || router == nullptr || router->external) {
        return topk_il >= 0 && topk_il == il;
    }
    const steermoe_note * note = hook->note(t);
    return note != nullptr && note->weights && note->il == il;
}

bool steermoe_recorder::reads(const steermoe_note & note) const {
    return (sums && any) || (note.weights ? trace.keeps_weights() : trace.keeps_logits());
}

bool steermoe_recorder::eval(const ggml_tensor * t, bool ask) {
    if (hook == nullptr) {
        return !ask; // not bound yet: ask for no tensor, do not stop the graph
    }
    if (hook->n_ubatch != cur_ubatch) {
        begin_ubatch();
    }
    if (finished) {
        // Other backends may have graph splits behind the last router. Asking for the first node of each split and then
        // returning false leaves all other nodes uncomputed.
        return ask;
    }
    const int             il    = topk_layer(t);
    const bool            last  = stop_early && is_end(t, il);
    const bool            here  = any || trace.is_on(); // is anything of this ubatch read?
    // Looked up for every tensor of a graph: only where one may be read.
    const bool            noted = here && (sums || trace.keeps_weights() || trace.keeps_logits());
    const steermoe_note * note  = noted ? hook->note(t) : nullptr;
    if (note != nullptr && !reads(*note)) {
        note = nullptr;
    }
    if (ask) {
        return (il >= 0 && here) || note != nullptr || last;
    }
    if (note != nullptr && !note->weights) {
        keep_logits(t, note->il);
    }
    if (il >= 0 && il < n_layer && here && !layer_done[il]) {
        layer_done[il] = true;
        count(t, il);
    }
    if (note != nullptr && note->weights) {
        add_weights(t, note->il);
    }
    finished = last;
    return !last;
}
