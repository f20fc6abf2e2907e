"""LAC, Lock and Check: class weights localise action units, then a graph and an LSTM relate them.

Huang, Gao, Cai, Chen, Hu, Gao, Gao: Lock and Check: A novel approach for facial action unit recognition. IEEE
Transactions on Affective Computing (manuscript of 2025). Equations, tables and figures below are those of the
paper; the README beside this file lists what it leaves open, and corrections of its formulas.

    lock   picture -> ResNet -> F (N, h, w)        y' = w_c mean(F) + b           (Eqs. 1-3)
                                                   M  = cos(w_c, F) (m, h, w)
    check  f_c = W mean(M * F) (m, d)              alpha = |sigmoid(y') - 0.5| / 0.5  (Eq. 10)
           f'  = alpha f_c + (1 - alpha) GAT(f_c)  (Eq. 11)
           f'' = LSTM over the frames of f'        y'' = w'' f'' + b''

Shapes: B pictures or clips, T frames per clip, S = B (* T) pictures in total, m action units, N channels of
the backbone's map of h x w cells, d the size of an AU vector.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ResNetModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import can_return_tuple

from actionunits.action_units import UNKNOWN
from actionunits.au_regions import roi_boxes
from actionunits.losses import occurrence_weights, weighted_asymmetric_loss, weighted_au_loss
from actionunits.modeling_au import (
    AUClassifier,
    AUPreTrainedModel,
    module_names,
    on_device,
    on_one_device,
    or_default,
    parameter_of,
    sum_over_processes,
)
from actionunits.modeling_outputs import AUDetectionOutput
from actionunits.roi_align import roi_align

from .configuration_lac import LacConfig
from .losses_lac import activation_loss, consistency_loss, localization_loss
from .stream import LacStream

State = tuple[Tensor, Tensor]
"""Hidden and cell state of the LSTM, (1, B * m, d) each."""


class LacForAUDetection(AUPreTrainedModel):
    """LAC (Fig. 2) for pictures and clips: a clip of one frame is a picture.

    Training needs `au_centers`, so landmarks; detection does not.

    The dynamic loss (Eqs. 13-16) weights action units by statistics of the epochs before, which the model
    gathers in training. Custom training loops must call `end_of_epoch`; `training/train.py` does, and the
    Trainer with `actionunits.callbacks.EndOfEpochCallback`.

    Made from a configuration, the backbone is random; `from_backbone` loads a pretrained one.

    Example:
        >>> model = LacForAUDetection.from_backbone("microsoft/resnet-50", aus=[1, 2, 4, 6, 12])
        >>> model(torch.zeros(2, 16, 3, 224, 224)).logits.shape  # two clips
        torch.Size([2, 16, 5])
        >>> stream = model.stream()  # a video of any length
    """

    config: LacConfig
    _no_split_modules = [
        *("ResNetEmbeddings", "ResNetBasicLayer", "ResNetBottleNeckLayer"),
        *("AUClassifier", "AUGraph"),
    ]
    _keep_in_fp32_modules_strict = ["epoch_weights$", "epoch_sums$"]

    def __init__(self, config: LacConfig):
        super().__init__(config)
        self.resnet = ResNetModel(config.resnet_config)
        self.stage = CheckpointedStage()
        self.localizer = AUClassifier(config, config.num_features)  # w_c
        self.reduction = self.relations = self.lstm = self.classifier = None
        if config.state_detection:
            size = config.hidden_size
            self.reduction = nn.Linear(config.num_features, size)
            self.relations = None if config.spatial == "none" else AUGraph(config)
            self.lstm = None if config.temporal == "none" else nn.LSTM(size, size, batch_first=True)
            self.classifier = AUClassifier(config, size)
        self.statistics = nn.ModuleDict({name: EpochStatistics() for name in module_names(config)})
        self.post_init()

    @classmethod
    def from_backbone(
        cls,
        backbone_name_or_path: str | Path,
        backbone_revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        **config_kwargs: Any,
    ) -> "LacForAUDetection":
        """Make a model on a pretrained ResNet.

        Args:
            backbone_name_or_path: Folder or Hub name of a checkpoint of type "resnet", whatever head it has.
            backbone_revision: Branch, tag or commit on the Hub.
            dtype: Type of the weights.
            config_kwargs: Fields of `LacConfig`, such as `aus`.

        Raises:
            ValueError: The checkpoint is not a ResNet, or lacks weights.
        """
        config = LacConfig.from_backbone(str(backbone_name_or_path), backbone_revision, **config_kwargs)
        return cls._from_config(config, dtype=dtype)

    def load_named_parts(self) -> None:
        """Load the backbone if the configuration names one."""
        if self.config.backbone_name_or_path is not None:
            self.load_backbone()

    @torch.no_grad()
    def load_backbone(self) -> None:
        """Load the backbone's weights from the checkpoint that the configuration names.

        Raises:
            ValueError: The checkpoint lacks weights of this backbone.
        """
        name, revision = self.config.backbone_name_or_path, self.config.backbone_revision or "main"
        loaded: Any = ResNetModel.from_pretrained(name, revision=revision, output_loading_info=True)
        source, info = loaded
        weights, here = source.state_dict(), self.resnet.state_dict()
        wrong = [key for key in here if key not in weights or weights[key].shape != here[key].shape]
        if wrong := sorted({*info["missing_keys"], *wrong}):
            raise ValueError(
                f"{name} is not the backbone that the configuration describes: it lacks {wrong[0]} and "
                f"{len(wrong) - 1} more. Use LacForAUDetection.from_backbone, which reads the checkpoint's "
                "own configuration."
            )
        self.resnet.load_state_dict(weights)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, EpochStatistics):
            for buffer in module.buffers():
                init.zeros_(buffer)
        elif isinstance(module, (nn.Linear, nn.LSTM)):
            fan_in = module.hidden_size if isinstance(module, nn.LSTM) else module.in_features
            for name, parameter in module.named_parameters():
                bound = 0.0 if "bias" in name else fan_in**-0.5  # PyTorch's, except for biases
                init.uniform_(parameter, -bound, bound)
        # The backbone initialises itself.

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        au_centers: Tensor | None = None,
        labels: Tensor | None = None,
        output_au_attentions: bool = False,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> AUDetectionOutput:
        """Detect action units.

        Args:
            pixel_values: (B, 3, H, W) normalised aligned faces, or clips (B, T, 3, H, W), frames in
                temporal order. For clips, all other shapes have T after B, too.
            au_centers: (B, m, 2, 2) the two centres (x, y) of every action unit, in pixels of `pixel_values`
                (origin: centre of the top-left pixel). Needed with `labels`, if the loss has RoIs.
            labels: (B, m) occurrences in [0, 1], or -1 for unknown; adds the loss (Eq. 17).
            output_au_attentions: Return `au_attentions`, (1 + M) / 2 with the similarity M = cos(w_c, F) of
                every position to the action unit; and `au_evidence`, contributions to y' by position.
            output_hidden_states: Return the feature maps of the backbone's stem and stages.
            kwargs: Ignored, so that all that the image processor returns can be passed on.

        Returns:
            With state detection, `logits` are y'', and `branch_logits` (B, 2, m) are y'' and y'.

        Raises:
            ValueError: Centres are missing, or a shape is wrong.
        """
        batch = pixel_values.shape[:-3]
        if len(batch) not in (1, 2):
            raise ValueError(
                f"pixel_values of shape {tuple(pixel_values.shape)} are neither pictures (B, 3, H, W) nor "
                "clips (B, T, 3, H, W)."
            )
        want_states = or_default(output_hidden_states, self.config.output_hidden_states)
        pictures = pixel_values.flatten(0, -4)
        locked = self._lock(pictures)
        logits = locked.logits
        if self.config.state_detection:
            vectors = self._relate(locked).unflatten(0, batch)
            clips = vectors if len(batch) == 2 else vectors[:, None]
            logits = on_device(self.check(clips)[0].flatten(0, 1), locked.logits.device)
        loss = None
        if labels is not None:
            if labels.shape != (*batch, logits.shape[-1]):
                expected = (*batch, logits.shape[-1])
                raise ValueError(f"labels have shape {tuple(labels.shape)}, the logits {expected}.")
            size = pictures.shape[-2:]
            loss = self._loss(logits, locked, labels.flatten(0, -2), self._boxes(au_centers, batch, size))
        both = torch.stack([logits, locked.logits], dim=1) if self.config.state_detection else None
        outputs = {"logits": logits, "branch_logits": both}
        if output_au_attentions:
            outputs |= locked.attentions()
        return AUDetectionOutput(
            loss=loss,
            **{name: None if x is None else x.unflatten(0, batch) for name, x in outputs.items()},
            hidden_states=_states_of(locked.states, batch) if want_states else None,
        )

    def stream(self, clip_length: int | None | Literal["default"] = "default", overlap: int = 0) -> LacStream:
        """Return a detector for videos of any length, some frames at a time; see `LacStream`.

        Args:
            clip_length: Frames after which the LSTM is reset; "default" is the configuration's `clip_length`,
                as in the paper; None for no resets.
            overlap: Frames before a clip that warm up its LSTM.
        """
        length = self.config.clip_length if isinstance(clip_length, str) else clip_length
        return LacStream(self, length, overlap)

    def spatial_vectors(self, pixel_values: Tensor) -> Tensor:
        """Return f' (S, m, d) of pictures (S, 3, H, W), before the temporal module.

        Raises:
            ValueError: The model has no state detection.
        """
        if not self.config.state_detection:
            raise ValueError("With state_detection=False the model has no AU vectors.")
        return self._relate(self._lock(pixel_values))

    def check(self, vectors: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        """Classify the frames of clips: f' (B, T, m, d) -> logits y'' (B, T, m), and the LSTM's state.

        Args:
            vectors: f' of frames in temporal order.
            state: The LSTM's state after the frames before; zeros by default.
        """
        b, t, m, d = vectors.shape
        if self.lstm is not None:
            sequences, state = self._remember(vectors.transpose(1, 2).reshape(b * m, t, d), state)
            vectors = sequences.view(b, m, t, d).transpose(1, 2)  # f''
        vectors, weight, bias = on_one_device([vectors, self.classifier.weight, self.classifier.bias])  # type: ignore[union-attr]
        return (vectors * weight).sum(-1) + bias, state

    def _remember(self, sequences: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Run the LSTM over sequences (B * m, T, d)."""
        assert self.lstm is not None
        if sequences.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return self.lstm(sequences, state)
        with torch.autocast("cpu", enabled=False):  # CPUs without AVX-512 have no LSTM in bf16
            return self.lstm(sequences.to(self.dtype), state)

    def end_of_epoch(self, batches: Any = None) -> None:
        """Update the loss weights by the counts of the epoch (Eqs. 13-14).

        Call it in every process, after the last training step and before evaluation. Without training steps
        since the last call it has no effect.

        Args:
            batches: Not used; an argument of this method in all models.
        """
        statistics = self._statistics
        sums = torch.stack(on_one_device(each.epoch_sums for each in statistics))  # (m, 3)
        if not sums.any():
            return
        config = self.config
        momentum = sums.new_tensor([config.difficulty_momentum, config.distribution_momentum])
        updated = momentum * self._epoch_weights() + (1 - momentum) * self._inverse_shares(sums)
        for each, weights in zip(statistics, updated, strict=True):
            each.epoch_weights.copy_(weights)
            each.epochs.add_(1)
        self.break_off_epoch()

    def break_off_epoch(self, batches: Any = None) -> None:
        """Discard the counts of an interrupted epoch; the loss weights remain."""
        for each in self._statistics:
            each.epoch_sums.zero_()

    @property
    def loss_weights(self) -> Tensor | None:
        """Weights w (m,) of action units in the current epoch's loss, with a mean of about 1; None for CE."""
        if self.config.au_loss_type == "cross_entropy":
            return None
        if self.config.au_loss_type == "weighted":
            return self._initial_weights()
        share, weights = self.config.difficulty_share, self._epoch_weights()
        return share * weights[:, 0] + (1 - share) * weights[:, 1]  # Eq. 15

    def _lock(self, pictures: Tensor) -> "LockedAUs":
        """Localise action units in pictures (S, 3, H, W): Eqs. 1-3."""
        states = [self.resnet.embedder(self.in_own_type(pictures))]
        for stage in self.resnet.encoder.stages:
            states.append(self.stage(states[-1], stage.__call__))
        features, weight, bias = on_one_device([states[-1], self.localizer.weight, self.localizer.bias])
        scores = F.conv2d(features, weight[:, :, None, None])  # w_c F (S, m, h, w)
        at_least_single = torch.promote_types(features.dtype, torch.float32)
        magnitude = torch.linalg.vector_norm(features, dim=1, dtype=at_least_single)
        lengths = magnitude[:, None] * torch.linalg.vector_norm(weight, dim=1, dtype=at_least_single).view(
            -1, 1, 1
        )
        similarity = scores / lengths.clamp(min=1e-8)
        return LockedAUs(
            features=features,
            magnitude=magnitude,
            scores=scores,
            similarity=similarity,
            logits=scores.mean((2, 3)) + bias,  # Eq. 2, plus a bias
            states=tuple(states),
        )

    def _relate(self, locked: "LockedAUs") -> Tensor:
        """Return the related AU vectors f' (S, m, d): Eqs. 7-11."""
        features = locked.features.flatten(2)
        similarity = locked.similarity.to(features.dtype).flatten(2)
        pooled = similarity @ features.mT / features.shape[-1]  # GAP of F_c = M * F
        vectors = self.reduction(pooled)  # type: ignore[misc]  # f_c
        if self.relations is None:
            return vectors
        related = self.relations(vectors)
        if self.config.spatial == "graph":
            return related
        confidence = ((torch.sigmoid(locked.logits) - 0.5).abs() / 0.5)[..., None]  # Eq. 10
        vectors, related, confidence = on_one_device([vectors, related, confidence])
        return vectors * confidence + related * (1 - confidence)  # Eq. 11

    def _loss(self, logits: Tensor, locked: "LockedAUs", labels: Tensor, boxes: Tensor | None) -> Tensor:
        """Eq. 17, for labels (S, m) and boxes (S, m, 2, 4) relative to the picture."""
        config = self.config
        loss = config.answer_weight * self.au_loss(logits, labels)
        if config.state_detection:
            loss = loss + config.first_answer_weight * self.au_loss(locked.logits, labels)
        if boxes is not None:
            magnitudes, similarities = locked.pool(boxes.to(logits.device), config.roi_cells)
            known = labels.to(similarities)
            loss = loss + config.localization_weight * localization_loss(magnitudes, known)
            activation = activation_loss(similarities, known, config.balance_activation)
            loss = loss + config.activation_weight * activation
            overall = locked.similarity.mean((2, 3))
            loss = loss + config.consistency_weight * consistency_loss(similarities, overall, known)
        if self.training and config.au_loss_type == "dynamic":
            self._observe(logits, labels)
        return loss

    def au_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return L_DWA, L_WA or L_CE (Eqs. 12 and 16, with the minus that a loss needs)."""
        weights = self.loss_weights
        if weights is None:
            return weighted_au_loss(logits, labels)
        return weighted_asymmetric_loss(logits, labels, weights)

    @torch.no_grad()
    def _observe(self, logits: Tensor, labels: Tensor) -> None:
        """Count known, occurring, and detected occurring labels (S, m) of a training batch."""
        labels = labels.to(logits.device)
        known = labels != UNKNOWN
        occurring = torch.where(known, labels, 0).float()
        detected = occurring * (logits > 0)
        counts = torch.stack([known.float(), occurring, detected], dim=-1).sum(0)  # (m, 3)
        # Summed at every step, as checkpoints save the buffers of one process.
        for each, count in zip(self._statistics, sum_over_processes(counts), strict=True):
            each.epoch_sums.add_(count.to(each.epoch_sums.device))

    def _epoch_weights(self) -> Tensor:
        """Return w_diff and w_dist (m, 2) of the current epoch; new action units have the initial ones."""
        weights, epochs = (
            torch.stack(on_one_device(parameter_of(each, name) for each in self._statistics))
            for name in ("epoch_weights", "epochs")
        )
        weights, is_new = weights.float(), epochs == 0
        return torch.where(is_new[:, None], self._initial_weights()[:, None], weights)

    def _initial_weights(self) -> Tensor:
        """Return weights (m,) by the occurrence rates of the training set, mean 1."""
        rates = self.config.au_occurrence_rates
        weights = torch.ones(len(self._statistics)) if rates is None else occurrence_weights(rates)[0]
        return (weights / weights.mean()).to(parameter_of(self._statistics[0], "epoch_sums").device)

    def _inverse_shares(self, sums: Tensor) -> Tensor:
        """Return 1 / recall and 1 / rate (m, 2) of an epoch's counts (m, 3), both with mean 1.

        Where they are undefined, without occurrences or labels, the current weights are returned.
        """
        known, occurring, detected = sums.float().unbind(-1)
        shares = torch.stack([detected / occurring, occurring / known], dim=-1)
        can_tell = torch.stack([occurring, known], dim=-1) > 0
        inverse = torch.where(can_tell, 1 / shares.clamp(min=self.config.share_floor), 0.0)
        mean = inverse.sum(0) / can_tell.sum(0).clamp(min=1)
        return torch.where(can_tell, inverse / mean.clamp(min=1), self._epoch_weights())

    @property
    def _statistics(self) -> list["EpochStatistics"]:
        return list(self.statistics.values())  # type: ignore[arg-type]

    def _boxes(self, au_centers: Tensor | None, batch: torch.Size, size: torch.Size) -> Tensor | None:
        """Return regions of interest (S, m, 2, 4): xmin, ymin, xmax, ymax relative to the picture."""
        config = self.config
        if not config.needs_rois:
            return None
        if au_centers is None:
            raise ValueError(
                "LAC's loss has regions around the centres of the action units, but au_centers is "
                "missing. Pass all that the image processor or collator returns, model(**inputs), leave out "
                "labels, or train with localization_weight, activation_weight and consistency_weight of 0."
            )
        self.check_centers(au_centers, batch)
        centers = au_centers.flatten(0, -4).to(torch.promote_types(au_centers.dtype, torch.float32))
        height, width = size
        # Relative to the picture's edges, for maps of any size.
        return roi_boxes(centers + 0.5, config.roi_ratio * width) / centers.new_tensor([width, height] * 2)


class LockedAUs(NamedTuple):
    """Results of the lock step.

    Attributes:
        features: F (S, N, h, w).
        magnitude: |F| (S, h, w), at least float32.
        scores: w_c F (S, m, h, w).
        similarity: M = cos(w_c, F) (S, m, h, w), at least float32.
        logits: y' (S, m).
        states: Maps of the backbone's stem and stages.
    """

    features: Tensor
    magnitude: Tensor
    scores: Tensor
    similarity: Tensor
    logits: Tensor
    states: tuple[Tensor, ...]

    def attentions(self) -> dict[str, Tensor]:
        """Return the maps (S, m, h, w) of `output_au_attentions`."""
        cells = self.scores.shape[-2] * self.scores.shape[-1]
        return {
            "au_attentions": ((1 + self.similarity) / 2).clamp(0, 1),
            "au_evidence": self.scores / cells,
        }

    def pool(self, boxes: Tensor, cells: int) -> tuple[Tensor, Tensor]:
        """Return the means (S, m, 2) of |F|, relative to its maximum, and of M in boxes (S, m, 2, 4).

        Boxes are relative to the picture; each action unit's M is pooled in its own two boxes.
        """
        h, w = self.magnitude.shape[-2:]
        boxes = boxes * boxes.new_tensor([w, h] * 2) - 0.5
        peak = self.magnitude.amax((1, 2), keepdim=True).clamp(min=1e-8)
        magnitudes = roi_align((self.magnitude / peak)[:, None], boxes.flatten(1, 2), cells)
        similarities = roi_align(self.similarity.flatten(0, 1)[:, None], boxes.flatten(0, 1), cells)
        means = (pooled.mean((2, 3, 4)) for pooled in (magnitudes, similarities))
        return tuple(mean.view(boxes.shape[:3]) for mean in means)  # type: ignore[return-value]


class AUGraph(nn.Module):
    """Graph attention between action units (Velickovic et al., ICLR 2018): f_c (S, m, d) -> the same."""

    def __init__(self, config: LacConfig):
        super().__init__()
        size = config.hidden_size
        self.layers = nn.ModuleList(GraphAttentionLayer(size) for _ in range(config.num_graph_layers))
        self.neighbors = neighbors(config)

    def forward(self, vectors: Tensor) -> Tensor:
        """Return the vectors after all layers."""
        is_neighbor = torch.tensor(self.neighbors, device=vectors.device)
        for layer in self.layers:
            vectors = layer(vectors, is_neighbor)
        return vectors


class GraphAttentionLayer(nn.Module):
    """Graph attention layer (Eqs. 7-9).

    a [v_i W || v_j W] is computed as the sum of products with the two halves of a, without forming pairs.
    """

    def __init__(self, size: int):
        super().__init__()
        self.value = nn.Linear(size, size, bias=False)  # W
        self.target = nn.Linear(size, 1, bias=False)  # the half of a on v_i W
        self.source = nn.Linear(size, 1, bias=False)  # the half on v_j W

    def forward(self, vectors: Tensor, is_neighbor: Tensor) -> Tensor:
        """Vectors (S, m, d), and a mask (m, m) of the neighbours j of i -> (S, m, d)."""
        values = self.value(vectors)
        edges = F.leaky_relu(self.target(values) + self.source(values).mT, 0.2)  # Eq. 7
        weights = edges.masked_fill(~is_neighbor, -torch.inf).softmax(-1)  # Eq. 8
        return F.elu(weights @ values)  # Eq. 9


class EpochStatistics(nn.Module):
    """Statistics of an action unit for the dynamic loss (Eqs. 13-14)."""

    epoch_weights: Tensor
    epoch_sums: Tensor
    epochs: Tensor

    def __init__(self):
        super().__init__()
        # w_diff and w_dist, from `epochs` epochs; known, occurring and detected labels of the current one.
        self.register_buffer("epoch_weights", torch.zeros(2, dtype=torch.float32))
        self.register_buffer("epochs", torch.zeros((), dtype=torch.int64))
        self.register_buffer("epoch_sums", torch.zeros(3, dtype=torch.float32))


class CheckpointedStage(GradientCheckpointingLayer):
    """Runs a stage of the backbone with gradient checkpointing, which transformers' ResNet lacks.

    The stage is passed as a function, as Accelerate moves modules among the arguments to another device.
    """

    def forward(self, x: Tensor, stage: Callable[[Tensor], Tensor]) -> Tensor:
        """(S, C, H, W) -> (S, C', H', W')."""
        return stage(x)


REGIONS: dict[str, tuple[int, ...]] = {
    "upper": (1, 2, 4, 7, 5, 43, 45, 46),
    "middle": (6, 9, 38, 39),
}
"""Regions of the face (Table I), and our extension from 5 and 38 on; others are in the lower region."""


def neighbors(config: LacConfig) -> list[list[bool]]:
    """Return a mask of the neighbours of each action unit in the graph.

    Labels that are not action units have no region; all of them are neighbours.
    """
    m = len(config.au_labels)
    if config.graph_edges == "all" or config.aus is None:
        return [[True] * m for _ in range(m)]
    region = {au: name for name, aus in REGIONS.items() for au in aus}
    regions = [region.get(au, "lower") for au in config.aus]
    return [[i == j or regions[i] != regions[j] for j in range(m)] for i in range(m)]


def _states_of(states: tuple[Tensor, ...], batch: torch.Size) -> tuple[Tensor, ...]:
    """Return maps of pictures unchanged, so that they have gradients, and those of clips as clips."""
    return states if len(batch) == 1 else tuple(x.unflatten(0, batch) for x in states)


__all__ = ["LacForAUDetection"]
