"""ModelOpt's ONNX quantization, run by peers.py in an environment of its own.

python peer_modelopt.py FLOAT.onnx CALIBRATION.npy OUT.onnx METHOD      (METHOD: entropy or max)
"""

from __future__ import annotations

import sys

import numpy as np
from modelopt.onnx.quantization import quantize


def main() -> None:
    """Quantize one graph to INT8 with float32 around it."""
    source, images, out, method = sys.argv[1:]
    quantize(
        source,
        quantize_mode="int8",
        calibration_data={"images": np.load(images)},
        calibration_method=method,
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        output_path=out,
        log_level="WARNING",
    )


if __name__ == "__main__":
    main()
