"""Studies on an evaluator: a steering's effect with controls, its numbers, depth, transfer; audits of a behaviour.

Imports: metrics, tasks, measuring.
Public: `evaluate`, `run_evaluation`, `by_layer`; in its folders `run_controls`, `sweep`, `tune`, `transfer`, `audit`.
"""
