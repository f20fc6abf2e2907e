"""ESCDA written down as its paper and those of its blocks have it: one action unit, one head after the other.

Functions of a model's parameters and buffers by name. Masks are drawn cell by cell and multiply the attention
itself (Eq. 5); MobileFaceNet, MixConv, coordinate attention and the NTB are as in their papers.
"""

import math

import torch
import torch.nn.functional as F


def plain_lsc(config, p, pixel_values, au_centers, training=False):
    """Logits (B, m) of LSC."""
    features = backbone(config, p, pixel_values, training)
    columns = []
    for number, label in enumerate(config.au_labels):
        x = transformer_block(config, p, f"branches.{label}.block", features, au_centers[:, number], training)
        x = norm(p, f"branches.{label}.pool.norm", whole_map(p, f"branches.{label}.pool", x), training)
        weight, bias = (p[f"branches.{label}.classifier.{name}"] for name in ("weight", "bias"))
        columns.append(x.flatten(1) @ weight.T + bias)
    return torch.cat(columns, dim=1)


def plain_gda(config, p, pixel_values, au_centers=None, training=False):
    """Logits (B, m) of GDA."""
    x = backbone(config, p, pixel_values, training)
    rows = torch.einsum("bchw,cw->bch", x, p["attention.summaries.vertical.conv.weight"][:, 0, 0])
    columns = torch.einsum("bchw,ch->bcw", x, p["attention.summaries.horizontal.conv.weight"][:, 0, :, 0])
    rows = norm(p, "attention.summaries.vertical.norm", rows[..., None], training)
    columns = norm(p, "attention.summaries.horizontal.norm", columns[..., None], training)
    a_h, a_w = directional(p, "attention.weights", rows, columns, training)
    x = x * a_h * a_w.transpose(2, 3)
    x = norm(p, "pool.norm", whole_map(p, "pool", x), training).flatten(1)
    heads = [(p[f"classifier.{label}.weight"], p[f"classifier.{label}.bias"]) for label in config.au_labels]
    return torch.cat([x @ weight.T + bias for weight, bias in heads], dim=1)


def backbone(config, p, x, training):
    """The enhanced MobileFaceNet: pictures -> the last map."""
    x = layer(p, "backbone.stem.0", x, training, stride=2)
    x = layer(p, "backbone.stem.1", x, training, groups=config.stem_channels)
    for stage, depth in enumerate(config.stage_depths):
        x = mixed_block(p, f"backbone.stages.{stage}.0", x, training, stride=2)
        for block in range(1, depth + 1):
            x = x + mixed_block(p, f"backbone.stages.{stage}.{block}", x, training, stride=1)
    return layer(p, "backbone.last", x, training)


def mixed_block(p, name, x, training, stride):
    """Enhanced depth-separable convolution, without its shortcut."""
    x = layer(p, f"{name}.expand", x, training)
    parts, first = [], 0
    for number in range(sum(key.startswith(f"{name}.mix.convs.") for key in p)):
        kernel = p[f"{name}.mix.convs.{number}.weight"]
        part, side = x[:, first : first + len(kernel)], kernel.shape[-1]
        parts.append(F.conv2d(part, kernel, None, stride, (side - 1) // 2, groups=len(kernel)))
        first += len(kernel)
    x = torch.cat(parts, dim=1)
    rows, columns = x.mean(3)[..., None], x.mean(2)[..., None]
    a_h, a_w = directional(p, f"{name}.attention.weights", rows, columns, training)
    return layer(p, f"{name}.project", x * a_h * a_w.transpose(2, 3), training, act=False)


def directional(p, name, rows, columns, training):
    """Weights of rows (B, C, h, 1) and columns (B, C, w, 1) from what sums them up."""
    y = torch.cat([rows, columns], dim=2)
    y = norm(p, f"{name}.norm", pointwise(p, f"{name}.narrow", y), training)
    y = y * F.relu6(y + 3) / 6  # h-swish
    y_h, y_w = y[:, :, : rows.shape[2]], y[:, :, rows.shape[2] :]
    return [
        1 / (1 + torch.exp(-pointwise(p, f"{name}.widen.{i}", part))) for i, part in enumerate((y_h, y_w))
    ]


def transformer_block(config, p, name, features, centers, training):
    """NTB of one action unit (Sec. 3.1.2)."""
    x = layer(p, f"{name}.project_in", features, training, act=False)
    tokens = norm(p, f"{name}.norm1", x, training).flatten(2).transpose(1, 2)  # (B, n, C)
    q, k, v = (
        tokens @ p[f"{name}.attention.{part}.weight"].T + p[f"{name}.attention.{part}.bias"]
        for part in ("query", "key", "value")
    )
    mask = masks(config, centers)
    if config.constraint == "adaptive":
        epsilon = torch.log1p(torch.exp(p[f"{name}.attention.raw_epsilon"]))
        mask = (mask + epsilon) / (1 + epsilon)  # Eq. 3
    heads, d = [], config.attention_head_dim
    for first in range(0, config.attention_channels, d):
        part = slice(first, first + d)
        weights = torch.softmax(q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(d), dim=-1)  # Eq. 4
        heads.append((weights * mask[:, None]) @ v[..., part])  # Eqs. 5-6
    combined = torch.cat(heads, dim=-1) @ p[f"{name}.attention.output.weight"].T
    combined = combined + p[f"{name}.attention.output.bias"]
    x = x + combined.transpose(1, 2).reshape(x.shape)
    y = layer(p, f"{name}.project", x, training, act=False)
    groups = config.convolution_channels // config.mhca_head_dim
    z = F.conv2d(y, p[f"{name}.convolution.conv.weight"], padding=1, groups=groups)
    z = norm(p, f"{name}.convolution.norm", z, training).clamp(min=0)
    y = y + F.conv2d(z, p[f"{name}.convolution.project.weight"])
    x = torch.cat([x, y], dim=1)
    hidden = pointwise(p, f"{name}.mlp.0", norm(p, f"{name}.norm2", x, training)).clamp(min=0)
    return x + pointwise(p, f"{name}.mlp.2", hidden)


def masks(config, centers):
    """Eqs. 1-2 of one action unit: centres (B, 2, 2) in pixels -> (B, n)."""
    size, result = config.map_size, []
    for pair in (centers + 0.5) * size / config.image_size - 0.5:
        cells = [(a, b) for b in range(size) for a in range(size)]
        squares = [[(a - x) ** 2 + (b - y) ** 2 for x, y in pair.tolist()] for a, b in cells]
        result.append([math.exp(-min(each) / (2 * config.mask_sigma**2)) for each in squares])
    return torch.tensor(result, dtype=centers.dtype)


def layer(p, name, x, training, stride=1, groups=1, act=True):
    """Convolution, batch normalisation and perhaps PReLU."""
    weight = p[f"{name}.0.weight"]
    x = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, groups=groups)
    x = norm(p, f"{name}.1", x, training)
    return torch.where(x > 0, x, p[f"{name}.2.weight"].view(-1, 1, 1) * x) if act else x


def norm(p, name, x, training):
    """Batch normalisation by the batch's statistics or by the running ones."""
    if training:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    else:
        mean, var = p[f"{name}.running_mean"], p[f"{name}.running_var"]
    x = (x - mean.view(-1, 1, 1)) / torch.sqrt(var.view(-1, 1, 1) + 1e-5)
    return x * p[f"{name}.weight"].view(-1, 1, 1) + p[f"{name}.bias"].view(-1, 1, 1)


def pointwise(p, name, x):
    """1x1 convolution with a bias."""
    return F.conv2d(x, p[f"{name}.weight"], p[f"{name}.bias"])


def whole_map(p, name, x):
    """Global depthwise convolution, (B, c, 1, 1)."""
    return (x * p[f"{name}.conv.weight"][:, 0]).sum((2, 3), keepdim=True)
