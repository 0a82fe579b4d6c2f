"""The plan carried out on an NVIDIA GPU: our kernels around TensorRT or ONNX Runtime, on one stream."""
