"""Studies of a steering on an evaluator: effect with controls, search of its numbers, depth, transfer to quantizations.

Imports: metrics, tasks, measuring.
Public: `evaluate`, `run_evaluation`, `by_layer`; in its folders `run_controls`, `sweep`, `tune`, `transfer`.
"""
