"""Estimates which experts cause a behaviour, by random interventions on a model.

Imports: evaluation and all below; not server.
Public: `attribute`, `AttributionOptions`, `pair_items`, `task_items`.
"""
