"""Arithmetic on results: confidence intervals, repetition, formatting of figures.

Imports: nothing else of evaluation.
Public: `intervals`, `repetition`, `formatting`.
"""
