"""Steering and recording on an NVIDIA GPU: run.sh, and what it needs where there is no network."""
