#include "steermoe-bias.h"

#include "gguf.h"
#include "ggml.h"

#include "steermoe-error.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>

namespace {

constexpr const char * KEY_ARCHITECTURE  = "general.architecture";
constexpr const char * KEY_VERSION       = "expertbias.version";
constexpr const char * KEY_MODEL_HINT    = "expertbias.model_hint";
constexpr const char * KEY_LAYER_COUNT   = "expertbias.layer_count";
constexpr const char * KEY_EXPERT_COUNT  = "expertbias.expert_count";
constexpr const char * KEY_EXPERT_USED   = "expertbias.expert_used_count";
constexpr const char * KEY_MODE          = "expertbias.mode";
constexpr const char * KEY_EPSILON       = "expertbias.epsilon";
constexpr const char * KEY_CAP           = "expertbias.cap";
constexpr const char * KEY_ROUTER_SHA256 = "expertbias.router_sha256";
constexpr const char * TENSOR_PREFIX     = "bias.";

// Far above any model. They bound products and allocations when a header is hostile. The Python reader has the same
// bounds.
constexpr int32_t MAX_LAYERS  = 4096;
constexpr int32_t MAX_EXPERTS = 16384;

// In logits. With a far larger epsilon the softmax of all other experts underflows to zero, and ties decide which of
// them are selected.
constexpr float MAX_EPSILON = 20.0f;
constexpr float MAX_SOFT    = 1e6f; // logits are in the tens; this keeps sums far from F32 overflow
constexpr float MAX_CAP     = MAX_SOFT;

// Version of the files of each rule: what reads version 1 alone must refuse a capped file.
constexpr uint32_t VERSION_PLAIN  = 1;
constexpr uint32_t VERSION_CAPPED = 2;
static_assert(VERSION_CAPPED == STEERMOE_BIAS_VERSION, "the newest version");

struct gguf_deleter {
    void operator()(gguf_context * ctx) const { gguf_free(ctx); }
};

using gguf_ptr = std::unique_ptr<gguf_context, gguf_deleter>;

struct file_closer {
    void operator()(FILE * file) const { fclose(file); }
};

using file_ptr = std::unique_ptr<FILE, file_closer>;

[[noreturn]] void bad(const std::string & name, const std::string & what) {
    throw steermoe_error(STEERMOE_ERR_FORMAT, name + ": " + what);
}

int64_t find(const gguf_context * ctx, const std::string & name, const char * key, gguf_type type) {
    const int64_t id = gguf_find_key(ctx, key);
    if (id < 0) {
        bad(name, std::string("key ") + key + " is missing; build the file again with steermoe bias build");
    }
    if (gguf_get_kv_type(ctx, id) != type) {
        bad(name, std::string("key ") + key + " has the type " + gguf_type_name(gguf_get_kv_type(ctx, id)) + ", not " +
                      gguf_type_name(type));
    }
    return id;
}

std::string get_str(const gguf_context * ctx, const std::string & name, const char * key) {
    return gguf_get_val_str(ctx, find(ctx, name, key, GGUF_TYPE_STRING));
}

uint32_t get_u32(const gguf_context * ctx, const std::string & name, const char * key) {
    return gguf_get_val_u32(ctx, find(ctx, name, key, GGUF_TYPE_UINT32));
}

// Refuses NUL in keys, texts and names of tensors. gguf.cpp returns and compares them as C strings, so a key "...mode\0x"
// would be taken for "...mode", whatever stands in the file under that key; the Python reader refuses such a file, too.
class nul_scan {
  public:
    nul_scan(const char * data, size_t size, const std::string & name) : data(data), size(size), name(name) {}

    // Of a whole header, which gguf.cpp has accepted.
    void header() {
        skip(8, 1); // magic and version
        const uint64_t n_tensors = number(8);
        const uint64_t n_pairs   = number(8);
        for (uint64_t i = 0; i < n_pairs; i++) {
            text();
            value((uint32_t) number(4));
        }
        for (uint64_t i = 0; i < n_tensors; i++) {
            text();
            skip(number(4), 8);
            skip(4 + 8, 1); // type and offset
        }
    }

  private:
    void skip(uint64_t n, uint64_t n_bytes) {
        if (n > (size - at) / n_bytes) {
            bad(name, "not a valid GGUF file (truncated or damaged?); build it again with steermoe bias build");
        }
        at += (size_t) (n * n_bytes);
    }

    uint64_t number(size_t n_bytes) {
        skip(1, n_bytes);
        uint64_t result = 0;
        memcpy(&result, data + at - n_bytes, n_bytes); // gguf.cpp takes only files of this machine's byte order
        return result;
    }

    void text() {
        const uint64_t n = number(8);
        skip(n, 1);
        if (memchr(data + at - n, 0, (size_t) n) != nullptr) {
            bad(name, "a key, text or tensor name in it has a NUL byte; build it again with steermoe bias build");
        }
    }

    void value(uint32_t type) {
        // bytes of a value, by gguf_type; texts and arrays have none of fixed size
        static constexpr uint8_t sizes[] = { 1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8 };

        const bool     is_array = type == GGUF_TYPE_ARRAY;
        const uint32_t item     = is_array ? (uint32_t) number(4) : type;
        const uint64_t n        = is_array ? number(8) : 1;
        if (item == GGUF_TYPE_STRING) {
            for (uint64_t i = 0; i < n; i++) {
                text();
            }
            return;
        }
        const uint64_t n_bytes = item < sizeof(sizes) ? sizes[item] : 0;
        if (n_bytes == 0) {
            bad(name, "a value of an unknown type in it; build it again with steermoe bias build");
        }
        skip(n, n_bytes);
    }

    const char *        data;
    size_t              size;
    const std::string & name;
    size_t              at = 0;
};

int32_t require_count(const std::string & name, const char * key, int64_t value, int32_t max) {
    if (value < 1 || value > max) {
        bad(name, std::string(key) + " is " + std::to_string(value) + ", outside 1 to " + std::to_string(max));
    }
    return (int32_t) value;
}

// The signs that a layer may have: the router must be able to select all +1 experts, and there must be enough experts
// that are not -1 for it to select.
void require_sign_counts(const steermoe_bias & bias, const std::string & where, int32_t n_plus, int32_t n_minus) {
    if (n_plus > bias.n_expert_used) {
        bad(bias.name, where + " activates " + std::to_string(n_plus) + " experts, its router selects only " +
                           std::to_string(bias.n_expert_used));
    }
    if (bias.n_expert - n_minus < bias.n_expert_used) {
        bad(bias.name, where + " deactivates " + std::to_string(n_minus) + " of " + std::to_string(bias.n_expert) +
                           " experts; " + std::to_string(bias.n_expert_used) + " must remain, deactivate fewer");
    }
}

// The layer of a tensor named "bias.<layer>", in decimal without leading zeros; else -1.
int32_t layer_of(const char * tensor_name, int32_t n_layer) {
    const size_t n_prefix = strlen(TENSOR_PREFIX);
    if (strncmp(tensor_name, TENSOR_PREFIX, n_prefix) != 0) {
        return -1;
    }
    const std::string digits = tensor_name + n_prefix;
    if (digits.empty() || digits.size() > 4 || digits.find_first_not_of("0123456789") != std::string::npos ||
        (digits.size() > 1 && digits[0] == '0')) {
        return -1;
    }
    const int32_t il = std::stoi(digits);
    return il < n_layer ? il : -1;
}

} // namespace

steermoe_bias steermoe_bias::from_file(const std::string & path) {
    // ggml's: on Windows the path is in UTF-8, too
    const file_ptr file(ggml_fopen(path.c_str(), "rb"));
    if (!file) {
        throw steermoe_error(STEERMOE_ERR_IO, path + ": cannot be opened; check the path and its permissions");
    }
    // some systems report a huge size for a folder; on Windows there is none from 2 GiB on
    const long size = fseek(file.get(), 0, SEEK_END) == 0 ? ftell(file.get()) : -1;
    if (size < 0 || (unsigned long) size > STEERMOE_BIAS_MAX_BYTES) {
        throw steermoe_error(STEERMOE_ERR_IO, path + ": not a bias file (folder, device, or larger than " +
                                                  std::to_string(STEERMOE_BIAS_MAX_BYTES >> 20) + " MiB)");
    }
    std::vector<char> data((size_t) size);
    rewind(file.get());
    if (fread(data.data(), 1, data.size(), file.get()) != data.size()) {
        throw steermoe_error(STEERMOE_ERR_IO, path + ": cannot be read to its end");
    }
    return from_buffer(data.data(), data.size(), path);
}

steermoe_bias steermoe_bias::from_buffer(const void * data, size_t size, const std::string & name) {
    const gguf_init_params params = { /*.no_alloc =*/true, /*.ctx =*/nullptr };

    gguf_ptr ctx(gguf_init_from_buffer(data, size, params));
    if (!ctx) {
        bad(name, "not a valid GGUF file (truncated or damaged?); build it again with steermoe bias build");
    }
    nul_scan((const char *) data, size, name).header();

    const std::string kind = get_str(ctx.get(), name, KEY_ARCHITECTURE);
    if (kind != "expertbias") {
        bad(name, "its general.architecture is \"" + kind + "\", not \"expertbias\": this is not a bias file");
    }
    const uint32_t version = get_u32(ctx.get(), name, KEY_VERSION);
    if (version != VERSION_PLAIN && version != VERSION_CAPPED) {
        bad(name, "format version " + std::to_string(version) + ", this library reads versions " +
                      std::to_string(VERSION_PLAIN) + " and " + std::to_string(VERSION_CAPPED) +
                      "; use a matching steermoe-local");
    }

    steermoe_bias bias;
    bias.name          = name;
    bias.architecture  = get_str(ctx.get(), name, KEY_MODEL_HINT);
    bias.router_sha256 = get_str(ctx.get(), name, KEY_ROUTER_SHA256);
    bias.set_shape(get_u32(ctx.get(), name, KEY_LAYER_COUNT), get_u32(ctx.get(), name, KEY_EXPERT_COUNT),
                   get_u32(ctx.get(), name, KEY_EXPERT_USED));
    bias.epsilon = gguf_get_val_f32(ctx.get(), find(ctx.get(), name, KEY_EPSILON, GGUF_TYPE_FLOAT32));

    const std::string mode = get_str(ctx.get(), name, KEY_MODE);
    if (mode == "hard") {
        bias.mode = STEERMOE_MODE_HARD;
    } else if (mode == "soft") {
        bias.mode = STEERMOE_MODE_SOFT;
    } else if (mode == "capped") {
        bias.mode = STEERMOE_MODE_CAPPED;
    } else {
        bad(name, std::string(KEY_MODE) + " is \"" + mode + "\", none of \"hard\", \"soft\" and \"capped\"");
    }
    const bool capped = bias.mode == STEERMOE_MODE_CAPPED;
    if (capped != (version == VERSION_CAPPED)) {
        bad(name, "rule \"" + mode + "\" in a file of version " + std::to_string(version) +
                      "; build it again with steermoe bias build");
    }
    if (!capped && gguf_find_key(ctx.get(), KEY_CAP) >= 0) {
        bad(name, std::string("key ") + KEY_CAP + " belongs to the rule \"capped\", not to \"" + mode + "\"");
    }
    if (capped) {
        bias.cap = gguf_get_val_f32(ctx.get(), find(ctx.get(), name, KEY_CAP, GGUF_TYPE_FLOAT32));
    }
    bias.check_header();

    const size_t       data_offset = gguf_get_data_offset(ctx.get());
    const int64_t      n_tensors   = gguf_get_n_tensors(ctx.get());
    std::vector<float> values(bias.n_expert);
    for (int64_t i = 0; i < n_tensors; i++) {
        const char *  tensor = gguf_get_tensor_name(ctx.get(), i);
        const int32_t il     = layer_of(tensor, bias.n_layer);
        if (il < 0) {
            bad(name,
                std::string("tensor ") + tensor + " does not name a layer of 0 to " + std::to_string(bias.n_layer - 1));
        }
        if (gguf_get_tensor_type(ctx.get(), i) != GGML_TYPE_F32) {
            bad(name, std::string("tensor ") + tensor + " is not F32");
        }
        const int64_t * ne = gguf_get_tensor_ne(ctx.get(), i);
        if (ne[0] != bias.n_expert || ne[1] != 1 || ne[2] != 1 || ne[3] != 1) {
            bad(name, std::string("tensor ") + tensor + " is not one row of " + std::to_string(bias.n_expert) +
                          " values, one for each expert");
        }
        const size_t n_bytes = values.size() * sizeof(float);
        const size_t offset  = gguf_get_tensor_offset(ctx.get(), i);
        if (data_offset > size || offset > size - data_offset || n_bytes > size - data_offset - offset) {
            bad(name, std::string("tensor ") + tensor + " lies outside the file: it is truncated");
        }
        memcpy(values.data(), (const char *) data + data_offset + offset, n_bytes);
        bias.set_layer(il, values.data(), bias.n_expert);
    }
    return bias;
}

steermoe_bias steermoe_bias::from_info(const steermoe_bias_info & info) {
    steermoe_bias bias;
    bias.name          = "bias";
    bias.architecture  = info.architecture ? info.architecture : "";
    bias.router_sha256 = info.router_sha256 ? info.router_sha256 : "";
    bias.epsilon       = info.epsilon;
    bias.set_shape(info.n_layer, info.n_expert, info.n_expert_used);
    if (info.mode < STEERMOE_MODE_HARD || info.mode > STEERMOE_MODE_CAPPED) {
        bad(bias.name, "mode " + std::to_string(info.mode) + " is none of hard, soft and capped");
    }
    bias.mode = (steermoe_mode) info.mode;
    bias.cap  = bias.mode == STEERMOE_MODE_CAPPED ? info.cap : 0.0f;
    bias.check_header();
    return bias;
}

void steermoe_bias::set_shape(int64_t layer_count, int64_t expert_count, int64_t expert_used_count) {
    n_layer       = require_count(name, KEY_LAYER_COUNT, layer_count, MAX_LAYERS);
    n_expert      = require_count(name, KEY_EXPERT_COUNT, expert_count, MAX_EXPERTS);
    n_expert_used = require_count(name, KEY_EXPERT_USED, expert_used_count, n_expert);
    layers.resize((size_t) n_layer);
}

void steermoe_bias::check_header() const {
    if (!(epsilon > 0.0f) || epsilon > MAX_EPSILON) { // this form refuses NaN, too
        bad(name, std::string(KEY_EPSILON) + " must be above 0 and at most " + std::to_string((int) MAX_EPSILON));
    }
    if (!(cap >= 0.0f) || (cap > MAX_CAP && std::isfinite(cap))) {
        bad(name, std::string(KEY_CAP) + " must be 0 to 1e6, or infinite");
    }
    if (architecture.empty()) {
        bad(name, std::string(KEY_MODEL_HINT) + " is empty");
    }
    const bool hex = router_sha256.find_first_not_of("0123456789abcdef") == std::string::npos;
    if (router_sha256.size() != 64 || !hex) {
        bad(name, std::string(KEY_ROUTER_SHA256) + " is not 64 lower-case hex digits");
    }
}

void steermoe_bias::set_layer(int32_t il, const float * values, int32_t n) {
    const std::string where = "layer " + std::to_string(il);
    if (il < 0 || il >= n_layer) {
        bad(name, where + " does not exist: the model has " + std::to_string(n_layer));
    }
    if (n != n_expert) {
        bad(name, where + " has " + std::to_string(n) + " values for " + std::to_string(n_expert) + " experts");
    }
    if (!layers[il].empty()) {
        bad(name, where + " is given twice");
    }
    const bool signs   = mode != STEERMOE_MODE_SOFT;
    int32_t    n_plus  = 0;
    int32_t    n_minus = 0;
    for (int32_t e = 0; e < n; e++) {
        const float v = values[e];
        if (!std::isfinite(v)) {
            bad(name, where + ", expert " + std::to_string(e) + ": not a finite number");
        }
        if (signs && v != 0.0f && v != 1.0f && v != -1.0f) {
            bad(name, where + ", expert " + std::to_string(e) + ": hard and capped rules take -1, 0 or 1");
        }
        if (!signs && std::fabs(v) > MAX_SOFT) {
            bad(name, where + ", expert " + std::to_string(e) + ": a logit beyond 1e6; lower the scale");
        }
        n_plus += v > 0.0f;
        n_minus += v < 0.0f;
    }
    if (signs) {
        require_sign_counts(*this, where, n_plus, n_minus);
    }
    layers[il].assign(values, values + n);
}

bool steermoe_bias::is_hard() const {
    return mode == STEERMOE_MODE_HARD || (mode == STEERMOE_MODE_CAPPED && std::isinf(cap));
}

bool steermoe_bias::is_capped() const {
    return mode == STEERMOE_MODE_CAPPED && std::isfinite(cap);
}

bool steermoe_bias::layer_is_zero(int32_t il) const {
    const auto & v = layers.at(il);
    return (is_capped() && cap == 0.0f) || std::all_of(v.begin(), v.end(), [](float x) { return x == 0.0f; });
}

void steermoe_bias::require_model(const std::string & other_arch, int32_t other_n_layer, int32_t other_n_expert,
                                  int32_t other_n_used, const std::string & other_sha256, bool force) const {
    const auto describe = [](const std::string & arch, int32_t nl, int32_t ne, int32_t nu, const std::string & sha) {
        return arch + " (" + std::to_string(nl) + " layers, top-" + std::to_string(nu) + " of " + std::to_string(ne) +
               " experts, router " + sha.substr(0, 8) + ")";
    };
    const bool same_shape = architecture == other_arch && n_layer == other_n_layer && n_expert == other_n_expert &&
                            n_expert_used == other_n_used;
    if (same_shape && (force || router_sha256 == other_sha256)) {
        return;
    }
    throw steermoe_error(
        STEERMOE_ERR_MISMATCH,
        name + ": made for " + describe(architecture, n_layer, n_expert, n_expert_used, router_sha256) +
            ", but the model is " + describe(other_arch, other_n_layer, other_n_expert, other_n_used, other_sha256) +
            (same_shape ? "; if this is the same model from an unusual converter, force it"
                        : "; run steermoe detect on this model"));
}
