"""Steering and recording with layers on a GPU: Vulkan, computed by Mesa's lavapipe (marker `vulkan`)."""
