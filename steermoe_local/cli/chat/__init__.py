"""The terminal chat: screen, prompt line, slash commands, loop.

Imports: cli.options and the package's stages.
Public: `ChatSession`, `run_loop`.
"""
