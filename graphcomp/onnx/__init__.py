"""A program becomes an ONNX file."""
