"""crossbit: torch networks quantised to a few bits, compiled to tuned shared libraries.

Two halves meet in an ONNX file and never in one module: the torch half (quantizers, layers, models, data, train,
deploy, export) and the TVM half (importer, compiler, tune, artifact, session, bench).
"""
