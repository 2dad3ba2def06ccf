// Mutations that know where the fields of a GGUF file are. Bytes changed anywhere seldom pass the first checks; a field
// changed with its length set right, or wrong by one, reaches the rest.
#include "fuzz.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace {

std::vector<fuzz_bytes> kept;

} // namespace

const std::vector<fuzz_bytes> & fuzz_kept() {
    return kept;
}

void fuzz_keep(const uint8_t * data, size_t size) {
    constexpr size_t MAX = 512;
    if (kept.size() < MAX) {
        kept.emplace_back(data, data + size);
    } else {
        kept[fuzz_hash(data, size) % MAX].assign(data, data + size);
    }
}

void fuzz_require_message(const std::string & message, const std::string & name) {
    fuzz_require(message.compare(0, name.size() + 2, name + ": ") == 0, "a message names its file");
    // a file must not be able to forge lines of a log or to send commands to a terminal
    fuzz_require(std::none_of(message.begin(), message.end(), [](unsigned char c) { return c < 0x20 || c == 0x7f; }),
                 "a message is one line of printable text");
}

namespace {

enum class kind { integer, text, floats, bytes };

struct field {
    size_t begin;
    size_t size;
    kind   what;
};

struct span {
    size_t begin;
    size_t end;
};

// GGUF as far as it can be followed; a broken file ends in the middle of its fields.
struct layout {
    std::vector<field> fields;
    std::vector<span>  pairs;   // whole key-value pairs
    std::vector<span>  tensors; // whole tensor descriptions
};

constexpr size_t N_TENSORS_AT = 8;
constexpr size_t N_PAIRS_AT   = 16;
constexpr size_t HEADER_SIZE  = 24;

constexpr uint32_t TYPE_F32    = 6;
constexpr uint32_t TYPE_STRING = 8;
constexpr uint32_t TYPE_ARRAY  = 9;

// bytes of a value by GGUF type; 0: none of fixed size
size_t size_of(uint32_t type) {
    static constexpr size_t sizes[] = { 1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8 };
    return type < sizeof(sizes) / sizeof(*sizes) ? sizes[type] : 0;
}

struct parser {
    const fuzz_bytes & data;
    layout             found;
    size_t             at = 0;
    bool               ok = true;

    uint64_t integer(size_t size) {
        uint64_t value = 0;
        if (!take(size, kind::integer)) {
            return 0;
        }
        memcpy(&value, data.data() + at - size, size); // the file and every platform of the tests are little-endian
        return value;
    }

    bool take(uint64_t size, kind what) {
        ok = ok && size <= data.size() - at;
        if (ok) {
            found.fields.push_back({ at, (size_t) size, what });
            at += (size_t) size;
        }
        return ok;
    }

    void string() { take(integer(8), kind::text); }

    void value(uint32_t type) {
        if (type == TYPE_STRING) {
            string();
        } else if (type == TYPE_F32) {
            take(4, kind::floats);
        } else if (type == TYPE_ARRAY) {
            const auto     inner = (uint32_t) integer(4);
            const uint64_t n     = integer(8);
            if (inner == TYPE_STRING) {
                for (uint64_t i = 0; ok && i < n; i++) {
                    string();
                }
            } else {
                ok = ok && size_of(inner) > 0 && n <= data.size();
                take(n * size_of(inner), kind::bytes);
            }
        } else {
            ok = ok && size_of(type) > 0;
            take(size_of(type), kind::integer);
        }
    }

    void run() {
        take(4, kind::bytes);
        integer(4);
        const uint64_t n_tensors = integer(8);
        const uint64_t n_pairs   = integer(8);
        for (uint64_t i = 0; ok && i < n_pairs; i++) {
            const size_t begin = at;
            string();
            value((uint32_t) integer(4));
            if (ok) {
                found.pairs.push_back({ begin, at });
            }
        }
        for (uint64_t i = 0; ok && i < n_tensors; i++) {
            const size_t begin = at;
            string();
            const uint64_t n_dims = integer(4);
            for (uint64_t d = 0; ok && d < n_dims; d++) {
                integer(8);
            }
            integer(4);
            integer(8);
            if (ok) {
                found.tensors.push_back({ begin, at });
            }
        }
        at = std::min(data.size(), ok ? (at + 31) / 32 * 32 : at);
        if (at < data.size()) {
            found.fields.push_back({ at, data.size() - at, ok ? kind::floats : kind::bytes });
        }
    }
};

layout layout_of(const fuzz_bytes & data) {
    parser p{ data, {} };
    p.run();
    return p.found;
}

const std::vector<std::string> & words() {
    static const std::vector<std::string> list = {
        "expertbias",
        "expertbias.version",
        "expertbias.model_hint",
        "expertbias.layer_count",
        "expertbias.expert_count",
        "expertbias.expert_used_count",
        "expertbias.mode",
        "expertbias.epsilon",
        "expertbias.cap",
        "expertbias.router_sha256",
        "general.architecture",
        "general.alignment",
        "hard",
        "soft",
        "capped",
        "",
        "olmoe",
        "bias.0",
        "bias.1",
        "bias.2",
        "bias.3",
        "bias.4095",
        "bias.00",
        "bias.-1",
        "bias.",
        "bias.99999999999",
        "blk.0.ffn_gate_inp.weight",
        std::string(64, 'a'),
        std::string(64, 'f') + "0",
        std::string(63, 'b'),
        "two\nlines",
        "\x1b[31m",
        std::string("n\0l", 3),
        std::string("hard\0", 5),
        std::string("soft\0hard", 9),
        std::string("expertbias.mode\0", 16),
        std::string("expertbias.epsilon\0x", 20),
        std::string("bias.1\0x", 8),
        "\xff\xfe",
        "%s%n",
        std::string(3000, 'x'),
    };
    return list;
}

float interesting_float(fuzz_rng & rng) {
    static constexpr float nan    = std::numeric_limits<float>::quiet_NaN();
    static constexpr float inf    = std::numeric_limits<float>::infinity();
    // what a hard bias may hold comes often, so that many changed files stay valid
    static constexpr float list[] = { 0,    0,     0,    1,     1,     -1,     -1,      -1,       -0.0f, 0.5f, 0.01f,
                                      1e6f, -1e6f, 2e6f, 20.0f, 21.0f, 1e-40f, 3.4e38f, -3.4e38f, nan,   inf,  -inf };
    return list[rng.below(sizeof(list) / sizeof(*list))];
}

uint64_t interesting_integer(uint64_t old, size_t file_size, fuzz_rng & rng) {
    switch (rng.below(8)) {
        case 0:
            return old + 1;
        case 1:
            return old - 1;
        case 2:
            return rng.below(5);
        case 3:
            return uint64_t{ 1 } << rng.below(64);
        case 4:
            return (uint64_t{ 1 } << rng.below(64)) - 1;
        case 5:
            return ~uint64_t{ 0 } - rng.below(64);
        case 6:
            return file_size - 16 + rng.below(32);
        default:
            return rng.below(14); // the numbers of the GGUF types
    }
}

void replace(fuzz_bytes & data, size_t begin, size_t size, const uint8_t * by, size_t by_size) {
    const fuzz_bytes copy(by, by + by_size); // `by` may lie in `data`
    data.erase(data.begin() + begin, data.begin() + begin + size);
    data.insert(data.begin() + begin, copy.begin(), copy.end());
}

void add_to_count(fuzz_bytes & data, size_t at, int64_t difference) {
    uint64_t count;
    memcpy(&count, data.data() + at, sizeof(count));
    count += (uint64_t) difference;
    memcpy(data.data() + at, &count, sizeof(count));
}

void change_field(fuzz_bytes & data, const field & f, fuzz_rng & rng) {
    uint8_t * at = data.data() + f.begin;
    if (f.what == kind::integer && f.size <= sizeof(uint64_t)) {
        uint64_t value = 0;
        memcpy(&value, at, f.size);
        value = interesting_integer(value, data.size(), rng);
        memcpy(at, &value, f.size);
    } else if (f.what == kind::text && f.begin >= sizeof(uint64_t) && rng.below(2) == 0) {
        // another word; its length is set right, or left as it was
        const std::string & word = words()[rng.below(words().size())];
        const uint64_t      size = word.size();
        if (rng.below(4) != 0) {
            memcpy(at - sizeof(size), &size, sizeof(size));
        }
        replace(data, f.begin, f.size, (const uint8_t *) word.data(), word.size());
    } else if (f.what == kind::floats && f.size >= sizeof(float)) {
        for (size_t n = 1 + rng.below(4); n > 0; n--) {
            const float value = interesting_float(rng);
            memcpy(at + rng.below(f.size / sizeof(float)) * sizeof(float), &value, sizeof(value));
        }
    } else if (f.size > 0) {
        at[rng.below(f.size)] = (uint8_t) rng.next();
    }
}

// Leave out, double, swap or take over a whole entry; its count follows, most times.
void change_entries(fuzz_bytes & data, const layout & l, const fuzz_bytes & other, fuzz_rng & rng) {
    const bool                pairs = rng.below(2) == 0;
    const std::vector<span> & list  = pairs ? l.pairs : l.tensors;
    const size_t              count = pairs ? N_PAIRS_AT : N_TENSORS_AT;
    const bool                right = rng.below(8) != 0;
    if (list.empty()) {
        return;
    }
    const span a      = list[rng.below(list.size())];
    const span b      = list[rng.below(list.size())];
    int64_t    change = 0;
    switch (rng.below(4)) {
        case 0:
            replace(data, a.begin, a.end - a.begin, nullptr, 0);
            change = -1;
            break;
        case 1:
            replace(data, b.begin, 0, data.data() + a.begin, a.end - a.begin);
            change = 1;
            break;
        case 2:
            if (a.end <= b.begin) {
                const fuzz_bytes first(data.begin() + a.begin, data.begin() + a.end);
                replace(data, a.begin, a.end - a.begin, data.data() + b.begin, b.end - b.begin);
                const size_t moved = b.begin + (b.end - b.begin) - (a.end - a.begin);
                replace(data, moved, b.end - b.begin, first.data(), first.size());
            }
            break;
        default: {
            const layout              from    = layout_of(other);
            const std::vector<span> & foreign = pairs ? from.pairs : from.tensors;
            if (!foreign.empty()) {
                const span c = foreign[rng.below(foreign.size())];
                replace(data, a.begin, a.end - a.begin, other.data() + c.begin, c.end - c.begin);
            }
        }
    }
    if (right && change != 0) {
        add_to_count(data, count, change);
    }
}

void change_bytes(fuzz_bytes & data, const fuzz_bytes & other, size_t max_size, fuzz_rng & rng) {
    const size_t at = rng.below(data.size());
    const size_t n  = std::min(1 + rng.below(32), data.size() - at);
    switch (rng.below(6)) {
        case 0:
            data[at] ^= (uint8_t) (1u << rng.below(8));
            break;
        case 1:
            data[at] = (uint8_t) rng.next();
            break;
        case 2:
            data.resize(at);
            break;
        case 3:
            data.erase(data.begin() + at, data.begin() + at + n);
            break;
        case 4:
            data.insert(data.begin() + at, n, (uint8_t) (rng.below(2) ? 0 : rng.next()));
            break;
        default: // the beginning of one file, the end of another
            if (!other.empty()) {
                const size_t from = rng.below(2) ? std::min(at, other.size()) : rng.below(other.size());
                data.resize(at);
                data.insert(data.end(), other.begin() + from, other.end());
            }
    }
    data.resize(std::min(data.size(), max_size));
}

} // namespace

void fuzz_mutate(fuzz_bytes & data, const fuzz_bytes & other, size_t max_size, fuzz_rng & rng) {
    for (size_t n = 1 + rng.below(4); n > 0; n--) {
        if (data.size() < HEADER_SIZE) {
            data = other.size() >= HEADER_SIZE ? other : fuzz_bytes(HEADER_SIZE);
        }
        const size_t choice = rng.below(10);
        if (choice == 0) {
            change_bytes(data, other, max_size, rng);
            continue;
        }
        const layout l = layout_of(data);
        if (choice <= 2) {
            change_entries(data, l, other, rng);
        } else if (choice <= 5 && l.fields.back().what == kind::floats) {
            change_field(data, l.fields.back(), rng); // the values: what stays a valid file reaches furthest
        } else {
            change_field(data, l.fields[rng.below(l.fields.size())], rng);
        }
    }
    data.resize(std::min(data.size(), max_size));
}

#ifdef STEERMOE_LIBFUZZER
extern "C" size_t LLVMFuzzerMutate(uint8_t * data, size_t size, size_t max_size);

// A quarter of the mutations are libFuzzer's own, which learn from the comparisons they see. Its corpus fills with files
// that are refused in new ways, so half of the others begin with a file that was accepted.
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t * data, size_t size, size_t max_size, unsigned int seed) {
    fuzz_rng rng{ seed };
    if (rng.below(4) == 0) {
        return LLVMFuzzerMutate(data, size, max_size);
    }
    const fuzz_bytes own(data, data + size);
    const auto       pick = [&]() -> const fuzz_bytes & {
        return kept.empty() || rng.below(2) == 0 ? own : kept[rng.below(kept.size())];
    };
    fuzz_bytes bytes = pick();
    fuzz_mutate(bytes, pick(), max_size, rng);
    memcpy(data, bytes.data(), bytes.size());
    return bytes.size();
}
#endif
