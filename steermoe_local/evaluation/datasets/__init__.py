"""Builds task files from known data sets, by an adapter for each.

Imports: metrics, tasks.
Public: `ADAPTERS`, `BuildOptions`, `dataset_rows`, `task_items`, `select`, `task_head`, `write_task` (in `builders`).
"""
