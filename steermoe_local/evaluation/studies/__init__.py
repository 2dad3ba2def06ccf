"""Questions asked of an evaluator: evaluation, controls, sweep, tune, layers, transfer over quantizations.

Imports: metrics, tasks, measuring.
Public: `evaluate`, `sweep`, `tune`, `transfer`, `effect_by_depth`.
"""
