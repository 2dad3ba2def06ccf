// Ends in one of the ways that steermoe_crash_install has a word for: crash KIND. The last line on stderr is the library's.
#include "ggml.h"
#include "llama.h"
#include "steermoe.h"

#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <thread>

#ifdef _WIN32
#    include <windows.h>
#endif

namespace {

char * volatile nowhere = nullptr; // which the compiler must not know

void write_nowhere() {
    *nowhere = 1;
}

} // namespace

int main(int argc, char ** argv) {
    const char * kind = argc == 2 ? argv[1] : "";
#ifdef _WIN32
    if (strcmp(kind, "memory-without-a-runtime") == 0) { // as in a program of another C runtime than the library's
        SetUnhandledExceptionFilter(nullptr);
        kind = "memory";
    }
#endif
    steermoe_log_install(false);
    steermoe_crash_install("do this");
    if (strcmp(kind, "assertion") == 0) {
        GGML_ASSERT(argc == 3 && "three words");
    } else if (strcmp(kind, "exception") == 0) {
        throw std::runtime_error("nobody catches this");
    } else if (strcmp(kind, "memory") == 0) {
        write_nowhere();
    } else if (strcmp(kind, "memory-in-a-thread") == 0) {
        std::thread(write_nowhere).join();
    } else {
        fprintf(stderr, "usage: %s assertion|exception|memory|memory-in-a-thread|memory-without-a-runtime\n", argv[0]);
    }
    return 0;
}
