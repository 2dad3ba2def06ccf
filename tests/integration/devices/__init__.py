"""Steering and recording with layers on a GPU (marker `device`).

STEERMOE_TEST_DEVICE names it: Vulkan0, which Mesa's lavapipe computes on the CPU (make test-vulkan), or CUDA0
(make test-cuda).
"""
