"""Records the routing of pairs, unsteered: grouping, decoding, checkpoints, checking targets on a model.

Imports: everything up to llama; not generation.
Public: `record_counts`, `Checker`, `selected_experts`.
"""
