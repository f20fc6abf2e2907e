"""AUFormer written down as its paper has it, and nothing else: one expert after the other, in full width.

Every expert is a module of its own that computes its knowledge K_i in full, (B, T, D), and hands that on;
[CLS] goes through the convolutions as a picture of one pixel; the context-aware operator sums over a list of
neighbours.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from actionunits.models.auformer.modeling_auformer import expert_codes


class PlainExpert(nn.Module):
    """Mixture-of-knowledge expert (Sec. 3.3): tokens (B, 1 + H W, D) -> the same."""

    def __init__(self, size, channels, dilations, neighborhood, masked=False):
        super().__init__()
        self.neighborhood, self.masked = neighborhood, masked
        self.down = nn.Conv2d(size, channels, 1)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.mrf = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=r, dilation=r) for r in dilations)
        self.fuse = nn.Conv2d(len(dilations) * channels, channels, 1) if dilations else None
        if neighborhood:
            self.query, self.key, self.value = (nn.Conv2d(channels, channels, 1) for _ in range(3))
        self.up = nn.Conv2d(channels, size, 1)

    def forward(self, tokens):
        side = math.isqrt(tokens.shape[1] - 1)
        cls = tokens[:, :1].transpose(1, 2).unsqueeze(-1)
        patches = tokens[:, 1:].transpose(1, 2).unflatten(-1, (side, side))
        knowledge = [self.on_picture(picture).flatten(2) for picture in (cls, patches)]
        return torch.cat(knowledge, dim=-1).transpose(1, 2)

    def on_picture(self, picture):
        basic = self.conv(F.gelu(self.down(picture)))
        total = basic
        if self.fuse is not None:
            total = total + self.fuse(torch.cat([conv(basic) for conv in self.mrf], dim=1))
        if self.neighborhood:
            total = total + self.context(basic)
        return self.up(F.gelu(total))

    def context(self, basic):
        """Eq. 5."""
        query, key, value = self.query(basic), self.key(basic), self.value(basic)
        height, width = basic.shape[-2:]
        reach = self.neighborhood // 2
        result = torch.zeros_like(basic)
        for row in range(height):
            for column in range(width):
                scores, values = [], []
                for y in range(row - reach, row + reach + 1):
                    for x in range(column - reach, column + reach + 1):
                        if 0 <= y < height and 0 <= x < width:
                            scores.append(
                                query[..., row, column] * key[..., y, x] / math.sqrt(basic.shape[1])
                            )
                            values.append(value[..., y, x])
                        elif not self.masked:
                            scores.append(torch.zeros_like(query[..., row, column]))
                            values.append(torch.zeros_like(query[..., row, column]))
                weights = torch.softmax(torch.stack(scores), dim=0)
                result[..., row, column] = (weights * torch.stack(values)).sum(0)
        return result


class FastContextExpert(PlainExpert):
    """The same with the usual way to write Eq. 5 in PyTorch, `unfold`: what the model is timed against."""

    def context(self, basic):
        query, size = self.query(basic), self.neighborhood
        key, value = (
            F.unfold(layer(basic), size, padding=size // 2).unflatten(1, (basic.shape[1], size**2))
            for layer in (self.key, self.value)
        )
        weights = torch.softmax(query.flatten(2).unsqueeze(2) * key / math.sqrt(basic.shape[1]), dim=2)
        return (weights * value).sum(2).unflatten(-1, basic.shape[-2:])


class PlainAUFormer(nn.Module):
    """The network around a `ViTModel`.

    `forward` returns logits, the experts' logits and each expert's last knowledge; given labels, the loss of
    Eq. 9 with weights and exponents of 1 and a margin of 0.1, as a default configuration has it.

    Args:
        model: `AUFormerForAUDetection` with experts; its backbone is shared, other weights are copied.
        expert_class: `PlainExpert` or `FastContextExpert`.
    """

    def __init__(self, model, expert_class=PlainExpert):
        super().__init__()
        config = model.config
        self.vit = model.vit
        self.labels = list(model.experts)
        self.groups = nn.ModuleList(
            nn.ModuleList(
                expert_class(
                    config.backbone_config.hidden_size,
                    config.expert_channels,
                    config.mrf_dilations,
                    config.ca_neighborhood,
                    config.ca_border == "masked",
                )
                for _ in self.labels
            )
            for _ in range(config.num_generations)
        )
        self.classifiers = nn.ModuleList(
            nn.Linear(config.backbone_config.hidden_size, 1) for _ in self.labels
        )
        self.heads = nn.ModuleList(nn.Linear(config.backbone_config.hidden_size, 1) for _ in self.labels)
        self.to(next(model.classifier.parameters()))
        self.copy(model)

    @torch.no_grad()
    def copy(self, model):
        for target, source in self.pairs(dict(model.named_parameters())):
            target.copy_(source.view_as(target))

    def gradients_like(self, model):
        """The gradients of this network under the names of the model's parameters."""
        gradients = {
            name: torch.zeros_like(p) for name, p in model.named_parameters() if not name.startswith("vit.")
        }
        for target, place in self.pairs(gradients):
            if target.grad is not None:
                place.copy_(target.grad.view_as(place))
        return gradients

    def pairs(self, tensors):
        """Each parameter of this network beside its place, a view of one of the model's tensors by name."""
        for number, label in enumerate(self.labels):
            yield self.classifiers[number].weight, tensors[f"classifier.{label}.weight"]
            yield self.classifiers[number].bias, tensors[f"classifier.{label}.bias"]
            yield self.heads[number].weight, tensors[f"expert_classifier.{label}.weight"]
            yield self.heads[number].bias, tensors[f"expert_classifier.{label}.bias"]
            for generation, group in enumerate(self.groups):
                places = {
                    name: tensors[f"experts.{label}.{name}"][generation]
                    for name in self.names(tensors, label)
                }
                yield from expert_pairs(group[number], places)

    @staticmethod
    def names(tensors, label):
        prefix = f"experts.{label}."
        return [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]

    def forward(self, pixel_values, labels=None, au_centers=None):
        tokens, knowledge = self.vit.embeddings(pixel_values), [0.0] * len(self.labels)
        for number, layer in enumerate(self.vit.layers):
            x = layer.layernorm_before(tokens)
            knowledge = self.collaborate(self.groups[2 * number], x, knowledge)
            tokens = tokens + layer.attention(x)[0] + sum(knowledge) / len(knowledge)  # Eqs. 3-4
            x = layer.layernorm_after(tokens)
            knowledge = self.collaborate(self.groups[2 * number + 1], x, knowledge)
            tokens = tokens + layer.mlp(x) + sum(knowledge) / len(knowledge)
        features = self.vit.layernorm(tokens)[:, 0]
        logits = torch.cat([classifier(features) for classifier in self.classifiers], dim=1)
        expert_logits = [head(k[:, 0]) for head, k in zip(self.heads, knowledge, strict=True)]
        expert_logits = torch.cat(expert_logits, dim=1)
        if labels is not None:
            return mdwa(logits, labels) + dice(logits, labels) + mdwa(expert_logits, labels)
        return logits, expert_logits, knowledge

    @staticmethod
    def collaborate(group, x, knowledge):
        return [expert(x + k) for expert, k in zip(group, knowledge, strict=True)]  # Eq. 2


class ExpertsAlone(nn.Module):
    """The experts without the transformer: every group reads the patches of the picture as its tokens.

    Given labels, which it does not look at, `forward` returns a number to differentiate.
    """

    def __init__(self, model, plain):
        super().__init__()
        self.config = model.config
        self.groups = PlainAUFormer(model, FastContextExpert).groups if plain else None
        self.experts = None if plain else model.experts

    def forward(self, pixel_values, labels=None, au_centers=None):
        tokens = pixel_values.reshape(len(pixel_values), self.config.map_size**2, -1)
        tokens = torch.cat([tokens[:, :1], tokens], dim=1)
        total, knowledge, codes = torch.zeros_like(tokens), None, None
        for group in self.groups if self.experts is None else self.experts.fold():
            if self.experts is None:
                inputs = [0.0] * len(group) if knowledge is None else knowledge
                knowledge = PlainAUFormer.collaborate(group, tokens, inputs)
                total = total + sum(knowledge) / len(knowledge)
            else:
                codes = expert_codes(tokens, codes, group, self.config, dropout=0.0)
                total = total + F.linear(codes, group.up, group.up_bias)
        return total if labels is None else total.square().mean()


def mdwa(logits, labels, margin=0.1):
    p = torch.sigmoid(logits)
    p_m = (p - margin).clamp(min=0)
    return -(labels * p.log() + (1 - labels) * p_m * (1 - p_m).log()).mean()


def dice(logits, labels):
    p = torch.sigmoid(logits)
    return (1 - (2 * labels * p + 1) / (labels**2 + p**2 + 1)).mean()


def expert_pairs(expert, places):
    """Parameters of a `PlainExpert` beside their places in a generation of an `ExpertLine`."""
    single = {"down": expert.down, "conv": expert.conv, "up": expert.up}
    if expert.fuse is not None:
        single["fuse"] = expert.fuse
        for branch, conv in enumerate(expert.mrf):
            yield conv.weight, places["mrf_weight"][branch]
            yield conv.bias, places["mrf_bias"][branch]
    for name, layer in single.items():
        yield layer.weight, places[f"{name}_weight"]
        yield layer.bias, places[f"{name}_bias"]
    if expert.neighborhood:
        for number, layer in enumerate((expert.query, expert.key, expert.value)):
            channels = slice(number * layer.out_channels, (number + 1) * layer.out_channels)
            yield layer.weight, places["qkv_weight"][channels]
            yield layer.bias, places["qkv_bias"][channels]
