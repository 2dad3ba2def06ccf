"""Comparison with an unpatched build of the same tree (marker `stock`)."""
