"""Tasks, their scorers, judges, and the tasks and neutral texts that ship.

Imports: metrics.
Public: `Task`, `Scorer`, `load_task`, `SCORERS`, `make_scorer`, `open_task`, `NeutralText`.
"""
