"""PFD-IQA in PyTorch: a diffusion model that refines the features of one encoder, and a score read off them."""
