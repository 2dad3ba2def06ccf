// The folder of the library that this header is compiled into. Backends that ggml loads when it starts lie beside it,
// wherever the program is (which may be a Python interpreter) and wherever it was started.

#pragma once

#include <filesystem>

#ifdef _WIN32
#    ifndef NOMINMAX
#        define NOMINMAX
#    endif
#    include <windows.h>

#    include <string>
#else
#    include <dlfcn.h>
#endif

// Empty where the system does not say it: then no file is found.
static std::filesystem::path steermoe_own_folder() {
#ifdef _WIN32
    HMODULE     module = nullptr;
    const DWORD flags  = GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS | GET_MODULE_HANDLE_EX_FLAG_UNCHANGED_REFCOUNT;
    if (!GetModuleHandleExW(flags, reinterpret_cast<LPCWSTR>(&steermoe_own_folder), &module)) {
        return {};
    }
    std::wstring path(32768, L'\0'); // the longest that Windows has
    path.resize(GetModuleFileNameW(module, path.data(), static_cast<DWORD>(path.size())));
    return std::filesystem::path(path).parent_path();
#else
    Dl_info info;
    if (!dladdr(reinterpret_cast<const void *>(&steermoe_own_folder), &info) || !info.dli_fname) {
        return {};
    }
    return std::filesystem::path(info.dli_fname).parent_path();
#endif
}
