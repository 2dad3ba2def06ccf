"""Named experiments: each asks one question of a map, beside its control.

Imports: all other folders of evaluation but datasets.
Public: `EXPERIMENTS`, `run_experiment`.
"""
