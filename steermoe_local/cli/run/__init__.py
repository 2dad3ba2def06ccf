"""`steermoe run` behind its command: one prompt, or a file of prompts.

Imports: cli.options and the package's stages.
Public: `run_one`, `run_batch`.
"""
