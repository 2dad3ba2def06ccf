"""From an expert map to a bias: choices of experts, the paper's presets, control choices, bias files.

Imports: everything up to maps.
Public: `Steering`, `BiasFile`, `read_bias`, `write_bias`, `preset_for`.
"""
