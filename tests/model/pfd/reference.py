"""PFD-IQA in float64 NumPy, written from its definition in docs/pfdiqa.md and not from the PyTorch modules it judges.

Slow and plain on purpose. `w` maps names of a state dict to arrays; `at` is the dotted place of a part. Maps are
(batch, channel, row, column), token sequences (batch, token, width).
"""

import math
from typing import NamedTuple

import numpy as np

from diffiqa.model.config import Norm
from diffiqa.model.pfd.config import Backbone, Fusion, PfdConfig

from ..comparing import Array
from ..reference import Weights, attention, batch_norm, conv, conv_bias, gelu, group_norm, layer_norm, linear, relu

DOUBLE = tuple[Array, Array]


class Prior(NamedTuple):
    distortions: Array
    levels: Array
    condition: Array
    start: Array
    gamma: Array


def softmax_of(logits: list[float]) -> list[float]:
    e = [math.exp(x - max(logits)) for x in logits]
    return [x / sum(e) for x in e]


def unit(x: Array) -> Array:
    """Every row divided by its length."""
    out: Array = np.stack([row / math.sqrt(sum(v * v for v in row)) for row in x])
    return out


def heads_attend(w: Weights, at: str, heads: int, query: Array, memory: Array) -> Array:
    """Multi-head attention of one image's tokens: PyTorch packs the maps of query, key and value into one."""
    kernel, bias = np.split(w[f"{at}.in_proj_weight"], 3), np.split(w[f"{at}.in_proj_bias"], 3)
    q, k, v = (x @ m.T + b for x, m, b in zip((query, memory, memory), kernel, bias, strict=True))
    size = q.shape[1] // heads
    parts = [slice(h * size, (h + 1) * size) for h in range(heads)]
    mixed = np.concatenate([attention(q[:, p], k[:, p], v[:, p], size**-0.5) for p in parts], axis=1)
    return linear(w, f"{at}.out_proj", mixed)


# Encoders


def encoder(w: Weights, at: str, c: PfdConfig, images: Array) -> DOUBLE:
    """Images in [-1, 1] → class vectors, features."""
    return vit(w, at, c, images) if c.encoder is Backbone.VIT else lite_encoder(w, at, images, LITE[c.encoder])


def vit(w: Weights, at: str, c: PfdConfig, images: Array) -> DOUBLE:
    """DEIQT's: pixels as ImageNet's weights want them; positions for patches alone; LayerScale; a last norm."""
    colours = zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)
    planes = [((images[:, k] + 1) / 2 - m) / s for k, (m, s) in enumerate(colours)]
    classes, maps = [], []
    kernel, bias = w[f"{at}.patch_embed.proj.weight"], w[f"{at}.patch_embed.proj.bias"]
    size, head = c.patch, c.width // c.heads
    for image in np.stack(planes, axis=1):
        patches = [
            np.array([(f * image[:, r * size : (r + 1) * size, k * size : (k + 1) * size]).sum() for f in kernel])
            + bias
            for r in range(c.grid)
            for k in range(c.grid)
        ]
        x = np.concatenate([w[f"{at}.cls_token"][0], np.stack(patches) + w[f"{at}.pos_embed"][0]])
        for b in range(c.blocks):
            block = f"{at}.blocks.{b}"
            q, k, v = np.split(linear(w, f"{block}.attn.qkv", layer_norm(w, f"{block}.norm1", x, 1e-6)), 3, axis=1)
            parts = [slice(h * head, (h + 1) * head) for h in range(c.heads)]
            mixed = np.concatenate([attention(q[:, p], k[:, p], v[:, p], head**-0.5) for p in parts], axis=1)
            x = x + w[f"{block}.gamma_1"] * linear(w, f"{block}.attn.proj", mixed)
            hidden = gelu(linear(w, f"{block}.mlp.fc1", layer_norm(w, f"{block}.norm2", x, 1e-6)))
            x = x + w[f"{block}.gamma_2"] * linear(w, f"{block}.mlp.fc2", hidden)
        x = layer_norm(w, f"{at}.norm", x, 1e-6)
        classes.append(x[0])
        maps.append(np.stack([x[1 + place] for place in range(c.grid**2)], axis=1).reshape(-1, c.grid, c.grid))
    return np.stack(classes), np.stack(maps)


LITE = {  # kernel, stride, expansion, channels out, blocks
    Backbone.LITE0: [
        (3, 1, 1, 16, 1),
        (3, 2, 6, 24, 2),
        (5, 2, 6, 40, 2),
        (3, 2, 6, 80, 3),
        (5, 1, 6, 112, 3),
        (5, 2, 6, 192, 4),
        (3, 1, 6, 320, 1),
    ],
    Backbone.LITE2: [
        (3, 1, 1, 16, 1),
        (3, 2, 6, 24, 3),
        (5, 2, 6, 48, 3),
        (3, 2, 6, 88, 4),
        (5, 1, 6, 120, 4),
        (5, 2, 6, 208, 5),
        (3, 1, 6, 352, 1),
    ],
}
Groups = list[tuple[int, int, int, int, int]]


def lite_maps(w: Weights, at: str, images: Array, groups: Groups) -> list[Array]:
    """The last outputs at strides 4, 8, 16 and 32, and the last map."""

    def norm(name: str, x: Array) -> Array:
        mean, var, gain, bias = (
            w[f"{at}.{name}.{part}"][None, :, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        out: Array = (x - mean) / np.sqrt(var + 1e-3) * gain + bias
        return out

    def same(x: Array, kernel: int, stride: int) -> Array:
        """Padded so that the result has 1/stride of the places; an odd row goes below and to the right."""
        total = kernel - stride
        return np.pad(x, ((0, 0), (0, 0), *[(total // 2, total - total // 2)] * 2))

    def depthwise(x: Array, kernel: Array, stride: int) -> Array:
        size, side = kernel.shape[2], x.shape[2] // stride
        windows = np.lib.stride_tricks.sliding_window_view(same(x, size, stride), (size, size), axis=(2, 3))
        out: Array = np.einsum("nchwij,cij->nchw", windows[:, :, ::stride, ::stride][:, :, :side, :side], kernel[:, 0])
        return out

    def relu6(x: Array) -> Array:
        return np.minimum(relu(x), 6.0)

    pixels = (images + 1) * 127.5  # 0 to 255
    x = relu6(norm("_bn0", conv(same((pixels - 127) / 128, 3, 2), w[f"{at}._conv_stem.weight"], stride=2)))
    read, index = [], 0
    for group, (kernel, stride, expansion, outputs, count) in enumerate(groups):
        for b in range(count):
            block, by, h = f"_blocks.{index}", stride if b == 0 else 1, x
            if expansion > 1:
                h = relu6(norm(f"{block}._bn0", conv(h, w[f"{at}.{block}._expand_conv.weight"])))
            filters = w[f"{at}.{block}._depthwise_conv.weight"]
            if filters.shape[2] != kernel:
                raise ValueError(f"{block} has filters of {filters.shape}")
            h = relu6(norm(f"{block}._bn1", depthwise(h, filters, by)))
            h = norm(f"{block}._bn2", conv(h, w[f"{at}.{block}._project_conv.weight"]))
            x = h + x if by == 1 and x.shape[1] == outputs else h
            index += 1
        if group in {1, 2, 4, 6}:
            read.append(x)
    return [*read, relu6(norm("_bn1", conv(x, w[f"{at}._conv_head.weight"])))]


def lite_encoder(w: Weights, at: str, images: Array, groups: Groups) -> DOUBLE:
    maps = lite_maps(w, f"{at}.lite", images, groups)
    facts = []
    for x in maps:
        mean = x.mean(axis=(2, 3))
        facts += [mean, np.sqrt(((x - mean[:, :, None, None]) ** 2).mean(axis=(2, 3)) + 1e-6)]
    centred = (np.concatenate(facts, axis=1) - w[f"{at}.readout.mean"]) / w[f"{at}.readout.deviation"]
    grid = maps[2].shape[2]

    def pooled(x: Array, by: int) -> Array:
        out: Array = x.reshape(*x.shape[:2], grid, by, grid, by).mean(axis=(3, 5))
        return out

    joined = np.concatenate(
        [pooled(maps[0], 4), pooled(maps[1], 2), maps[2], maps[3].repeat(2, axis=2).repeat(2, axis=3)], axis=1
    )
    features = batch_norm(w, f"{at}.norm", conv(joined, w[f"{at}.project.weight"]))
    return linear(w, f"{at}.readout.linear", centred), features


# Prior


def bottleneck(w: Weights, at: str, c: PfdConfig, x: Array) -> Array:
    def norm(name: str, y: Array) -> Array:
        place = f"{at}.{name}"
        return batch_norm(w, place, y) if c.norm is Norm.BATCH else group_norm(w, place, y, c.groups)

    h = relu(norm("norm1", conv(x, w[f"{at}.down.weight"])))
    h = relu(norm("norm2", conv(h, w[f"{at}.mix.weight"], padding=1)))
    return x + norm("norm3", conv(h, w[f"{at}.up.weight"]))


def auxiliary(w: Weights, at: str, c: PfdConfig, features: Array) -> tuple[Array, Array, Array]:
    """F̂, p, and p·T for T of unit length."""
    own = conv_bias(w, f"{at}.conv2", relu(conv_bias(w, f"{at}.conv1", features, padding=1)), padding=1)
    prompts = unit(w[f"{at}.prompts"])
    seen = own.mean(axis=(2, 3)) @ w[f"{at}.to_prompt.weight"].T
    rows = []
    for s in seen:
        cosines = [float(s @ t) / math.sqrt(float(s @ s)) for t in prompts]
        rows.append(softmax_of([c.temperature * cosine for cosine in cosines]))
    p = np.array(rows)
    return own, p, p @ prompts


def prior(w: Weights, at: str, c: PfdConfig, features: Array) -> Prior:
    own_d, p_d, prompt_d = auxiliary(w, f"{at}.distortions", c, features)
    own_q, p_q, prompt_q = auxiliary(w, f"{at}.levels", c, features)
    condition = np.stack([linear(w, f"{at}.condition", prompt) for prompt in (prompt_d, prompt_q)], axis=1)
    if c.fusion is Fusion.SUM:
        start = features + own_d + own_q
    else:
        start = conv_bias(w, f"{at}.fuse", np.concatenate([features, own_d, own_q], axis=1))
    gamma = np.ones((len(features), 1))
    if c.alignment:
        two = linear(w, f"{at}.adapter.predict", bottleneck(w, f"{at}.adapter.block", c, start).mean(axis=(2, 3)))
        gamma = np.array([[softmax_of(list(pair))[0]] for pair in two])
    return Prior(p_d, p_q, condition, start, gamma)


# Denoiser and decoder


def denoiser(w: Weights, at: str, c: PfdConfig, y: Array, condition: Array, timestep: int) -> Array:
    x = bottleneck(w, f"{at}.before", c, y + w[f"{at}.time.weight"][timestep][None, :, None, None])
    if c.cross_attention:
        places = x.reshape(*x.shape[:2], -1).transpose(0, 2, 1)
        queries = layer_norm(w, f"{at}.cross.norm", places, 1e-6)
        heard = [
            heads_attend(w, f"{at}.cross.attend", c.heads, q, keys).T.reshape(x.shape[1:])
            for q, keys in zip(queries, condition, strict=True)
        ]
        x = x + np.stack(heard)
    return conv_bias(w, f"{at}.out", bottleneck(w, f"{at}.after", c, x))


def decoder(w: Weights, at: str, c: PfdConfig, features: Array, cls: Array) -> Array:
    scores = []
    for tokens, own in zip(features.reshape(*features.shape[:2], -1).transpose(0, 2, 1), cls, strict=True):
        x = w[f"{at}.panels"][0] + own
        normed = layer_norm(w, f"{at}.layer.norm1", x, c.decoder_eps)
        x = x + heads_attend(w, f"{at}.layer.self_attn", c.heads, normed, normed)
        normed = layer_norm(w, f"{at}.layer.norm2", x, c.decoder_eps)
        x = x + heads_attend(w, f"{at}.layer.multihead_attn", c.heads, normed, tokens)
        hidden = gelu(linear(w, f"{at}.layer.linear1", layer_norm(w, f"{at}.layer.norm3", x, c.decoder_eps)))
        x = x + linear(w, f"{at}.layer.linear2", hidden)
        scores.append((x @ w[f"{at}.head.weight"][0]).mean())
    return np.array(scores)


# The loop


def ddim_row(t: int, following: int | None) -> tuple[float, float, float, float]:
    """The factors of a step from t to the one that follows: y and ε in x0, then x0 and y in the new y. float32."""
    bars, bar = [], 1.0
    for k in range(1000):
        bar *= 1 - (1e-4 + (0.02 - 1e-4) * k / 999)
        bars.append(bar)
    now, then = bars[t], 1.0 if following is None else bars[following]
    slope = math.sqrt(1 - then) / math.sqrt(1 - now)
    factors = (1 / math.sqrt(now), math.sqrt(1 - now) / math.sqrt(now), math.sqrt(then) - math.sqrt(now) * slope, slope)
    return tuple(float(np.float32(f)) for f in factors)  # type: ignore[return-value]


def refine(w: Weights, at: str, c: PfdConfig, found: Prior, noise: Array) -> Array:
    g = found.gamma[:, :, None, None]
    y = g * found.start + (1 - g) * noise
    steps = list(c.schedule.timesteps)
    for t, following in zip(steps, [*steps[1:], None][: len(steps)], strict=True):
        y_to_x0, noise_to_x0, x0_to_next, y_to_next = ddim_row(t, following)
        x0 = y * y_to_x0 - denoiser(w, at, c, y, found.condition, t) * noise_to_x0
        y = x0 * x0_to_next + y * y_to_next
    return y


def whole(w: Weights, c: PfdConfig, crops: Array, noise: Array) -> tuple[Array, Array, Array]:
    """Scores and both probabilities of crops."""
    cls, features = encoder(w, "encoder", c, crops)
    found = prior(w, "prior", c, features)
    return decoder(w, "decoder", c, refine(w, "denoiser", c, found, noise), cls), found.distortions, found.levels
