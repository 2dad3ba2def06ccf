"""Experiments: does a steering do what its name says, how strongly, and at what price?

`bench` measures, and everything else is arithmetic on its measurements: `evaluate`, `control_runs`, `sweep`, `tune`,
`layers`, `transfer`, and the named experiments of `recipes`. `from_files` opens what they need.
"""

from __future__ import annotations

__all__: list[str] = []
