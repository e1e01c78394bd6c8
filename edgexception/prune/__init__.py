"""Fewer channels: which of them go (a plan), and the smaller network of the same family."""
