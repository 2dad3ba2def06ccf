"""`steermoe run` behind its command: one prompt, or a file of prompts.

Imports: cli.options, cli.output, cli.chat.text and the package's stages.
Public: `run_one`, `run_batch`.
"""
