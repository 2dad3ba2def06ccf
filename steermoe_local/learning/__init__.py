"""Learns a steering from a contrast: answers, map, effects, numbers of experts, a check on held-out items, a report.

Imports: attribution, evaluation and all below; not server.
Public: `learn`, `LearnOptions`, `LearnProgress`, `LearnResult`, `LikeUnlike`, `GivenPairs`, `Builtin`.
"""
