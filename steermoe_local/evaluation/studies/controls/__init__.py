"""Controls of a steering: the same numbers of experts that ought to do nothing, measured on the same task.

Imports: metrics, tasks, measuring.
Public: `Controls`, `ControlResult`, `run_controls`.
"""
