"""Training: the U-Net that restores, the backbones, the network that scores."""
