"""One module a command: options, one call into the package, printing.

Imports: cli.options, cli.output, cli.program, cli.chat, cli.run and the package's stages.
Public: each module's click command.
"""
