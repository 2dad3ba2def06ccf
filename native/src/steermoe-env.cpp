// Steering named by environment variables, for programs that know nothing of steering.
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include "steermoe-bias.h"
#include "steermoe-error.h"
#include "steermoe-hook.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

void steermoe_attach_env(llama_context & ctx) {
    const char * path = getenv("STEERMOE_BIAS");
    if (path == nullptr || *path == '\0') {
        return;
    }
    if (ctx.get_model().hparams.no_alloc) {
        return; // a model without weights, loaded only to measure memory
    }
    const char * force = getenv("STEERMOE_FORCE");
    try {
        const steermoe_bias bias = steermoe_bias::from_file(path);
        if (ctx.get_steermoe()->attach(bias, force != nullptr && strcmp(force, "1") == 0)) {
            ctx.steermoe_reserve();
        }
        LLAMA_LOG_INFO("%s: STEERMOE_BIAS: steering with %s\n", __func__, path);
    } catch (const steermoe_error & e) {
        // Also here: the programs write their log in another thread and lose it when they exit at once.
        fprintf(stderr, "error: STEERMOE_BIAS: %s\n", e.what());
        throw steermoe_error(e.status, std::string("STEERMOE_BIAS: ") + e.what());
    }
}
