"""Pictures with labels: published data sets, splits, synthetic damage, full-reference metrics."""
