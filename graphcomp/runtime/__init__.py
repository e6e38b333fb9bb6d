"""ONNX Runtime and this machine: targets, sessions, timings."""
