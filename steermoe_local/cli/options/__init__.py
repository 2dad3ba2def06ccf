"""Groups of options that commands share, the configuration of their defaults, and what they open.

Imports: cli.output and the package's stages; no command.
Public: `option_group`, a decorator for each group (`llama_options`, ...), `open_model`, `open_engine`.
"""
