"""Studies in words, tables and pictures.

Imports: metrics, tasks, measuring, studies.
Public: one report and one picture module a study.
"""
