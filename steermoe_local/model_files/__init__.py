"""Reads GGUF model files without loading them: header, split parts, gating facts, cache shape, memory estimate.

Imports: _util, errors, identity.
Public: `ModelInfo`, `model_info`, `read_header`, `gating`, `check_memory`.
"""
