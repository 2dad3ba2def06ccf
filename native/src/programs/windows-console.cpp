// Linked into llama.cpp's programs on Windows: a console gets their bytes as they are.
//
// The programs print UTF-8 and set the console to it (SetConsoleOutputCP). Microsoft's C runtime hands bytes on unchanged
// as long as a program has not set a locale; wine's takes them for characters of the C locale, one each, and converts
// them, so that `ö` arrives as two letters. Neither converts what is written in binary mode. Lines still begin at the left,
// because a console does by itself what text mode would add (unless it is told DISABLE_NEWLINE_AUTO_RETURN). Pipes and
// files keep text mode.

#include <fcntl.h>
#include <io.h>
#include <stdio.h>

namespace {

[[maybe_unused]] const bool done = [] {
    for (FILE * stream : { stdout, stderr }) {
        if (_isatty(_fileno(stream))) {
            _setmode(_fileno(stream), _O_BINARY);
        }
    }
    return true;
}();

} // namespace
