"""LAC written down as its paper describes it, and nothing else: every F_c exists, every loop is a loop.

Only the backbone is the model's own. The weights come from a `LacForAUDetection`, by name.
"""

import math
from types import SimpleNamespace

import torch
from torch import nn

from actionunits.roi_align import roi_align

UPPER, MIDDLE = {1, 2, 4, 5, 7}, {6, 9}  # Table I; AU 5 is ours


class PlainLac(nn.Module):
    """The network of a model, step by step. `forward` returns y'' and y', (B, m) or (B, T, m), or a loss."""

    def __init__(self, model, pool=None):
        super().__init__()
        self.model = model
        self.pool = pool or naive_roi_align

    def forward(self, pixel_values, au_centers=None, labels=None):
        self.seen = {"F": [], "M": [], "first": []}
        if pixel_values.ndim == 4:
            answers = [self.clip(picture[None])[0] for picture in pixel_values]
        else:
            answers = [self.clip(clip) for clip in pixel_values]
        answer = torch.stack(answers)
        first = torch.stack(self.seen["first"]).view_as(answer)
        if labels is None:
            return answer, first
        size = pixel_values.shape[-1]
        return self.loss(answer, first, au_centers, labels, size)

    def clip(self, frames):
        """(T, 3, H, W) -> y'' (T, m)."""
        states, answers = None, []
        maps = self.model.resnet(frames).last_hidden_state
        for t in range(len(frames)):
            vectors = self.frame(maps[t])
            if self.model.lstm is not None:
                states = states or [(torch.zeros_like(v), torch.zeros_like(v)) for v in vectors]
                states = [self.lstm_step(v, *s) for v, s in zip(vectors, states, strict=True)]
                vectors = [h for h, _ in states]
            heads = self.model.classifier.values()
            answers.append(torch.cat([head(v) for head, v in zip(heads, vectors, strict=True)]))
        return torch.stack(answers)

    def frame(self, F):  # noqa: N803
        """F (N, h, w) -> f' of every action unit."""
        N, h, w = F.shape
        M, first, f = [], [], []
        for head in self.model.localizer.values():
            w_c = head.weight[0]
            M.append(torch.nn.functional.cosine_similarity(w_c[:, None, None], F, dim=0))
            first.append(head(F.mean((1, 2)))[0])  # Eqs. 1-2
            F_c = M[-1] * F
            f.append(self.model.reduction(F_c.mean((1, 2))))
        self.seen["F"].append(F)
        self.seen["M"].append(torch.stack(M))
        self.seen["first"].append(torch.stack(first))
        if self.model.relations is None:
            return f
        related = f
        for layer in self.model.relations.layers:
            related = self.graph_layer(layer, related)
        if self.model.config.spatial == "graph":
            return related
        mixed = []
        for y, own, heard in zip(first, f, related, strict=True):
            alpha = abs(1 / (1 + torch.exp(-y)) - 0.5) / 0.5  # Eq. 10
            mixed.append(own * alpha + heard * (1 - alpha))  # Eq. 11
        return mixed

    def graph_layer(self, layer, v):
        aus = self.model.config.aus
        W, a = layer.value.weight.T, torch.cat([layer.target.weight[0], layer.source.weight[0]])
        result = []
        for i in range(len(v)):
            near = [j for j in range(len(v)) if j == i or region(aus[i]) != region(aus[j])]
            if self.model.config.graph_edges == "all":
                near = range(len(v))
            e = [torch.cat([v[i] @ W, v[j] @ W]) @ a for j in near]  # Eq. 7
            e = [torch.exp(torch.where(x > 0, x, 0.2 * x)) for x in e]
            total = sum(g / sum(e) * (v[j] @ W) for g, j in zip(e, near, strict=True))  # Eqs. 8-9
            result.append(torch.where(total > 0, total, torch.exp(total) - 1))
        return result

    def lstm_step(self, x, h, c):
        """Hochreiter and Schmidhuber's cell with a forget gate."""
        lstm = self.model.lstm
        gates = lstm.weight_ih_l0 @ x + lstm.bias_ih_l0 + lstm.weight_hh_l0 @ h + lstm.bias_hh_l0
        i, f, g, o = gates.chunk(4)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c

    def loss(self, answer, first, au_centers, labels, size):
        """Eq. 17 with its default coefficients, all labels known, and equal weights w."""
        m = labels.shape[-1]
        y = labels.reshape(-1, m)
        centers = au_centers.reshape(-1, m, 2, 2)
        config = self.model.config
        loc, act, l2g = [], [], []
        for s in range(len(y)):
            F, M = self.seen["F"][s], self.seen["M"][s]
            magnitude = F.square().sum(0).sqrt()
            for i in range(m):
                inside = []
                for x, down in centers[s, i].tolist():
                    half = config.roi_ratio * size / 2
                    box = (x - half, down - half, x + half, down + half)
                    box = [(edge + 0.5) * F.shape[-1] / size - 0.5 for edge in box]
                    pooled = self.pool(magnitude / magnitude.max(), box, config.roi_cells)
                    loc.append(1 - pooled.mean())  # Eq. 4
                    inside.append(self.pool(M[i], box, config.roi_cells).mean())
                    l2g.append((inside[-1] - M[i].mean()) ** 2)  # Eq. 6
                sign = -1 if y[s, i] == 1 else 1
                act.append(1 + sign * (inside[0] + inside[1]) / 2)  # Eq. 5
        parts = [torch.stack(values).mean() for values in (loc, act, l2g)]
        parts += [weighted_asymmetric(a.reshape(-1, m), y) for a in (first, answer)]
        return sum(eta * part for eta, part in zip((0.5, 0.5, 0.01, 0.5, 1.0), parts, strict=True))


class Features(nn.Module):
    """In place of the backbone, to measure the rest alone: the model then takes maps F for pictures."""

    def __init__(self):
        super().__init__()
        self.embedder, self.encoder = nn.Identity(), nn.Module()
        self.encoder.stages = nn.ModuleList()

    def forward(self, x):
        return SimpleNamespace(last_hidden_state=x)


def fast_roi_align(values, box, output_size):
    """Sampled by PyTorch, so that a benchmark does not measure Python."""
    return roi_align(values[None, None], values.new_tensor([[box]]), output_size)[0, 0, 0]


def weighted_asymmetric(logits, labels, weights=None):
    """Eqs. 12 and 16."""
    terms, total = [], 0.0
    for x, y in zip(logits, labels, strict=True):
        for i in range(len(y)):
            p, w = torch.sigmoid(x[i]), 1.0 if weights is None else float(weights[i])
            terms.append(-w * (y[i] * torch.log(p) + (1 - y[i]) * p * torch.log(1 - p)))
            total += w
    return sum(terms) / total


def region(au):
    return "upper" if au in UPPER else "middle" if au in MIDDLE else "lower"


def naive_roi_align(values, box, output_size, samples=2):
    """RoIAlign of one map (h, w) and one box, sample by sample, as Mask R-CNN's authors do it."""
    h, w = values.shape
    xmin, ymin, xmax, ymax = box
    cell_width, cell_height = (xmax - xmin) / output_size, (ymax - ymin) / output_size
    result = values.new_zeros(output_size, output_size)
    for row in range(output_size):
        for column in range(output_size):
            for i in range(samples):
                for j in range(samples):
                    y = ymin + cell_height * (row + (i + 0.5) / samples)
                    x = xmin + cell_width * (column + (j + 0.5) / samples)
                    result[row, column] += bilinear(values, x, y) / samples**2
    return result


def bilinear(values, x, y):
    h, w = values.shape
    if not (-1 <= x <= w and -1 <= y <= h):
        return values.new_zeros(())
    x, y = min(max(x, 0), w - 1), min(max(y, 0), h - 1)
    left, top = min(math.floor(x), max(w - 2, 0)), min(math.floor(y), max(h - 2, 0))
    dx, dy = x - left, y - top
    right, bottom = min(left + 1, w - 1), min(top + 1, h - 1)
    upper = (1 - dx) * values[top, left] + dx * values[top, right]
    lower = (1 - dx) * values[bottom, left] + dx * values[bottom, right]
    return (1 - dy) * upper + dy * lower
