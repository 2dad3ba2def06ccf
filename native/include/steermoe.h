// steermoe.h - steering and recording of Mixture-of-Experts routing in llama.cpp
//
// This header is the documentation of the C interface that the patched libllama exports beside llama.h.
//
// What it does
//   Steering  For chosen layers the router's logits z of every token are edited before anything else uses them, so
//             selection and mixing weights both follow (arXiv 2509.09660, section 3.2; llama.cpp: build_moe_ffn):
//               hard rule   z'_e = max(z) + epsilon  where the sign of expert e is +1
//                           z'_e = min(z) - epsilon  where it is -1,  z'_e = z_e otherwise
//               soft rule   z'_e = z_e + b_e
//             Each sequence of a context may be under a steering of its own; one batch may hold them all.
//   Recording The experts that each chosen token selects are counted per layer, without keeping anything per token.
//
// Rules of the interface
//   - Every function that can fail returns a steermoe_status. After a failure, steermoe_last_error() has one line that
//     says what is wrong and how to mend it. Bad files and wrong models are failures, never aborts.
//   - On failure nothing changes: output pointers are set to NULL or left alone, a context keeps its steering.
//   - Objects come from *_init/*_load and go to *_free, which take NULL. Getters on a valid object cannot fail.
//   - Threads: a context, what is attached to it and the recorder bound to it belong to one thread at a time; different
//     contexts, also of one model, are independent. Many threads may read one bias at once (get_info, layer, check,
//     attach), but not while steermoe_bias_set_layer or steermoe_bias_free runs on it. Functions that take only a model
//     may be called from any thread while the model lives. The text of a failure is its thread's own.
//   - Passing NULL where an object is wanted is a STEERMOE_ERR_ARGUMENT.
//
// From the environment
//   STEERMOE_BIAS=FILE attaches the bias file to every context that is created, so that each program built from this
//   tree (llama-server, llama-cli, llama-bench, llama-perplexity, ...) runs steered unchanged. A file that cannot be
//   used makes the creation of the context fail. STEERMOE_FORCE=1 is the same as STEERMOE_FORCE_ROUTER below.
//   It is read when a context is made: do not change the environment while another thread makes one.

#ifndef STEERMOE_H
#define STEERMOE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef LLAMA_SHARED
#    if defined(_WIN32) && !defined(__MINGW32__)
#        ifdef LLAMA_BUILD
#            define STEERMOE_API __declspec(dllexport)
#        else
#            define STEERMOE_API __declspec(dllimport)
#        endif
#    else
#        define STEERMOE_API __attribute__((visibility("default")))
#    endif
#else
#    define STEERMOE_API
#endif

// Raised by one whenever a signature, a struct or the meaning of a value below changes.
#define STEERMOE_ABI_VERSION 2

// Version of the bias file format (`expertbias.version`).
#define STEERMOE_BIAS_VERSION 1

// Largest bias file that is read, in bytes.
#define STEERMOE_BIAS_MAX_BYTES (256u * 1024u * 1024u)

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_tensor;
struct llama_context;
struct llama_model;

struct steermoe_bias;     // signs or biases for the routers of one model
struct steermoe_recorder; // routing counts

typedef enum steermoe_status {
    STEERMOE_OK              = 0,
    STEERMOE_ERR_IO          = 1, // a file cannot be opened or read
    STEERMOE_ERR_FORMAT      = 2, // the contents of a bias file, or of an equivalent struct, are not valid
    STEERMOE_ERR_MISMATCH    = 3, // made for another model
    STEERMOE_ERR_UNSUPPORTED = 4, // the model routes in a way that cannot be steered
    STEERMOE_ERR_ARGUMENT    = 5, // a bad argument
    STEERMOE_ERR_STATE       = 6, // called at the wrong time, for example counts after a failed recording
    STEERMOE_ERR_INTERNAL    = 7, // out of memory, a device that fails
} steermoe_status;

typedef enum steermoe_mode {
    STEERMOE_MODE_HARD = 0,
    STEERMOE_MODE_SOFT = 1,
} steermoe_mode;

typedef enum steermoe_gating {
    STEERMOE_GATING_NONE           = 0, // the layer has no router
    STEERMOE_GATING_SOFTMAX        = 1, // softmax over all experts, then top-k
    STEERMOE_GATING_SIGMOID        = 2,
    STEERMOE_GATING_SOFTMAX_WEIGHT = 3, // top-k of the logits, then softmax over the selected
    STEERMOE_GATING_SQRT_SOFTPLUS  = 4,
} steermoe_gating;

// Flags for steermoe_bias_check, steermoe_attach and steermoe_attach_seq.
enum {
    // Accept another router as long as architecture, layers, experts and top-k match (files of unusual converters).
    STEERMOE_FORCE_ROUTER = 1,
};

//
// library
//

// STEERMOE_ABI_VERSION of the library; compare it with the one of the header that you compiled against.
STEERMOE_API int32_t steermoe_abi_version(void);

// Text of the last failure in this thread, "" if there was none. Valid until the next call from this thread.
STEERMOE_API const char * steermoe_last_error(void);

//
// bias: which experts to promote or suppress
//

struct steermoe_bias_info {
    const char * architecture;  // general.architecture of the model it was made for, e.g. "olmoe"
    const char * router_sha256; // 64 lower-case hex digits, see steermoe_model_router_sha256
    int32_t      mode;          // steermoe_mode
    float        epsilon;       // distance to the extreme logit under the hard rule, > 0; logits
    int32_t      n_layer;       // layers of the model
    int32_t      n_expert;      // experts of a layer
    int32_t      n_expert_used; // top-k
    int32_t      n_steered;     // layers with at least one value that is not zero (init: ignored)
    int64_t      n_active;      // values > 0 over all layers (init: ignored)
    int64_t      n_inactive;    // values < 0 over all layers (init: ignored)
};

// Read and validate a bias file (GGUF, architecture "expertbias"; docs/formats.md).
STEERMOE_API steermoe_status steermoe_bias_load(const char * path, struct steermoe_bias ** bias);

// The same from memory. `name` is used in messages.
STEERMOE_API steermoe_status steermoe_bias_load_buffer(const void * data, size_t size, const char * name,
                                                       struct steermoe_bias ** bias);

// Make one without a file: no layer is steered until steermoe_bias_set_layer is called. Strings are copied.
STEERMOE_API steermoe_status steermoe_bias_init(const struct steermoe_bias_info * info, struct steermoe_bias ** bias);

// Set the values of layer il: [n_expert] signs -1, 0, +1 (hard) or finite logits (soft).
// Under the hard rule at most n_expert_used may be +1, and at least n_expert_used must not be -1.
STEERMOE_API steermoe_status steermoe_bias_set_layer(struct steermoe_bias * bias, int32_t il, const float * values,
                                                     int32_t n_expert);

STEERMOE_API void steermoe_bias_get_info(const struct steermoe_bias * bias, struct steermoe_bias_info * info);

// Values of layer il, [n_expert]; NULL where the layer is left alone.
STEERMOE_API const float * steermoe_bias_layer(const struct steermoe_bias * bias, int32_t il);

STEERMOE_API void steermoe_bias_free(struct steermoe_bias * bias);

//
// model
//

// SHA-256 over all blk.*.ffn_gate_inp.weight tensors as little-endian F32, in layer order, as 64 hex digits plus NUL.
// No quantization of a model changes it. The first call reads the routers back from their device and hashes them, which
// takes milliseconds (4 bytes a router weight); the model keeps the result. steermoe_attach needs it, too: call this
// once when the model is loaded if the first attach must be quick.
STEERMOE_API steermoe_status steermoe_model_router_sha256(const struct llama_model * model, char sha256[65]);

// Does the bias belong to the model? STEERMOE_OK or STEERMOE_ERR_MISMATCH.
STEERMOE_API steermoe_status steermoe_bias_check(const struct steermoe_bias * bias, const struct llama_model * model,
                                                 int32_t flags);

//
// steering of a context
//
//   A sequence is under the steering that steermoe_attach_seq gave it, else under that of its context (steermoe_attach),
//   else unsteered. What counts is the sequence of a token in the batch, at the time of llama_decode: the steering of a
//   sequence stays when the sequence is emptied (llama_memory_seq_rm), and llama_memory_seq_cp does not copy it.
//
//   DANGER: the memory (KV cache) holds what the old steering computed. Empty it (llama_memory_clear) or the sequence
//   (llama_memory_seq_rm) before you go on under another steering. A token that belongs to several sequences is computed
//   once, so they must be under one steering: else llama_decode returns -1, steermoe_last_error() names the token, and
//   nothing has changed.
//

// Steer the sequences of ctx that have no steering of their own, from the next decode on; replaces what was attached to
// the context before. The bias is copied: free it when you like. A bias without values: they run unsteered.
STEERMOE_API steermoe_status steermoe_attach(struct llama_context * ctx, const struct steermoe_bias * bias,
                                             int32_t flags);

// Stop steering ctx and all its sequences. The graph is then node for node that of an unpatched library.
STEERMOE_API steermoe_status steermoe_detach(struct llama_context * ctx);

// Steer sequence seq_id alone, whatever the context is steered by; replaces what was attached to the sequence before.
// bias NULL, or one without values: the sequence runs unsteered. The bias is copied.
// seq_id is what llama_decode takes in this context: from 0 to n_seq_max - 1, with kv_unified to 255. Anything else is
// a STEERMOE_ERR_ARGUMENT.
//
// Sequences in one batch may be under hard and soft rules, of different epsilon and layers, and unsteered. What becomes
// of a token's router logits does not hang on the other sequences: bit for bit, as far as they are finite (the sign of a
// zero is not promised), and those of unsteered tokens stay as they are. A ubatch whose tokens all are under equal
// steering takes the same graph as if that were the context's.
//
// It takes microseconds to milliseconds: a few values are written in each layer. Only the first time that sequences
// differ, and that again after steermoe_detach, the context reserves its graphs anew.
STEERMOE_API steermoe_status steermoe_attach_seq(struct llama_context * ctx, int32_t seq_id,
                                                 const struct steermoe_bias * bias, int32_t flags);

// Put sequence seq_id under the steering of the context again.
STEERMOE_API steermoe_status steermoe_detach_seq(struct llama_context * ctx, int32_t seq_id);

struct steermoe_layer_info {
    int32_t      gating; // steermoe_gating; STEERMOE_GATING_NONE: no router, the other fields are 0
    int32_t      n_expert;
    int32_t      n_expert_used;
    bool         selection_bias; // the selection adds a bias to the probabilities (DeepSeek-V3 and relatives)
    bool         expert_groups;  // experts are first selected by group
    bool         steerable;
    bool         steered; // by what is attached now, to the context or to any sequence
    const char * reason;  // why it is not steerable, "" if it is; static text
};

// How layer il of this context routes, as seen when its graph was built.
STEERMOE_API steermoe_status steermoe_get_layer_info(const struct llama_context * ctx, int32_t il,
                                                     struct steermoe_layer_info * info);

//
// recorder
//
//   steermoe_recorder_init(model, n_bins, &rec);
//   params.cb_eval = steermoe_recorder_eval; params.cb_eval_user_data = rec;
//   ctx = llama_init_from_model(model, params);
//   steermoe_recorder_bind(rec, ctx);
//   for each batch { steermoe_recorder_set_mask(rec, bins, n_tokens); llama_decode(ctx, batch); }
//   steermoe_recorder_counts(rec, counts, tokens);
//   llama_free(ctx); steermoe_recorder_free(rec); // in this order
//

// n_bins >= 1 kinds of tokens are counted apart, for example 0: shows the behaviour, 1: its opposite.
STEERMOE_API steermoe_status steermoe_recorder_init(const struct llama_model * model, int32_t n_bins,
                                                    struct steermoe_recorder ** recorder);

// Tell which context calls the recorder. Nothing is counted before, so a warm-up run never is.
STEERMOE_API steermoe_status steermoe_recorder_bind(struct steermoe_recorder * recorder, struct llama_context * ctx);

// Which tokens of the next llama_decode count: bins[i] is the bin of token i of the batch, or -1 for "not counted".
// However llama.cpp splits or reorders the batch, tokens are found by their place in it.
// The last layer routes only tokens whose batch.logits[i] is set: set it for every counted token.
// A mask serves one llama_decode. Until the next mask nothing more is counted; n_tokens = 0 switches counting off.
STEERMOE_API steermoe_status steermoe_recorder_set_mask(struct steermoe_recorder * recorder, const int32_t * bins,
                                                        int32_t n_tokens);

// With stop = true the rest of a graph behind the last router (last experts, output head) is not computed, and no
// buffer for logits is kept: llama_get_logits gives NULL, embeddings are garbage, and layers behind the last router do
// not write their memory (KV cache). Routing is right all the same. Clear the memory when you switch it off.
// Default: false.
STEERMOE_API void steermoe_recorder_set_stop(struct steermoe_recorder * recorder, bool stop);

// Set all counts to zero and forget the mask and any failure.
STEERMOE_API void steermoe_recorder_reset(struct steermoe_recorder * recorder);

// counts: [n_bins][n_layer][n_expert], how many counted tokens selected the expert.
// tokens: [n_bins][n_layer], how many tokens of the bin were seen in the layer (0 in layers without a router, and in
// layers whose experts are not chosen by their router).
// Either may be NULL. Fails with STEERMOE_ERR_STATE and the reason if something went wrong while counting.
STEERMOE_API steermoe_status steermoe_recorder_counts(const struct steermoe_recorder * recorder, int64_t * counts,
                                                      int64_t * tokens);

STEERMOE_API void steermoe_recorder_free(struct steermoe_recorder * recorder);

// The eval callback itself: goes to llama_context_params.cb_eval, with the recorder as user data. Do not call it.
STEERMOE_API bool steermoe_recorder_eval(struct ggml_tensor * t, bool ask, void * user_data);

//
// log
//

// Take llama.cpp's log (llama_log_set): all of it goes to stderr if verbose, else only what is said of failures is kept.
// For programs in languages whose callbacks should not run in the middle of a decode.
STEERMOE_API void steermoe_log_install(bool verbose);

// Copy the first line of failure since the last call into a buffer of `size` bytes, and forget it. Returns its length, 0
// if there was none. With buffer NULL nothing is forgotten.
STEERMOE_API size_t steermoe_log_take_error(char * buffer, size_t size);

#ifdef __cplusplus
}
#endif

#endif // STEERMOE_H
