// Fuzz target: the bias file reader alone. What it accepts must be what steermoe.h and docs/formats.md promise, and
// the same bias must come out of steermoe_bias_init and steermoe_bias_set_layer.
#include "fuzz.h"

#include "ggml.h"

#include "steermoe-bias.h"
#include "steermoe-error.h"

#include <cmath>
#include <optional>

namespace {

constexpr const char * NAME = "fuzz.gguf";

fuzz_outcomes outcomes({ { "accepted" }, { "refused" } });

void require_valid(const steermoe_bias & bias) {
    fuzz_require(bias.n_layer >= 1 && bias.n_layer <= 4096, "1 to 4096 layers");
    fuzz_require(bias.n_expert >= 1 && bias.n_expert <= 16384, "1 to 16384 experts");
    fuzz_require(bias.n_expert_used >= 1 && bias.n_expert_used <= bias.n_expert, "1 to n_expert used");
    fuzz_require(bias.epsilon > 0.0f && bias.epsilon <= 20.0f, "epsilon above 0 and at most 20");
    const bool capped = bias.mode == STEERMOE_MODE_CAPPED;
    fuzz_require(bias.mode == STEERMOE_MODE_HARD || bias.mode == STEERMOE_MODE_SOFT || capped, "a known rule");
    fuzz_require(capped ? (bias.cap >= 0.0f && bias.cap <= 1e6f) || std::isinf(bias.cap) : bias.cap == 0.0f,
                 "a cap from 0 to 1e6 or infinite, under the capped rule alone");
    fuzz_require(!bias.architecture.empty(), "an architecture");
    fuzz_require(bias.router_sha256.size() == 64, "a hash of 64 digits");
    fuzz_require(bias.layers.size() == (size_t) bias.n_layer, "a row for each layer");
    for (const auto & row : bias.layers) {
        fuzz_require(row.empty() || row.size() == (size_t) bias.n_expert, "a value for each expert");
        int32_t n_plus  = 0;
        int32_t n_minus = 0;
        for (const float v : row) {
            fuzz_require(std::isfinite(v) && std::fabs(v) <= 1e6f, "finite values up to 1e6");
            n_plus += v == 1.0f;
            n_minus += v == -1.0f;
            fuzz_require(bias.mode == STEERMOE_MODE_SOFT || v == 0.0f || std::fabs(v) == 1.0f, "signs are -1, 0, 1");
        }
        if (bias.mode != STEERMOE_MODE_SOFT) {
            fuzz_require(n_plus <= bias.n_expert_used, "at most n_expert_used are activated");
            fuzz_require(bias.n_expert - n_minus >= bias.n_expert_used, "n_expert_used are left");
        }
    }
}

void require_same_by_hand(const steermoe_bias & bias) {
    steermoe_bias_info info{};
    info.architecture  = bias.architecture.c_str();
    info.router_sha256 = bias.router_sha256.c_str();
    info.mode          = bias.mode;
    info.epsilon       = bias.epsilon;
    info.cap           = bias.cap;
    info.n_layer       = bias.n_layer;
    info.n_expert      = bias.n_expert;
    info.n_expert_used = bias.n_expert_used;

    const steermoe_status status = steermoe_guard([&] {
        steermoe_bias copy = steermoe_bias::from_info(info);
        for (int32_t il = 0; il < bias.n_layer; il++) {
            if (!bias.layers[il].empty()) {
                copy.set_layer(il, bias.layers[il].data(), bias.n_expert);
            }
        }
        fuzz_require(copy.layers == bias.layers && copy.cap == bias.cap, "the same values by hand");
        copy.require_model(bias.architecture, bias.n_layer, bias.n_expert, bias.n_expert_used, bias.router_sha256,
                           false);
    });
    fuzz_require(status == STEERMOE_OK, "what a file may say, steermoe_bias_init takes");
}

} // namespace

extern "C" int LLVMFuzzerInitialize(int *, char ***) {
    ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    std::optional<steermoe_bias> bias;
    const steermoe_status status = steermoe_guard([&] { bias.emplace(steermoe_bias::from_buffer(data, size, NAME)); });
    outcomes.list[status == STEERMOE_OK ? 0 : 1].n++;
    if (status != STEERMOE_OK) {
        fuzz_require(status == STEERMOE_ERR_FORMAT, "a bad file is STEERMOE_ERR_FORMAT");
        fuzz_require_message(steermoe_last_error(), NAME);
        return 0;
    }
    fuzz_keep(data, size);
    require_valid(*bias);
    require_same_by_hand(*bias);
    const steermoe_status mismatch =
        steermoe_guard([&] { bias->require_model("no such model", 1, 1, 1, std::string(64, '0'), true); });
    fuzz_require(mismatch == STEERMOE_ERR_MISMATCH, "another model is refused");
    fuzz_require_message(steermoe_last_error(), NAME);
    return 0;
}
