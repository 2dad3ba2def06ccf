"""Confidence intervals of results, repetition of an answer, formatting of figures.

Imports: nothing else of evaluation.
Public: `intervals`, `repetition`, `formatting`.
"""
