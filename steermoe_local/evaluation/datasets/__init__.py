"""Builds task files from known data sets: one adapter a data set.

Imports: metrics, tasks.
Public: `layout_rows`, `select`, `write_task`.
"""
