"""Engine directory → scores. Nothing below this folder imports torch, `model/` or `export/`."""
