// Linked into llama-cli on Windows: a console gets its UTF-8 as it is.
//
// The program sets the console to UTF-8 (SetConsoleOutputCP) and prints bytes. Microsoft's C runtime hands them on as long as
// a program has not set a locale; wine's takes them for characters of the C locale, one each, and converts them, so that `ö`
// arrives as two letters. It does not in binary mode, but writes byte by byte where a stream has no buffer, and the console
// does not put letters together. llama-cli flushes after what it prints. Lines still begin at the left: a console does by
// itself what text mode would add (unless it is told DISABLE_NEWLINE_AUTO_RETURN). Pipes and files keep text mode.

#include <fcntl.h>
#include <io.h>
#include <stdio.h>

namespace {

[[maybe_unused]] const bool done = [] {
    if (_isatty(_fileno(stdout))) {
        _setmode(_fileno(stdout), _O_BINARY);
        setvbuf(stdout, nullptr, _IOFBF, 4096);
    }
    return true;
}();

} // namespace
