// Errors: internal functions throw steermoe_error; the C functions turn it into a status and a message.
#pragma once

#include "steermoe.h"

#include <exception>
#include <stdexcept>
#include <string>

// `text` with '?' for every control character: messages quote text from files, which must neither add lines nor send
// commands to a terminal.
std::string steermoe_printable(std::string text);

struct steermoe_error : std::runtime_error {
    steermoe_status status;

    steermoe_error(steermoe_status status, const std::string & message)
        : std::runtime_error(steermoe_printable(message)), status(status) {}
};

// Set the message that steermoe_last_error returns in this thread.
void steermoe_set_last_error(const char * message) noexcept;

// Run the body of a C function. No exception may leave it: the callers are C and Python.
template <typename F> steermoe_status steermoe_guard(F && body) noexcept {
    try {
        body();
        return STEERMOE_OK;
    } catch (const steermoe_error & e) {
        steermoe_set_last_error(e.what());
        return e.status;
    } catch (const std::exception & e) {
        steermoe_set_last_error(e.what());
        return STEERMOE_ERR_INTERNAL;
    } catch (...) {
        steermoe_set_last_error("unknown exception");
        return STEERMOE_ERR_INTERNAL;
    }
}
