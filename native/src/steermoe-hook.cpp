#include "steermoe-hook.h"

#include "llama-arch.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include "steermoe-bank.h"
#include "steermoe-bias.h"
#include "steermoe-error.h"
#include "steermoe-model.h"
#include "steermoe-sequences.h"

#include <algorithm>
#include <utility>

namespace {

// Reports an obstacle in llama.cpp's log and in steermoe_last_error. Returns true if there is none.
bool passes(const std::string & obstacle) {
    if (obstacle.empty()) {
        return true;
    }
    LLAMA_LOG_ERROR("%s\n", obstacle.c_str());
    steermoe_set_last_error(obstacle.c_str());
    return false;
}

} // namespace

const char * steermoe_router::obstacle() const {
    return external ? "its experts are not chosen by a router" : "";
}

bool steermoe_router::selects_by_logits() const {
    const bool softmax =
        gating == LLAMA_EXPERT_GATING_FUNC_TYPE_SOFTMAX || gating == LLAMA_EXPERT_GATING_FUNC_TYPE_SOFTMAX_WEIGHT;
    return softmax && !selection_bias && !expert_groups && !own_selection;
}

steermoe_hook::steermoe_hook(const llama_model & model)
    : model(model), routers(model.hparams.n_layer()), noted_logits(routers.size()), noted_weights(routers.size()),
      sequences(std::make_unique<steermoe_sequences>(model)) {}

steermoe_hook::~steermoe_hook() = default;

ggml_tensor * steermoe_hook::edit_router(ggml_context * ctx, llm_graph_result * res, ggml_tensor * logits, int il,
                                         const steermoe_router & router) {
    if (il < 0 || il >= n_layer()) {
        return logits; // a layer for multi-token prediction, behind the last one
    }
    if (routers[il] == nullptr) {
        routers[il]                = std::make_unique<steermoe_router>(router);
        // a warm-up graph uses all experts: take the model's number
        routers[il]->n_expert_used = std::min<int64_t>(router.n_expert_used, model.hparams.n_expert_used(il));
    }
    if (router.external || logits->ne[1] == 0) {
        return logits;
    }
    if (noted_graph != n_graph) { // the first router of a graph
        noted_graph = n_graph;
        notes.clear();
        std::fill(noted_logits.begin(), noted_logits.end(), nullptr);
        std::fill(noted_weights.begin(), noted_weights.end(), nullptr);
    }
    if (noted_logits[il] == nullptr) {
        noted_logits[il] = logits;
        notes[logits]    = { il, /*.weights =*/false };
    }
    return sequences->edit_logits(ctx, res, logits, il);
}

ggml_tensor * steermoe_hook::edit_selection(ggml_context * ctx, ggml_tensor * scores, int il) {
    if (il < 0 || il >= n_layer() || scores->ne[1] == 0) {
        return scores;
    }
    return sequences->edit_selection(ctx, scores, il);
}

void steermoe_hook::note_weights(const ggml_tensor * weights, int il) {
    if (il < 0 || il >= n_layer() || noted_graph != n_graph || noted_logits[il] == nullptr ||
        noted_weights[il] != nullptr) {
        return;
    }
    noted_weights[il] = weights;
    notes[weights]    = { il, /*.weights =*/true };
}

const steermoe_note * steermoe_hook::note(const ggml_tensor * t) const {
    const auto found = notes.find(t);
    return found == notes.end() ? nullptr : &found->second;
}

bool steermoe_hook::accepts(const llama_batch * batch) {
    n_batch++;
    return passes(sequences->begin_batch(batch)) && batch != nullptr;
}

uint64_t steermoe_hook::begin_graph(const llama_ubatch * ubatch) {
    n_graph++;
    return sequences->begin_graph(ubatch);
}

bool steermoe_hook::begin_ubatch(const llama_ubatch & new_ubatch) {
    ubatch = &new_ubatch;
    n_ubatch++;
    sequences->end_inputs(new_ubatch);
    return passes(std::exchange(sequences->failure, ""));
}

uint32_t steermoe_hook::n_nodes() const {
    // grovemoe calls build_moe_ffn twice for a layer
    return sequences->n_nodes() * (model.arch == LLM_ARCH_GROVEMOE ? 2 : 1);
}

bool steermoe_hook::is_steered(int il) const {
    return sequences->steers(il);
}

const steermoe_router * steermoe_hook::router(int il) const {
    return il >= 0 && il < n_layer() ? routers[il].get() : nullptr;
}

int steermoe_hook::last_router() const {
    int il = n_layer() - 1;
    while (il >= 0 && routers[il] == nullptr) {
        il--;
    }
    return il;
}

std::vector<steermoe_layer> steermoe_hook::layers() const {
    std::vector<steermoe_layer> all(routers.size());
    for (size_t il = 0; il < all.size(); il++) {
        if (const steermoe_router * r = routers[il].get()) {
            all[il].steerable      = *r->obstacle() == '\0';
            all[il].edit_selection = !r->selects_by_logits();
            all[il].masked         = r->expert_groups;
        }
    }
    return all;
}

void steermoe_hook::require_steerable(const steermoe_bias & bias, bool force) const {
    steermoe_require_model(bias, model, force ? std::string() : steermoe_router_sha256(model), force);
    for (int il = 0; il < bias.n_layer; il++) {
        if (bias.layer_is_zero(il)) {
            continue;
        }
        const std::string where = bias.name + ": layer " + std::to_string(il) + " cannot be steered: ";
        if (router(il) == nullptr) {
            throw steermoe_error(STEERMOE_ERR_UNSUPPORTED, where + "it has no router (see steermoe info)");
        }
        if (*router(il)->obstacle() != '\0') {
            throw steermoe_error(STEERMOE_ERR_UNSUPPORTED, where + router(il)->obstacle());
        }
    }
}

bool steermoe_hook::attach(const steermoe_bias & bias, bool force) {
    require_steerable(bias, force);
    return sequences->attach(bias, layers());
}

bool steermoe_hook::attach_seq(int32_t seq, const steermoe_bias * bias, bool force) {
    if (bias != nullptr) {
        require_steerable(*bias, force);
    }
    return sequences->attach_seq(seq, bias, layers());
}

bool steermoe_hook::detach_seq(int32_t seq) {
    return sequences->detach_seq(seq);
}

bool steermoe_hook::attach_row(int32_t row, const steermoe_bias & bias, bool force) {
    require_steerable(bias, force);
    return sequences->attach_row(row, bias, layers());
}

bool steermoe_hook::detach_row(int32_t row) {
    return sequences->detach_row(row);
}

bool steermoe_hook::detach() {
    return sequences->detach();
}

void steermoe_hook::set_token_rows(const int32_t * rows, int32_t n_tokens) {
    sequences->set_token_rows(rows, n_tokens);
}
