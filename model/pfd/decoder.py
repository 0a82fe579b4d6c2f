"""Refined features → score, by DEIQT's panel of judges: one transformer decoder layer. Names are DEIQT's, shortened."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import PfdConfig


class Decoder(nn.Module):
    """Each judge begins with the class vector and its own, looks at the features, and says a number."""

    def __init__(self, c: PfdConfig) -> None:
        super().__init__()
        self.panels = nn.Parameter(torch.zeros(1, c.panels, c.width))
        self.layer = nn.TransformerDecoderLayer(
            c.width,
            c.heads,
            c.mlp_ratio * c.width,
            dropout=0.0,
            activation=F.gelu,
            layer_norm_eps=c.decoder_eps,
            batch_first=True,
            norm_first=True,
        )
        self.head = nn.Linear(c.width, 1, bias=False)
        nn.init.trunc_normal_(self.panels, std=0.02)

    def forward(self, features: Tensor, cls: Tensor) -> Tensor:
        """Features (N, width, grid, grid) and class vector (N, width) → scores (N,), the mean of the judges'."""
        judged = self.layer(self.panels + cls[:, None], features.flatten(2).transpose(1, 2))
        out: Tensor = self.head(judged).mean(dim=(1, 2))
        return out
