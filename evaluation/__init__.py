"""How well scores agree with labels: correlations, tables, comparisons between models."""
