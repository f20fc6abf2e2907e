"""AC2D written down as its paper and ResTv2 describe it, and nothing else: slow, large, easy to check.

Modules are named as in the authors' snapshots, so that `state_dict()` has a snapshot's keys. Every attention
matrix is materialised, branches run one after the other, losses are loops.
"""

import math

import torch
from torch import nn


class Ac2dReference(nn.Module):
    """The network without dropped paths. `forward` returns features, attentions and logits.

    Args:
        num_aus: m.
        dims, depths, heads, reductions: Of the three stages.
        stem: Channels of the first convolution.
        query_size: Outputs of W_Q and W_K.
        intervention_size: Outputs of W_X and W_Z.
    """

    def __init__(
        self,
        num_aus=12,
        dims=(64, 64, 64),
        depths=(1, 6, 3),
        heads=(1, 2, 4),
        reductions=(4, 2, 1),
        stem=32,
        mlp_ratio=4,
        query_size=512,
        intervention_size=64,
    ):
        super().__init__()
        blocks = [
            [Block(dims[s], heads[s], reductions[s], mlp_ratio) for _ in range(depths[s])] for s in range(2)
        ]

        def block():
            return Block(dims[2], heads[2], reductions[2], mlp_ratio)

        aus = range(num_aus)
        self.stem = Stem(stem, dims[0])
        self.stage1 = nn.ModuleList(blocks[0])
        self.patch_2 = Patch(dims[0], dims[1])
        self.stage2 = nn.ModuleList(blocks[1])
        self.aus_patch_3 = nn.ModuleList(Patch(dims[1], dims[2]) for _ in aus)
        self.aus_stage3_start = nn.ModuleList(
            nn.ModuleList(block() for _ in range(depths[2] - 2)) for _ in aus
        )
        self.aus_stage3_interm = nn.ModuleList(block() for _ in aus)
        self.aus_stage3_end = nn.ModuleList(block() for _ in aus)
        self.aus_norm = nn.ModuleList(nn.LayerNorm(dims[2], eps=1e-6) for _ in aus)
        self.aus_data_attention = nn.ModuleList(
            Intervention(dims[2], query_size, intervention_size) for _ in aus
        )
        self.aus_head = nn.ModuleList(nn.Linear(intervention_size, 1) for _ in aus)

    def forward(self, x, keys=None, values=None):
        """x (B, 3, l, l); keys and values (m, c) of the intervention, which is left out without them.

        Returns features (B, m, c), attentions (B, m, k, n, n) of the constrained blocks, logits (B, m).
        """
        x, size = self.stem(x)
        for block in self.stage1:
            x, _ = block(x, size)
        x, size = self.patch_2(x, size)
        for block in self.stage2:
            x, _ = block(x, size)
        features, attentions, logits = [], [], []
        for j, head in enumerate(self.aus_head):
            y, small = self.aus_patch_3[j](x, size)
            for block in self.aus_stage3_start[j]:
                y, _ = block(y, small)
            y, attention = self.aus_stage3_interm[j](y, small)
            y, _ = self.aus_stage3_end[j](y, small)
            f = self.aus_norm[j](y).mean(1)
            features.append(f)
            attentions.append(attention)
            if keys is not None:
                f = self.aus_data_attention[j](f, keys[j : j + 1], values[j : j + 1])
            logits.append(head(f))
        return torch.stack(features, 1), torch.stack(attentions, 1), torch.cat(logits, 1)


class Stem(nn.Module):
    def __init__(self, narrow, dim):
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(3, narrow, 3, 1, 1, bias=False),
            nn.BatchNorm2d(narrow),
            nn.ReLU(),
            nn.Conv2d(narrow, dim, 3, 2, 1, bias=False),
            nn.BatchNorm2d(dim),
            nn.ReLU(),
            nn.Conv2d(dim, dim, 1),
        )
        self.pos = PixelAttention(dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x):
        x = self.pos(self.proj(x))
        return self.norm(x.flatten(2).transpose(1, 2).contiguous()), x.shape[2:]


class Patch(nn.Module):
    def __init__(self, dim_in, dim):
        super().__init__()
        self.proj = nn.Conv2d(dim_in, dim, 3, 2, 1)
        self.pos = PixelAttention(dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x, size):
        batch, _, dim = x.shape
        x = x.transpose(1, 2).reshape(batch, dim, *size)
        x = self.pos(self.proj(x))
        return self.norm(x.flatten(2).transpose(1, 2).contiguous()), x.shape[2:]


class PixelAttention(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.pa_conv = nn.Conv2d(dim, dim, 3, 1, 1, groups=dim)

    def forward(self, x):
        return x * torch.sigmoid(self.pa_conv(x))


class Block(nn.Module):
    def __init__(self, dim, heads, reduction, mlp_ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, reduction)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(dim, mlp_ratio * dim), "fc2": nn.Linear(mlp_ratio * dim, dim)}
        )

    def forward(self, x, size):
        y, attention = self.attn(self.norm1(x), size)
        x = x + y
        hidden = nn.functional.gelu(self.mlp["fc1"](self.norm2(x)))
        return x + self.mlp["fc2"](hidden), attention


class Attention(nn.Module):
    """Eqs. 1 and 2."""

    def __init__(self, dim, heads, reduction):
        super().__init__()
        self.heads, self.reduction = heads, reduction
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        if reduction > 1:
            self.sr = nn.Conv2d(dim, dim, reduction + 1, reduction, reduction // 2, groups=dim)
            self.sr_norm = nn.LayerNorm(dim, eps=1e-6)
        self.up = nn.Sequential(
            nn.Conv2d(dim, dim * reduction**2, 3, 1, 1, groups=dim), nn.PixelShuffle(reduction)
        )
        self.up_norm = nn.LayerNorm(dim, eps=1e-6)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, size):
        batch, tokens, dim = x.shape
        q = self.q(x).reshape(batch, tokens, self.heads, dim // self.heads).permute(0, 2, 1, 3)
        if self.reduction > 1:
            image = self.sr(x.transpose(1, 2).reshape(batch, dim, *size))
            size = image.shape[2:]
            x = self.sr_norm(image.reshape(batch, dim, -1).transpose(1, 2))
        kv = self.kv(x).reshape(batch, -1, 2, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        k, v = kv[0], kv[1]
        attention = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(dim // self.heads), dim=-1)
        attended = (attention @ v).transpose(1, 2).reshape(batch, tokens, dim)
        image = v.transpose(1, 2).reshape(batch, -1, dim).transpose(1, 2).reshape(batch, dim, *size)
        up = self.up(image).reshape(batch, dim, -1).transpose(1, 2)
        return self.proj(attended + self.up_norm(up)), attention


class Intervention(nn.Module):
    """Eqs. 10, 12 and 13."""

    def __init__(self, dim, query_size, out):
        super().__init__()
        self.kmap = nn.Linear(dim, query_size)
        self.qmap = nn.Linear(dim, query_size)
        self.xmap = nn.Linear(dim, out)
        self.smap = nn.Linear(dim, out)

    def forward(self, f, keys, values):
        q, k = self.qmap(f), self.kmap(keys)
        alpha = torch.softmax(q @ k.T / math.sqrt(q.shape[-1]), dim=-1)
        return self.xmap(f) + self.smap(alpha @ values)


def predefined_attention(centers, map_size, image_size, sigma):
    """Eqs. 3-5 of one action unit, cell by cell: centers (2, 2) -> (map_size, map_size)."""
    gt = torch.zeros(map_size, map_size, dtype=torch.float64)
    for row in range(map_size):
        for column in range(map_size):
            for x, y in centers.tolist():
                a = math.floor(x / image_size * map_size + 0.5)
                b = math.floor(y / image_size * map_size + 0.5)
                value = math.exp(-((column - a) ** 2 + (row - b) ** 2) / (2 * sigma**2))
                gt[row, column] = max(float(gt[row, column]), value)
    return gt / gt.sum()


def attention_loss(attentions, centers, image_size, sigma=3.0, each=False):
    """Eq. 7, averaged over the batch: attentions (B, m, k, n, n), centers (B, m, 2, 2).

    With `each`, every channel of the attention is held to the target instead of their average (A^e).
    """
    batch, aus, heads, tokens, _ = attentions.shape
    total = 0.0
    for i in range(batch):
        for j in range(aus):
            gt = predefined_attention(centers[i, j], math.isqrt(tokens), image_size, sigma).flatten()
            gt = gt.to(attentions)
            channels = attentions[i, j].reshape(heads * tokens, tokens)  # Eq. 6: k x l/8 x l/8 channels
            channels = channels if each else channels.mean(0, keepdim=True)
            divergence = (torch.xlogy(gt, gt) - gt * torch.log(channels)).sum(-1).mean()
            total = total + divergence / tokens
    return total / (batch * aus)


def au_loss(logits, labels, rates):
    """Eq. 14, averaged over the batch: labels (B, m) in {0, 1}, rates (m,)."""
    w = [(1 / r) / sum(1 / s for s in rates) for r in rates]
    v = [(1 - r) / r for r in rates]
    total = 0.0
    for i in range(logits.shape[0]):
        for j in range(logits.shape[1]):
            p, y = torch.sigmoid(logits[i, j]), labels[i, j]
            total = total - w[j] * (v[j] * y * torch.log(p) + (1 - y) * torch.log(1 - p))
    return total / logits.shape[0]


class Ac2dPlain(nn.Module):
    """The plain implementation as a model with a loss, to measure against."""

    def __init__(self, num_aus=12, image_size=176):
        super().__init__()
        self.network, self.image_size = Ac2dReference(num_aus), image_size
        self.register_buffer("prototypes", torch.zeros(num_aus, 64))

    def forward(self, pixel_values, au_centers=None, labels=None):
        """Logits (B, m), and with labels the loss (Eqs. 7, 14 and 15 without occurrence rates)."""
        from actionunits.au_regions import gaussian_maps

        _, attentions, logits = self.network(pixel_values, self.prototypes, self.prototypes)
        if labels is None:
            return logits
        maps = gaussian_maps(au_centers, self.image_size // 8, self.image_size, 3.0, True).flatten(2)
        target = maps / maps.sum(-1, keepdim=True)
        average = attentions.flatten(2, 3).mean(2)  # (B, m, n)
        divergence = (torch.xlogy(target, target) - target * average.log()).mean()
        return nn.functional.binary_cross_entropy_with_logits(logits, labels) + 12800 * divergence
