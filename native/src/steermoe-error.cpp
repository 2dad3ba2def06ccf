#include "steermoe-error.h"

#include <cstdio>

namespace {

// A fixed buffer, so that reporting a failure needs no memory.
thread_local char last_error[2048] = "";

} // namespace

std::string steermoe_printable(std::string text) {
    unsigned char last = 0;
    for (char & c : text) {
        const auto byte = (unsigned char) c;
        // U+0080 to U+009F, in UTF-8 C2 80 to C2 9F, are control characters, too
        if (byte < 0x20 || byte == 0x7f || (last == 0xc2 && byte >= 0x80 && byte < 0xa0)) {
            c = '?';
        }
        last = byte;
    }
    return text;
}

void steermoe_set_last_error(const char * message) noexcept {
    snprintf(last_error, sizeof(last_error), "%s", message);
}

const char * steermoe_last_error(void) {
    return last_error;
}
