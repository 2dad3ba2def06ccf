"""Conditions of steering plans: the threshold of a lean, and how well it tells the sides of pairs apart.

Imports: detection, maps, steering, `evaluation.metrics`.
Public: `fit_condition`, `ConditionFit`.
"""
