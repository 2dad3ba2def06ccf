"""`steermoe chat` behind its command: screen, prompt line, slash commands, loop.

Imports: cli.options, cli.program and the package's stages.
Public: `run_chat`, `TerminalKind`, `ChatFlags`.
"""
