"""MANIQA's transposed attention block (TAB) and the paper's residual variant (RTAB)."""

import torch.nn.functional as F
from torch import Tensor, nn


class TransposedAttention(nn.Module):
    """TAB: attention between channels, each channel a vector over all tokens."""

    def __init__(self, tokens: int, dropout: float) -> None:
        super().__init__()
        self.q = nn.Linear(tokens, tokens)
        self.k = nn.Linear(tokens, tokens)
        self.v = nn.Linear(tokens, tokens)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, tokens) → the same shape."""
        mixed = _attend(self.q(x), self.k(x), self.v(x), self.q.in_features)
        # MANIQA transposes and then *reshapes* back: not the inverse, a reinterpretation that trained weights rely on.
        out: Tensor = self.drop(mixed.transpose(1, 2).reshape(x.shape)) + x
        return out


class ResidualTransposedAttention(nn.Module):
    """RTAB: attends over the differences between the image's features and those of its restorations."""

    def __init__(self, features: int, tokens: int, dropout: float) -> None:
        super().__init__()
        self.residual = nn.Linear(features, tokens)
        self.q = nn.Linear(features, tokens)
        self.k = nn.Linear(features, tokens)
        self.v = nn.Linear(features, tokens)
        self.drop = nn.Dropout(dropout)

    def forward(self, f: Tensor, for_query: Tensor, for_key: Tensor, for_value: Tensor) -> Tensor:
        """Features (B, F) of the image and of three restorations → (B, tokens)."""
        q, k, v = self.q((f - for_query).abs()), self.k((f - for_key).abs()), self.v((f - for_value).abs())
        mixed = _attend(q[..., None], k[..., None], v[..., None], self.q.in_features)  # tokens of one channel each
        out: Tensor = self.drop(mixed[..., 0]) + self.residual(f)
        return out


def _attend(q: Tensor, k: Tensor, v: Tensor, scale_of: int) -> Tensor:
    """softmax(q kᵀ / √scale_of) v over (B, length, depth); SDPA, so that length × length need not be stored."""
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], scale=scale_of**-0.5)[:, 0]
