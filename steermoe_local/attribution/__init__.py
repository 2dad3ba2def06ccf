"""Estimates which experts cause a behaviour, by random interventions on a model, and fits a soft bias to that.

Imports: evaluation and all below; not server.
Public: `attribute`, `AttributionOptions`, `fit`, `FitOptions`, `pair_items`, `task_items`.
"""
