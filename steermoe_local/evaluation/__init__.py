"""Measures whether a steering does what its name says, how strongly, and at which cost.

Imports: detection, generation and all below. Inside: metrics <- tasks <- datasets, measuring <- studies <- reports <-
experiments.
Public: `Evaluator`, `evaluate`, `sweep`, `tune`, `transfer`, `audit`, `open_evaluator`.
"""
