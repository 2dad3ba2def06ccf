// The last words of a process that native code ends: a failed assertion (ggml_abort), an exception that nobody caught,
// or a signal of the processor. Everything that the handler of a signal reads is prepared before, in static memory; the
// handler itself only copies bytes and writes them.
#include "steermoe-crash.h"

#include "ggml.h"
#include "steermoe.h"

#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>

#ifdef _WIN32
#    include <io.h>
#    include <windows.h>
#else
#    include <fcntl.h>
#    include <poll.h>
#    include <pthread.h>
#    include <unistd.h>
#endif

namespace {

struct fault {
    int          signal;
    const char * name;
};

const fault FAULTS[] = {
    { SIGABRT, "SIGABRT" },
    { SIGSEGV, "SIGSEGV, it read or wrote memory that is not its own" },
    { SIGFPE, "SIGFPE, it divided by zero" },
    { SIGILL, "SIGILL, this CPU lacks an instruction" },
#ifdef SIGBUS
    { SIGBUS, "SIGBUS, a file in memory became shorter, or the memory is broken" },
#endif
};
const size_t N_FAULTS = sizeof(FAULTS) / sizeof(FAULTS[0]);

// Written before the crash, or by the thread that crashes.
char cure[512]    = "";
char reason[1024] = ""; // the assertion or the exception
char words[1024]  = ""; // the last errors of llama.cpp's log
int  descriptor   = -1;

// A buffer to which text is added until it is full, without anything that a handler of a signal may not call.
struct line {
    char   text[4096];
    size_t n = 0;

    void byte(char c) {
        if (n < sizeof(text)) {
            text[n++] = c;
        }
    }

    void add(const char * s) {
        for (; *s != '\0'; s++) {
            byte(*s);
        }
    }

    // Text of others, of a file perhaps: in one line, without what a terminal obeys.
    void add_foreign(const char * s, size_t size) {
        for (size_t i = 0; i < size && s[i] != '\0'; i++) {
            const unsigned char c = (unsigned char) s[i];
            if (c == '\n') {
                if (s[i + 1] != '\0') {
                    add("; ");
                }
            } else {
                byte(c < 0x20 || c >= 0x7f ? '?' : (char) c);
            }
        }
    }
};

void write_out(const line & text) {
    for (size_t done = 0; done < text.n;) {
#ifdef _WIN32
        const int n = _write(descriptor, text.text + done, (unsigned) (text.n - done));
#else
        const ssize_t n = write(descriptor, text.text + done, text.n - done);
#endif
        if (n <= 0) {
            return;
        }
        done += (size_t) n;
    }
}

void say_last_words(int signal) {
    const char * name = "a signal";
    for (const fault & f : FAULTS) {
        if (f.signal == signal) {
            name = f.name;
        }
    }
    line text;
    text.add("error: llama.cpp, or another native library, ended this process (");
    text.add(name);
    text.add(")");
    if (reason[0] != '\0') {
        text.add(": ");
        text.add_foreign(reason, sizeof(reason));
    }
    if (words[0] != '\0') {
        text.add("; llama.cpp said: ");
        text.add_foreign(words, sizeof(words));
    }
    text.add("; ");
    text.add(cure);
    if (text.n == sizeof(text.text)) {
        text.n--;
    }
    text.byte('\n');
    write_out(text);
}

// The path of a source file means nothing to the reader: only its name stays.
void keep_reason(const char * message) {
    const char * start = message;
    for (const char * c = message; *c != '\0' && *c != ' '; c++) {
        if (*c == '/' || *c == '\\') {
            start = c + 1;
        }
    }
    snprintf(reason, sizeof(reason), "%s", start);
}

void on_ggml_abort(const char * message) {
    keep_reason(message);
}

// Instead of ggml's, which starts a debugger, if there is one, to print a backtrace.
void on_terminate() {
    snprintf(reason, sizeof(reason), "an exception in C++ that nobody caught");
    if (const std::exception_ptr error = std::current_exception()) {
        try {
            std::rethrow_exception(error);
        } catch (const std::exception & e) {
            snprintf(reason, sizeof(reason), "%s", e.what());
        } catch (...) {
        }
    }
    abort();
}

#ifdef _WIN32
using thread_id = DWORD;

thread_id this_thread() {
    return GetCurrentThreadId();
}

void wait_ms(int ms) {
    Sleep((DWORD) ms);
}
#else
using thread_id = pthread_t;

thread_id this_thread() {
    return pthread_self();
}

void wait_ms(int ms) {
    poll(nullptr, 0, ms);
}
#endif

// Of the threads that fail together (all of a graph, at a failed assertion) one says it; the others wait for it, since
// the first that goes on ends the process. Not for ever: whoever should read the words may have stopped reading.
const int MAX_WAIT_MS = 10000;

std::atomic<bool>      saying(false);
std::atomic<bool>      said(false);
std::atomic<thread_id> sayer;

void say_once(int number) {
    if (!saying.exchange(true)) {
        sayer = this_thread();
        say_last_words(number);
        said = true;
    } else if (sayer != this_thread()) {
        for (int ms = 0; ms < MAX_WAIT_MS && !said; ms++) {
            wait_ms(1);
        }
    }
}

#ifdef _WIN32
void on_signal(int number) {
    say_once(number);
    signal(number, SIG_DFL);
    raise(number);
}

void take_signal(size_t i) {
    signal(FAULTS[i].signal, on_signal);
}

LPTOP_LEVEL_EXCEPTION_FILTER filter_before = nullptr;

int signal_of(DWORD code) {
    switch (code) {
        case EXCEPTION_ACCESS_VIOLATION:
        case EXCEPTION_IN_PAGE_ERROR:
        case EXCEPTION_STACK_OVERFLOW:
            return SIGSEGV;
        case EXCEPTION_ILLEGAL_INSTRUCTION:
        case EXCEPTION_PRIV_INSTRUCTION:
            return SIGILL;
        case EXCEPTION_INT_DIVIDE_BY_ZERO:
        case EXCEPTION_FLT_DIVIDE_BY_ZERO:
            return SIGFPE;
        default:
            return 0; // C++'s own among others, which end in on_terminate
    }
}

// A C runtime makes signals of the system's exceptions only in what it has started: the program may have another, and
// threads of the system have none.
LONG WINAPI on_exception(EXCEPTION_POINTERS * exception) {
    const int number = signal_of(exception->ExceptionRecord->ExceptionCode);
    if (number != 0) {
        say_once(number);
    }
    return filter_before == nullptr ? EXCEPTION_CONTINUE_SEARCH : filter_before(exception);
}
#else
struct sigaction before[N_FAULTS];

// Says it, then leaves the rest to whoever had the signal before: by default the end with the signal's status.
void on_signal(int number) {
    say_once(number);
    for (size_t i = 0; i < N_FAULTS; i++) {
        if (FAULTS[i].signal == number) {
            sigaction(number, &before[i], nullptr);
        }
    }
    raise(number);
}

void take_signal(size_t i) {
    struct sigaction action = {};
    action.sa_handler       = on_signal;
    action.sa_flags         = SA_NODEFER | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    sigaction(FAULTS[i].signal, &action, &before[i]);
    if ((before[i].sa_flags & SA_SIGINFO) == 0 && before[i].sa_handler == SIG_IGN) {
        sigaction(FAULTS[i].signal, &before[i], nullptr);
    }
}

// An overflow of the stack leaves no room for the handler. Of this thread only; others have the system's message.
void give_own_stack() {
    static char stack[64 * 1024];
    stack_t     now = {};
    if (sigaltstack(nullptr, &now) == 0 && (now.ss_flags & SS_DISABLE) != 0) {
        stack_t own  = {};
        own.ss_sp    = stack;
        own.ss_size  = sizeof(stack);
        own.ss_flags = 0;
        sigaltstack(&own, nullptr);
    }
}
#endif

} // namespace

void steermoe_crash_remember(const char * text) {
    const size_t n = strlen(text);
    if (n == 0) {
        words[0] = '\0';
        return;
    }
    // the newest lines stay; a line that is too long alone keeps its beginning
    const size_t room = sizeof(words) - 1;
    if (n >= room) {
        memcpy(words, text, room);
        words[room] = '\0';
        return;
    }
    size_t used = strlen(words);
    while (used + n > room) {
        const char * next = strchr(words, '\n');
        const size_t cut  = next == nullptr ? used : (size_t) (next + 1 - words);
        memmove(words, words + cut, used - cut + 1);
        used -= cut;
    }
    memcpy(words + used, text, n + 1);
}

void steermoe_crash_install(const char * what_to_do) {
    static bool installed = false;
    snprintf(cure, sizeof(cure), "%s", what_to_do == nullptr ? "" : what_to_do);
    if (installed) {
        return;
    }
    installed = true;
    // a copy: whoever wants llama.cpp silent may point the original to the null device meanwhile
#ifdef _WIN32
    descriptor    = _dup(2);
    filter_before = SetUnhandledExceptionFilter(on_exception);
#else
    descriptor = fcntl(2, F_DUPFD_CLOEXEC, 3);
    give_own_stack();
#endif
    ggml_set_abort_callback(on_ggml_abort);
    std::set_terminate(on_terminate);
    for (size_t i = 0; i < N_FAULTS; i++) {
        take_signal(i);
    }
}
