// Steering named by environment variables, for programs that know nothing of steering.
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include "steermoe-bias.h"
#include "steermoe-error.h"
#include "steermoe-hook.h"

#include <cstdio>
#include <cstdlib>
#include <string>

#ifdef _WIN32
#    define WIN32_LEAN_AND_MEAN
#    ifndef NOMINMAX
#        define NOMINMAX
#    endif
#    include <windows.h>
#endif

namespace {

// The value of a variable in UTF-8, "" if there is none. On Windows getenv has the system's code page, which lacks
// letters that a path may have, and its own copy of the environment in every C runtime of a process.
std::string variable(const char * name) {
#ifdef _WIN32
    const std::wstring wide_name(name, name + std::char_traits<char>::length(name));
    std::wstring       wide(GetEnvironmentVariableW(wide_name.c_str(), nullptr, 0), L'\0');
    wide.resize(GetEnvironmentVariableW(wide_name.c_str(), wide.data(), (DWORD) wide.size()));
    const int   n_wide  = (int) wide.size();
    const int   n_bytes = WideCharToMultiByte(CP_UTF8, 0, wide.data(), n_wide, nullptr, 0, nullptr, nullptr);
    std::string text((size_t) n_bytes, '\0');
    WideCharToMultiByte(CP_UTF8, 0, wide.data(), n_wide, text.data(), n_bytes, nullptr, nullptr);
    return text;
#else
    const char * text = getenv(name);
    return text == nullptr ? "" : text;
#endif
}

// Writes a line in UTF-8 to stderr. Windows' console gets it in UTF-16: what a C runtime makes of bytes for a console
// depends on code pages, which lack letters that a path may have.
void say(const std::string & line) {
#ifdef _WIN32
    const HANDLE handle = GetStdHandle(STD_ERROR_HANDLE);
    DWORD        mode   = 0;
    if (GetConsoleMode(handle, &mode)) {
        const int    n_bytes = (int) line.size();
        std::wstring wide((size_t) MultiByteToWideChar(CP_UTF8, 0, line.data(), n_bytes, nullptr, 0), L'\0');
        MultiByteToWideChar(CP_UTF8, 0, line.data(), n_bytes, wide.data(), (int) wide.size());
        DWORD written = 0;
        WriteConsoleW(handle, wide.data(), (DWORD) wide.size(), &written, nullptr);
        return;
    }
#endif
    fputs(line.c_str(), stderr);
}

} // namespace

void steermoe_attach_env(llama_context & ctx) {
    const std::string path = variable("STEERMOE_BIAS");
    if (path.empty()) {
        return;
    }
    if (ctx.get_model().hparams.no_alloc) {
        return; // a model without weights, loaded only to measure memory
    }
    try {
        const steermoe_bias bias = steermoe_bias::from_file(path);
        if (ctx.get_steermoe()->attach(bias, variable("STEERMOE_FORCE") == "1")) {
            ctx.steermoe_reserve();
        }
        LLAMA_LOG_INFO("%s: STEERMOE_BIAS: steering with %s\n", __func__, path.c_str());
    } catch (const steermoe_error & e) {
        // Also here: the programs write their log in another thread and lose it when they exit at once.
        say(std::string("error: STEERMOE_BIAS: ") + e.what() + "\n");
        throw steermoe_error(e.status, std::string("STEERMOE_BIAS: ") + e.what());
    }
}
