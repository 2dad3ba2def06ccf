"""Comparison with Hugging Face transformers: live with the marker `reference`, recorded for `make test`."""
