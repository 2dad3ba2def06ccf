"""Whether a map made on one quantization of a model serves the others: made, measured and compared with the base.

Imports: metrics, tasks, measuring.
Public: `transfer`, `Transfer`, `Quantizer`.
"""
