// What is kept for the message of a crash.
#pragma once

// Append a line of llama.cpp's errors to the last words; "" forgets them. Calls must not overlap.
void steermoe_crash_remember(const char * line);
