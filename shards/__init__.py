"""Millions of images: a plan cut into shards, workers that each commit whole shards, one manifest at the end."""
