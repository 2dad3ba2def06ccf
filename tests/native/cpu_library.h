// What the programs that compare the bits of a libggml-cpu have in common: its library, numbers, and what frees itself.
#pragma once

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml.h"

#include <dlfcn.h>
#include <time.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

namespace {

[[noreturn]] void fail(const std::string & what) {
    fprintf(stderr, "error: %s\n", what.c_str());
    exit(1);
}

// splitmix64: the same numbers with every standard library
struct generator {
    uint64_t state;

    uint64_t next() {
        state += 0x9E3779B97F4A7C15u;
        uint64_t z = state;
        z          = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
        z          = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
        return z ^ (z >> 31);
    }

    int below(int n) { return (int) (next() % (uint64_t) n); }

    bool one_in(int n) { return below(n) == 0; }

    float uniform() { return (float) (next() >> 40) * 0x1p-24f; }

    // nearly normal
    float normal() { return (uniform() + uniform() + uniform() + uniform() - 2) * 1.7320508f; }
};

template <typename T, void (*F)(T *)> struct deleter {
    void operator()(T * p) const { F(p); }
};

using backend_ptr = std::unique_ptr<ggml_backend, deleter<ggml_backend, ggml_backend_free>>;
using buffer_ptr  = std::unique_ptr<ggml_backend_buffer, deleter<ggml_backend_buffer, ggml_backend_buffer_free>>;
using context_ptr = std::unique_ptr<ggml_context, deleter<ggml_context, ggml_free>>;

struct library {
    ggml_backend_dev_t           device;
    ggml_backend_buffer_type_t   repacked = nullptr; // where the library was built with it
    ggml_backend_set_n_threads_t set_n_threads;

    explicit library(const char * path) {
        void * handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        if (handle == nullptr) {
            fail(dlerror());
        }
        const auto get_reg = (ggml_backend_reg_t (*)()) dlsym(handle, "ggml_backend_cpu_reg");
        if (get_reg == nullptr) {
            fail(std::string(path) + ": no CPU backend");
        }
        ggml_backend_reg_t reg = get_reg();

        device = ggml_backend_reg_dev_get(reg, 0);
        set_n_threads =
            (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");

        const auto get_extra = (ggml_backend_dev_get_extra_bufts_t) ggml_backend_reg_get_proc_address(
            reg, "ggml_backend_dev_get_extra_bufts");
        for (auto * type = get_extra(device); type != nullptr && *type != nullptr; type++) {
            if (strcmp(ggml_backend_buft_name(*type), "CPU_REPACK") == 0) {
                repacked = *type;
            }
        }
    }
};

double cpu_time() {
    timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double) t.tv_sec + (double) t.tv_nsec * 1e-9;
}

// A hash of the results' bytes in the rows for which `finite` says so; how many they are, how many finite, how many zero.
void print_results(const std::vector<uint32_t> & bits, int row_size, const std::vector<bool> & finite) {
    uint64_t hash     = 14695981039346656037u; // FNV-1a, by words
    size_t   n_hashed = 0, n_finite = 0, n_zero = 0;
    for (size_t i = 0; i < bits.size(); i++) {
        if (!finite[i / row_size]) {
            continue;
        }
        const uint32_t magnitude = bits[i] & 0x7FFFFFFFu;
        hash                     = (hash ^ bits[i]) * 1099511628211u;
        n_hashed++;
        n_finite += magnitude < 0x7F800000u;
        n_zero += magnitude == 0;
    }
    printf("%016llx %zu %zu %zu", (unsigned long long) hash, n_hashed, n_finite, n_zero);
}

// The main function of a program: compute(library, case, how many timed runs) for each line of stdin.
template <typename F> int run_cases(int argc, char ** argv, const F & compute) {
    const bool timed = argc == 4 && strcmp(argv[2], "time") == 0;
    if (argc != 2 && !timed) {
        fail(std::string("usage: ") + argv[0] + " LIBRARY [time N] < CASES");
    }
    const library lib(argv[1]);
    for (std::string line; std::getline(std::cin, line);) {
        compute(lib, line, timed ? atoi(argv[3]) : 0);
    }
    return 0;
}

} // namespace
