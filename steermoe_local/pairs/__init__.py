"""Contrastive prompt pairs and prompt files: reading, writing, building from data sets, control pairs.

Imports: _util, errors, identity.
Public: `Pair`, `Message`, `load_pairs`, `save_pairs`, `load_prompts`, and the builders.
"""
