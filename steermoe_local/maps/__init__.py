"""Routing counts, risk-difference scores, their significance, and expert maps with plots, cards, import and export.

Imports: _util, errors, identity, model_files, pairs.
Public: `RoutingCounts`, `PairCounts`, `risk_difference`, `ExpertMap`.
"""
