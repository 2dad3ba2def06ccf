// steermoe.h - steering and recording of Mixture-of-Experts routing in llama.cpp
//
// This header documents the C interface that the patched libllama exports in addition to llama.h.
//
// What it does
//   Steering  In the steered layers, the router logits z of every token are edited before anything else uses them, so
//             both the selection of experts and their mixing weights are computed from the edited logits
//             (arXiv 2509.09660, section 3.2; llama.cpp: build_moe_ffn):
//               hard rule   z'_e = max(z) + epsilon  where the sign of expert e is +1
//                           z'_e = min(z) - epsilon  where it is -1,  z'_e = z_e otherwise
//               soft rule   z'_e = z_e + b_e
//               capped rule z'_e = min(max(z) + epsilon, z_e + cap)   where the sign of expert e is +1
//                           z'_e = max(min(z) - epsilon, z_e - cap)   where it is -1,  z'_e = z_e otherwise
//             Each sequence of a context can have its own steering, and so can each token: one batch can contain all
//             of them.
//   Recording For the tokens of a mask, the selected experts are counted per layer, and what their routers computed is
//             summed. For the tokens of a trace, the experts, and what the routers computed, are kept token by token.
//
// Rules of the interface
//   - Every function that can fail returns a steermoe_status. After a failure, steermoe_last_error() returns one line
//     that says what is wrong and how to fix it. Bad files and wrong models are failures, never aborts.
//   - A failure changes nothing: output pointers are set to NULL or stay as they are, a context keeps its steering.
//   - *_init and *_load create objects, *_free destroys them and accepts NULL. Getters on a valid object cannot fail.
//   - Threads: a context, what is attached to it and the recorder bound to it may be used by one thread at a time;
//     different contexts, also of one model, are independent. Several threads may read one bias at once (get_info,
//     layer, check, attach), but not while steermoe_bias_set_layer or steermoe_bias_free runs on it. Functions that
//     take only a model may be called from any thread while the model exists. The message of a failure is kept per
//     thread.
//   - NULL in place of an object is a STEERMOE_ERR_ARGUMENT.
//
// Environment variables
//   llama_init_from_model attaches the bias file STEERMOE_BIAS=FILE to every new context, so that each program built
//   from this tree (llama-server, llama-cli, llama-bench, llama-perplexity, ...) runs steered without changes. If the
//   file cannot be used, no context is created. STEERMOE_FORCE=1 has the effect of STEERMOE_FORCE_ROUTER below. Do not
//   change the environment while another thread creates a context.

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

// Incremented whenever a signature, a struct or the meaning of a value below changes.
#define STEERMOE_ABI_VERSION 4

// Newest version of the bias file format (`expertbias.version`) that is read. Files of the hard and soft rules have
// version 1, those of the capped rule version 2.
#define STEERMOE_BIAS_VERSION 2

// Maximum size of a bias file, in bytes.
#define STEERMOE_BIAS_MAX_BYTES (256u * 1024u * 1024u)

// Number of rows that tokens of a context can be steered by, see steermoe_row_attach.
#define STEERMOE_MAX_ROWS 1024

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
    STEERMOE_ERR_ARGUMENT    = 5, // an invalid argument
    STEERMOE_ERR_STATE       = 6, // called in the wrong state, for example counts after a failed recording
    STEERMOE_ERR_INTERNAL    = 7, // out of memory, device failure
} steermoe_status;

typedef enum steermoe_mode {
    STEERMOE_MODE_HARD   = 0,
    STEERMOE_MODE_SOFT   = 1,
    STEERMOE_MODE_CAPPED = 2,
} steermoe_mode;

typedef enum steermoe_gating {
    STEERMOE_GATING_NONE           = 0, // the layer has no router
    STEERMOE_GATING_SOFTMAX        = 1, // softmax over all experts, then top-k
    STEERMOE_GATING_SIGMOID        = 2,
    STEERMOE_GATING_SOFTMAX_WEIGHT = 3, // top-k of the logits, then softmax over the selected
    STEERMOE_GATING_SQRT_SOFTPLUS  = 4,
} steermoe_gating;

// Flags for steermoe_bias_check, steermoe_attach, steermoe_attach_seq and steermoe_row_attach.
enum {
    // Accept another router hash if architecture, layers, experts and top-k match (files of unusual converters).
    STEERMOE_FORCE_ROUTER = 1,
};

// Flags for steermoe_recorder_set_trace: what is kept of a token beside its experts.
enum {
    STEERMOE_TRACE_WEIGHTS = 1,
    STEERMOE_TRACE_LOGITS  = 2,
};

//
// library
//

// STEERMOE_ABI_VERSION of the library; compare it with that of the header that you compiled with.
STEERMOE_API int32_t steermoe_abi_version(void);

// Message of the last failure in this thread, "" if there was none. Valid until the next call from this thread.
STEERMOE_API const char * steermoe_last_error(void);

//
// bias: the values that steer a model
//

struct steermoe_bias_info {
    const char * architecture;  // general.architecture of the model, e.g. "olmoe"
    const char * router_sha256; // 64 lower-case hex digits, see steermoe_model_router_sha256
    int32_t      mode;          // steermoe_mode
    float        epsilon;       // distance to the extreme logit under the hard and capped rules, > 0; logits
    float        cap;           // how far the capped rule moves an expert at most, >= 0 or infinite; logits. 0 changes
                                // nothing, infinity is the hard rule, bit for bit. Other rules: ignored by init, else 0
    int32_t      n_layer;       // layers of the model
    int32_t      n_expert;      // experts per layer
    int32_t      n_expert_used; // top-k
    int32_t      n_steered;     // layers that it changes: with a value that is not zero, cap not 0 (init: ignored)
    int64_t      n_active;      // values > 0 in all layers (init: ignored)
    int64_t      n_inactive;    // values < 0 in all layers (init: ignored)
};

// Read and validate a bias file (GGUF, architecture "expertbias"; docs/formats.md).
STEERMOE_API steermoe_status steermoe_bias_load(const char * path, struct steermoe_bias ** bias);

// The same from memory. `name` appears in messages.
STEERMOE_API steermoe_status steermoe_bias_load_buffer(const void * data, size_t size, const char * name,
                                                       struct steermoe_bias ** bias);

// Create a bias without a file: no layer is steered until steermoe_bias_set_layer is called. Strings are copied.
STEERMOE_API steermoe_status steermoe_bias_init(const struct steermoe_bias_info * info, struct steermoe_bias ** bias);

// Set the values of layer il: [n_expert] signs -1, 0, +1 (hard, capped) or finite logits (soft).
// Of signs at most n_expert_used may be +1, and at least n_expert_used must not be -1.
STEERMOE_API steermoe_status steermoe_bias_set_layer(struct steermoe_bias * bias, int32_t il, const float * values,
                                                     int32_t n_expert);

STEERMOE_API void steermoe_bias_get_info(const struct steermoe_bias * bias, struct steermoe_bias_info * info);

// Values of layer il, [n_expert]; NULL if the layer has none.
STEERMOE_API const float * steermoe_bias_layer(const struct steermoe_bias * bias, int32_t il);

STEERMOE_API void steermoe_bias_free(struct steermoe_bias * bias);

//
// model
//

// SHA-256 over all blk.*.ffn_gate_inp.weight tensors as little-endian F32, in layer order, as 64 hex digits plus NUL.
// It is the same for all quantizations of a model. The first call reads the routers from their device and hashes them,
// which takes milliseconds (4 bytes per router weight); the model keeps the result. steermoe_attach needs it, too: call
// this function when the model is loaded if the first attach must be fast.
STEERMOE_API steermoe_status steermoe_model_router_sha256(const struct llama_model * model, char sha256[65]);

// Was the bias made for the model? STEERMOE_OK or STEERMOE_ERR_MISMATCH.
STEERMOE_API steermoe_status steermoe_bias_check(const struct steermoe_bias * bias, const struct llama_model * model,
                                                 int32_t flags);

//
// steering of a context
//
//   A sequence has the steering that steermoe_attach_seq attached to it, else that of its context (steermoe_attach),
//   else none. llama_decode steers each token by the sequence that it has in the batch. Steering is not part of the
//   memory (KV cache): a sequence keeps it when its cells are removed (llama_memory_seq_rm), and llama_memory_seq_cp
//   does not copy it.
//
//   Tokens can have steering of their own, regardless of their sequences: biases are attached to numbered rows of the
//   context (steermoe_row_attach), and steermoe_set_token_rows says which row steers which token of the next
//   llama_decode. So one prompt can be steered in one part and not in another, without a decode for each part:
//     steermoe_row_attach(ctx, 0, faithful, 0);
//     steermoe_row_attach(ctx, 1, formal, 0);
//     steermoe_set_token_rows(ctx, (int32_t[]) { -1, -1, 0, 0, 1 }, 5);
//     llama_decode(ctx, batch_of_5_tokens);
//
//   WARNING: the memory (KV cache) contains keys and values computed under the old steering. Clear it
//   (llama_memory_clear), or remove the sequence (llama_memory_seq_rm), before you continue under another steering, or
//   keep only tokens that were computed under the steering that you want for them. A token that belongs to several
//   sequences is computed once, so all of them must have the same steering, unless rows are given; else llama_decode
//   returns -1, steermoe_last_error() names the token, and nothing has changed.
//

// Steer the sequences of ctx that have no steering of their own, from the next decode on; replaces what was attached to
// the context before. The bias is copied and may be freed. With a bias without values they run unsteered.
STEERMOE_API steermoe_status steermoe_attach(struct llama_context * ctx, const struct steermoe_bias * bias,
                                             int32_t flags);

// Stop steering ctx, all its sequences and all its rows; forgets the rows of the next batch. The graph then has the same
// nodes as that of an unpatched library.
STEERMOE_API steermoe_status steermoe_detach(struct llama_context * ctx);

// Steer sequence seq_id, regardless of the steering of the context; replaces what was attached to the sequence before.
// bias NULL, or a bias without values: the sequence runs unsteered. The bias is copied.
// seq_id is any sequence that llama_decode accepts in this context: 0 to n_seq_max - 1, with kv_unified 0 to 255.
// Anything else is a STEERMOE_ERR_ARGUMENT.
//
// The sequences of one batch may have different rules, epsilons, caps and layers, or no steering. The edited
// router logits of a token do not depend on the steering of other sequences, bit for bit, and the logits of unsteered
// tokens keep their bits. A ubatch in which all tokens have equal steering is computed by the same graph as if that
// steering were the context's.
//
// A change takes microseconds to milliseconds: a few values are written per layer. The context reserves its graphs
// again only at the first change from unsteered to steered, at the first capped rule, and at the next one of each after
// steermoe_detach.
STEERMOE_API steermoe_status steermoe_attach_seq(struct llama_context * ctx, int32_t seq_id,
                                                 const struct steermoe_bias * bias, int32_t flags);

// Let sequence seq_id have the steering of the context again.
STEERMOE_API steermoe_status steermoe_detach_seq(struct llama_context * ctx, int32_t seq_id);

// Attach a bias to row `row` of ctx, 0 to STEERMOE_MAX_ROWS - 1 (else a STEERMOE_ERR_ARGUMENT); replaces what was attached
// to the row before. Tokens of a row whose bias has no values are unsteered. The bias is copied.
//
// A change costs as much as one of a sequence's steering. Rows and sequences of equal steering share its values in
// memory, so a row whose bias is attached elsewhere costs nothing.
STEERMOE_API steermoe_status steermoe_row_attach(struct llama_context * ctx, int32_t row,
                                                 const struct steermoe_bias * bias, int32_t flags);

// Take the bias off a row, if it has one. A token of the next batch that steermoe_set_token_rows gave this row makes
// llama_decode fail, unless a bias is attached to the row before.
STEERMOE_API steermoe_status steermoe_row_detach(struct llama_context * ctx, int32_t row);

// The row that steers each token of the next llama_decode or llama_encode: rows[i] is that of token i of the batch, -1: the
// token is unsteered. Replaces what was set for it before; n_tokens = 0: tokens have the steering of their sequences, as
// without this call. A row that does not exist or has no bias is a STEERMOE_ERR_ARGUMENT.
//
// Tokens are identified by their index in the batch, so llama.cpp may split and reorder the batch. Rows are valid for one
// llama_decode, also if it fails; what follows it is under the steering of the sequences until the next call. If n_tokens
// is not the number of tokens in the batch, or a bias was taken off a row in the meantime, llama_decode returns -1,
// steermoe_last_error() says why, and nothing has changed. (A batch without tokens, or one of embeddings of another
// model's size, llama.cpp refuses before it looks at it: the rows then wait for the next.)
//
// What steermoe_attach_seq promises of the sequences of a batch holds for its tokens: any rules, epsilons, caps and layers
// beside each other; edited logits that do not depend on the rows of other tokens, bit for bit; unsteered tokens that
// keep the bits of their logits; and the graph of a steered context where one steering serves a whole ubatch. (A ubatch of
// at most 32 tokens also has the nodes that one of the last 16 of its size needed. They change no bit, and rows that steer
// the tokens of an answer in turns need no new graph for each.)
STEERMOE_API steermoe_status steermoe_set_token_rows(struct llama_context * ctx, const int32_t * rows,
                                                     int32_t n_tokens);

struct steermoe_layer_info {
    int32_t      gating; // steermoe_gating; STEERMOE_GATING_NONE: no router, the other fields are 0
    int32_t      n_expert;
    int32_t      n_expert_used;
    bool         selection_bias; // a bias is added to the probabilities for the selection (DeepSeek-V3 and others)
    bool         expert_groups;  // groups of experts are selected first
    bool         steerable;
    bool         steered; // by the bias of the context, of any sequence or of any row
    const char * reason;  // why it is not steerable, "" if it is; static text
};

// How layer il of this context routes, noted when its graph was built.
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

// Tokens are counted in n_bins >= 1 bins, for example 0: tokens that show the behaviour, 1: tokens of its opposite.
STEERMOE_API steermoe_status steermoe_recorder_init(const struct llama_model * model, int32_t n_bins,
                                                    struct steermoe_recorder ** recorder);

// Bind the recorder to the context that calls it. Nothing is counted before, so a warm-up run is not counted.
STEERMOE_API steermoe_status steermoe_recorder_bind(struct steermoe_recorder * recorder, struct llama_context * ctx);

// The tokens of the next llama_decode to count: bins[i] is the bin of token i of the batch, -1: not counted.
// Tokens are identified by their index in the batch, so llama.cpp may split and reorder the batch.
// The last layer routes only tokens whose batch.logits[i] is set: set it for every counted token.
// A mask is valid for one llama_decode, also if it fails. Nothing is counted after it until the next mask. n_tokens = 0:
// count nothing.
STEERMOE_API steermoe_status steermoe_recorder_set_mask(struct steermoe_recorder * recorder, const int32_t * bins,
                                                        int32_t n_tokens);

// With stop = true the part of a graph behind the last router (last experts, output head) is not computed, and no
// buffer for logits is allocated: llama_get_logits returns NULL, embeddings are undefined, and layers behind the last
// router do not write their memory (KV cache). Routing is not affected. Clear the memory when you set it to false
// again. Default: false.
STEERMOE_API void steermoe_recorder_set_stop(struct steermoe_recorder * recorder, bool stop);

// Set all counts to zero and clear the mask, the trace and any failure.
STEERMOE_API void steermoe_recorder_reset(struct steermoe_recorder * recorder);

// counts: [n_bins][n_layer][n_expert], number of counted tokens for which the expert was selected.
// tokens: [n_bins][n_layer], number of counted tokens that the layer routed (0 in layers without a router, and in
// layers whose experts are not selected by their router). Either may be NULL. Returns STEERMOE_ERR_STATE with the
// reason if counting failed.
STEERMOE_API steermoe_status steermoe_recorder_counts(const struct steermoe_recorder * recorder, int64_t * counts,
                                                      int64_t * tokens);

// With sums = true, what the routers compute for the counted tokens is summed beside the counts. Two more tensors of each
// layer are then read. Sets all counts and sums to zero. Default: false.
STEERMOE_API steermoe_status steermoe_recorder_set_sums(struct steermoe_recorder * recorder, bool sums);

// Sums over the counted tokens (see tokens above), in float64, in the order of the batch:
// logits:  [n_bins][n_layer][n_expert], the router's logits, before they are steered.
// spread:  [n_bins][n_layer], over the experts, too: the squared deviation of each logit from the mean of its token.
// weights: [n_bins][n_layer][n_expert], the weight with which a selected expert's output is mixed, after the model's own
//          normalisation and scaling; experts that are not selected add 0.
// Only those of the first n_bins bins (at most the recorder's) are copied. Each may be NULL. Returns STEERMOE_ERR_STATE
// with the reason if no sums are kept, or summing failed.
STEERMOE_API steermoe_status steermoe_recorder_sums(const struct steermoe_recorder * recorder, int32_t n_bins,
                                                    double * logits, double * spread, double * weights);

// The tokens of the next llama_decode to trace: wanted[i] says whether token i of the batch is one. Valid for one
// llama_decode as a mask is, and independent of it: tokens can be traced and not counted, counted and not traced, or
// both. Forgets the last trace. flags: STEERMOE_TRACE_WEIGHTS and STEERMOE_TRACE_LOGITS, each of which reads one more tensor
// of each layer. n_tokens = 0: trace nothing.
STEERMOE_API steermoe_status steermoe_recorder_set_trace(struct steermoe_recorder * recorder, const bool * wanted,
                                                         int32_t n_tokens, int32_t flags);

// The most experts that a layer of the model selects for a token: n_used below.
STEERMOE_API int32_t steermoe_recorder_top_k(const struct steermoe_recorder * recorder);

// The trace of the tokens wanted in the last steermoe_recorder_set_trace, in the order of the batch, after llama_decode:
// experts: [n_wanted][n_layer][n_used], the selected experts in the order of the model's selection, best first, -1: no
//          (further) expert. -1 alone in layers without a router, in layers whose experts are not selected by their
//          router, in the last layer for tokens whose batch.logits[i] is not set, which it does not route, and in a
//          warm-up run (llama_set_warmup).
// weights: the same shape, the weights of these experts (see steermoe_recorder_sums), 0 where there is none.
// logits:  [n_wanted][n_layer][n_expert], the router's logits, before they are steered, NaN where there is no expert.
// Each may be NULL. It is kept, for one decode at a time, until the next steermoe_recorder_set_trace or
// steermoe_recorder_reset. Returns STEERMOE_ERR_STATE with the reason if no trace was asked for, or not of these values, if
// the decode did not compute all wanted tokens, or recording failed.
STEERMOE_API steermoe_status steermoe_recorder_trace(const struct steermoe_recorder * recorder, int32_t * experts,
                                                     float * weights, float * logits);

STEERMOE_API void steermoe_recorder_free(struct steermoe_recorder * recorder);

// The eval callback, for llama_context_params.cb_eval with the recorder as user data. Do not call it yourself.
STEERMOE_API bool steermoe_recorder_eval(struct ggml_tensor * t, bool ask, void * user_data);

//
// log
//

// Receive llama.cpp's log (llama_log_set). verbose: print all of it to stderr; else keep only the first error message.
// For programs in languages whose callbacks should not run during a decode.
STEERMOE_API void steermoe_log_install(bool verbose);

// Copy the first error message since the last call into a buffer of `size` bytes, and clear it. Returns its length, 0
// if there was none. With buffer NULL it is not cleared.
STEERMOE_API size_t steermoe_log_take_error(char * buffer, size_t size);

//
// crash
//

// From now on, when native code ends the process (a failed assertion of ggml, an exception in C++ that nobody caught,
// SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT), write one line in ASCII to what is stderr now: "error:", what happened,
// the last errors of llama.cpp's log since steermoe_log_take_error, and `what_to_do`. The process then ends as without
// this, by the signal; whoever handled the signal before handles it after. For programs, not for libraries: it takes
// the process's handlers. Further calls only change `what_to_do`, which is copied. Needs steermoe_log_install.
STEERMOE_API void steermoe_crash_install(const char * what_to_do);

#ifdef __cplusplus
}
#endif

#endif // STEERMOE_H
