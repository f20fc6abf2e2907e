"""GTLE-Net written down as its paper has it, and nothing else: one classifier after the other, all maps.

The encoder is InceptionResnetV1 with the names of facenet-pytorch, so that `state_dict()` has the keys of its
weight files; the rest copies its weights from a `GtleNetForAUDetection`.
"""

import copy
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn


class Basic(nn.Module):
    def __init__(self, i, o, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(i, o, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(o, eps=0.001)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x)))


class Block(nn.Module):
    """Inception block; `rows` are the branches' (output channels, kernel, padding)."""

    def __init__(self, channels, scale, rows, activate=True):
        super().__init__()
        self.count, self.scale, self.activate = len(rows), scale, activate
        for number, row in enumerate(rows):
            layers, i = [], channels
            for o, kernel, padding in row:
                layers.append(Basic(i, o, kernel, 1, padding))
                i = o
            self.add_module(f"branch{number}", layers[0] if len(layers) == 1 else nn.Sequential(*layers))
        self.conv2d = nn.Conv2d(sum(row[-1][0] for row in rows), channels, 1)

    def forward(self, x):
        y = torch.cat([getattr(self, f"branch{number}")(x) for number in range(self.count)], dim=1)
        y = self.conv2d(y) * self.scale + x
        return torch.relu(y) if self.activate else y


class Mixed6a(nn.Module):
    def __init__(self, i, w, p):
        super().__init__()
        self.branch0 = Basic(i, w(384), 3, 2, p)
        self.branch1 = nn.Sequential(
            Basic(i, w(192), 1), Basic(w(192), w(192), 3, 1, 1), Basic(w(192), w(256), 3, 2, p)
        )
        self.pool = nn.MaxPool2d(3, 2, p)

    def forward(self, x):
        return torch.cat([self.branch0(x), self.branch1(x), self.pool(x)], dim=1)


class Mixed7a(nn.Module):
    def __init__(self, i, w, p):
        super().__init__()
        self.branch0 = nn.Sequential(Basic(i, w(256), 1), Basic(w(256), w(384), 3, 2, p))
        self.branch1 = nn.Sequential(Basic(i, w(256), 1), Basic(w(256), w(256), 3, 2, p))
        self.branch2 = nn.Sequential(
            Basic(i, w(256), 1), Basic(w(256), w(256), 3, 1, 1), Basic(w(256), w(256), 3, 2, p)
        )
        self.pool = nn.MaxPool2d(3, 2, p)

    def forward(self, x):
        return torch.cat([self.branch0(x), self.branch1(x), self.branch2(x), self.pool(x)], dim=1)


class PlainInception(nn.Module):
    """InceptionResnetV1 up to its last map; `p` is 0 as published, or 1 to keep maps from shrinking.

    With `shallow`, up to the map h of a 16th of the picture's size.
    """

    def __init__(self, width=1.0, depths=(5, 10, 5), p=0, shallow=False):
        super().__init__()

        def w(channels):
            return max(1, round(width * channels))

        a, b, c = w(32), w(128), w(192)
        rows35 = [[(a, 1, 0)], [(a, 1, 0), (a, 3, 1)], [(a, 1, 0), (a, 3, 1), (a, 3, 1)]]
        rows17 = [[(b, 1, 0)], [(b, 1, 0), (b, (1, 7), (0, 3)), (b, (7, 1), (3, 0))]]
        rows8 = [[(c, 1, 0)], [(c, 1, 0), (c, (1, 3), (0, 1)), (c, (3, 1), (1, 0))]]
        middle = w(256) + w(384) + w(256)
        deep = middle + w(384) + 2 * w(256)
        self.conv2d_1a = Basic(3, w(32), 3, 2, p)
        self.conv2d_2a = Basic(w(32), w(32), 3, 1, p)
        self.conv2d_2b = Basic(w(32), w(64), 3, 1, 1)
        self.maxpool_3a = nn.MaxPool2d(3, 2, p)
        self.conv2d_3b = Basic(w(64), w(80), 1)
        self.conv2d_4a = Basic(w(80), w(192), 3, 1, p)
        self.conv2d_4b = Basic(w(192), w(256), 3, 2, p)
        self.repeat_1 = nn.Sequential(*(Block(w(256), 0.17, rows35) for _ in range(depths[0])))
        self.mixed_6a = Mixed6a(w(256), w, p)
        self.repeat_2 = nn.Sequential(*(Block(middle, 0.10, rows17) for _ in range(depths[1])))
        if not shallow:
            self.mixed_7a = Mixed7a(middle, w, p)
            self.repeat_3 = nn.Sequential(*(Block(deep, 0.20, rows8) for _ in range(depths[2])))
            self.block8 = Block(deep, 1.0, rows8, activate=False)

    def forward(self, x):
        for layer in self.children():
            x = layer(x)
        return x


class PlainResidual(nn.Module):
    def __init__(self, i, o, is_residual=True):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(i, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.norm2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.is_residual, self.shortcut = is_residual, None
        if is_residual and i != o:
            self.shortcut = nn.Sequential(nn.Conv2d(i, o, 1, bias=False), nn.BatchNorm2d(o))

    def forward(self, x):
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        if self.is_residual:
            y = y + (self.shortcut(x) if self.shortcut is not None else x)
        return torch.relu(y)


class PlainExtractor(nn.Module):
    """Residual blocks and upsampling, then heads one after the other: a list of N + 1 maps."""

    def __init__(self, i, o, widths, depth, count, activation, is_residual=True):
        super().__init__()
        layers = []
        for width in widths:
            for _ in range(depth):
                layers.append(PlainResidual(i, width, is_residual))
                i = width
            layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
        self.backbone = nn.Sequential(*layers)
        self.heads = nn.ModuleList(nn.Conv2d(i, o, 3, 1, 1) for _ in range(count))
        self.activation = activation

    def forward(self, h):
        h = self.backbone(h)
        return [self.activation(head(h)) for head in self.heads]


def plain_classifier(i, widths, kernel):
    """Layers of one g (Sec. 3.4), the last of them a 1x1 convolution without padding."""
    layers = OrderedDict()
    for number, o in enumerate(widths):
        layers[f"conv{number}"] = nn.Conv2d(i, o, kernel, 2, kernel // 2)
        layers[f"norm{number}"] = nn.BatchNorm2d(o)
        layers[f"elu{number}"] = nn.ELU()
        i = o
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["last"] = nn.Conv2d(i, 1, 1)
    return nn.Sequential(layers)


class PlainGtleNet(nn.Module):
    """GTLE-Net with every variant of Table 6. `forward` returns logits, or given labels the loss of Eq. 9.

    Args:
        config: `GtleNetConfig`.
        model: `GtleNetForAUDetection` to take the weights from; random ones without it.
    """

    def __init__(self, config, model=None):
        super().__init__()
        count, channels = len(config.au_labels) + 1, config.encoder.width_multiplier
        self.variant, self.weight = config.local_module, config.reconstruction_loss_weight
        self.reduction = config.reconstruction_reduction
        self.gee = PlainInception(channels, config.encoder.depths, p=1, shallow=True)
        h = sum(max(1, round(channels * c)) for c in (256, 384, 256))
        classifier_inputs = h
        if self.variant != "none":
            classifier_inputs = 3
            self.e_a = PlainExtractor(
                h, 3, config.feature_channels, config.feature_depth, count, torch.tanh, self.variant != "cnn"
            )
            self.d_r = nn.Conv2d(3 * count, 3, 3, 1, 1)
        if self.variant == "masked":
            self.e_m = PlainExtractor(h, 1, config.mask_channels, config.mask_depth, count, torch.sigmoid)
        widths, kernel = config.classifier_channels, config.classifier_kernel_size
        self.g = nn.ModuleList(plain_classifier(classifier_inputs, widths, kernel) for _ in range(count - 1))
        if model is not None:
            self.to(next(model.parameters()).dtype)
            self.copy(model)
            self.train(model.training)

    def forward(self, pixel_values, labels=None, au_centers=None):
        h = self.gee(pixel_values)  # Eq. 2
        if self.variant == "none":
            c = [h] * len(self.g)
        else:
            c = self.e_a(h)  # Eq. 3
            if self.variant == "masked":
                c = [m * f for m, f in zip(self.e_m(h), c, strict=True)]  # Eqs. 4-5
            y_rec = self.d_r(torch.cat(c, dim=1))  # Eq. 6
        y = torch.cat([g(c_i).flatten(1) for g, c_i in zip(self.g, c, strict=False)], dim=1)  # Eq. 7
        if labels is None:
            return y
        o = torch.sigmoid(y)  # Eq. 8
        loss = -(labels * o.log() + (1 - labels) * (1 - o).log()).mean()  # Eq. 10, over action units a mean
        if self.variant != "none":
            factor = pixel_values.shape[-1] // y_rec.shape[-1]
            picture = F.avg_pool2d(pixel_values, factor)
            total = 0.5 * ((y_rec - picture) ** 2).sum() / len(y)  # Eq. 11
            if self.reduction == "mean":
                total = total / y_rec[0, 0].numel()
            loss = loss + self.weight * total  # Eq. 9
        return loss

    def pairs(self, model):
        """Each module of this network beside the model's: both have the same parameters in the same order."""
        yield from zip(self.gee.children(), trunk_parts(model.trunk), strict=True)
        if self.variant != "none":
            blocks = [block for stage in model.feature_extractor.stages for block in stage]
            yield from zip(residuals(self.e_a), blocks, strict=True)
            yield from zip(self.e_a.heads, model.feature_extractor.heads.values(), strict=True)
        if self.variant == "masked":
            blocks = [block for stage in model.mask_extractor.stages for block in stage]
            yield from zip(residuals(self.e_m), blocks, strict=True)
            yield from zip(self.e_m.heads, model.mask_extractor.heads.values(), strict=True)
        yield from zip(self.g, model.classifiers.values(), strict=True)

    @torch.no_grad()
    def copy(self, model):
        for here, there in self.pairs(model):
            tensors = [*there.parameters(), *there.buffers()]
            for target, source in zip([*here.parameters(), *here.buffers()], tensors, strict=True):
                target.copy_(source.view_as(target))
        if self.variant != "none":
            convs = list(model.reconstruction.values())
            self.d_r.weight.copy_(torch.cat([conv.weight for conv in convs], dim=1))
            self.d_r.bias.copy_(convs[-1].bias)

    @torch.no_grad()
    def write_to(self, model):
        """Give the model the batch statistics of this network."""
        for here, there in self.pairs(model):
            for source, target in zip(here.buffers(), there.buffers(), strict=True):
                target.copy_(source)

    def gradients_like(self, model):
        """The gradients of this network under the names of the model's parameters."""
        twin = copy.deepcopy(model)
        twin.zero_grad()
        for here, there in self.pairs(twin):
            for source, target in zip(here.parameters(), there.parameters(), strict=True):
                target.grad = source.grad.view_as(target).clone()
        if self.variant != "none":
            for i, conv in enumerate(twin.reconstruction.values()):
                conv.weight.grad = self.d_r.weight.grad[:, 3 * i : 3 * i + 3].clone()
            conv.bias.grad = self.d_r.bias.grad.clone()
        return {name: p.grad for name, p in twin.named_parameters()}


def residuals(extractor):
    return [layer for layer in extractor.backbone if isinstance(layer, PlainResidual)]


def trunk_parts(trunk):
    """The modules of an `InceptionTrunk` in the order of `PlainInception`'s."""
    return [*trunk.stem, trunk.stage1, trunk.reduction, trunk.stage2]
