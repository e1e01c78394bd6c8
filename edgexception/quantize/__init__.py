"""Quantization: a float graph plus a `QuantPlan`."""
