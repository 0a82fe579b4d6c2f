"""`iqa-verify`: whether an engine, a build or a plan is still the same model, and which nodes are to blame."""
