"""How many experts to steer: all choices of a grid, or a search inside a budget of side effects.

Imports: metrics, tasks, measuring.
Public: `Grid`, `sweep`, `Budget`, `tune`, `exhaustive`.
"""
