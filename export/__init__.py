"""Checkpoint → engine directory: one ONNX file per stage, checked and compared with PyTorch."""
