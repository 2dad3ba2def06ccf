"""The build for 64-bit ARM Linux, under qemu (marker `arm64`)."""
