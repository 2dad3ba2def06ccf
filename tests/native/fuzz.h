// What the fuzz targets share: how they report a fault and count outcomes, and the mutations.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

using fuzz_bytes = std::vector<uint8_t>;

// libFuzzer's entry points (https://llvm.org/docs/LibFuzzer.html); fuzz_driver.cpp calls them where there is none.
extern "C" int LLVMFuzzerInitialize(int * argc, char *** argv);
extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size);

// A fault that no sanitizer sees: a promise of steermoe.h that does not hold.
inline void fuzz_require(bool holds, const char * promise) {
    if (!holds) {
        fprintf(stderr, "fault: %s\n", promise);
        abort();
    }
}

// A small generator whose numbers are the same with every standard library (SplitMix64).
struct fuzz_rng {
    uint64_t state;

    uint64_t next() {
        uint64_t z = state += 0x9e3779b97f4a7c15u;
        z          = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z          = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }

    size_t below(size_t n) { return n ? (size_t) (next() % n) : 0; } // 0 to n - 1
};

// The same number for the same input, so that what a target does with an input never depends on those before.
inline uint64_t fuzz_hash(const uint8_t * data, size_t size) {
    uint64_t h = 0xcbf29ce484222325u;
    for (size_t i = 0; i < size; i++) {
        h = (h ^ data[i]) * 0x100000001b3u;
    }
    return fuzz_rng{ h }.next();
}

// What became of the inputs; printed when the program ends, whoever runs it.
struct fuzz_outcome {
    const char * name;
    uint64_t     n = 0;
};

struct fuzz_outcomes {
    explicit fuzz_outcomes(std::vector<fuzz_outcome> list) : list(std::move(list)) {}

    ~fuzz_outcomes() {
        printf("outcomes:");
        for (const auto & outcome : list) {
            printf(" %s %llu", outcome.name, (unsigned long long) outcome.n);
        }
        printf("\n");
        fflush(stdout);
    }

    std::vector<fuzz_outcome> list;
};

// The inputs that a target accepted, at most 512: what is mutated from them has the best chance to be accepted as well.
const std::vector<fuzz_bytes> & fuzz_kept();
void                            fuzz_keep(const uint8_t * data, size_t size);

// Checks of an error message: one line of printable text that names the file.
void fuzz_require_message(const std::string & message, const std::string & name);

// One to four changes of a GGUF file, most of them to a field: a count, a length, a type, a text, a value. `other` is
// a second file to splice with.
void fuzz_mutate(fuzz_bytes & data, const fuzz_bytes & other, size_t max_size, fuzz_rng & rng);
