"""Export: one inference graph and one plan, written as ONNX for each runtime."""
