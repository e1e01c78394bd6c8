"""edgexception: deploy trained Xception image classifiers on edge devices."""

__version__ = "0.1.0"
