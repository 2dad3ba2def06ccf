"""Models by name: short names, the Hugging Face hub, local models and their facts, the embedded model, shipped maps.

Imports: everything up to maps.
Public: `resolve_model`, `LocalModels`, `map_path`, `hub`.
"""
