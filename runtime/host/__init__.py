"""The plan carried out on the CPU: NumPy holds the images; ONNX Runtime or OpenVINO the networks."""
