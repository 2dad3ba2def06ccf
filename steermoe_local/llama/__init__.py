"""The bindings to llama.cpp: ctypes, `SteeredLlama`, rendering, tokens, sampling, quantizer.

Imports: everything up to steering and models. Loads the native library on first use.
Public: `SteeredLlama`, `Renderer`, `Sampling`, `ReasoningSplitter`.
"""
