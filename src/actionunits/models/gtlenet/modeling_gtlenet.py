"""GTLE-Net: a feature map and a mask for each action unit, from an expression encoder.

An, Zhang, Zeng, Chen, Deng, Ding: Global-to-local expression-aware embeddings for facial action unit
detection. 2022. Equations, figures and sections below are those of the paper. InceptionResnetV1 is that of
Szegedy et al. (AAAI 2017) with the sizes of facenet-pytorch's weights. The README beside this file lists what
the paper leaves open.

    picture -> GEE up to 16 x 16 -> h -> E_a -> feature maps f^1 .. f^N, f^N+1 of the background
                                      -> E_m -> masks        m^1 .. m^N, m^N+1
    c^i = m^i f^i -> classifier g^i -> logit of action unit i;  c^1 .. c^N+1 -> D_r -> the picture again

Shapes: B pictures, N action units, C channels, h x w cells of the encoder's map h, H x W of maps and masks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from actionunits.action_units import UNKNOWN
from actionunits.modeling_au import (
    AUHeads,
    AUPreTrainedModel,
    CheckpointedPreTrainedModel,
    check_size,
    is_plain,
    linear_map,
    module_names,
    on_device,
    on_one_device,
    or_default,
    parameter_of,
)
from actionunits.modeling_outputs import AUDetectionOutput

from .configuration_gtlenet import GlobalExpressionEncoderConfig, GtleNetConfig

BACKGROUND = "background"
"""Name of the (N+1)-th map, which belongs to no action unit."""


class GtleNetForAUDetection(AUPreTrainedModel):
    """GTLE-Net (Fig. 2), which needs landmarks only for the alignment.

    Made from a configuration, the encoder is random; `from_encoder` loads a pretrained one.

    Example:
        >>> model = GtleNetForAUDetection.from_encoder("runs/expression/model", aus=[1, 2, 4, 6, 12])
        >>> masks = model(**inputs, output_au_attentions=True).au_attentions  # (B, 5, 256, 256)
    """

    config: GtleNetConfig
    _no_split_modules = [
        *("ConvNormAct", "InceptionBlock", "InceptionReduction", "ResidualBlock"),
        *("MapExtractor", "AUClassifiers", "ReconstructionHead"),
    ]

    def __init__(self, config: GtleNetConfig):
        super().__init__(config)
        self.trunk = InceptionTrunk(config.encoder)
        channels = self.trunk.out_channels
        self.feature_extractor = self.mask_extractor = self.reconstruction = None
        if config.local_module != "none":
            widths, depth = config.feature_channels, config.feature_depth
            is_residual = config.local_module != "cnn"
            self.feature_extractor = MapExtractor(config, channels, 3, widths, depth, is_residual)
            self.reconstruction = ReconstructionHead(config)
        if config.local_module == "masked":
            self.mask_extractor = MapExtractor(config, channels, 1, config.mask_channels, config.mask_depth)
        self.classifiers = AUClassifiers(config, 3 if self.feature_extractor is not None else channels)
        self.post_init()
        self.freeze()

    @classmethod
    def from_encoder(
        cls,
        encoder_name_or_path: str | Path,
        encoder_revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        **config_kwargs: Any,
    ) -> "GtleNetForAUDetection":
        """Make a model on a pretrained expression encoder.

        Args:
            encoder_name_or_path: Folder or Hub name of a `GlobalExpressionEncoder`.
            encoder_revision: Branch, tag or commit on the Hub.
            dtype: Type of the weights.
            config_kwargs: Fields of `GtleNetConfig`, such as `aus`.

        Raises:
            ValueError: The checkpoint is another model, lacks weights, or has another `pretraining`.
        """
        config = GtleNetConfig.from_encoder(str(encoder_name_or_path), encoder_revision, **config_kwargs)
        return cls._from_config(config, dtype=dtype)

    def load_named_parts(self) -> None:
        """Load the encoder if the configuration names one."""
        if self.config.encoder_name_or_path is not None:
            self.load_encoder()

    @torch.no_grad()
    def load_encoder(self, **hub_arguments: Any) -> None:
        """Load the encoder's weights, up to h, from the checkpoint that the configuration names.

        Raises:
            ValueError: It has another `pretraining`, lacks weights, or they have other shapes.
        """
        config, name = self.config, self.config.encoder_name_or_path
        loaded: Any = GlobalExpressionEncoder.from_pretrained(
            name,
            revision=config.encoder_revision or "main",
            dtype=self.dtype,
            output_loading_info=True,
            **hub_arguments,
        )
        source, info = loaded
        theirs, ours = source.trunk.state_dict(), self.trunk.state_dict()
        wrong = sorted(info["missing_keys"]) + sorted(theirs.keys() ^ ours.keys())
        wrong += [key for key in ours.keys() & theirs.keys() if theirs[key].shape != ours[key].shape]
        if wrong or source.config.pretraining != config.pretraining:
            raise ValueError(
                f"{name} is not the encoder that the configuration describes: it was pretrained on "
                f"{source.config.pretraining!r}, expected {config.pretraining!r}; weights that do not fit: "
                f"{wrong[:8] or 'none'}. Use from_encoder, which reads the checkpoint's own configuration."
            )
        self.trunk.load_state_dict(theirs)

    def freeze(self) -> None:
        """Freeze the encoder if the configuration says so."""
        self.trunk.requires_grad_(not self.config.freeze_encoder)

    def train(self, mode: bool = True) -> "GtleNetForAUDetection":
        """Set training mode, but not for a frozen encoder, which keeps its batch statistics."""
        super().train(mode)
        if self.config.freeze_encoder:
            self.trunk.eval()
        return self

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not init_convolution(module):
            super()._init_weights(module)

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
            pixel_values: (B, 3, image_size, image_size) normalised aligned faces.
            au_centers: Not used; an argument of all models.
            labels: (B, N) occurrences in [0, 1], or -1 for unknown; adds the loss (Eq. 9).
            output_au_attentions: Return `au_attentions` (B, N, H, W), the masks m of the action units (Figs.
                4-5); none for variants without E_m.
            output_hidden_states: Return the encoder's maps: after its stem, its first stage, and h.
            kwargs: Ignored, so that all that the image processor returns can be passed on.

        Raises:
            ValueError: The pictures have another size.
        """
        want_states = or_default(output_hidden_states, self.config.output_hidden_states)
        hidden_states = self._encode(pixel_values)
        masked, masks = self._local_features(hidden_states[-1], with_background=labels is not None)
        logits = self.classifiers.classify(self.classifiers.embed(self._of_units(masked)))
        return AUDetectionOutput(
            loss=None if labels is None else self._loss(logits, masked, pixel_values, labels),
            logits=logits,
            au_attentions=self._of_units(masks) if output_au_attentions and masks is not None else None,
            hidden_states=hidden_states if want_states else None,
        )

    def au_embeddings(self, pixel_values: Tensor) -> Tensor:
        """Return the input of each classifier's last layer, (B, N, D) (Sec. 3.4, Fig. 6)."""
        masked, _ = self._local_features(self._encode(pixel_values)[-1], with_background=False)
        return self.classifiers.embed(self._of_units(masked))

    def reconstruct(self, pixel_values: Tensor) -> Tensor:
        """Return the reconstruction by D_r, (B, 3, H, W) in units of the input (Eq. 6).

        Raises:
            ValueError: The variant has no feature maps.
        """
        if self.reconstruction is None:
            raise ValueError('local_module="none" has no feature maps, so no reconstruction either.')
        masked, _ = self._local_features(self._encode(pixel_values)[-1], with_background=True)
        return self.reconstruction(masked)

    def _encode(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        check_size(pixel_values, self.config.image_size)
        return self.trunk(self.in_own_type(pixel_values))  # Eq. 2

    def _local_features(self, h: Tensor, with_background: bool) -> tuple[Tensor, Tensor | None]:
        """Return c (B, N+1, 3, H, W) and m (B, N+1, H, W), or N of each; h (B, 1, C, h, w) without E_a."""
        if self.feature_extractor is None:
            return h.unsqueeze(1), None
        names = [*module_names(self.config), *([BACKGROUND] if with_background else [])]
        features = torch.tanh(self.feature_extractor(h, names))  # Eq. 3
        if self.mask_extractor is None:
            return features, None
        masks = torch.sigmoid(self.mask_extractor(h, names))  # Eq. 4
        masks, features = on_one_device([masks, features])
        return masks * features, masks[:, :, 0]  # Eq. 5

    def _of_units(self, maps: Tensor) -> Tensor:
        """The maps without the background."""
        return maps[:, : len(self.config.au_labels)]

    def _loss(self, logits: Tensor, masked: Tensor, pixel_values: Tensor, labels: Tensor) -> Tensor:
        """L_au + lambda L_rec (Eq. 9), both of pictures with known labels."""
        loss = self.au_loss(logits, labels)  # Eq. 10, as a mean over action units
        weight = self.config.reconstruction_loss_weight
        if self.reconstruction is not None and weight:
            is_known = (labels != UNKNOWN).any(dim=1)
            reconstruction = self.reconstruction(masked)  # Eq. 6
            pictures, counts = (x.to(reconstruction.device) for x in (pixel_values, is_known))
            reduction = self.config.reconstruction_reduction
            error = reconstruction_loss(reconstruction, pictures, counts, reduction)
            loss = loss + weight * error.to(loss.device)
        return loss


@dataclass
class ExpressionEncoderOutput(ModelOutput):
    """Output of `GlobalExpressionEncoder`.

    Attributes:
        embeddings: (B, embedding_size) of length 1, which are close for similar expressions.
        hidden_states: Maps (B, C, h, w) after stem and stages; with `output_hidden_states=True`.
    """

    embeddings: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class GlobalExpressionEncoder(CheckpointedPreTrainedModel):
    """Global expression encoder (GEE, Sec. 3.2): picture -> embedding of its expression.

    It is trained with `triplet_loss` (`training/pretrain_expression.py`); GTLE-Net starts from its `trunk`.
    """

    config: GlobalExpressionEncoderConfig
    main_input_name = "pixel_values"
    accepts_loss_kwargs = False

    def __init__(self, config: GlobalExpressionEncoderConfig):
        super().__init__(config)
        self.trunk = InceptionTrunk(config)
        self.reduction = InceptionReduction(config, self.trunk.out_channels, REDUCTIONS[1])
        channels = self.reduction.out_channels
        is_last = [False] * config.depths[2] + [True]
        self.stage3 = nn.Sequential(
            *(InceptionBlock(config, channels, STAGES[2], is_activated=not last) for last in is_last)
        )
        self.dropout = nn.Dropout(config.dropout)
        self.embedding = nn.Linear(channels, config.embedding_size)
        # InceptionResnetV1's last layer has one, too. Without it, or with a learned shift, embeddings of
        # triplets soon collapse to one point.
        self.norm = nn.BatchNorm1d(config.embedding_size, affine=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not init_convolution(module):
            super()._init_weights(module)

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, **kwargs: Any
    ) -> ExpressionEncoderOutput:
        """Embed expressions.

        Args:
            pixel_values: (B, 3, S, S) normalised aligned faces, S of 32 or more.
            output_hidden_states: Return the maps after stem and stages; by default that of the configuration.
            kwargs: Ignored, so that all that the image processor returns can be passed on.
        """
        want_states = or_default(output_hidden_states, self.config.output_hidden_states)
        maps = self.trunk(self.in_own_type(pixel_values))
        last = self.stage3(self.reduction(maps[-1]))
        embeddings = self.norm(self.embedding(self.dropout(last.mean((2, 3)))))
        return ExpressionEncoderOutput(
            embeddings=F.normalize(embeddings, dim=-1),
            hidden_states=(*maps, last) if want_states else None,
        )


def triplet_loss(anchor: Tensor, positive: Tensor, negative: Tensor, margin: Tensor | float = 0.2) -> Tensor:
    """Triplet loss of embeddings (Eq. 1), the mean over triplets.

    Anchor and positive are the most similar pair; both are compared with the negative.

    Args:
        anchor: (T, D).
        positive: (T, D).
        negative: (T, D).
        margin: m, the margin of squared distances; a number or (T,).

    Returns:
        Scalar, at least float32.
    """
    dtype = torch.promote_types(anchor.dtype, torch.float32)
    a, p, n = (embedding.to(dtype) for embedding in (anchor, positive, negative))
    near, far_from_a, far_from_p = (((x - y) ** 2).sum(-1) for x, y in ((a, p), (a, n), (p, n)))
    return (F.relu(near - far_from_a + margin) + F.relu(near - far_from_p + margin)).mean()


def reconstruction_loss(reconstruction: Tensor, picture: Tensor, counts: Tensor, reduction: str) -> Tensor:
    """Half the squared error of pixels (Eq. 11, without its minus sign), averaged over pictures.

    Args:
        reconstruction: (B, C, H, W).
        picture: (B, C, S, S), which is downsampled to H x W.
        counts: (B,) whether each picture is included.
        reduction: "sum" over the pixels of a picture, or their "mean".

    Returns:
        Scalar, at least float32; 0 without pictures.
    """
    dtype = torch.promote_types(picture.dtype, torch.float32)
    target = F.interpolate(picture.to(dtype), size=reconstruction.shape[-2:], mode="area")
    errors = 0.5 * ((reconstruction.to(dtype) - target) ** 2).sum(1).flatten(1)  # (B, H W)
    each = errors.mean(1) if reduction == "mean" else errors.sum(1)
    return (each * counts).sum() / counts.sum().clamp(min=1)


class MapExtractor(nn.Module):
    """E_a and E_m (Sec. 3.3): stages of residual blocks, each with upsampling, and a head per action unit.

    Heads are stored by the labels of their action units, and computed as one convolution.
    """

    def __init__(
        self,
        config: GtleNetConfig,
        in_channels: int,
        out_channels: int,
        widths: Sequence[int],
        depth: int,
        is_residual: bool = True,
    ):
        super().__init__()
        self.stages = nn.ModuleList()
        for width in widths:
            inputs = [in_channels] + [width] * (depth - 1)
            self.stages.append(nn.Sequential(*(ResidualBlock(c, width, is_residual) for c in inputs)))
            in_channels = width
        names = [*module_names(config), BACKGROUND]
        self.heads = nn.ModuleDict(
            {name: nn.Conv2d(in_channels, out_channels, 3, padding=1) for name in names}
        )

    def forward(self, h: Tensor, names: Sequence[str]) -> Tensor:
        """Map h (B, C, h, w) -> outputs of the heads of these names, (B, names, 3 or 1, H, W)."""
        for stage in self.stages:
            h = F.interpolate(stage(h), scale_factor=2.0, mode="bilinear", align_corners=False)
        heads = [self.heads[name] for name in names]
        if not all(map(is_plain, heads)):
            return torch.stack(on_one_device(head(h) for head in heads), dim=1)
        weight, bias = (torch.cat([getattr(head, name) for head in heads]) for name in ("weight", "bias"))
        return F.conv2d(h, weight, bias, padding=1).unflatten(1, (len(names), -1))


class ReconstructionHead(nn.ModuleDict):
    """D_r (Eq. 6): a convolution over all masked features, stored by the labels of the action units."""

    def __init__(self, config: GtleNetConfig):
        names, channels = [*module_names(config), BACKGROUND], config.encoder.num_channels
        super().__init__(
            {name: nn.Conv2d(3, channels, 3, padding=1, bias=name == BACKGROUND) for name in names}
        )

    def forward(self, masked: Tensor) -> Tensor:
        """Masked features c (B, N+1, 3, H, W) -> pictures (B, 3, H, W)."""
        if not all(map(is_plain, self.values())):
            shares = [conv(c) for conv, c in zip(self.values(), masked.unbind(1), strict=True)]
            return torch.stack(on_one_device(shares)).sum(0)
        weight = torch.cat([conv.weight for conv in self.values()], dim=1)  # type: ignore[misc]
        return F.conv2d(masked.flatten(1, 2), weight, self[BACKGROUND].bias, padding=1)  # type: ignore[arg-type]


class AUClassifiers(AUHeads):
    """The classifiers g^1 .. g^N (Sec. 3.4), by the labels of their action units.

    They are computed as grouped convolutions, but on CPUs one after the other, which is faster there and
    needs less memory. The results are the same.
    """

    def __init__(self, config: GtleNetConfig, in_channels: int):
        super().__init__({name: UnitClassifier(config, in_channels) for name in module_names(config)})

    def embed(self, inputs: Tensor) -> Tensor:
        """Masked features (B, N, C, H, W), or (B, 1, C, H, W) for all -> AU embeddings (B, N, D)."""
        inputs = inputs.expand(-1, len(self), -1, -1, -1)
        layers = (layer for unit in self.values() for pair in unit.layers for layer in pair)
        are_grouped = inputs.device.type != "cpu" and all(map(is_plain, layers))
        return self.embed_grouped(inputs) if are_grouped else self.embed_one_by_one(inputs)

    def embed_one_by_one(self, inputs: Tensor) -> Tensor:
        """`embed`, action unit by action unit."""
        embeddings = [unit(x.contiguous()) for unit, x in zip(self.values(), inputs.unbind(1), strict=True)]
        return torch.stack(on_one_device(embeddings), dim=1)

    def embed_grouped(self, inputs: Tensor) -> Tensor:
        """`embed`, by grouped layers with a group per action unit."""
        x = inputs.flatten(1, 2)
        for layers in zip(*(unit.layers for unit in self.values()), strict=True):
            convs, norms = zip(*layers, strict=True)
            x = F.elu(grouped_norm(grouped_conv(x, convs), norms))
        return x.mean((2, 3)).unflatten(1, (len(self), -1))

    def classify(self, embeddings: Tensor) -> Tensor:
        """AU embeddings (B, N, D) -> logits (B, N), by the last layer of each classifier."""
        maps = [linear_map(unit.output) for unit in self.values()]  # type: ignore[arg-type]
        weight, bias = (torch.cat(on_one_device(parts)) for parts in zip(*maps, strict=True))
        return (on_device(embeddings, weight.device) * weight).sum(-1) + bias


class UnitClassifier(nn.Module):
    """Classifier g of one action unit: map (B, C, H, W) -> AU embedding (B, D), and its last layer."""

    def __init__(self, config: GtleNetConfig, in_channels: int):
        super().__init__()
        kernel, widths = config.classifier_kernel_size, [in_channels, *config.classifier_channels]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, kernel, stride=2, padding=kernel // 2), nn.BatchNorm2d(o))
            for i, o in zip(widths[:-1], widths[1:], strict=True)
        )
        self.output = nn.Linear(widths[-1], 1)  # the 1x1 convolution after global average pooling

    def forward(self, x: Tensor) -> Tensor:
        """Return the embedding."""
        for layer in self.layers:
            x = F.elu(layer(x))
        return x.mean((2, 3))


class ResidualBlock(GradientCheckpointingLayer):
    """Two 3x3 convolutions, by default with a residual connection: (B, C, h, w) -> (B, C', h, w)."""

    def __init__(self, in_channels: int, out_channels: int, is_residual: bool = True):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.is_residual = is_residual
        self.shortcut = None
        if is_residual and in_channels != out_channels:
            conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)), inplace=True)))
        if self.is_residual:
            y = y + (x if self.shortcut is None else self.shortcut(x))
        return F.relu(y)


# InceptionResnetV1 as tables: output channels, kernel (height, width), stride, and whether the published
# network has padding; with padding="same" all layers have it.

Layer = tuple[int, tuple[int, int], int, bool]

STEM: tuple[Layer | None, ...] = (
    (32, (3, 3), 2, False),
    (32, (3, 3), 1, False),
    (64, (3, 3), 1, True),
    None,  # max pooling
    (80, (1, 1), 1, True),
    (192, (3, 3), 1, False),
    (256, (3, 3), 2, False),
)


@dataclass(frozen=True)
class Stage:
    """Residual blocks: the branches of a block, and the scale of its residual."""

    branches: tuple[tuple[Layer, ...], ...]
    scale: float


def _chain(*layers: tuple[int, tuple[int, int]]) -> tuple[Layer, ...]:
    return tuple((channels, kernel, 1, True) for channels, kernel in layers)


STAGES = (
    Stage(
        (
            _chain((32, (1, 1))),
            _chain((32, (1, 1)), (32, (3, 3))),
            _chain((32, (1, 1)), (32, (3, 3)), (32, (3, 3))),
        ),
        0.17,
    ),
    Stage((_chain((128, (1, 1))), _chain((128, (1, 1)), (128, (1, 7)), (128, (7, 1)))), 0.10),
    Stage((_chain((192, (1, 1))), _chain((192, (1, 1)), (192, (1, 3)), (192, (3, 1)))), 0.20),
)

REDUCTIONS: tuple[tuple[tuple[Layer, ...], ...], ...] = (
    (
        ((384, (3, 3), 2, False),),
        (*_chain((192, (1, 1)), (192, (3, 3))), (256, (3, 3), 2, False)),
    ),
    (
        (*_chain((256, (1, 1))), (384, (3, 3), 2, False)),
        (*_chain((256, (1, 1))), (256, (3, 3), 2, False)),
        (*_chain((256, (1, 1)), (256, (3, 3))), (256, (3, 3), 2, False)),
    ),
)


class InceptionTrunk(nn.Module):
    """InceptionResnetV1 up to h, a 16th of the picture's size, with 9.6 M of its 22.6 M parameters."""

    def __init__(self, config: GlobalExpressionEncoderConfig):
        super().__init__()
        channels, self.stem = config.num_channels, nn.Sequential()
        for layer in STEM:
            if layer is None:
                self.stem.append(max_pool(config))
                continue
            self.stem.append(conv := ConvNormAct(config, channels, layer))
            channels = conv.out_channels
        self.stage1 = nn.Sequential(
            *(InceptionBlock(config, channels, STAGES[0]) for _ in range(config.depths[0]))
        )
        self.reduction = InceptionReduction(config, channels, REDUCTIONS[0])
        self.out_channels = self.reduction.out_channels
        self.stage2 = nn.Sequential(
            *(InceptionBlock(config, self.out_channels, STAGES[1]) for _ in range(config.depths[1]))
        )

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Picture (B, 3, S, S) -> maps of stem and first stage, S/8 each, and h (B, 896, S/16, S/16)."""
        stem = self.stem(pixel_values)
        stage1 = self.stage1(stem)
        return stem, stage1, self.stage2(self.reduction(stage1))


class InceptionBlock(GradientCheckpointingLayer):
    """Residual block of InceptionResnetV1: (B, C, h, w) -> the same."""

    def __init__(
        self, config: GlobalExpressionEncoderConfig, channels: int, stage: Stage, is_activated: bool = True
    ):
        super().__init__()
        self.is_activated = is_activated
        self.scale = stage.scale if is_activated else 1.0  # the last block is not scaled
        self.branches = nn.ModuleList(make_branch(config, channels, layers) for layers in stage.branches)
        width = sum(branch[-1].out_channels for branch in self.branches)  # type: ignore[index]
        self.project = nn.Conv2d(width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y = x + self.scale * self.project(torch.cat([branch(x) for branch in self.branches], dim=1))
        return F.relu(y) if self.is_activated else y


class InceptionReduction(nn.Module):
    """Halves the map by convolutions and pooling in parallel: (B, C, h, w) -> (B, C', h/2, w/2)."""

    def __init__(
        self,
        config: GlobalExpressionEncoderConfig,
        in_channels: int,
        branches: tuple[tuple[Layer, ...], ...],
    ):
        super().__init__()
        self.branches = nn.ModuleList(make_branch(config, in_channels, layers) for layers in branches)
        self.pool = max_pool(config)
        self.out_channels = in_channels + sum(branch[-1].out_channels for branch in self.branches)  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        """Return the smaller map."""
        return torch.cat([*(branch(x) for branch in self.branches), self.pool(x)], dim=1)


class ConvNormAct(nn.Module):
    """Convolution, batch normalisation and ReLU of InceptionResnetV1."""

    def __init__(self, config: GlobalExpressionEncoderConfig, in_channels: int, layer: Layer):
        super().__init__()
        channels, (height, width), stride, is_padded = layer
        self.out_channels = max(1, round(config.width_multiplier * channels))
        padding = (height // 2, width // 2) if is_padded or config.padding == "same" else (0, 0)
        self.conv = nn.Conv2d(in_channels, self.out_channels, (height, width), stride, padding, bias=False)
        self.norm = nn.BatchNorm2d(self.out_channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', h / stride, w / stride)."""
        return F.relu(self.norm(self.conv(x)), inplace=True)


def make_branch(
    config: GlobalExpressionEncoderConfig, channels: int, layers: tuple[Layer, ...]
) -> nn.Sequential:
    """Return a sequence of convolutions."""
    branch = nn.Sequential()
    for layer in layers:
        branch.append(conv := ConvNormAct(config, channels, layer))
        channels = conv.out_channels
    return branch


def max_pool(config: GlobalExpressionEncoderConfig) -> nn.MaxPool2d:
    """Return the pooling that halves a map."""
    return nn.MaxPool2d(3, stride=2, padding=1 if config.padding == "same" else 0)


def grouped_conv(x: Tensor, convs: Sequence[nn.Conv2d]) -> Tensor:
    """Convolutions of the same shape, each on its group of channels of x (B, N C, h, w)."""
    weight, bias = (torch.cat([parameter_of(conv, name) for conv in convs]) for name in ("weight", "bias"))
    x = on_device(x, weight.device)
    return F.conv2d(x, weight, bias, convs[0].stride, convs[0].padding, groups=len(convs))  # type: ignore[arg-type]


def grouped_norm(x: Tensor, norms: Sequence[nn.BatchNorm2d]) -> Tensor:
    """Batch normalisations, each on its group of channels; their statistics are updated."""
    weight, bias = (torch.cat([parameter_of(norm, name) for norm in norms]) for name in ("weight", "bias"))
    mean, var = (torch.cat([n.get_buffer(name) for n in norms]) for name in ("running_mean", "running_var"))
    is_training, momentum = norms[0].training, norms[0].momentum
    x = F.batch_norm(x, mean, var, weight, bias, is_training, momentum or 0.0, norms[0].eps)
    if is_training:
        for norm, m, v in zip(norms, mean.chunk(len(norms)), var.chunk(len(norms)), strict=True):
            norm.get_buffer("running_mean").copy_(m)
            norm.get_buffer("running_var").copy_(v)
            norm.get_buffer("num_batches_tracked").add_(1)
    return x


def init_convolution(module: nn.Module) -> bool:
    """Initialise a convolution or linear layer as He et al. (ICCV 2015); return whether it is one."""
    if not isinstance(module, (nn.Conv2d, nn.Linear)):
        return False
    init.kaiming_normal_(module.weight, nonlinearity="relu")
    if module.bias is not None:
        init.zeros_(module.bias)
    return True


__all__ = [
    "ExpressionEncoderOutput",
    "GlobalExpressionEncoder",
    "GtleNetForAUDetection",
    "reconstruction_loss",
    "triplet_loss",
]
