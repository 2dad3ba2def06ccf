// One way to fail: inside, functions throw steermoe_error; the C functions turn it into a status and a message.
#pragma once

#include "steermoe.h"

#include <exception>
#include <stdexcept>
#include <string>

// `text` with '?' for every control character: a message quotes texts of a file, which must neither forge further lines
// nor send commands to a terminal.
std::string steermoe_printable(std::string text);

struct steermoe_error : std::runtime_error {
    steermoe_status status;

    steermoe_error(steermoe_status status, const std::string & message)
        : std::runtime_error(steermoe_printable(message)), status(status) {}
};

// message of steermoe_last_error, per thread
void steermoe_set_last_error(const char * message) noexcept;

// Run a body at the C boundary. No exception may leave it: the callers are C and Python.
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
