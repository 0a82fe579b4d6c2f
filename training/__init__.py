"""Training: distorted pictures, the restoration network, the quality network, and their evaluation."""
