"""ESCDA: a local and a global attention network for facial action units, and their ensemble.

Shao, Chen, Zhou, Shi, Li, Ma, Yeung: Constrained and directional ensemble attention for facial action unit
detection. Pattern Recognition, 2025. Equations, figures and sections below are those of the paper. Blocks
that it only names follow their own papers in widths and order; see the README beside this file.

    LSC: picture -> backbone -> (B, c, h, w) -> for each AU a branch of masked self-attention -> p_L
    GDA: picture -> backbone -> (B, c, h, w) -> attention over rows and columns, classifier   -> p_G
    ESCDA: (p_L + p_G) / 2

Shapes: B pictures, m action units, c (or C) channels, h x w cells of the last feature map, n = h * w of them.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple

from actionunits.au_regions import gaussian_maps
from actionunits.modeling_au import (
    AUClassifier,
    AUPreTrainedModel,
    check_size,
    module_names,
    on_device,
    on_one_device,
    or_default,
    parameter_of,
)
from actionunits.modeling_outputs import AUDetectionOutput

from .configuration_escda import EscdaBackboneConfig, EscdaConfig, GdaConfig, LscConfig


class EscdaPreTrainedModel(AUPreTrainedModel):
    """Initialisation and settings of the three models for transformers."""

    _no_split_modules = [
        *("MixedDepthwiseBlock", "LscBranch"),
        *("DualDirectionalAttention", "GlobalDepthwiseConv", "AUClassifier"),
    ]
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=0.02)
            init.zeros_(module.bias)
        elif isinstance(module, nn.PReLU):
            init.constant_(module.weight, 0.25)
        elif isinstance(module, ConstrainedSelfAttention) and module.raw_epsilon is not None:
            init.constant_(module.raw_epsilon, inverse_softplus(module.config.epsilon_init))
        else:
            super()._init_weights(module)  # batch normalisation and its statistics


class LscForAUDetection(EscdaPreTrainedModel):
    """Local self-attention constraining network (LSC, Sec. 3.1), with a branch of masked attention per AU.

    The self-attention of a branch is multiplied (Eq. 5) by a mask around the two centres of its action unit
    (Eqs. 1-3), so this model needs the centres at inference, too.
    """

    config: LscConfig

    def __init__(self, config: LscConfig):
        super().__init__(config)
        self.backbone = EscdaBackbone(config)
        self.branches = nn.ModuleDict({name: LscBranch(config) for name in module_names(config)})
        self.post_init()

    @property
    def needs_au_centers(self) -> bool:
        """Whether the attention is masked."""
        return self.config.constraint != "none"

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        au_centers: Tensor | None = None,
        labels: Tensor | None = None,
        output_au_attentions: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> AUDetectionOutput:
        """Detect action units.

        Args:
            pixel_values: (B, 3, image_size, image_size) normalised aligned faces.
            au_centers: (B, m, 2, 2) the two centres (x, y) of every action unit, in pixels of `pixel_values`
                (origin: centre of the top-left pixel). Not needed with `constraint="none"`.
            labels: (B, m) occurrences in [0, 1], or -1 for unknown; adds the loss (Eqs. 7-8).
            output_au_attentions: Return the rows of Fig. 4: `au_attentions_unconstrained` A', `au_masks` M,
                `au_attentions` A = A' * M; the attentions as means over heads and queries, a value a key.
            output_hidden_states: Return the feature maps of stem, stages and last layer.
            output_attentions: Return `attentions`, A' of every action unit, m times (B, heads, n, n).
            kwargs: Ignored, so that all that the image processor returns can be passed on.

        Raises:
            ValueError: Centres are missing or have another shape, pictures have another size, or a training
                batch has a single face.
        """
        output_hidden_states = or_default(output_hidden_states, self.config.output_hidden_states)
        output_attentions = or_default(output_attentions, self.config.output_attentions)
        gaussians = self._gaussians(au_centers, batch_size=pixel_values.shape[0])
        hidden_states = self.backbone(self.in_own_type(pixel_values))
        results = [
            branch(hidden_states[-1], gaussian, output_au_attentions or output_attentions)
            for branch, gaussian in zip(self.branches.values(), gaussians, strict=True)
        ]
        columns, weights, masks = zip(*results, strict=True)
        logits = torch.cat(on_one_device(columns), dim=1)
        return AUDetectionOutput(
            loss=None if labels is None else self.au_loss(logits, labels),
            logits=logits,
            hidden_states=hidden_states if output_hidden_states else None,
            attentions=weights if output_attentions else None,
            **(self._maps(weights, masks) if output_au_attentions else {}),
        )

    def _gaussians(self, au_centers: Tensor | None, batch_size: int) -> Sequence[Tensor | None]:
        """Return M~ (B, n) of every action unit, Eqs. 1-2, or `None` without a constraint."""
        config = self.config
        if config.constraint == "none":
            return [None] * len(config.au_labels)
        if au_centers is None:
            raise ValueError(
                "LSC masks its attention around the centres of the action units, but au_centers is missing. "
                "Pass all that the image processor returns, model(**inputs), or use GDA, which needs none."
            )
        self.check_centers(au_centers, (batch_size,))
        maps = gaussian_maps(au_centers, config.map_size, config.image_size, config.mask_sigma)
        return maps.flatten(-2).unbind(1)

    def _maps(self, weights: tuple[Tensor, ...], masks: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
        """Return maps (B, m, h, w) of A' (B, heads, n, n) and M (B, n) of all action units."""
        size = (self.config.map_size, self.config.map_size)
        means = on_one_device(weight.mean(dim=(1, 2)) for weight in weights)
        attention = torch.stack(means, dim=1).unflatten(-1, size)
        if masks[0] is None:
            return {"au_attentions": attention}
        mask = torch.stack(on_one_device(masks), dim=1).unflatten(-1, size)  # type: ignore[arg-type]
        return {
            "au_attentions": attention * mask,  # the mean of A, as heads and queries share the mask
            "au_attentions_unconstrained": attention,
            "au_masks": mask,
        }


class GdaForAUDetection(EscdaPreTrainedModel):
    """Global dual-directional attention network (GDA, Sec. 3.2): weights of rows and columns of the map."""

    config: GdaConfig

    def __init__(self, config: GdaConfig):
        super().__init__(config)
        self.backbone = EscdaBackbone(config)
        self.attention = DualDirectionalAttention(config)
        self.pool = GlobalDepthwiseConv(config.hidden_size, (config.map_size, config.map_size))
        self.classifier = AUClassifier(config, config.hidden_size)
        self.post_init()

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
            labels: (B, m) occurrences in [0, 1], or -1 for unknown; adds the loss (Eqs. 7-8).
            output_au_attentions: Return `au_attentions`, the attention a averaged over channels, which all
                action units share, and `au_evidence`, contributions to the logits by position (cf. Fig. 5).
            output_hidden_states: Return the feature maps of stem, stages and last layer.
            kwargs: Ignored, so that all that the image processor returns can be passed on.

        Raises:
            ValueError: Pictures have another size, or a training batch has a single face.
        """
        output_hidden_states = or_default(output_hidden_states, self.config.output_hidden_states)
        hidden_states = self.backbone(self.in_own_type(pixel_values))
        attention = self.attention(hidden_states[-1])
        features = on_device(hidden_states[-1], attention.device) * attention
        logits = self.classifier(self.pool(features).flatten(1))
        output = AUDetectionOutput(
            loss=None if labels is None else self.au_loss(logits, labels),
            logits=logits,
            hidden_states=hidden_states if output_hidden_states else None,
        )
        if output_au_attentions:
            output.au_attentions = attention.mean(1, keepdim=True).expand(-1, logits.shape[1], -1, -1)
            output.au_evidence = self._evidence(features)
        return output

    def _evidence(self, features: Tensor) -> Tensor:
        """Return the contribution of each position to the logits, (B, c, h, w) -> (B, m, h, w).

        As the layers after the attention are linear in evaluation mode, the contributions sum up to the
        logit, except for a constant of the action unit.
        """
        norm = self.pool.norm
        scale = parameter_of(norm, "weight") / (parameter_of(norm, "running_var") + norm.eps).sqrt()  # (c,)
        pooled, scale, weight = on_one_device([self.pool.shares(features), scale, self.classifier.weight])
        return torch.einsum("mc,bchw->bmhw", weight * scale, pooled)


class EscdaForAUDetection(EscdaPreTrainedModel):
    """Ensemble of LSC and GDA (ESCDA, Sec. 3.3): the mean of their probabilities.

    The loss is the sum of the networks' losses, so that they are trained independently.
    """

    config: EscdaConfig

    def __init__(self, config: EscdaConfig):
        super().__init__(config)
        self.lsc = LscForAUDetection(config.lsc_config)  # type: ignore[arg-type]
        self.gda = GdaForAUDetection(config.gda_config)  # type: ignore[arg-type]
        self.post_init()

    @property
    def needs_au_centers(self) -> bool:
        """Whether LSC does."""
        return self.lsc.needs_au_centers

    @classmethod
    def from_networks(
        cls, lsc: LscForAUDetection, gda: GdaForAUDetection, **config_kwargs: Any
    ) -> "EscdaForAUDetection":
        """Combine copies of two trained networks.

        Args:
            lsc: Local network.
            gda: Global network for the same action units in the same order.
            config_kwargs: Fields of `EscdaConfig`, such as `ensemble` or `au_thresholds`.

        Returns:
            The ensemble in evaluation mode, on the device and in the type of `lsc`.

        Raises:
            ValueError: The networks have different action units.
        """
        lsc_config, gda_config = copy.deepcopy(lsc.config), copy.deepcopy(gda.config)
        lsc_config.name_or_path = gda_config.name_or_path = ""  # without the paths of their folders
        model = cls(EscdaConfig(lsc_config=lsc_config, gda_config=gda_config, **config_kwargs))
        model.to(device=lsc.device, dtype=lsc.dtype)  # type: ignore[call-arg]
        model.lsc.load_state_dict(lsc.state_dict())
        model.gda.load_state_dict(gda.state_dict())
        return model.eval()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        au_centers: Tensor | None = None,
        labels: Tensor | None = None,
        output_au_attentions: bool = False,
        **kwargs: Any,
    ) -> AUDetectionOutput:
        """Detect action units.

        Args:
            pixel_values: (B, 3, image_size, image_size) normalised aligned faces.
            au_centers: (B, m, 2, 2) centres of the action units, see `LscForAUDetection`.
            labels: (B, m) occurrences in [0, 1], or -1 for unknown; adds the loss.
            output_au_attentions: Return LSC's attentions and masks and GDA's `au_evidence`.
            kwargs: Passed to both networks.

        Returns:
            The ensemble's logits, and `branch_logits` (B, 2, m) of LSC and GDA. Hidden states are LSC's.

        Raises:
            ValueError: See `LscForAUDetection`.
        """
        kwargs = self.asked_of_networks(kwargs)
        local = self.lsc(pixel_values, au_centers, None, output_au_attentions, return_dict=True, **kwargs)
        whole = self.gda(pixel_values, None, None, output_au_attentions, return_dict=True, **kwargs)
        logits = on_one_device([local.logits, whole.logits])
        loss = None
        if labels is not None:
            loss = self.au_loss(logits[0], labels) + self.au_loss(logits[1], labels)
        combine = mean_probability_logits if self.config.ensemble == "average" else torch.maximum
        return AUDetectionOutput(
            loss=loss,
            logits=combine(*logits),
            branch_logits=torch.stack(logits, dim=1),
            au_attentions=local.au_attentions,
            au_attentions_unconstrained=local.au_attentions_unconstrained,
            au_masks=local.au_masks,
            au_evidence=whole.au_evidence,
            hidden_states=local.hidden_states,
            attentions=local.attentions,
        )


class EscdaBackbone(nn.Module):
    """Enhanced MobileFaceNet (Sec. 3.1.1): picture (B, 3, l, l) -> feature maps, the last (B, c, h, w)."""

    def __init__(self, config: EscdaBackboneConfig):
        super().__init__()
        self.image_size = config.image_size
        width = config.stem_channels
        self.stem = nn.Sequential(
            ConvNormAct(config.num_channels, width, kernel_size=3, stride=2),
            ConvNormAct(width, width, kernel_size=3, groups=width),
        )
        self.stages = nn.ModuleList()
        for stage, channels in enumerate(config.stage_channels):
            self.stages.append(_make_stage(config, stage, in_channels=width))
            width = channels
        self.last = ConvNormAct(width, config.hidden_size, kernel_size=1)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Return the maps of stem, stages and last layer."""
        check_size(pixel_values, self.image_size)
        maps = [self.stem(pixel_values)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return (*maps, self.last(maps[-1]))


def _make_stage(config: EscdaBackboneConfig, stage: int, in_channels: int) -> nn.Sequential:
    """Return a stage: the block that halves the map, and residual blocks."""
    channels = config.stage_channels[stage]
    halve = MixedDepthwiseBlock(
        in_channels,
        channels,
        expansion=config.downsample_expansion[stage],
        kernel_shares=config.downsample_kernel_shares[stage],
        coordinate_reduction=config.coordinate_reduction,
        stride=2,
    )
    refine = [
        MixedDepthwiseBlock(
            channels,
            channels,
            expansion=config.residual_expansion[stage],
            kernel_shares=config.residual_kernel_shares[stage],
            coordinate_reduction=config.coordinate_reduction,
        )
        for _ in range(config.stage_depths[stage])
    ]
    return nn.Sequential(halve, *refine)


class MixedDepthwiseBlock(GradientCheckpointingLayer):
    """Enhanced depth-separable convolution: expansion, MixConv, coordinate attention, projection."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        expansion: int,
        kernel_shares: Sequence[int],
        coordinate_reduction: int,
        stride: int = 1,
    ):
        super().__init__()
        self.is_residual = stride == 1
        self.expand = ConvNormAct(in_channels, expansion, kernel_size=1)
        self.mix = MixedDepthwiseConv(expansion, kernel_shares, stride)
        self.attention = CoordinateAttention(expansion, coordinate_reduction)
        self.project = ConvNormAct(expansion, out_channels, kernel_size=1, act=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', h / stride, w / stride)."""
        y = self.project(self.attention(self.mix(self.expand(x))))
        return x + y if self.is_residual else y


class MixedDepthwiseConv(nn.Module):
    """MixConv (Tan and Le, BMVC 2019): depthwise kernels 3x3, 5x5, ..., each on its share of the channels."""

    def __init__(self, channels: int, kernel_shares: Sequence[int], stride: int):
        super().__init__()
        self.split_sizes = split_channels(channels, kernel_shares)
        self.convs = nn.ModuleList(
            nn.Conv2d(size, size, kernel, stride, padding=kernel // 2, groups=size, bias=False)
            for size, kernel in zip(self.split_sizes, range(3, 3 + 2 * len(kernel_shares), 2), strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h / stride, w / stride)."""
        parts = x.split(self.split_sizes, dim=1)
        return torch.cat([conv(part) for conv, part in zip(self.convs, parts, strict=True)], dim=1)


class CoordinateAttention(nn.Module):
    """Coordinate attention (Hou et al., CVPR 2021): weights of rows and columns from their means."""

    def __init__(self, channels: int, reduction: int):
        super().__init__()
        self.weights = DirectionalWeights(channels, reduction, directions=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same."""
        a_h, a_w = self.weights(x.mean(3, keepdim=True), x.mean(2, keepdim=True).transpose(2, 3))
        return x * a_h * a_w.transpose(2, 3)


class DualDirectionalAttention(nn.Module):
    """Attention map a of GDA (Sec. 3.2), (B, c, h, w) in (0, 1): weights of rows times weights of columns.

    Unlike coordinate attention it summarises rows and columns by global depthwise convolutions.
    """

    def __init__(self, config: GdaConfig):
        super().__init__()
        channels, size = config.hidden_size, config.map_size
        self.summaries = nn.ModuleDict()
        if config.attention_directions != "horizontal":
            self.summaries["vertical"] = GlobalDepthwiseConv(channels, (1, size))  # one value per row
        if config.attention_directions != "vertical":
            self.summaries["horizontal"] = GlobalDepthwiseConv(channels, (size, 1))  # one value per column
        self.weights = DirectionalWeights(channels, config.coordinate_reduction, len(self.summaries))

    def forward(self, x: Tensor) -> Tensor:
        """Return the attention for the map x (B, c, h, w)."""
        profiles = [summary(x).flatten(2).unsqueeze(3) for summary in self.summaries.values()]  # (B, c, k, 1)
        attention = x.new_ones(1)
        for direction, weight in zip(self.summaries, self.weights(*profiles), strict=True):
            attention = attention * (weight if direction == "vertical" else weight.transpose(2, 3))
        return attention.expand_as(x)


class DirectionalWeights(nn.Module):
    """Profiles (B, C, k, 1) of one or two directions -> weights in (0, 1) of the same shapes.

    A joint reduction of channels, then for each direction an expansion and a sigmoid.
    """

    def __init__(self, channels: int, reduction: int, directions: int):
        super().__init__()
        hidden = max(8, channels // reduction)
        self.narrow = nn.Conv2d(channels, hidden, 1)
        self.norm = nn.BatchNorm2d(hidden)
        self.widen = nn.ModuleList(nn.Conv2d(hidden, channels, 1) for _ in range(directions))

    def forward(self, *profiles: Tensor) -> list[Tensor]:
        """Return the weights of all cells of the profiles."""
        y = F.hardswish(self.norm(self.narrow(torch.cat(profiles, dim=2))))
        parts = y.split([profile.shape[2] for profile in profiles], dim=2)
        return [torch.sigmoid(widen(part)) for widen, part in zip(self.widen, parts, strict=True)]


class LscBranch(GradientCheckpointingLayer):
    """Branch of one action unit: NTB and AU classifier, feature map (B, c, h, w) -> logit (B, 1)."""

    def __init__(self, config: LscConfig):
        super().__init__()
        channels = config.attention_channels + config.convolution_channels
        self.block = NextTransformerBlock(config)
        self.pool = GlobalDepthwiseConv(channels, (config.map_size, config.map_size))
        self.classifier = nn.Linear(channels, 1)

    def forward(
        self, features: Tensor, gaussian: Tensor | None, want_weights: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the logit, A' (B, heads, n, n) if wanted, and M (B, n) if M~ `gaussian` (B, n) is given."""
        x, weights, mask = self.block(features, gaussian, want_weights)
        return self.classifier(self.pool(x).flatten(1)), weights, mask


class NextTransformerBlock(nn.Module):
    """Next transformer block (NTB; Li et al., Next-ViT, 2022), its self-attention constrained by a mask.

    Self-attention, convolutional attention on a projection of its output, both concatenated, and an MLP.
    """

    def __init__(self, config: LscConfig):
        super().__init__()
        whole, local = config.attention_channels, config.convolution_channels
        self.project_in = ConvNormAct(config.hidden_size, whole, kernel_size=1, act=False)
        self.norm1 = nn.BatchNorm2d(whole)
        self.attention = ConstrainedSelfAttention(config)
        self.project = ConvNormAct(whole, local, kernel_size=1, act=False)
        self.convolution = ConvolutionalAttention(local, config.mhca_head_dim)
        self.norm2 = nn.BatchNorm2d(whole + local)
        self.mlp = nn.Sequential(
            nn.Conv2d(whole + local, config.mlp_channels, 1),
            nn.ReLU(),
            nn.Conv2d(config.mlp_channels, whole + local, 1),
        )

    def forward(
        self, features: Tensor, gaussian: Tensor | None, want_weights: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(B, c, h, w) -> (B, attention_channels + convolution_channels, h, w), and the attention's A', M."""
        x = self.project_in(features)
        tokens = self.norm1(x).flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, n, C)
        tokens, weights, mask = self.attention(tokens, gaussian, want_weights)
        x = x + tokens.transpose(1, 2).reshape(x.shape)
        y = self.project(x)
        y = y + self.convolution(y)
        x = torch.cat([x, y], dim=1)
        return x + self.mlp(self.norm2(x)), weights, mask


class ConstrainedSelfAttention(nn.Module):
    """Multi-head self-attention whose weights are multiplied by the mask of one action unit (Eqs. 3-6)."""

    is_causal = False

    def __init__(self, config: LscConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.attention_head_dim
        channels = config.attention_channels
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.output = nn.Linear(channels, channels)  # W^M
        self.raw_epsilon = nn.Parameter(torch.empty(1)) if config.constraint == "adaptive" else None

    @property
    def epsilon(self) -> Tensor | float:
        """Importance of positions outside the action unit's region: 0, or the softplus of a parameter."""
        return 0.0 if self.raw_epsilon is None else F.softplus(self.raw_epsilon)

    def forward(
        self, x: Tensor, gaussian: Tensor | None, want_weights: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Tokens (B, n, C), M~ (B, n) -> tokens, A' (B, heads, n, n) if wanted, M (B, n) if M~ is given."""
        query, key, value = (
            linear(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, n, head_dim)
            for linear in (self.query, self.key, self.value)
        )
        mask = None
        if gaussian is not None:
            mask = ((gaussian + self.epsilon) / (1 + self.epsilon)).to(x.dtype)  # Eq. 3
            # Eqs. 5-6: M depends on the keys only, so (A' * M) V = A' (M * V), for which any kernel works.
            value = mask[:, None, :, None] * value
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        if want_weights or x.shape[0] == 0:  # kernels return no weights and reject empty batches
            attend = eager_attention
        y, weights = attend(self, query, key, value, None, scaling=self.head_dim**-0.5, dropout=0.0)
        return self.output(y.flatten(2)), weights if want_weights else None, mask


class ConvolutionalAttention(nn.Module):
    """Multi-head convolutional attention (MHCA, Next-ViT): 3x3 convolution per head, 1x1 projection."""

    def __init__(self, channels: int, head_dim: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels // head_dim, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.project = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same."""
        return self.project(F.relu(self.norm(self.conv(x))))


class GlobalDepthwiseConv(nn.Module):
    """Depthwise convolution whose kernel spans the map, its rows or its columns, and normalisation."""

    def __init__(self, channels: int, kernel_size: tuple[int, int]):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size, groups=channels, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, 1, 1), (B, C, h, 1) or (B, C, 1, w)."""
        x = self.conv(x)
        if self.norm.training and x[:, 0].numel() == 1:
            raise ValueError(
                "A batch of one face cannot be trained on, as batch normalisation needs several; choose a "
                "batch size that leaves no single face. The Trainer drops the last batch with "
                "dataloader_drop_last=True, but in evaluation, too, unless per_device_eval_batch_size=1."
            )
        return self.norm(x)

    def shares(self, x: Tensor) -> Tensor:
        """Return each position's share in the convolution of a whole map, (B, C, h, w).

        An adapted layer may mix channels, so it is called for each position alone.
        """
        if type(self.conv) is nn.Conv2d:
            kernel = parameter_of(self.conv, "weight")[:, 0]  # (C, h, w)
            return on_device(x, kernel.device) * kernel
        batch, channels, height, width = x.shape
        places = torch.eye(height * width, dtype=x.dtype, device=x.device).view(-1, 1, height, width)
        alone = (x[:, None] * places).flatten(0, 1)  # (B h w, C, h, w)
        shares = self.conv(alone) - self.conv(torch.zeros_like(alone[:1]))
        return shares.view(batch, height * width, channels).mT.view(x.shape)


class ConvNormAct(nn.Sequential):
    """Convolution, batch normalisation and, if `act`, PReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        act: bool = True,
    ):
        padding = kernel_size // 2
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(out_channels), *([PReLU(out_channels)] if act else []))


class PReLU(nn.PReLU):
    """PReLU with a slope per channel; on CPUs in a form whose gradient is three times as fast as torch's."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same."""
        if x.device.type != "cpu":
            return super().forward(x)
        return torch.addcmul(x, 1 - self.weight[:, None, None], F.relu(-x))


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention (Eq. 4): (B, n, heads, d), and its weights (B, heads, n, n)."""
    scores = query @ key.transpose(-1, -2) * scaling
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def mean_probability_logits(a: Tensor, b: Tensor) -> Tensor:
    """Return the logits of (sigmoid(a) + sigmoid(b)) / 2 (Sec. 3.3), exactly for logits of any size."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    x, y = a.to(dtype), b.to(dtype)
    log_p = torch.logaddexp(F.logsigmoid(x), F.logsigmoid(y))  # log 2p
    log_q = torch.logaddexp(F.logsigmoid(-x), F.logsigmoid(-y))  # log 2(1 - p)
    return (log_p - log_q).to(a.dtype)


def split_channels(channels: int, shares: Sequence[int]) -> list[int]:
    """Divide channels in proportion, the remainder to the first: 512, [1, 1, 1] -> [172, 170, 170]."""
    sizes = [channels * share // sum(shares) for share in shares]
    sizes[0] += channels - sum(sizes)
    return sizes


def inverse_softplus(x: float) -> float:
    """Return the argument whose softplus is x > 0."""
    return x + math.log(-math.expm1(-x))


__all__ = ["EscdaForAUDetection", "EscdaPreTrainedModel", "GdaForAUDetection", "LscForAUDetection"]
