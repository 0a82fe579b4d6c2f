"""CUDA C++ kernels of the restoration loop and its images: source, compile cache, launches. Imports nothing of ours.

`launch` describes a launch as plain data, `compile` turns the sources into cubins, `load` runs one on the other.
"""
