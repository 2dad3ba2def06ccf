// The C interface of steermoe.h.
#include "steermoe.h"

#include "llama-context.h"
#include "llama-model.h"
#include "llama.h"

#include "steermoe-bias.h"
#include "steermoe-error.h"
#include "steermoe-hook.h"
#include "steermoe-model.h"
#include "steermoe-recorder.h"

#include <algorithm>
#include <cstring>

static_assert((int) STEERMOE_GATING_SOFTMAX == (int) LLAMA_EXPERT_GATING_FUNC_TYPE_SOFTMAX, "gating");
static_assert((int) STEERMOE_GATING_SIGMOID == (int) LLAMA_EXPERT_GATING_FUNC_TYPE_SIGMOID, "gating");
static_assert((int) STEERMOE_GATING_SOFTMAX_WEIGHT == (int) LLAMA_EXPERT_GATING_FUNC_TYPE_SOFTMAX_WEIGHT, "gating");
static_assert((int) STEERMOE_GATING_SQRT_SOFTPLUS == (int) LLAMA_EXPERT_GATING_FUNC_TYPE_SQRT_SOFTPLUS, "gating");

namespace {

void require(const void * p, const char * what) {
    if (p == nullptr) {
        throw steermoe_error(STEERMOE_ERR_ARGUMENT, std::string(what) + " must not be NULL");
    }
}

// Run a change of the steering of ctx. change: hook -> must the context reserve its graphs again?
template <typename F> steermoe_status steer(llama_context * ctx, F && change) {
    return steermoe_guard([&] {
        require(ctx, "ctx");
        ctx->synchronize(); // a graph that is still being computed reads the tensors that change
        if (change(*ctx->get_steermoe())) {
            ctx->steermoe_reserve();
        }
    });
}

// to may be NULL.
template <typename T> void copy_all(T * to, const std::vector<T> & from) {
    if (to != nullptr) {
        std::copy(from.begin(), from.end(), to);
    }
}

// Sequence ids that llama_decode accepts in ctx.
void require_seq(const llama_context * ctx, int32_t seq_id) {
    const auto & cparams = ctx->get_cparams();
    const int    n       = cparams.kv_unified ? LLAMA_MAX_SEQ : (int) cparams.n_seq_max;
    if (seq_id < 0 || seq_id >= n) {
        throw steermoe_error(STEERMOE_ERR_ARGUMENT, "sequence " + std::to_string(seq_id) +
                                                        " does not exist: the context has the sequences 0 to " +
                                                        std::to_string(n - 1));
    }
}

void require_row(int32_t row) {
    if (row < 0 || row >= STEERMOE_MAX_ROWS) {
        throw steermoe_error(STEERMOE_ERR_ARGUMENT, "row " + std::to_string(row) +
                                                        " does not exist: a context has the rows 0 to " +
                                                        std::to_string(STEERMOE_MAX_ROWS - 1));
    }
}

// What is said of each of n_tokens tokens.
void require_tokens(const void * values, int32_t n_tokens, const char * what) {
    if (n_tokens < 0) {
        throw steermoe_error(STEERMOE_ERR_ARGUMENT, "n_tokens must not be negative");
    }
    if (n_tokens > 0) {
        require(values, what);
    }
}

} // namespace

//
// library
//

int32_t steermoe_abi_version(void) {
    return STEERMOE_ABI_VERSION;
}

//
// bias
//

steermoe_status steermoe_bias_load(const char * path, steermoe_bias ** bias) {
    return steermoe_guard([&] {
        require(bias, "bias");
        *bias = nullptr;
        require(path, "path");
        *bias = new steermoe_bias(steermoe_bias::from_file(path));
    });
}

steermoe_status steermoe_bias_load_buffer(const void * data, size_t size, const char * name, steermoe_bias ** bias) {
    return steermoe_guard([&] {
        require(bias, "bias");
        *bias = nullptr;
        require(data, "data");
        *bias = new steermoe_bias(steermoe_bias::from_buffer(data, size, name ? name : "bias"));
    });
}

steermoe_status steermoe_bias_init(const steermoe_bias_info * info, steermoe_bias ** bias) {
    return steermoe_guard([&] {
        require(bias, "bias");
        *bias = nullptr;
        require(info, "info");
        *bias = new steermoe_bias(steermoe_bias::from_info(*info));
    });
}

steermoe_status steermoe_bias_set_layer(steermoe_bias * bias, int32_t il, const float * values, int32_t n_expert) {
    return steermoe_guard([&] {
        require(bias, "bias");
        require(values, "values");
        bias->set_layer(il, values, n_expert);
    });
}

void steermoe_bias_get_info(const steermoe_bias * bias, steermoe_bias_info * info) {
    *info               = {};
    info->architecture  = bias->architecture.c_str();
    info->router_sha256 = bias->router_sha256.c_str();
    info->mode          = bias->mode;
    info->epsilon       = bias->epsilon;
    info->cap           = bias->cap;
    info->n_layer       = bias->n_layer;
    info->n_expert      = bias->n_expert;
    info->n_expert_used = bias->n_expert_used;
    for (int32_t il = 0; il < bias->n_layer; il++) {
        info->n_steered += !bias->layer_is_zero(il);
        for (const float v : bias->layers[il]) {
            info->n_active += v > 0.0f;
            info->n_inactive += v < 0.0f;
        }
    }
}

const float * steermoe_bias_layer(const steermoe_bias * bias, int32_t il) {
    const bool given = il >= 0 && il < bias->n_layer && !bias->layers[il].empty();
    return given ? bias->layers[il].data() : nullptr;
}

void steermoe_bias_free(steermoe_bias * bias) {
    delete bias;
}

//
// model
//

steermoe_status steermoe_model_router_sha256(const llama_model * model, char sha256[65]) {
    return steermoe_guard([&] {
        require(model, "model");
        require(sha256, "sha256");
        const std::string hex = steermoe_router_sha256(*model);
        memcpy(sha256, hex.c_str(), hex.size() + 1);
    });
}

steermoe_status steermoe_bias_check(const steermoe_bias * bias, const llama_model * model, int32_t flags) {
    return steermoe_guard([&] {
        require(bias, "bias");
        require(model, "model");
        const bool force = flags & STEERMOE_FORCE_ROUTER;
        steermoe_require_model(*bias, *model, force ? std::string() : steermoe_router_sha256(*model), force);
    });
}

//
// steering
//

steermoe_status steermoe_attach(llama_context * ctx, const steermoe_bias * bias, int32_t flags) {
    return steer(ctx, [&](steermoe_hook & hook) {
        require(bias, "bias");
        return hook.attach(*bias, flags & STEERMOE_FORCE_ROUTER);
    });
}

steermoe_status steermoe_detach(llama_context * ctx) {
    return steer(ctx, [&](steermoe_hook & hook) { return hook.detach(); });
}

steermoe_status steermoe_attach_seq(llama_context * ctx, int32_t seq_id, const steermoe_bias * bias, int32_t flags) {
    return steer(ctx, [&](steermoe_hook & hook) {
        require_seq(ctx, seq_id);
        return hook.attach_seq(seq_id, bias, flags & STEERMOE_FORCE_ROUTER);
    });
}

steermoe_status steermoe_detach_seq(llama_context * ctx, int32_t seq_id) {
    return steer(ctx, [&](steermoe_hook & hook) {
        require_seq(ctx, seq_id);
        return hook.detach_seq(seq_id);
    });
}

steermoe_status steermoe_row_attach(llama_context * ctx, int32_t row, const steermoe_bias * bias, int32_t flags) {
    return steer(ctx, [&](steermoe_hook & hook) {
        require_row(row);
        require(bias, "bias");
        return hook.attach_row(row, *bias, flags & STEERMOE_FORCE_ROUTER);
    });
}

steermoe_status steermoe_row_detach(llama_context * ctx, int32_t row) {
    return steer(ctx, [&](steermoe_hook & hook) {
        require_row(row);
        return hook.detach_row(row);
    });
}

// Without waiting for a graph that is still being computed: its inputs are set.
steermoe_status steermoe_set_token_rows(llama_context * ctx, const int32_t * rows, int32_t n_tokens) {
    return steermoe_guard([&] {
        require(ctx, "ctx");
        require_tokens(rows, n_tokens, "rows");
        ctx->get_steermoe()->set_token_rows(rows, n_tokens);
    });
}

steermoe_status steermoe_get_layer_info(const llama_context * ctx, int32_t il, steermoe_layer_info * info) {
    return steermoe_guard([&] {
        require(ctx, "ctx");
        require(info, "info");
        const steermoe_hook * hook = ctx->get_steermoe();
        if (il < 0 || il >= hook->n_layer()) {
            throw steermoe_error(STEERMOE_ERR_ARGUMENT, "layer " + std::to_string(il) +
                                                            " does not exist: the model has " +
                                                            std::to_string(hook->n_layer()));
        }
        *info        = {};
        info->reason = "the layer has no router";

        const steermoe_router * router = hook->router(il);
        if (router == nullptr) {
            return;
        }
        info->gating         = router->gating;
        info->n_expert       = (int32_t) router->n_expert;
        info->n_expert_used  = (int32_t) router->n_expert_used;
        info->selection_bias = router->selection_bias;
        info->expert_groups  = router->expert_groups;
        info->reason         = router->obstacle();
        info->steerable      = *info->reason == '\0';
        info->steered        = hook->is_steered(il);
    });
}

//
// recorder
//

steermoe_status steermoe_recorder_init(const llama_model * model, int32_t n_bins, steermoe_recorder ** recorder) {
    return steermoe_guard([&] {
        require(recorder, "recorder");
        *recorder = nullptr;
        require(model, "model");
        if (n_bins < 1) {
            throw steermoe_error(STEERMOE_ERR_ARGUMENT, "n_bins must be at least 1");
        }
        const auto & hparams = model->hparams;
        if (hparams.n_expert == 0) {
            throw steermoe_error(STEERMOE_ERR_UNSUPPORTED,
                                 "the model has no experts: it is not a Mixture-of-Experts model");
        }
        *recorder = new steermoe_recorder(n_bins, (int32_t) hparams.n_layer(), (int32_t) hparams.n_expert,
                                          (int32_t) hparams.n_expert_used_max());
    });
}

steermoe_status steermoe_recorder_bind(steermoe_recorder * recorder, llama_context * ctx) {
    return steermoe_guard([&] {
        require(recorder, "recorder");
        require(ctx, "ctx");
        const auto & hparams = ctx->get_model().hparams;
        if ((int32_t) hparams.n_layer() != recorder->n_layer || (int32_t) hparams.n_expert != recorder->n_expert) {
            throw steermoe_error(STEERMOE_ERR_ARGUMENT, "the recorder was made for another model than the context's");
        }
        recorder->bind(ctx->get_steermoe());
    });
}

steermoe_status steermoe_recorder_set_mask(steermoe_recorder * recorder, const int32_t * bins, int32_t n_tokens) {
    return steermoe_guard([&] {
        require(recorder, "recorder");
        require_tokens(bins, n_tokens, "bins");
        recorder->set_mask(bins, n_tokens);
    });
}

void steermoe_recorder_set_stop(steermoe_recorder * recorder, bool stop) {
    recorder->set_stop(stop);
}

void steermoe_recorder_reset(steermoe_recorder * recorder) {
    recorder->reset();
}

steermoe_status steermoe_recorder_counts(const steermoe_recorder * recorder, int64_t * counts, int64_t * tokens) {
    return steermoe_guard([&] {
        require(recorder, "recorder");
        if (!recorder->failure.empty()) {
            throw steermoe_error(STEERMOE_ERR_STATE, recorder->failure);
        }
        copy_all(counts, recorder->counts);
        copy_all(tokens, recorder->tokens);
    });
}

steermoe_status steermoe_recorder_set_sums(steermoe_recorder * recorder, bool sums) {
    return steermoe_guard([&] {
        require(recorder, "recorder");
        recorder->set_sums(sums);
    });
}

steermoe_status steermoe_recorder_sums(const steermoe_recorder * recorder, int32_t n_bins, double * logits,
                                       double * spread, double * weights) {
    return steermoe_guard([&] {
        require(recorder, "recorder");
        if (n_bins < 0 || n_bins > recorder->n_bins) {
            throw steermoe_error(STEERMOE_ERR_ARGUMENT, "n_bins: " + std::to_string(n_bins) + " of a recorder of " +
                                                            std::to_string(recorder->n_bins) + " bins");
        }
        const std::string failure = recorder->failure.empty() ? recorder->missing_sums() : recorder->failure;
        if (!recorder->sums || !failure.empty()) {
            throw steermoe_error(STEERMOE_ERR_STATE,
                                 recorder->sums ? failure
                                                : "no sums are kept; ask for them by steermoe_recorder_set_sums");
        }
        const auto copy = [&](double * to, const std::vector<double> & from) {
            if (to != nullptr) {
                memcpy(to, from.data(), from.size() / recorder->n_bins * n_bins * sizeof(double));
            }
        };
        copy(logits, recorder->logits);
        copy(spread, recorder->spread);
        copy(weights, recorder->weights);
    });
}

steermoe_status steermoe_recorder_set_trace(steermoe_recorder * recorder, const bool * wanted, int32_t n_tokens,
                                            int32_t flags) {
    return steermoe_guard([&] {
        require(recorder, "recorder");
        require_tokens(wanted, n_tokens, "wanted");
        recorder->set_trace(wanted, n_tokens, flags & STEERMOE_TRACE_WEIGHTS, flags & STEERMOE_TRACE_LOGITS);
    });
}

int32_t steermoe_recorder_top_k(const steermoe_recorder * recorder) {
    return recorder->trace.n_used;
}

steermoe_status steermoe_recorder_trace(const steermoe_recorder * recorder, int32_t * experts, float * weights,
                                        float * logits) {
    return steermoe_guard([&] {
        require(recorder, "recorder");
        const steermoe_trace & trace   = recorder->trace;
        const std::string      failure = recorder->failure.empty() ? trace.missing() : recorder->failure;
        if (!failure.empty()) {
            throw steermoe_error(STEERMOE_ERR_STATE, failure);
        }
        if ((weights != nullptr && !trace.has_weights()) || (logits != nullptr && !trace.has_logits())) {
            throw steermoe_error(STEERMOE_ERR_STATE, "the trace keeps no such values; ask for them by the flags of "
                                                     "steermoe_recorder_set_trace");
        }
        copy_all(experts, trace.experts);
        copy_all(weights, trace.weights);
        copy_all(logits, trace.logits);
    });
}

void steermoe_recorder_free(steermoe_recorder * recorder) {
    delete recorder;
}

bool steermoe_recorder_eval(ggml_tensor * t, bool ask, void * user_data) {
    return static_cast<steermoe_recorder *>(user_data)->eval(t, ask);
}
