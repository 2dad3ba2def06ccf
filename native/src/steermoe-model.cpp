#include "steermoe-model.h"

#include "ggml-backend-impl.h"
#include "ggml-backend.h"
#include "ggml.h"
#include "llama-arch.h"
#include "llama-hparams.h"
#include "llama-model.h"

#include "steermoe-bias.h"
#include "steermoe-error.h"

extern "C" {
#include "hash/sha256/sha256.h"
}

#include <memory>
#include <mutex>
#include <vector>

namespace {

// The values of a tensor as F32, read from its device.
std::vector<float> read_f32(const ggml_tensor * t) {
    const auto * buffer = t->view_src ? t->view_src->buffer : t->buffer;
    if (buffer == nullptr || t->data == nullptr) {
        throw steermoe_error(STEERMOE_ERR_STATE, std::string(t->name) + ": the model was loaded without its weights");
    }
    if (!ggml_is_contiguous(t) || buffer->iface.get_tensor == nullptr) {
        // a backend that repacks tensors may not be able to read them back
        throw steermoe_error(STEERMOE_ERR_UNSUPPORTED, std::string(t->name) + ": " +
                                                           ggml_backend_buffer_name(t->buffer) +
                                                           " cannot be read back to identify the model; force it");
    }
    std::vector<float> values(ggml_nelements(t));
    if (t->type == GGML_TYPE_F32) {
        ggml_backend_tensor_get(t, values.data(), 0, ggml_nbytes(t));
        return values;
    }
    const auto * traits = ggml_get_type_traits(t->type);
    if (traits->to_float == nullptr) {
        throw steermoe_error(STEERMOE_ERR_UNSUPPORTED,
                             std::string(t->name) + ": no conversion from " + traits->type_name);
    }
    std::vector<char> raw(ggml_nbytes(t));
    ggml_backend_tensor_get(t, raw.data(), 0, raw.size());
    traits->to_float(raw.data(), values.data(), (int64_t) values.size());
    return values;
}

std::string compute_router_sha256(const llama_model & model) {
    sha256_t state;
    sha256_init(&state);
    bool any = false;
    for (uint32_t il = 0; il < model.hparams.n_layer(); il++) {
        const std::string name = "blk." + std::to_string(il) + ".ffn_gate_inp.weight";
        if (const ggml_tensor * t = model.get_tensor(name.c_str())) {
            const std::vector<float> values = read_f32(t);
            sha256_update(&state, (const unsigned char *) values.data(), values.size() * sizeof(float));
            any = true;
        }
    }
    if (!any) {
        throw steermoe_error(STEERMOE_ERR_UNSUPPORTED,
                             std::string("this ") + llm_arch_name(model.arch) +
                                 " model has no routers: it is not a Mixture-of-Experts model and cannot be steered");
    }
    unsigned char digest[SHA256_DIGEST_SIZE];
    sha256_final(&state, digest);

    std::string hex;
    for (const unsigned char byte : digest) {
        hex += "0123456789abcdef"[byte >> 4];
        hex += "0123456789abcdef"[byte & 15];
    }
    return hex;
}

} // namespace

const std::string & steermoe_router_sha256(const llama_model & model) {
    static std::mutex     mutex; // contexts of one model may ask from several threads
    const std::lock_guard guard(mutex);
    if (model.steermoe_sha256 == nullptr) {
        model.steermoe_sha256 = std::make_shared<const std::string>(compute_router_sha256(model));
    }
    return *model.steermoe_sha256;
}

void steermoe_require_model(const steermoe_bias & bias, const llama_model & model, const std::string & router_sha256,
                            bool force) {
    const auto & hparams = model.hparams;
    bias.require_model(llm_arch_name(model.arch), (int32_t) hparams.n_layer(), (int32_t) hparams.n_expert,
                       (int32_t) hparams.n_expert_used_max(), router_sha256, force);
}
