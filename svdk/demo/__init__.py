"""The demo: warm start, calibration and steered decoding on a small task with a known right answer."""
