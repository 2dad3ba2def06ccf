// Loads every file of a folder, as a file and from memory, and prints one line for each: NAME STATUS MESSAGE.
// Under AddressSanitizer and UBSan any mistake of the reader ends the program. Knows no llama.cpp: model and context
// functions of steermoe.h are not linked.
#include "steermoe-bias.h"
#include "steermoe-error.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <vector>

namespace {

// Read every value, so that a row outside its memory is noticed.
void touch(const steermoe_bias & bias) {
    double sum = 0.0;
    for (int32_t il = 0; il < bias.n_layer; il++) {
        sum += bias.layer_is_zero(il);
        for (const float v : bias.layers[il]) {
            sum += std::fabs(v);
        }
    }
    if (!std::isfinite(sum)) {
        fprintf(stderr, "a value that is not finite was accepted\n");
        abort();
    }
    for (const bool force : { false, true }) {
        steermoe_guard([&] { bias.require_model("olmoe", 3, 4, 2, std::string(64, '0'), force); });
    }
    steermoe_set_last_error("");
}

template <typename F> steermoe_status load(F && f) {
    steermoe_set_last_error("");
    return steermoe_guard([&] { touch(f()); });
}

} // namespace

int main(int argc, char ** argv) {
    if (argc != 2) {
        fprintf(stderr, "usage: %s FOLDER\n", argv[0]);
        return 2;
    }
    std::vector<std::filesystem::path> files(std::filesystem::directory_iterator(argv[1]), {});
    std::sort(files.begin(), files.end());
    for (const auto & path : files) {
        const std::string     name      = path.u8string(); // as the C interface wants it on Windows, too
        const steermoe_status from_file = load([&] { return steermoe_bias::from_file(name); });
        const std::string     message   = steermoe_last_error();

        // exactly as much memory as the file has bytes: one more read is an error
        std::ifstream           stream(path, std::ios::binary);
        const std::string       data{ std::istreambuf_iterator<char>(stream), {} };
        std::unique_ptr<char[]> exact(new char[data.size()]);
        std::memcpy(exact.get(), data.data(), data.size());
        const steermoe_status from_memory =
            load([&] { return steermoe_bias::from_buffer(exact.get(), data.size(), name); });

        if (from_file != from_memory) {
            fprintf(stderr, "%s: status %d from the file, %d from memory\n", name.c_str(), from_file, from_memory);
            return 1;
        }
        printf("%s %d %s\n", path.filename().u8string().c_str(), from_file, message.c_str());
    }
    return 0;
}
