"""Named experiments: each answers one question about a map, compared with a control.

Imports: all other folders of evaluation but datasets.
Public: `EXPERIMENTS`, `run_experiment`, `ExperimentSetup`, `ExperimentResult`.
"""
