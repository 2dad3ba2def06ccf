"""Tests. Properties are checked on the same examples in every run, and nothing is kept of them."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "steermoe",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],  # which goes by the clock
)
settings.load_profile("steermoe")
