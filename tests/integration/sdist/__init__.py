"""The source distribution: what it has, and a wheel built from it without a network (marker `sdist`)."""
