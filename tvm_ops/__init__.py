"""Bit-serial arithmetic: the number format, the ONNX domain, the TE operators and their CPU schedule."""
