// Several contexts of one model in several threads, each of which loads, attaches, swaps and detaches biases, decodes,
// records, and makes and frees contexts. Every result is compared bit for bit with the one of a single thread, so that
// threads that disturb each other are noticed without ThreadSanitizer as well; under it, every race is.
//   stress_threads MODEL [-rounds=N] [-threads=N] [-decode_threads=N]
// The model needs steerable layers and no vocabulary.
#include "ggml-backend.h"
#include "llama.h"
#include "steermoe.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr int32_t N_BATCH = 8;
constexpr int32_t N_BINS  = 2;

// Bias 0, 1, 2: signs in the last layer, other signs in the same tensors, signs in all layers; 3: soft.
constexpr int N_KINDS = 4;

[[noreturn]] void fail(const std::string & what) {
    fprintf(stderr, "error: %s\n", what.c_str());
    fflush(stderr);
    _Exit(1); // other threads are still running
}

void require(bool holds, const char * what) {
    if (!holds) {
        fail(std::string(what) + " (last message of this thread: " + steermoe_last_error() + ")");
    }
}

void require_ok(steermoe_status status, const char * what) {
    require(status == STEERMOE_OK, what);
}

template <typename T, void (*F)(T *)> struct deleter {
    void operator()(T * p) const { F(p); }
};

using model_ptr    = std::unique_ptr<llama_model, deleter<llama_model, llama_model_free>>;
using context_ptr  = std::unique_ptr<llama_context, deleter<llama_context, llama_free>>;
using bias_ptr     = std::unique_ptr<steermoe_bias, deleter<steermoe_bias, steermoe_bias_free>>;
using recorder_ptr = std::unique_ptr<steermoe_recorder, deleter<steermoe_recorder, steermoe_recorder_free>>;

struct options {
    std::string model;
    std::string files; // folder of bias files, one for each kind of bias
    int         rounds         = 20;
    int         threads        = 4;
    int         decode_threads = 1;
};

struct shape {
    std::string architecture;
    std::string sha256;
    int32_t     n_layer;
    int32_t     n_expert;
    int32_t     n_used;
};

// Threads that wait here go on together, so that first calls meet.
class barrier {
  public:
    explicit barrier(int n) : n(n) {}

    void wait() {
        std::unique_lock<std::mutex> lock(mutex);
        const int                    round = rounds;
        if (++waiting == n) {
            waiting = 0;
            rounds++;
            all_here.notify_all();
        } else {
            all_here.wait(lock, [&] { return rounds != round; });
        }
    }

  private:
    std::mutex              mutex;
    std::condition_variable all_here;
    const int               n;
    int                     waiting = 0;
    int                     rounds  = 0;
};

model_ptr load_model(const options & opt) {
    llama_model_params params = llama_model_default_params();
    params.n_gpu_layers       = 0;
    model_ptr model(llama_model_load_from_file(opt.model.c_str(), params));
    require(model != nullptr, "the model loads");
    return model;
}

context_ptr make_context(llama_model * model, const options & opt, steermoe_recorder * recorder = nullptr) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx                = 64;
    params.n_seq_max            = N_KINDS + 1;
    params.kv_unified           = true;
    params.n_batch = params.n_ubatch = N_BATCH;
    params.n_threads = params.n_threads_batch = opt.decode_threads;
    params.flash_attn_type                    = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    if (recorder != nullptr) {
        params.cb_eval           = steermoe_recorder_eval;
        params.cb_eval_user_data = recorder;
    }
    context_ptr ctx(llama_init_from_model(model, params));
    require(ctx != nullptr, "a context can be made");
    return ctx;
}

// A prompt and two single tokens, from an empty memory: all logits of the last token of each.
std::vector<float> decode(llama_context * ctx) {
    llama_token tokens[] = { 1, 7, 3, 9, 5, 11, 2 };
    const int   n_vocab  = llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx)));

    std::vector<float> all;
    llama_memory_clear(llama_get_memory(ctx), true);
    const auto step = [&](llama_token * first, int32_t n) {
        require(llama_decode(ctx, llama_batch_get_one(first, n)) == 0, "the model decodes");
        const float * logits = llama_get_logits_ith(ctx, -1);
        all.insert(all.end(), logits, logits + n_vocab);
    };
    step(tokens, 5);
    step(tokens + 5, 1);
    step(tokens + 6, 1);
    return all;
}

// What the recorder counts in a batch whose tokens all are outputs, half of them in either bin.
std::vector<int64_t> record(llama_context * ctx, steermoe_recorder * recorder, const shape & s) {
    llama_batch          batch = llama_batch_init(N_BATCH, 0, 1);
    std::vector<int32_t> bins;
    for (int32_t i = 0; i < N_BATCH; i++) {
        batch.token[i]     = 3 * i + 1;
        batch.pos[i]       = i;
        batch.n_seq_id[i]  = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i]    = true;
        bins.push_back(i % N_BINS);
    }
    batch.n_tokens = N_BATCH;
    llama_memory_clear(llama_get_memory(ctx), true);
    steermoe_recorder_reset(recorder);
    require_ok(steermoe_recorder_set_mask(recorder, bins.data(), N_BATCH), "the mask is taken");
    bool wanted[N_BATCH];
    for (int32_t i = 0; i < N_BATCH; i++) {
        wanted[i] = i % 3 != 0;
    }
    require_ok(steermoe_recorder_set_trace(recorder, wanted, N_BATCH, STEERMOE_TRACE_WEIGHTS | STEERMOE_TRACE_LOGITS),
               "a trace can be asked for");
    require(llama_decode(ctx, batch) == 0, "the recording decodes");
    llama_batch_free(batch);
    const auto           n_wanted = (size_t) std::count(wanted, wanted + N_BATCH, true);
    const size_t         n_used   = (size_t) steermoe_recorder_top_k(recorder);
    std::vector<int32_t> experts(n_wanted * s.n_layer * n_used);
    std::vector<float>   weights(experts.size());
    std::vector<float>   logits(n_wanted * s.n_layer * s.n_expert);
    require_ok(steermoe_recorder_trace(recorder, experts.data(), weights.data(), logits.data()), "there is a trace");
    for (size_t i = 0; i < experts.size(); i++) {
        require(experts[i] >= 0 && experts[i] < s.n_expert && weights[i] > 0.0f, "a token has its experts");
    }
    const size_t         n_rows = (size_t) N_BINS * s.n_layer;
    std::vector<int64_t> counts(n_rows * s.n_expert);
    std::vector<int64_t> tokens(n_rows);
    require_ok(steermoe_recorder_counts(recorder, counts.data(), tokens.data()), "there are counts");
    counts.insert(counts.end(), tokens.begin(), tokens.end());
    counts.insert(counts.end(), experts.begin(), experts.end());
    return counts;
}

// Sequences under all kinds of bias and an unsteered one in one batch, twice: all logits. by_rows: the same steering, said
// of the tokens. The context is left unsteered.
std::vector<float> decode_sequences(llama_context * ctx, const std::vector<bias_ptr> & biases, bool by_rows = false) {
    const auto         n       = (int32_t) biases.size() + 1;
    const int          n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx)));
    std::vector<float> all;
    llama_memory_clear(llama_get_memory(ctx), true);
    for (int32_t s = 0; s < n; s++) {
        const steermoe_bias * bias = s + 1 < n ? biases[(size_t) s].get() : nullptr;
        if (!by_rows) {
            require_ok(steermoe_attach_seq(ctx, s, bias, 0), "a sequence can be steered");
        } else if (bias != nullptr) {
            require_ok(steermoe_row_attach(ctx, s, bias, 0), "a row can be steered");
        }
    }
    for (int32_t pos = 0; pos < 2; pos++) {
        llama_batch batch = llama_batch_init(n, 0, 1);
        for (int32_t s = 0; s < n; s++) {
            batch.token[s]     = 5 * pos + s;
            batch.pos[s]       = pos;
            batch.n_seq_id[s]  = 1;
            batch.seq_id[s][0] = s;
            batch.logits[s]    = true;
        }
        batch.n_tokens = n;
        if (by_rows) {
            std::vector<int32_t> rows;
            for (int32_t s = 0; s < n; s++) {
                rows.push_back(s + 1 < n ? s : -1);
            }
            require_ok(steermoe_set_token_rows(ctx, rows.data(), n), "rows are taken");
        }
        require(llama_decode(ctx, batch) == 0, "sequences are decoded in one batch");
        const float * logits = llama_get_logits(ctx);
        all.insert(all.end(), logits, logits + n * n_vocab);
        llama_batch_free(batch);
    }
    require_ok(steermoe_detach(ctx), "steering can be ended");
    return all;
}

bool same(const std::vector<float> & a, const std::vector<float> & b) {
    return a.size() == b.size() && memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

std::string meta(const llama_model * model, const std::string & key) {
    char text[256];
    require(llama_model_meta_val_str(model, key.c_str(), text, sizeof(text)) >= 0, "the model says its shape");
    return text;
}

shape shape_of(const llama_model * model) {
    char sha256[65];
    require_ok(steermoe_model_router_sha256(model, sha256), "the routers have a hash");
    const std::string arch = meta(model, "general.architecture");
    return { arch, sha256, llama_model_n_layer(model), std::stoi(meta(model, arch + ".expert_count")),
             std::stoi(meta(model, arch + ".expert_used_count")) };
}

bias_ptr make_bias(const shape & s, int kind) {
    steermoe_bias_info info{};
    info.architecture  = s.architecture.c_str();
    info.router_sha256 = s.sha256.c_str();
    info.mode          = kind == 3 ? STEERMOE_MODE_SOFT : STEERMOE_MODE_HARD;
    info.epsilon       = 0.01f;
    info.n_layer       = s.n_layer;
    info.n_expert      = s.n_expert;
    info.n_expert_used = s.n_used;

    steermoe_bias * bias = nullptr;
    require_ok(steermoe_bias_init(&info, &bias), "a bias can be made");
    for (int32_t il = kind < 2 ? s.n_layer - 1 : 0; il < s.n_layer; il++) {
        std::vector<float> values((size_t) s.n_expert);
        values[(il + kind) % s.n_expert]     = kind == 3 ? 1.5f : 1.0f;
        values[(il + kind + 1) % s.n_expert] = kind == 3 ? -2.5f : -1.0f;
        require_ok(steermoe_bias_set_layer(bias, il, values.data(), s.n_expert), "a layer can be set");
    }
    return bias_ptr(bias);
}

std::string file_of(const options & opt, int kind) {
    return (std::filesystem::path(opt.files) / ("bias-" + std::to_string(kind) + ".gguf")).string();
}

bias_ptr load_bias(const std::string & path, bool through_memory) {
    steermoe_bias * bias = nullptr;
    if (through_memory) {
        std::ifstream     stream(path, std::ios::binary);
        const std::string data{ std::istreambuf_iterator<char>(stream), {} };
        require_ok(steermoe_bias_load_buffer(data.data(), data.size(), path.c_str(), &bias), "a bias can be loaded");
    } else {
        require_ok(steermoe_bias_load(path.c_str(), &bias), "a bias file can be loaded");
    }
    return bias_ptr(bias);
}

template <typename F> void run_threads(int n, F && body) {
    std::vector<std::thread> threads;
    for (int id = 0; id < n; id++) {
        threads.emplace_back(body, id);
    }
    for (auto & thread : threads) {
        thread.join();
    }
}

// The first thing that the process does with the library is done by all threads at once: whatever is computed once and
// kept (the hash of the routers, tables) is computed here. Returns the logits of thread id under bias id % N_KINDS.
std::vector<std::vector<float>> first_calls(const options & opt) {
    std::vector<std::vector<float>> logits((size_t) opt.threads);
    const model_ptr                 model = load_model(opt);
    barrier                         start(opt.threads);
    run_threads(opt.threads, [&](int id) {
        const context_ptr ctx  = make_context(model.get(), opt);
        const bias_ptr    bias = load_bias(file_of(opt, id % N_KINDS), false);
        start.wait();
        require_ok(steermoe_attach(ctx.get(), bias.get(), 0), "a bias can be attached");
        logits[(size_t) id] = decode(ctx.get());
    });
    return logits;
}

// What one thread found.
struct expected {
    std::vector<float>   logits[N_KINDS];
    std::vector<float>   unsteered;
    std::vector<float>   sequences; // a sequence under each kind
    std::vector<int64_t> counts[N_KINDS];
};

expected single_threaded(const options & opt, const shape & s) {
    // a model of its own: nothing of the other one has been computed when the threads begin
    const model_ptr   model = load_model(opt);
    const context_ptr ctx   = make_context(model.get(), opt);
    expected          e;
    e.unsteered = decode(ctx.get());
    for (int kind = 0; kind < N_KINDS; kind++) {
        const bias_ptr bias = make_bias(s, kind);
        require_ok(steermoe_attach(ctx.get(), bias.get(), 0), "a bias can be attached");
        e.logits[kind] = decode(ctx.get());
        require(!same(e.logits[kind], e.unsteered), "steering changes the logits");

        steermoe_recorder * made = nullptr;
        require_ok(steermoe_recorder_init(model.get(), N_BINS, &made), "a recorder can be made");
        const recorder_ptr recorder(made);
        const context_ptr  recording = make_context(model.get(), opt, made);
        require_ok(steermoe_recorder_bind(made, recording.get()), "it can be bound");
        require_ok(steermoe_attach(recording.get(), bias.get(), 0), "a bias can be attached");
        e.counts[kind] = record(recording.get(), made, s);
    }
    std::vector<bias_ptr> biases;
    for (int kind = 0; kind < N_KINDS; kind++) {
        biases.push_back(make_bias(s, kind));
    }
    e.sequences = decode_sequences(ctx.get(), biases);
    return e;
}

struct shared_state {
    const options &       opt;
    const shape &         s;
    const expected &      e;
    llama_model *         model;
    std::vector<bias_ptr> biases; // one of each kind, read by all threads
    barrier               start;
    std::atomic<int64_t>  n_decodes{ 0 };
    std::atomic<int64_t>  n_attaches{ 0 };
};

void require_steered(llama_context * ctx, const shape & s, const steermoe_bias * bias) {
    for (int32_t il = 0; il < s.n_layer; il++) {
        steermoe_layer_info info;
        require_ok(steermoe_get_layer_info(ctx, il, &info), "a layer has an info");
        require(info.steered == (bias != nullptr && steermoe_bias_layer(bias, il) != nullptr),
                "it tells what is steered");
    }
}

// Messages belong to their thread: read long after the failure, while others fail too.
void fail_on_purpose(int id) {
    const std::string name = "thread-" + std::to_string(id);
    steermoe_bias *   bias = nullptr;
    require(steermoe_bias_load_buffer("GGUF", 4, name.c_str(), &bias) == STEERMOE_ERR_FORMAT, "a stub is refused");
    std::this_thread::yield();
    require(std::string(steermoe_last_error()).compare(0, name.size() + 1, name + ":") == 0,
            "the message is the one of this thread");
}

void steer(shared_state & state, llama_context * ctx, int kind, int round) {
    const shape &         s = state.s;
    // in turn: the shared object, a file, the same from memory, one made by hand
    bias_ptr              own;
    const steermoe_bias * bias = state.biases[(size_t) kind].get();
    switch (round % 4) {
        case 1:
        case 2:
            own = load_bias(file_of(state.opt, kind), round % 4 == 2);
            break;
        case 3:
            own = make_bias(s, kind);
            break;
        default:
            break;
    }
    bias = own ? own.get() : bias;
    require_ok(steermoe_bias_check(bias, state.model, 0), "the bias is the model's");
    require_ok(steermoe_attach(ctx, bias, 0), "a bias can be attached");
    require_steered(ctx, s, bias);
    own.reset();
    state.n_attaches++;
    require(same(decode(ctx), state.e.logits[kind]), "steered logits are those of a single thread");
    state.n_decodes++;
}

void work(shared_state & state, int id) {
    const shape & s   = state.s;
    context_ptr   ctx = make_context(state.model, state.opt);
    state.start.wait();
    // the first thing on a fresh model and fresh contexts: all hash the routers at once
    require_ok(steermoe_attach(ctx.get(), state.biases[0].get(), 0), "a bias can be attached");
    char sha256[65];
    require_ok(steermoe_model_router_sha256(state.model, sha256), "the routers have a hash");
    require(s.sha256 == sha256, "it is the same hash");

    for (int round = 0; round < state.opt.rounds; round++) {
        const int kind = (id + round) % N_KINDS;
        steer(state, ctx.get(), kind, id + round);
        steer(state, ctx.get(), (kind + 1 + round % 3) % N_KINDS, id + round / 4); // swapped without a detach
        fail_on_purpose(id);
        if (round % 2 == id % 2) {
            require_ok(steermoe_detach(ctx.get()), "steering can be ended");
            require_steered(ctx.get(), s, nullptr);
            require(same(decode(ctx.get()), state.e.unsteered), "unsteered logits are those of a single thread");
        }
        if (round % 3 == id % 3) {
            require(same(decode_sequences(ctx.get(), state.biases, round % 2 == 0), state.e.sequences),
                    "sequences have the logits of a single thread, steered as such or token by token");
        }
        if (round % 4 == id % 4) { // beside the steered one: a recorder and its context, from birth to death
            steermoe_recorder * made = nullptr;
            require_ok(steermoe_recorder_init(state.model, N_BINS, &made), "a recorder can be made");
            const recorder_ptr recorder(made);
            const context_ptr  recording = make_context(state.model, state.opt, made);
            require_ok(steermoe_recorder_bind(made, recording.get()), "it can be bound");
            require_ok(steermoe_attach(recording.get(), state.biases[(size_t) kind].get(), 0), "and steered");
            require(record(recording.get(), made, s) == state.e.counts[kind], "counts are those of a single thread");
        }
        if (round % 8 == id % 8) {
            ctx = make_context(state.model, state.opt); // the old one is freed while others compute
        }
    }
}

// Contexts that take their bias from STEERMOE_BIAS, made at the same time.
void work_env(shared_state & state, int kind) {
    state.start.wait();
    for (int i = 0; i < 2; i++) {
        const context_ptr ctx = make_context(state.model, state.opt);
        require_steered(ctx.get(), state.s, state.biases[(size_t) kind].get());
        require(same(decode(ctx.get()), state.e.logits[kind]), "STEERMOE_BIAS steers as in a single thread");
        require_ok(steermoe_detach(ctx.get()), "steering can be ended");
        require(same(decode(ctx.get()), state.e.unsteered), "unsteered logits are those of a single thread");
        state.n_decodes += 2;
    }
}

bool number(const char * arg, const char * name, int & value) {
    const size_t n = strlen(name);
    if (strncmp(arg, name, n) != 0) {
        return false;
    }
    value = atoi(arg + n);
    return true;
}

} // namespace

int main(int argc, char ** argv) {
    options opt;
    for (int i = 1; i < argc; i++) {
        if (number(argv[i], "-rounds=", opt.rounds) || number(argv[i], "-threads=", opt.threads) ||
            number(argv[i], "-decode_threads=", opt.decode_threads)) {
            continue;
        }
        (opt.model.empty() ? opt.model : opt.files) = argv[i];
    }
    if (opt.files.empty() || opt.rounds < 1 || opt.threads < 1 || opt.decode_threads < 1) {
        fprintf(stderr, "usage: %s MODEL FOLDER [-rounds=N] [-threads=N] [-decode_threads=N]\n", argv[0]);
        return 2;
    }
    llama_log_set(
        [](ggml_log_level level, const char * text, void *) {
            if (level == GGML_LOG_LEVEL_ERROR && strncmp(text, "gguf_", 5) != 0) {
                fputs(text, stderr);
            }
        },
        nullptr);
    ggml_backend_load_all();

    const std::vector<std::vector<float>> first = first_calls(opt);

    const shape s = [&] {
        const model_ptr model = load_model(opt);
        return shape_of(model.get());
    }();
    const expected e = single_threaded(opt, s);
    for (size_t id = 0; id < first.size(); id++) {
        require(same(first[id], e.logits[id % N_KINDS]), "the first logits are those of a single thread");
    }
    for (int kind = 0; kind < N_KINDS; kind++) {
        // the files come from the test; they must be the biases of make_bias
        const bias_ptr made   = make_bias(s, kind);
        const bias_ptr loaded = load_bias(file_of(opt, kind), false);
        for (int32_t il = 0; il < s.n_layer; il++) {
            const float * a = steermoe_bias_layer(made.get(), il);
            const float * b = steermoe_bias_layer(loaded.get(), il);
            require((a == nullptr) == (b == nullptr) &&
                        (a == nullptr || memcmp(a, b, (size_t) s.n_expert * sizeof(float)) == 0),
                    "a bias file holds what its kind says");
        }
    }

    const model_ptr model = load_model(opt);
    shared_state    state{ opt, s, e, model.get(), {}, barrier(opt.threads) };
    for (int kind = 0; kind < N_KINDS; kind++) {
        state.biases.push_back(make_bias(s, kind));
    }
    run_threads(opt.threads, [&](int id) { work(state, id); });

    const int kind = 2;
#ifdef _WIN32
    _putenv_s("STEERMOE_BIAS", file_of(opt, kind).c_str());
#else
    setenv("STEERMOE_BIAS", file_of(opt, kind).c_str(), 1); // before the threads: getenv races with setenv
#endif
    run_threads(opt.threads, [&](int) { work_env(state, kind); });

    printf("%d threads, %d rounds: %lld attaches, %lld steered decodes compared\n", opt.threads, opt.rounds,
           (long long) state.n_attaches, (long long) state.n_decodes);
    return 0;
}
