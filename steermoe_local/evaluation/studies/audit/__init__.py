"""How a behaviour holds when random experts are suppressed or promoted, and on quantizations.

Imports: metrics, tasks, measuring, and of the studies layers and transfer.
Public: `audit`, `audit_quantizations`, `Perturbations`, `Audit`.
"""
