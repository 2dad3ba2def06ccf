// Fuzz target: a bias file through the C interface, from the reader to a context that decodes. STEERMOE_FUZZ_MODEL
// names the model. What is done with an input depends on its bytes alone, and a context is left unsteered, so that a
// fault can be had again from its input.
#include "fuzz.h"

#include "ggml.h"
#include "llama.h"
#include "steermoe.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

namespace {

constexpr const char * NAME     = "fuzz.gguf";
constexpr int32_t      N_TOKENS = 2;
constexpr int32_t      N_SEQ    = 3; // the context's steering; that of the input; unsteered

fuzz_outcomes outcomes({ { "attached" }, { "decoded" }, { "unsupported" }, { "mismatch" }, { "refused" } });

enum { ATTACHED, DECODED, UNSUPPORTED, MISMATCH, REFUSED };

struct bias_deleter {
    void operator()(steermoe_bias * bias) const { steermoe_bias_free(bias); }
};

using bias_ptr = std::unique_ptr<steermoe_bias, bias_deleter>;

llama_model *      model = nullptr;
llama_context *    ctx   = nullptr;
int32_t            n_layer;
int32_t            n_expert;
bias_ptr           fixed;        // a valid bias of our own to swap with
std::vector<float> fixed_logits; // what the model says under it
std::vector<float> unsteered;    // and without any

using sequences_t = std::vector<std::vector<float>>;

sequences_t fixed_sequences; // the same of a batch of sequences
sequences_t unsteered_sequences;

[[noreturn]] void stop(const std::string & what) {
    fprintf(stderr, "error: %s\n", what.c_str());
    exit(2);
}

std::vector<float> decode() {
    llama_memory_clear(llama_get_memory(ctx), true);
    llama_token tokens[N_TOKENS] = { 3, 5 };
    fuzz_require(llama_decode(ctx, llama_batch_get_one(tokens, N_TOKENS)) == 0, "the model decodes");
    const float * logits = llama_get_logits_ith(ctx, -1);
    return { logits, logits + llama_vocab_n_tokens(llama_model_get_vocab(model)) };
}

// One batch of all sequences: the logits of the last token of each. rows: those of all tokens, if they are given.
sequences_t decode_sequences(const std::vector<int32_t> & rows = {}) {
    llama_memory_clear(llama_get_memory(ctx), true);
    llama_batch batch = llama_batch_init(N_SEQ * N_TOKENS, 0, 1);
    for (int32_t i = 0; i < N_SEQ * N_TOKENS; i++) {
        batch.token[i]     = 3 + 2 * (i % N_TOKENS);
        batch.pos[i]       = i % N_TOKENS;
        batch.n_seq_id[i]  = 1;
        batch.seq_id[i][0] = i / N_TOKENS;
        batch.logits[i]    = i % N_TOKENS == N_TOKENS - 1;
    }
    batch.n_tokens = N_SEQ * N_TOKENS;
    fuzz_require(steermoe_set_token_rows(ctx, rows.data(), (int32_t) rows.size()) == STEERMOE_OK, "rows are taken");
    fuzz_require(llama_decode(ctx, batch) == 0, "sequences are decoded in one batch");
    sequences_t all;
    for (int32_t s = 0; s < N_SEQ; s++) {
        const float * logits = llama_get_logits_ith(ctx, s * N_TOKENS + N_TOKENS - 1);
        all.emplace_back(logits, logits + llama_vocab_n_tokens(llama_model_get_vocab(model)));
    }
    llama_batch_free(batch);
    return all;
}

bool same_bits(const std::vector<float> & a, const std::vector<float> & b) {
    return a.size() == b.size() && memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

bool steers(const steermoe_bias * bias, int32_t il) {
    const float *      row = bias ? steermoe_bias_layer(bias, il) : nullptr;
    steermoe_bias_info info{};
    if (row != nullptr) {
        steermoe_bias_get_info(bias, &info);
    }
    if (info.mode == STEERMOE_MODE_CAPPED && info.cap == 0.0f) {
        return false;
    }
    for (int32_t e = 0; row != nullptr && e < n_expert; e++) {
        if (row[e] != 0.0f) {
            return true;
        }
    }
    return false;
}

void require_steered_by(const steermoe_bias * bias, const steermoe_bias * other = nullptr) {
    for (int32_t il = 0; il < n_layer; il++) {
        steermoe_layer_info info;
        fuzz_require(steermoe_get_layer_info(ctx, il, &info) == STEERMOE_OK, "every layer has an info");
        fuzz_require(info.steered == (steers(bias, il) || steers(other, il)), "the layers with values are steered");
        fuzz_require(!info.steered || info.steerable, "what is steered is steerable");
    }
}

// Every getter, every value.
void read_all(const steermoe_bias * bias) {
    steermoe_bias_info info;
    steermoe_bias_get_info(bias, &info);
    int64_t n_active   = 0;
    int64_t n_inactive = 0;
    for (int32_t il = -1; il <= info.n_layer; il++) {
        const float * row = steermoe_bias_layer(bias, il);
        for (int32_t e = 0; row != nullptr && e < info.n_expert; e++) {
            n_active += row[e] > 0.0f;
            n_inactive += row[e] < 0.0f;
        }
    }
    fuzz_require(n_active == info.n_active && n_inactive == info.n_inactive, "the info counts the values");
    fuzz_require(strlen(info.router_sha256) == 64 && *info.architecture != '\0', "the info names the model");
}

// The accepted bias, which steers the context, beside others. The context is left as it was.
void as_sequence(const steermoe_bias * bias, int32_t flags, bool decodes) {
    const sequences_t alike = decodes ? decode_sequences() : sequences_t();
    fuzz_require(steermoe_attach(ctx, fixed.get(), 0) == STEERMOE_OK, "another bias can be attached");
    fuzz_require(steermoe_attach_seq(ctx, 1, bias, flags) == STEERMOE_OK, "what steers a context steers a sequence");
    fuzz_require(steermoe_attach_seq(ctx, 2, nullptr, 0) == STEERMOE_OK, "a sequence can be left unsteered");
    require_steered_by(fixed.get(), bias);
    if (decodes) {
        // batches of one shape differ by their steering alone
        const sequences_t logits = decode_sequences();
        fuzz_require(same_bits(logits[0], fixed_sequences[0]), "a sequence without steering is under the context's");
        fuzz_require(same_bits(logits[1], alike[1]), "a sequence is under its own steering");
        fuzz_require(same_bits(logits[2], unsteered_sequences[2]), "an unsteered sequence is unsteered");
        fuzz_require(same_bits(decode(), fixed_logits), "one steering alone takes its own graph");
    }
    fuzz_require(steermoe_detach_seq(ctx, 1) == STEERMOE_OK, "the steering of a sequence can be ended");
    require_steered_by(fixed.get());
    fuzz_require(steermoe_detach(ctx) == STEERMOE_OK, "steering can be ended");
    require_steered_by(nullptr);
    fuzz_require(steermoe_attach(ctx, bias, flags) == STEERMOE_OK, "and begun again");
}

// The accepted bias, which steers the context, as a row of tokens beside others. The context is left as it was.
void as_row(const steermoe_bias * bias, int32_t flags, uint64_t hash, bool decodes) {
    const int32_t     last  = STEERMOE_MAX_ROWS - 1;
    const sequences_t alike = decodes ? decode_sequences() : sequences_t();
    fuzz_require(steermoe_row_attach(ctx, last, bias, flags) == STEERMOE_OK, "what steers a context steers a row");
    fuzz_require(steermoe_row_attach(ctx, 0, fixed.get(), 0) == STEERMOE_OK, "another bias can be attached");
    require_steered_by(bias, fixed.get());
    if (decodes) {
        const sequences_t logits = decode_sequences({ 0, 0, last, last, -1, -1 });
        fuzz_require(same_bits(logits[0], fixed_sequences[0]), "tokens are under the row that they have");
        fuzz_require(same_bits(logits[1], alike[1]), "whatever the rows of others");
        fuzz_require(same_bits(logits[2], unsteered_sequences[2]), "unsteered tokens are unsteered");

        std::vector<int32_t> rows;
        for (int32_t i = 0; i < N_SEQ * N_TOKENS; i++) {
            const int32_t all[] = { -1, 0, last };
            rows.push_back(all[(hash >> (8 + 2 * i)) % 3]);
        }
        const sequences_t mixed = decode_sequences(rows);
        for (int32_t s = 0; s < N_SEQ; s++) {
            std::vector<int32_t> others(rows.size(), 0);
            std::copy_n(rows.begin() + s * N_TOKENS, N_TOKENS, others.begin() + s * N_TOKENS);
            fuzz_require(same_bits(decode_sequences(others)[s], mixed[s]), "a sequence has its own rows alone");
        }
        fuzz_require(same_bits(decode_sequences()[1], alike[1]), "rows are of one decode");
    }
    fuzz_require(steermoe_row_detach(ctx, 0) == STEERMOE_OK, "a row can be given up");
    const int32_t unknown[] = { last, 0 };
    fuzz_require(steermoe_set_token_rows(ctx, unknown, 2) == STEERMOE_ERR_ARGUMENT, "a row without a bias is refused");
    fuzz_require(steermoe_set_token_rows(ctx, unknown, 1) == STEERMOE_OK, "one with a bias is not");
    llama_token tokens[N_TOKENS] = { 3, 5 };
    fuzz_require(llama_decode(ctx, llama_batch_get_one(tokens, N_TOKENS)) == -1,
                 "one row is not enough for two tokens");
    fuzz_require(steermoe_row_detach(ctx, last) == STEERMOE_OK, "all rows can be given up");
    require_steered_by(bias);
}

std::string meta(const char * key) {
    char text[256];
    if (llama_model_meta_val_str(model, key, text, sizeof(text)) < 0) {
        stop(std::string("the model has no ") + key);
    }
    return text;
}

} // namespace

extern "C" int LLVMFuzzerInitialize(int *, char ***) {
    const char * path = getenv("STEERMOE_FUZZ_MODEL");
    if (path == nullptr) {
        stop("STEERMOE_FUZZ_MODEL must name a model");
    }
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    ggml_backend_load_all();
    llama_model_params model_params = llama_model_default_params();
    model_params.n_gpu_layers       = 0;
    model                           = llama_model_load_from_file(path, model_params);
    llama_context_params params     = llama_context_default_params();
    params.n_ctx                    = 32;
    params.n_seq_max                = N_SEQ;
    params.kv_unified               = true;
    params.n_batch = params.n_ubatch = 8;
    params.n_threads = params.n_threads_batch = 1;
    ctx                                       = model ? llama_init_from_model(model, params) : nullptr;
    if (ctx == nullptr) {
        stop(std::string(path) + ": no context on this model");
    }

    const std::string  arch = meta("general.architecture");
    char               sha256[65];
    steermoe_bias_info info{};
    n_layer = llama_model_n_layer(model);
    if (steermoe_model_router_sha256(model, sha256) != STEERMOE_OK) {
        stop(steermoe_last_error());
    }
    info.architecture  = arch.c_str();
    info.router_sha256 = sha256;
    info.mode          = STEERMOE_MODE_HARD;
    info.epsilon       = 0.01f;
    info.n_layer       = n_layer;
    info.n_expert = n_expert = std::stoi(meta((arch + ".expert_count").c_str()));
    info.n_expert_used       = std::stoi(meta((arch + ".expert_used_count").c_str()));

    std::vector<float> signs((size_t) n_expert);
    signs[1]             = 1.0f;
    signs[0]             = -1.0f;
    steermoe_bias * made = nullptr;
    unsteered            = decode();
    unsteered_sequences  = decode_sequences();
    if (steermoe_bias_init(&info, &made) != STEERMOE_OK ||
        steermoe_bias_set_layer(made, n_layer - 1, signs.data(), n_expert) != STEERMOE_OK ||
        steermoe_attach(ctx, made, 0) != STEERMOE_OK) {
        stop(steermoe_last_error());
    }
    fixed.reset(made);
    fixed_logits    = decode();
    fixed_sequences = decode_sequences();
    steermoe_detach(ctx);
    if (same_bits(fixed_logits, unsteered)) {
        stop("steering does nothing on this model");
    }
    atexit([] {
        fixed.reset();
        llama_free(ctx);
        llama_model_free(model);
    });
    return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    const uint64_t  hash    = fuzz_hash(data, size);
    const int32_t   flags   = hash & 1 ? STEERMOE_FORCE_ROUTER : 0;
    const bool      decodes = hash % 31 == 0;
    static uint8_t  nothing;
    steermoe_bias * loaded = fixed.get(); // anything but NULL
    const auto      status = steermoe_bias_load_buffer(size ? data : &nothing, size, NAME, &loaded);
    if (status != STEERMOE_OK) {
        outcomes.list[REFUSED].n++;
        fuzz_require(status == STEERMOE_ERR_FORMAT, "a bad file is STEERMOE_ERR_FORMAT");
        fuzz_require(loaded == nullptr, "no bias after a failure");
        fuzz_require_message(steermoe_last_error(), NAME);
        return 0;
    }
    bias_ptr bias(loaded);
    read_all(bias.get());

    const bool held = hash & 2; // something is attached already
    if (held) {
        fuzz_require(steermoe_attach(ctx, fixed.get(), 0) == STEERMOE_OK, "a valid bias can be attached");
    }
    const auto check    = steermoe_bias_check(bias.get(), model, flags);
    const auto attached = steermoe_attach(ctx, bias.get(), flags);
    if (attached != STEERMOE_OK) {
        outcomes.list[attached == STEERMOE_ERR_MISMATCH ? MISMATCH : UNSUPPORTED].n++;
        if (attached == STEERMOE_ERR_UNSUPPORTED) {
            fuzz_keep(data, size);
        }
        fuzz_require_message(steermoe_last_error(), NAME);
        fuzz_require(attached == STEERMOE_ERR_MISMATCH || attached == STEERMOE_ERR_UNSUPPORTED, "why it is refused");
        fuzz_require((check == STEERMOE_ERR_MISMATCH) == (attached == STEERMOE_ERR_MISMATCH), "the check says so too");
        require_steered_by(held ? fixed.get() : nullptr);
        if (held && decodes) {
            fuzz_require(same_bits(decode(), fixed_logits), "after a refusal the old steering stays");
        }
    } else {
        outcomes.list[ATTACHED].n++;
        fuzz_keep(data, size);
        fuzz_require(check == STEERMOE_OK, "what can be attached passes the check");
        require_steered_by(bias.get());
        if (hash & 4) { // swapped to and fro before anything is decoded
            fuzz_require(steermoe_attach(ctx, fixed.get(), 0) == STEERMOE_OK, "another bias can be attached");
            require_steered_by(fixed.get());
            fuzz_require(steermoe_attach(ctx, bias.get(), flags) == STEERMOE_OK, "and the first again");
        }
        if (hash & 16) {
            as_sequence(bias.get(), flags, decodes);
        }
        if (hash & 32) {
            as_row(bias.get(), flags, hash, decodes);
        }
        bias.reset(); // the context has a copy
        if (decodes) {
            outcomes.list[DECODED].n++;
            for (const float v : decode()) {
                fuzz_require(std::isfinite(v), "steered logits are finite");
            }
            if (hash & 8) {
                fuzz_require(steermoe_attach(ctx, fixed.get(), 0) == STEERMOE_OK, "another bias can be attached");
                fuzz_require(same_bits(decode(), fixed_logits), "the next bias steers as if it were the first");
            }
        }
    }
    fuzz_require(steermoe_detach(ctx) == STEERMOE_OK, "steering can be ended");
    require_steered_by(nullptr);
    if (decodes) {
        fuzz_require(same_bits(decode(), unsteered), "without steering the logits are the model's own");
    }
    return 0;
}
