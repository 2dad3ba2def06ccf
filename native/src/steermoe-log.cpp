// A sink for llama.cpp's log. In C++, because some host languages must not run during a decode: Python, for example,
// loses a Ctrl-C that arrives while a callback runs.
#include "llama.h"
#include "steermoe-crash.h"
#include "steermoe.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <mutex>

namespace {

struct log_state {
    std::mutex     mutex;
    bool           verbose     = false;
    ggml_log_level last_level  = GGML_LOG_LEVEL_NONE;
    char           error[1024] = ""; // the first since the last steermoe_log_take_error
};

// Never destroyed: threads of the library may log while the process ends.
log_state & state() {
    static log_state * s = new log_state();
    return *s;
}

void log(ggml_log_level level, const char * text, void *) {
    log_state &                       s = state();
    const std::lock_guard<std::mutex> lock(s.mutex);
    if (level != GGML_LOG_LEVEL_CONT) {
        s.last_level = level;
    }
    if (s.last_level == GGML_LOG_LEVEL_ERROR && text[0] != '\0') {
        steermoe_crash_remember(text);
    }
    if (s.verbose) {
        fputs(text, stderr);
        fflush(stderr);
    } else if (s.last_level == GGML_LOG_LEVEL_ERROR && s.error[0] == '\0') {
        const char * first = text + strspn(text, " \t\r\n");
        size_t       n     = std::min(strlen(first), sizeof(s.error) - 1);
        while (n > 0 && strchr(" \t\r\n", first[n - 1]) != nullptr) {
            n--;
        }
        memcpy(s.error, first, n);
        s.error[n] = '\0';
    }
}

} // namespace

void steermoe_log_install(bool verbose) {
    {
        const std::lock_guard<std::mutex> lock(state().mutex);
        state().verbose = verbose;
    }
    llama_log_set(log, nullptr);
}

size_t steermoe_log_take_error(char * buffer, size_t size) {
    log_state &                       s = state();
    const std::lock_guard<std::mutex> lock(s.mutex);
    const size_t                      n = strlen(s.error);
    if (buffer != nullptr && size > 0) {
        snprintf(buffer, size, "%s", s.error);
        s.error[0] = '\0';
        steermoe_crash_remember(""); // whoever takes it handles it
    }
    return n;
}
