"""The Xception family and its checkpoints."""
