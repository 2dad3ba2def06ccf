// Runs a fuzz target where the compiler has no libFuzzer, with a few of its options, so that both are called alike:
//   PROGRAM [-runs=N] [-seed=S] [-max_len=BYTES] [-artifact_prefix=PREFIX] FILE|FOLDER...
// Every file is run as it is, then N mutations of them. The same seed and files give the same inputs. There is no
// coverage to be guided by: inputs that the target accepts are mutated further. The input that ends the program is
// written to PREFIXcrash.gguf.
#include "fuzz.h"

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>

// of the sanitizers' runtime; there is none in a build without them
extern "C" __attribute__((weak)) void __sanitizer_set_death_callback(void (*callback)());

namespace {

std::string        artifact;
const fuzz_bytes * current = nullptr;

void write_current() {
    if (current == nullptr) {
        return;
    }
    FILE * file = fopen(artifact.c_str(), "wb");
    if (file != nullptr) {
        fwrite(current->data(), 1, current->size(), file);
        fclose(file);
        fprintf(stderr, "the input was written to %s\n", artifact.c_str());
    }
    current = nullptr;
}

void on_signal(int number) {
    write_current();
    signal(number, SIG_DFL);
    raise(number);
}

bool option(const char * arg, const char * name, std::string & value) {
    const size_t n = strlen(name);
    if (strncmp(arg, name, n) != 0 || arg[n] != '=') {
        return false;
    }
    value = arg + n + 1;
    return true;
}

fuzz_bytes read(const std::filesystem::path & path) {
    std::ifstream stream(path, std::ios::binary);
    return { std::istreambuf_iterator<char>(stream), {} };
}

// exactly as much memory as there are bytes: one more read is an error
void run(const fuzz_bytes & bytes) {
    const fuzz_bytes exact(bytes.begin(), bytes.end());
    current = &bytes;
    LLVMFuzzerTestOneInput(exact.data(), exact.size());
    current = nullptr;
}

} // namespace

int main(int argc, char ** argv) {
    std::string                        runs = "0", seed = "1", max_len = "65536", prefix;
    std::vector<std::filesystem::path> paths;
    for (int i = 1; i < argc; i++) {
        const std::filesystem::path path = argv[i];
        if (option(argv[i], "-runs", runs) || option(argv[i], "-seed", seed) || option(argv[i], "-max_len", max_len) ||
            option(argv[i], "-artifact_prefix", prefix)) {
            continue;
        }
        if (std::filesystem::is_directory(path)) {
            paths.insert(paths.end(), std::filesystem::directory_iterator(path), {});
        } else if (std::filesystem::is_regular_file(path)) {
            paths.push_back(path);
        } else {
            fprintf(stderr, "%s: neither an option that this driver knows, nor a file or folder\n", argv[i]);
            return 2;
        }
    }
    if (paths.empty()) {
        fprintf(stderr, "usage: %s [-runs=N] [-seed=S] [-max_len=N] [-artifact_prefix=P] FILE|FOLDER...\n", argv[0]);
        return 2;
    }
    std::sort(paths.begin(), paths.end());
    artifact = prefix + "crash.gguf";
    signal(SIGABRT, on_signal);
    if (__sanitizer_set_death_callback != nullptr) {
        __sanitizer_set_death_callback(write_current);
    } else {
        signal(SIGSEGV, on_signal);
    }
    LLVMFuzzerInitialize(&argc, &argv);

    const auto              begin = std::chrono::steady_clock::now();
    std::vector<fuzz_bytes> seeds;
    for (const auto & path : paths) {
        seeds.push_back(read(path));
        run(seeds.back());
    }
    const size_t   max    = std::stoull(max_len);
    const uint64_t n_runs = std::stoull(runs);
    fuzz_rng       rng{ std::stoull(seed) };
    const auto     pick = [&]() -> const fuzz_bytes & {
        const auto & kept = fuzz_kept();
        return kept.empty() || rng.below(4) == 0 ? seeds[rng.below(seeds.size())] : kept[rng.below(kept.size())];
    };
    for (uint64_t i = 0; i < n_runs; i++) {
        fuzz_bytes bytes = pick();
        fuzz_mutate(bytes, pick(), max, rng);
        run(bytes);
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    printf("Done %llu runs in %.1f second(s)\n", (unsigned long long) (n_runs + seeds.size()), seconds.count());
    return 0;
}
