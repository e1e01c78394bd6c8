"""Measurements on a device, and what is computed from their raw data on the host."""
