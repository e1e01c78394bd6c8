"""The one training loop, and what is trained with it: networks, and later quantized ones."""
