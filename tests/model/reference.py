"""The whole network in float64 NumPy, written from its definition and not from the PyTorch modules it judges.

Slow and plain on purpose. Weights are a mapping from state-dict name to array; `at` is the dotted place of a part.
Images and maps are (batch, channel, height, width), token sequences (batch, token, width), unless said otherwise.
"""

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import PIL.Image

from diffiqa.engine.schedule import Kind
from diffiqa.model.config import ModelConfig, Norm, SwinConfig, UNetConfig, VCGConfig, VDAConfig, ViTConfig

Array = npt.NDArray[np.float64]
Weights = Mapping[str, Array]
Scored = tuple[Array, Array, Array]  # score (B,), score map (B, g, g), weight map (B, g, g)


# Elementary operations


def relu(x: Array) -> Array:
    return np.where(x > 0, x, 0.0)


def sigmoid(x: Array) -> Array:
    out: Array = 1 / (1 + np.exp(-x))
    return out


def silu(x: Array) -> Array:
    return x * sigmoid(x)


def gelu(x: Array) -> Array:
    """The exact one: x · Φ(x)."""
    phi: Array = np.array([0.5 * (1 + math.erf(value / math.sqrt(2))) for value in x.ravel()])
    out: Array = x * phi.reshape(x.shape)
    return out


def softmax(x: Array) -> Array:
    """Over the last axis."""
    e: Array = np.exp(x - x.max(axis=-1, keepdims=True))
    out: Array = e / e.sum(axis=-1, keepdims=True)
    return out


def linear(w: Weights, at: str, x: Array) -> Array:
    return x @ w[f"{at}.weight"].T + w[f"{at}.bias"]


def conv(x: Array, kernel: Array, *, stride: int = 1, padding: int = 0) -> Array:
    """Cross-correlation, one kernel tap at a time."""
    rows, columns = kernel.shape[2:]
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    height = (x.shape[2] - rows) // stride + 1
    width = (x.shape[3] - columns) // stride + 1
    out = np.zeros((x.shape[0], kernel.shape[0], height, width))
    for r in range(rows):
        for c in range(columns):
            seen = x[:, :, r : r + stride * (height - 1) + 1 : stride, c : c + stride * (width - 1) + 1 : stride]
            out += np.moveaxis(np.tensordot(kernel[:, :, r, c], seen, axes=(1, 1)), 0, 1)
    return out


def conv_bias(w: Weights, at: str, x: Array, *, stride: int = 1, padding: int = 0) -> Array:
    out = conv(x, w[f"{at}.weight"], stride=stride, padding=padding)
    return out + w[f"{at}.bias"][None, :, None, None]


def pointwise(w: Weights, at: str, x: Array) -> Array:
    """A 1×1 convolution with bias on (batch, channel, token)."""
    return np.stack([w[f"{at}.weight"][:, :, 0, 0] @ each + w[f"{at}.bias"][:, None] for each in x])


def layer_norm(w: Weights, at: str, x: Array, eps: float) -> Array:
    mean = x.mean(axis=-1, keepdims=True)
    var = ((x - mean) ** 2).mean(axis=-1, keepdims=True)
    out: Array = (x - mean) / np.sqrt(var + eps) * w[f"{at}.weight"] + w[f"{at}.bias"]
    return out


def batch_norm(w: Weights, at: str, x: Array) -> Array:
    """In eval mode."""
    mean, var, gain, bias = (
        w[f"{at}.{name}"][None, :, None, None] for name in ("running_mean", "running_var", "weight", "bias")
    )
    out: Array = (x - mean) / np.sqrt(var + 1e-5) * gain + bias
    return out


def group_norm(w: Weights, at: str, x: Array, groups: int) -> Array:
    """Every group of neighbouring channels of every image by its own mean and variance."""
    out = np.empty_like(x)
    size = x.shape[1] // groups
    for n in range(x.shape[0]):
        for g in range(groups):
            part = x[n, g * size : (g + 1) * size]
            out[n, g * size : (g + 1) * size] = (part - part.mean()) / np.sqrt(part.var() + 1e-5)
    return out * w[f"{at}.weight"][None, :, None, None] + w[f"{at}.bias"][None, :, None, None]


def attention(q: Array, k: Array, v: Array, scale: float, bias: Array | float = 0.0) -> Array:
    """`softmax(q kᵀ · scale + bias) v` of matrices whose rows are tokens."""
    return softmax(q @ k.T * scale + bias) @ v


# The U-Net


def noise_embedding(level: Array, width: int) -> Array:
    """Sinusoids (batch, width) of the continuous noise level (batch, 1): all sines, then all cosines."""
    half = width // 2
    out = np.empty((level.shape[0], width))
    for n in range(level.shape[0]):
        for k in range(half):
            angle = level[n, 0] * math.exp(-math.log(1e4) * k / half)
            out[n, k], out[n, half + k] = math.sin(angle), math.cos(angle)
    return out


def unet(w: Weights, config: UNetConfig, y: Array, condition: Array, level: Array) -> Array:
    """Predict the noise in `y` (batch, 3, H, W), given `level` = √ᾱ (batch, 1)."""

    def norm(at: str, x: Array) -> Array:
        return batch_norm(w, at, x) if config.norm is Norm.BATCH else group_norm(w, at, x, config.groups)

    def block(at: str, x: Array) -> Array:
        return conv_bias(w, f"{at}.block.3", silu(norm(f"{at}.block.0", x)), padding=1)

    def residual(at: str, x: Array, out_width: int, *, attend: bool) -> Array:
        h = block(f"{at}.res_block.block1", x)
        h = h + linear(w, f"{at}.res_block.noise_func.noise_func.0", embedded)[:, :, None, None]
        h = block(f"{at}.res_block.block2", h)
        skip = x if x.shape[1] == out_width else conv_bias(w, f"{at}.res_block.res_conv", x)
        h = h + skip
        return self_attention(f"{at}.attn", h) if attend else h

    def self_attention(at: str, x: Array) -> Array:
        channels = x.shape[1]
        mixed = np.empty_like(x)
        for n, qkv in enumerate(conv(norm(f"{at}.norm", x), w[f"{at}.qkv.weight"])):
            q, k, v = (qkv[j * channels : (j + 1) * channels].reshape(channels, -1).T for j in range(3))
            mixed[n] = attention(q, k, v, 1 / math.sqrt(channels)).T.reshape(x.shape[1:])
        return x + conv_bias(w, f"{at}.out", mixed)

    embedded = linear(w, "noise_level_mlp.1", noise_embedding(level, config.width))
    embedded = linear(w, "noise_level_mlp.3", silu(embedded))
    last = len(config.multipliers) - 1

    x = conv_bias(w, "downs.0", np.concatenate([condition, y], axis=1), padding=1)
    skips, place = [x], 1
    for level_index, multiplier in enumerate(config.multipliers):
        for _ in range(config.blocks):
            attend = level_index in config.attention_levels
            x = residual(f"downs.{place}", x, config.width * multiplier, attend=attend)
            skips.append(x)
            place += 1
        if level_index < last:
            x = conv_bias(w, f"downs.{place}.conv", x, stride=2, padding=1)
            skips.append(x)
            place += 1

    x = residual("mid.0", x, x.shape[1], attend=True)
    x = residual("mid.1", x, x.shape[1], attend=False)

    place = 0
    for level_index in range(last, -1, -1):
        for _ in range(config.blocks + 1):
            x = np.concatenate([x, skips.pop()], axis=1)
            attend = level_index in config.attention_levels
            x = residual(f"ups.{place}", x, config.width * config.multipliers[level_index], attend=attend)
            place += 1
        if level_index > 0:
            x = x.repeat(2, axis=2).repeat(2, axis=3)
            x = conv_bias(w, f"ups.{place}.conv", x, padding=1)
            place += 1
    if skips:
        raise ValueError("the ways down and up do not match")
    return block("final_conv", x)


# The ViT


def vit(w: Weights, at: str, config: ViTConfig, images: Array, layers: Sequence[int]) -> Array:
    """Outputs (N, L, tokens, width) of the blocks in `layers`, before the final norm, without the class token."""
    size, head = config.patch, config.width // config.heads
    kernel, bias = w[f"{at}.patch_embed.proj.weight"], w[f"{at}.patch_embed.proj.bias"]
    maps = []
    for image in images:
        rows, columns = image.shape[1] // size, image.shape[2] // size
        tokens = [w[f"{at}.cls_token"][0, 0]]
        for r in range(rows):
            for c in range(columns):
                patch = image[:, r * size : (r + 1) * size, c * size : (c + 1) * size]
                tokens.append(np.array([(filt * patch).sum() for filt in kernel]) + bias)
        x = np.stack(tokens) + w[f"{at}.pos_embed"][0]
        kept = {}
        for b in range(max(layers) + 1):
            block = f"{at}.blocks.{b}"
            qkv = linear(w, f"{block}.attn.qkv", layer_norm(w, f"{block}.norm1", x, 1e-6))
            q, k, v = np.split(qkv, 3, axis=1)
            heads = [slice(h * head, (h + 1) * head) for h in range(config.heads)]
            mixed = np.concatenate([attention(q[:, h], k[:, h], v[:, h], head**-0.5) for h in heads], axis=1)
            x = x + linear(w, f"{block}.attn.proj", mixed)
            hidden = gelu(linear(w, f"{block}.mlp.fc1", layer_norm(w, f"{block}.norm2", x, 1e-6)))
            x = x + linear(w, f"{block}.mlp.fc2", hidden)
            kept[b] = x[1:]
        maps.append(np.stack([kept[layer] for layer in layers]))
    return np.stack(maps)


# The ResNet


def resnet(w: Weights, at: str, width: int, blocks: Sequence[int], images: Array) -> Array:
    """Bottleneck ResNet with the stride in the 3×3 convolution, up to its class outputs (N, classes)."""

    def conv_bn(conv_at: str, bn_at: str, x: Array, stride: int, padding: int) -> Array:
        return batch_norm(w, f"{at}.{bn_at}", conv(x, w[f"{at}.{conv_at}.weight"], stride=stride, padding=padding))

    x = max_pool(relu(conv_bn("conv1", "bn1", images, 2, 3)))
    for stage, count in enumerate(blocks):
        for b in range(count):
            part = f"layer{stage + 1}.{b}"
            stride = 2 if b == 0 and stage > 0 else 1
            h = relu(conv_bn(f"{part}.conv1", f"{part}.bn1", x, 1, 0))
            h = relu(conv_bn(f"{part}.conv2", f"{part}.bn2", h, stride, 1))
            h = conv_bn(f"{part}.conv3", f"{part}.bn3", h, 1, 0)
            if h.shape[1] != width * 2**stage * 4:
                raise ValueError(f"{part} is {h.shape[1]} wide")
            if b == 0:
                x = conv_bn(f"{part}.downsample.0", f"{part}.downsample.1", x, stride, 0)
            x = relu(h + x)
    return linear(w, f"{at}.fc", x.mean(axis=(2, 3)))


def max_pool(x: Array) -> Array:
    """3×3, stride 2, padded by 1."""
    x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    height, width = (x.shape[2] - 3) // 2 + 1, (x.shape[3] - 3) // 2 + 1
    out = np.empty((*x.shape[:2], height, width))
    for r in range(height):
        for c in range(width):
            out[:, :, r, c] = x[:, :, 2 * r : 2 * r + 3, 2 * c : 2 * c + 3].max(axis=(2, 3))
    return out


# The transposed attention block


def tab(w: Weights, at: str, x: Array) -> Array:
    """MANIQA's block on (batch, C, N), with its `transpose(1, 2)` and reshape back to (C, N) that reinterprets."""
    out = np.empty_like(x)
    for n, each in enumerate(x):
        mixed = tab_attention(w, at, each)
        # Row-major reading of the N×C transpose fills the C×N result: number p is token p // C of channel p % C.
        channels, tokens = each.shape
        for p in range(channels * tokens):
            out[n, p // tokens, p % tokens] = mixed[p % channels, p // channels]
    return out + x


def tab_with_inverse_transpose(w: Weights, at: str, x: Array) -> Array:
    """What `tab` would be if the transpose were undone, as one expects at first sight. Nobody's weights want this."""
    return np.stack([tab_attention(w, at, each) for each in x]) + x


def tab_attention(w: Weights, at: str, x: Array) -> Array:
    """Attention between the C channels of one (C, N) map."""
    q, k, v = (linear(w, f"{at}.{name}", x) for name in "qkv")
    return attention(q, k, v, x.shape[1] ** -0.5)


def tab_stage(w: Weights, at: str, count: int, x: Array) -> Array:
    for i in range(count):
        x = tab(w, f"{at}.{i}", x)
    return x


# Swin


def swin(w: Weights, at: str, config: SwinConfig, grid: int, x: Array) -> Array:
    """MANIQA's stages on tokens (batch, grid², width)."""
    for layer in range(config.layers):
        h = x
        for b in range(config.blocks):
            shift = config.window // 2 if b % 2 else 0
            h = swin_block(w, f"{at}.layers.{layer}.blocks.{b}", config, grid, shift, h)
        image = h.transpose(0, 2, 1).reshape(h.shape[0], h.shape[2], grid, grid)
        image = relu(conv_bias(w, f"{at}.layers.{layer}.conv", image, padding=1))
        x = config.scale * image.reshape(h.shape[0], h.shape[2], grid * grid).transpose(0, 2, 1) + x
    return x


def swin_block(w: Weights, at: str, config: SwinConfig, grid: int, shift: int, x: Array) -> Array:
    normed = layer_norm(w, f"{at}.norm1", x, 1e-5)
    x = x + np.stack([window_attention(w, f"{at}.attn", config, grid, shift, each) for each in normed])
    hidden = gelu(linear(w, f"{at}.mlp.fc1", layer_norm(w, f"{at}.norm2", x, 1e-5)))
    return x + linear(w, f"{at}.mlp.fc2", hidden)


def window_attention(w: Weights, at: str, config: SwinConfig, grid: int, shift: int, x: Array) -> Array:
    """Attention inside windows of a map that is rolled up and left by `shift`; one image (grid², width)."""
    size = config.window
    out = np.empty_like(x)
    for top in range(0, grid, size):
        for left in range(0, grid, size):
            # Where the window's tokens come from, and whether rolling carried them around an edge to get there.
            rolled = [(top + r + shift, left + c + shift) for r in range(size) for c in range(size)]
            tokens = [(r % grid) * grid + c % grid for r, c in rolled]
            around = [(r >= grid, c >= grid) for r, c in rolled]
            mask = np.array([[0.0 if a == b else -100.0 for b in around] for a in around])
            out[tokens] = one_window(w, at, config, mask, x[tokens])
    return linear(w, f"{at}.proj", out)


def one_window(w: Weights, at: str, config: SwinConfig, mask: Array, x: Array) -> Array:
    size, width = config.window, x.shape[1]
    head = width // config.heads
    q, k, v = np.split(linear(w, f"{at}.qkv", x), 3, axis=1)
    out = np.empty_like(x)
    for h in range(config.heads):
        part = slice(h * head, (h + 1) * head)
        table = w[f"{at}.relative_position_bias_table"][:, h].reshape(2 * size - 1, 2 * size - 1)
        bias = np.empty((size * size, size * size))
        for i in range(size * size):  # the query
            for j in range(size * size):  # the key
                down, right = i // size - j // size, i % size - j % size
                bias[i, j] = table[down + size - 1, right + size - 1]
        out[:, part] = attention(q[:, part], k[:, part], v[:, part], head**-0.5, bias + mask)
    return out


# The branches


def heads(w: Weights, at: str, grid: int, x: Array) -> Scored:
    """Score and weight every token of (batch, grid², width); the score is the weighted mean."""
    score = relu(linear(w, f"{at}.score.3", relu(linear(w, f"{at}.score.0", x))))[..., 0]
    weight = sigmoid(linear(w, f"{at}.weight.3", relu(linear(w, f"{at}.weight.0", x))))[..., 0]
    mean = (score * weight).sum(axis=1) / weight.sum(axis=1)
    return mean, score.reshape(-1, grid, grid), weight.reshape(-1, grid, grid)


def vit_maps(w: Weights, config: ModelConfig, images: Array) -> Array:
    """Maps (B, K, L, tokens, width) of images (B, K, 3, crop, crop)."""
    vcg = _vcg(config)
    flat = images.reshape(-1, *images.shape[2:])
    maps = vit(w, "vcg.vit", vcg.vit, flat, vcg.layers)
    return maps.reshape(*images.shape[:2], *maps.shape[1:])


def vcg_scores(w: Weights, config: ModelConfig, maps: Array) -> Scored:
    """The branch from ViT maps (B, K, L, tokens, width) on."""
    vcg = _vcg(config)
    chosen = [kind for kind in (Kind.DIS, Kind.Y0, Kind.T1, Kind.T2) if kind in vcg.selection]
    parts = []
    for row, kind in enumerate(chosen):
        image = maps[:, config.kinds.index(kind)]
        parts += [image[:, vcg.layers.index(layer)] for layer in vcg.selection[kind]]
        if vcg.noise_code:
            parts.append(np.broadcast_to(w["vcg.noise_codes"][row], (len(maps), config.tokens, vcg.noise_code)))
    z = np.concatenate(parts, axis=2).transpose(0, 2, 1)
    z = tab_stage(w, "tabs", config.tabs, z)
    for i in range(len(vcg.squeeze)):
        z = pointwise(w, f"vcg.squeeze.{i}", z)
    z = swin(w, "vcg.swin1", vcg.swin, config.grid, z.transpose(0, 2, 1)).transpose(0, 2, 1)
    z = tab_stage(w, "vcg.tabs2", config.tabs, z)
    z = pointwise(w, "vcg.halve", z)
    return heads(w, "vcg", config.grid, swin(w, "vcg.swin2", vcg.swin, config.grid, z.transpose(0, 2, 1)))


def maniqa(w: Weights, config: ModelConfig, images: Array) -> Array:
    """MANIQA by itself, for images (B, 3, crop, crop): knows nothing of kinds, codes or other branches."""
    vcg = _vcg(config)
    layers = vcg.selection[Kind.DIS]
    maps = vit(w, "vcg.vit", vcg.vit, images, layers)
    x = np.concatenate([maps[:, i] for i in range(len(layers))], axis=2).transpose(0, 2, 1)
    x = tab(w, "tabs.1", tab(w, "tabs.0", x))
    x = pointwise(w, "vcg.squeeze.0", x)
    x = swin(w, "vcg.swin1", vcg.swin, config.grid, x.transpose(0, 2, 1)).transpose(0, 2, 1)
    x = tab(w, "vcg.tabs2.1", tab(w, "vcg.tabs2.0", x))
    x = pointwise(w, "vcg.halve", x)
    x = swin(w, "vcg.swin2", vcg.swin, config.grid, x.transpose(0, 2, 1))
    scores = []
    for tokens in x:
        f = relu(linear(w, "vcg.score.3", relu(linear(w, "vcg.score.0", tokens))))
        g = sigmoid(linear(w, "vcg.weight.3", relu(linear(w, "vcg.weight.0", tokens))))
        scores.append((f * g).sum() / g.sum())
    return np.array(scores)


def vda_scores(w: Weights, config: ModelConfig, images: Array) -> Scored:
    """The branch that compares: images (B, K, 3, crop, crop)."""
    vda = _vda(config)
    f = {
        kind: resnet(w, "vda.resnet", vda.resnet_width, vda.resnet_blocks, images[:, i])
        for i, kind in enumerate(config.kinds)
    }
    x = rtab(w, "vda.rtab", f[Kind.DIS], f[vda.query], f[vda.key], f[vda.value])[:, None, :]
    x = tab_stage(w, "tabs", config.tabs, x)
    x = pointwise(w, "vda.widen", x)
    return heads(w, "vda", config.grid, x.transpose(0, 2, 1))


def rtab(w: Weights, at: str, f: Array, f_query: Array, f_key: Array, f_value: Array) -> Array:
    """Residual transposed attention of class outputs (batch, classes) → (batch, tokens)."""
    out = []
    for own, query, key, value in zip(f, f_query, f_key, f_value, strict=True):
        q = linear(w, f"{at}.q", np.abs(own - query))[:, None]
        k = linear(w, f"{at}.k", np.abs(own - key))[:, None]
        v = linear(w, f"{at}.v", np.abs(own - value))[:, None]
        out.append(attention(q, k, v, f.shape[1] ** -0.5)[:, 0] + linear(w, f"{at}.residual", own))
    return np.stack(out)


def _vcg(config: ModelConfig) -> VCGConfig:
    if config.vcg is None:
        raise ValueError("no VCG branch")
    return config.vcg


def _vda(config: ModelConfig) -> VDAConfig:
    if config.vda is None:
        raise ValueError("no VDA branch")
    return config.vda


# Restoration


def alpha_bars(steps: int, offset: float = 0.008, max_beta: float = 0.999) -> Array:
    """ᾱ_0 … ᾱ_{T−1} of the cosine schedule."""
    f = [math.cos((i / steps + offset) / (1 + offset) * math.pi / 2) ** 2 for i in range(steps + 1)]
    bars, bar = [], 1.0
    for i in range(steps):
        beta = min(1 - (f[i + 1] / f[0]) / (f[i] / f[0]), max_beta)
        bar *= 1 - beta
        bars.append(bar)
    return np.array(bars)


def sampling_step(bars: Array, i: int, y: Array, eps: Array, z: Array) -> tuple[Array, Array]:
    """Return the state after step index `i`, and the estimate of the image before it is clamped."""
    bar, before = bars[i], bars[i - 1] if i else 1.0
    alpha = bar / before
    beta = 1 - alpha
    x0 = y * math.sqrt(1 / bar) - eps * math.sqrt(1 / bar - 1)
    mean = np.clip(x0, -1, 1) * beta * math.sqrt(before) / (1 - bar) + y * (1 - before) * math.sqrt(alpha) / (1 - bar)
    if i > 0:
        mean = mean + math.sqrt(max(beta * (1 - before) / (1 - bar), 1e-20)) * z
    return mean, x0


# Files


def through_png(plane: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Save a (3, H, W) plane as SR3's program does, really as a PNG, and read it as MANIQA's reader does."""
    unit = (plane.transpose(1, 2, 0).clip(-1, 1) - np.float32(-1)) / np.float32(2)
    file = io.BytesIO()
    PIL.Image.fromarray((unit * np.float32(255)).round().astype(np.uint8)).save(file, "PNG")
    read = np.asarray(PIL.Image.open(file)).astype(np.float32) / np.float32(255)
    return ((read - np.float32(0.5)) / np.float32(0.5)).transpose(2, 0, 1)


def bicubic(pixels: npt.NDArray[np.uint8], height: int, width: int) -> Array:
    """(H, W, 3) → (height, width, 3), before rounding: Keys' kernel with a = -3/4 at 4×4 pixels, ends repeated."""

    def kernel(t: float) -> float:
        t, a = abs(t), -0.75
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0

    def matrix(length: int, size: int) -> Array:
        out = np.zeros((size, length))
        for row in range(size):
            centre = (row + 0.5) * length / size - 0.5
            for place in range(math.floor(centre) - 1, math.floor(centre) + 3):
                out[row, min(max(place, 0), length - 1)] += kernel(place - centre)
        return out

    rows, columns = matrix(pixels.shape[0], height), matrix(pixels.shape[1], width)
    out: Array = np.einsum("rh,cw,hwk->rck", rows, columns, pixels.astype(np.float64))
    return out
