"""Studies in words, tables and pictures: one module a study, on a common document and figure.

Imports: metrics, tasks, measuring, studies.
Public: `evaluation`, `sweep`, `tuning`, `layers`, `transfer`, each with its report and its picture.
"""
