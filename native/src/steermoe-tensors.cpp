#include "steermoe-tensors.h"

#include "ggml-backend.h"
#include "ggml.h"
#include "llama-model.h"

#include "steermoe-error.h"

ggml_tensor * steermoe_tensors::make(ggml_type type, int64_t ne0, int64_t ne1, int il, const char * what) {
    ggml_context_ptr & ctx = ctxs[model.select_buft(il)];
    if (ctx == nullptr) {
        const ggml_init_params params = {
            /*.mem_size   =*/n_max * ggml_tensor_overhead(),
            /*.mem_buffer =*/nullptr,
            /*.no_alloc   =*/true,
        };
        ctx.reset(ggml_init(params));
        if (ctx == nullptr) {
            throw steermoe_error(STEERMOE_ERR_INTERNAL, "out of memory for the steering tensors");
        }
    }
    return ggml_format_name(ggml_new_tensor_2d(ctx.get(), type, ne0, ne1), "steermoe.%s.%d", what, il);
}

void steermoe_tensors::allocate() {
    for (const auto & [buft, ctx] : ctxs) {
        ggml_backend_buffer_t buf = ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft);
        if (buf == nullptr) {
            throw steermoe_error(STEERMOE_ERR_INTERNAL,
                                 std::string("no memory for the steering tensors on ") + ggml_backend_buft_name(buft));
        }
        bufs.emplace_back(buf);
    }
}
