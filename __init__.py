"""diffiqa: Diff-V²-IQA image quality scores in production."""

__version__ = "0.1.0"
