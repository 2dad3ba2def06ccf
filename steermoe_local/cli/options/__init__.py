"""Option groups that commands share, and where their defaults come from.

Imports: the package's stages; no command.
Public: one decorator a group.
"""
