"""Diff-V²-IQA in PyTorch: what a checkpoint holds and what an engine must agree with."""
