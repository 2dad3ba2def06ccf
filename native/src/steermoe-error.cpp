#include "steermoe-error.h"

#include <cstdio>

namespace {

// A fixed buffer: reporting a failure must not fail for want of memory.
thread_local char last_error[2048] = "";

} // namespace

void steermoe_set_last_error(const char * message) noexcept {
    snprintf(last_error, sizeof(last_error), "%s", message);
}

const char * steermoe_last_error(void) {
    return last_error;
}
