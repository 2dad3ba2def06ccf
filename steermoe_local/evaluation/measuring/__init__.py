"""The evaluator: answers a task under steerings, scores the answers and keeps the results.

Imports: metrics, tasks.
Public: `Evaluator`, `EvaluatorSettings`, `Measurement`, `open_evaluator`.
"""
