"""From an expert map to a bias file: the choice of experts, presets, control choices.

Imports: everything up to maps.
Public: `Steering`, `BiasFile`, `read_bias`, `write_bias`, `preset_for`.
"""
