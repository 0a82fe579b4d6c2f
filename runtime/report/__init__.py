"""Pictures of what the model saw: the HTML page behind `--report`, the PNG files of `--save-intermediates`."""
