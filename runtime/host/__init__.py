"""Plans on the CPU: NumPy holds the images, ONNX Runtime or OpenVINO runs the networks."""
