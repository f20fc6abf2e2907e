"""AC2D: adaptively constrained self-attention and causal deconfounding of samples.

Shao, Zhu, Zhou, Xiang, Liu, Yao, Ma: Facial action unit detection by adaptively constraining self-attention
and causally deconfounding sample. International Journal of Computer Vision, 2025. Equations, figures and
sections below are those of the paper. Details that it leaves open follow ResTv2 (Zhang and Yang, NeurIPS
2022); the README beside this file lists where the paper and its authors' code differ.

    picture (B, 3, l, l) -> stem -> stage 1 -> stage 2 -> rich feature (B, c, l/4, l/4)
    for each AU: stage 3, its last block but one constrained -> f (B, c) -> W_X f + W_Z E[g(z)] -> logit

Shapes: B pictures, m action units, c (or C) channels, h x w cells of a map, n = h * w of them, which are the
tokens of self-attention. Maps (B, C, h, w) and tokens (B, n, C) are views of the same memory, channels last.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple

from actionunits.au_regions import gaussian_maps
from actionunits.losses import attention_kl_loss
from actionunits.modeling_au import (
    AUPreTrainedModel,
    check_size,
    is_plain,
    linear_map,
    module_names,
    on_device,
    on_one_device,
    or_default,
    sum_over_processes,
)
from actionunits.modeling_outputs import AUDetectionOutput

from .configuration_ac2d import Ac2dConfig

_CHUNK_ELEMENTS = {"cpu": 2**20, "other": 2**26}
"""Attention weights computed at once where only their mean is kept, to fit a CPU's cache or a GPU."""


class Ac2dForAUDetection(AUPreTrainedModel):
    """AC2D (Fig. 2): a shared trunk, and a branch with constraint and deconfounding per action unit.

    Training needs `au_centers`, so landmarks; detection does not.

    The prototypes of deconfounding are mean features of the training set over an epoch, used in the next one.
    The model gathers them in training. Custom training loops must call `end_of_epoch`; `training/train.py`
    does, and the Trainer with `actionunits.callbacks.EndOfEpochCallback`.
    """

    config: Ac2dConfig
    _no_split_modules = [
        *("ConvStem", "PatchEmbedding", "Ac2dBlock"),
        *("AUBranch", "CausalIntervention", "TrunkReader"),
    ]
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = ["prototype$", "feature_sum$"]  # patterns, which exclude the counts

    def __init__(self, config: Ac2dConfig):
        super().__init__(config)
        self.trunk = Ac2dTrunk(config)
        self.intervention = None
        if config.deconfounding == "shared":
            self.intervention = CausalIntervention(config, config.hidden_sizes[1], config.map_sizes[1] ** 2)
        self.branches = nn.ModuleDict({name: AUBranch(config) for name in module_names(config)})
        self.trunk_reader = TrunkReader(config) if config.trunk_loss_weight else None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ZeroLinear):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, CausalIntervention):
            for buffer in module.buffers(recurse=False):
                init.zeros_(buffer)
        else:
            super()._init_weights(module)  # normalisations and their statistics

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
                (origin: centre of the top-left pixel). Needed with `labels`, unless `constraint="none"` and
                `trunk_loss_weight=0`.
            labels: (B, m) occurrences in [0, 1], or -1 for unknown; adds the loss (Eqs. 7, 14 and 15).
            output_au_attentions: Return `au_attentions`, the average self-attention of the constrained block
                (A^avg, Eq. 6), which sums to one; given centres `au_masks`, the predefined attention (A^gt,
                Eq. 5); and `au_evidence`, contributions to the logit by position.
            output_hidden_states: Return the feature maps of stem, first and second stage.
            output_attentions: Return `attentions`, A of every action unit's constrained block, m times
                (B, k, n, n).
            kwargs: Ignored, so that all that the image processor returns can be passed on.

        Raises:
            ValueError: Centres are missing or have another shape, or pictures have another size.
        """
        config = self.config
        need_constraint = labels is not None and config.constraint != "none"
        target = None
        if need_constraint or (output_au_attentions and au_centers is not None):
            target = self._predefined_attention(au_centers, batch_size=pixel_values.shape[0])
        hidden_states = self.trunk(self.in_own_type(pixel_values))
        trunk_loss = self._trunk_loss(hidden_states[-1], au_centers, labels)
        rich = hidden_states[-1] if self.intervention is None else self._deconfound(hidden_states[-1])
        wanted = Wanted(
            mean=output_au_attentions or need_constraint,
            mean_log=need_constraint and config.constraint == "each",
            weights=or_default(output_attentions, config.output_attentions),
            evidence=output_au_attentions,
        )
        results = [branch(rich, wanted) for branch in self.branches.values()]
        if self.training and config.deconfounding in ("dynamic", "static"):
            self._observe(torch.stack(on_one_device(result.feature for result in results)))
        logits = torch.cat(on_one_device(result.logit for result in results), dim=1)
        want_states = or_default(output_hidden_states, config.output_hidden_states)
        return AUDetectionOutput(
            loss=None if labels is None else self._loss(logits, results, target, labels, trunk_loss),
            logits=logits,
            hidden_states=hidden_states if want_states else None,
            attentions=tuple(result.attention.weights for result in results) if wanted.weights else None,
            **(self._maps(results, target) if output_au_attentions else {}),
        )

    def end_of_epoch(self, batches: Iterable[Mapping[str, Tensor]] | None = None) -> None:
        """Update the prototypes by the features of the epoch (Eq. 12a).

        Call it in every process, after the last training step and before evaluation. Without training steps
        since the last call it has no effect.

        Args:
            batches: Inputs of the model with the training set once, or this process' share of it; only for
                `deconfounding="static"`, which computes their features with the current weights.

        Raises:
            ValueError: "static" without batches.
        """
        interventions = self._interventions
        if not interventions or not interventions[0].feature_count:
            return
        if self.config.deconfounding == "static":
            if batches is None:
                raise ValueError(
                    'deconfounding="static" computes its prototypes at the end of an epoch from the whole '
                    "training set: call end_of_epoch(batches) with its inputs."
                )
            self._look_again(batches)
        for intervention in interventions:
            intervention.end_of_epoch()

    def break_off_epoch(self, batches: Iterable[Mapping[str, Tensor]] | None = None) -> None:
        """Discard the features of an interrupted epoch; the prototypes remain.

        Args:
            batches: As in `end_of_epoch`, which is called with them for "static".
        """
        if self.config.deconfounding == "static" and batches is not None:
            self.end_of_epoch(batches)
        for intervention in self._interventions:
            intervention.start_over()

    @property
    def prototypes(self) -> Tensor | None:
        """The current prototypes, mean features (m, c) of the last epoch; (n, C) for "shared"."""
        if self.intervention is not None:
            return self.intervention.prototype
        found = [intervention.prototype[0] for intervention in self._interventions]
        return torch.stack(on_one_device(found)) if found else None

    def adapt_to_aus(self, aus: Iterable[int], like: Mapping[int, int] | None = None) -> "Ac2dForAUDetection":
        """Return a copy of this model for other action units; known ones keep their branches.

        Args:
            aus: FACS numbers in the new output order.
            like: New action units that start as copies of known ones, {new: known}; others are random.

        Raises:
            ValueError: Unknown or repeated action units, or `like` names one that this model lacks.
        """
        model = super().adapt_to_aus(aus)
        for new, known in (like or {}).items():
            if f"AU{known}" not in self.branches or f"AU{new}" not in model.branches:
                raise ValueError(
                    f"like={{{new}: {known}}} copies AU{known} to AU{new}, but the model has "
                    f"{self.config.aus} and the new one {model.config.aus}."
                )
            model.branches[f"AU{new}"].load_state_dict(self.branches[f"AU{known}"].state_dict())
        return model

    @property
    def _interventions(self) -> list["CausalIntervention"]:
        if self.intervention is not None:
            return [self.intervention]
        branches = self.branches.values()
        return [branch.intervention for branch in branches if branch.intervention is not None]  # type: ignore[misc]

    def _deconfound(self, rich: Tensor) -> Tensor:
        """Deconfound the rich feature (B, C, h, w), with the mean rich feature as prototype (C^s(d))."""
        tokens = to_tokens(rich)
        if self.training:
            self._observe(tokens[None])
        return to_map(self.intervention(tokens), rich.shape[-2:])  # type: ignore[misc]

    @torch.no_grad()
    def _observe(self, features: Tensor) -> None:
        """Add up the features (m, B, c) of a training batch, or (1, B, n, C) of the rich feature."""
        count = torch.full((), features.shape[1], dtype=torch.int64, device=features.device)
        sums = features.detach().to(torch.promote_types(features.dtype, torch.float32)).sum(1)
        # Summed at every step, as checkpoints save the buffers of one process.
        sums, count = sum_over_processes(sums), sum_over_processes(count)
        for intervention, feature_sum in zip(self._interventions, sums, strict=True):
            intervention.feature_count.add_(count.to(intervention.feature_count.device))
            if self.config.deconfounding != "static":
                intervention.feature_sum.add_(feature_sum.to(intervention.feature_sum.device))

    @torch.no_grad()
    def _look_again(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Add up the features of all batches with the current weights."""
        sums = torch.zeros_like(self.prototypes)  # type: ignore[arg-type]
        count = torch.zeros((), dtype=torch.int64, device=self.device)
        # Shuffling must not change the random numbers of training.
        with _evaluating(self), torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            for batch in batches:
                rich = self.trunk(batch["pixel_values"].to(self.device, self.dtype))[-1]
                features = [branch(rich, Wanted()).feature for branch in self.branches.values()]
                sums += torch.stack(on_one_device(features)).to(sums).sum(1)
                count += rich.shape[0]
        sums, count = sum_over_processes(sums), sum_over_processes(count)
        for intervention, feature_sum in zip(self._interventions, sums, strict=True):
            intervention.feature_sum.copy_(feature_sum[None])
            intervention.feature_count.copy_(count)

    def _predefined_attention(self, au_centers: Tensor | None, batch_size: int) -> Tensor:
        """Return A^gt (B, m, n), Eqs. 3-5."""
        config, au_centers = self.config, self._checked(au_centers, batch_size)
        centers = au_centers.to(torch.promote_types(au_centers.dtype, torch.float32))
        size, sigma = config.attention_size, float(config.attention_sigma)
        maps = gaussian_maps(centers, size, config.image_size, sigma, config.round_centers)  # Eqs. 3-4
        return F.normalize(maps.flatten(2), p=1.0, dim=-1)  # Eq. 5

    def _checked(self, au_centers: Tensor | None, batch_size: int) -> Tensor:
        """Return the centres after checking that they are complete."""
        if au_centers is None:
            raise ValueError(
                "AC2D's loss constrains attention to the centres of the action units, but au_centers is "
                "missing. Pass all that the image processor or collator returns, model(**inputs), leave out "
                'labels, or train with constraint="none" and trunk_loss_weight=0.'
            )
        self.check_centers(au_centers, (batch_size,))
        return au_centers

    def _loss(
        self,
        logits: Tensor,
        results: list["BranchResult"],
        target: Tensor | None,
        labels: Tensor,
        trunk_loss: Tensor | None,
    ) -> Tensor:
        """Eq. 15: the detection loss (Eq. 14), and the attention loss (Eq. 7)."""
        config, loss = self.config, self.au_loss(logits, labels)
        if target is not None and config.constraint != "none":
            logs = on_one_device(result.attention.log(config.constraint) for result in results)
            constraint_loss = attention_kl_loss(torch.stack(logs, dim=1), target, labels)
            loss = loss + config.constraint_weight * constraint_loss
        return loss if trunk_loss is None else loss + trunk_loss.to(loss.device)

    def _trunk_loss(self, rich: Tensor, au_centers: Tensor | None, labels: Tensor | None) -> Tensor | None:
        """Auxiliary loss of occurrences and centres predicted from the shared map; not in the paper.

        Unknown labels are ignored, but not the centres of their faces.
        """
        if labels is None or self.trunk_reader is None:
            return None
        places = (self._checked(au_centers, len(labels)).flatten(2) + 0.5) / self.config.image_size - 0.5
        logits, read = self.trunk_reader(rich)
        loss = self.au_loss(logits, labels) + F.smooth_l1_loss(read, 5 * places.to(read))
        return self.config.trunk_loss_weight * loss

    def _maps(self, results: list["BranchResult"], target: Tensor | None) -> dict[str, Tensor | None]:
        """Return the branches' maps as (B, m, h, w)."""
        size, attention_size = (
            (side, side) for side in (self.config.map_sizes[2], self.config.attention_size)
        )
        means = on_one_device(result.attention.mean for result in results)  # type: ignore[misc]
        shares = on_one_device(result.evidence for result in results)  # type: ignore[misc]
        attention, evidence = torch.stack(means, dim=1), torch.stack(shares, dim=1)
        masks = None if target is None else on_device(target, attention.device).to(attention.dtype)
        return {
            "au_attentions": attention.unflatten(-1, attention_size),
            "au_masks": None if masks is None else masks.unflatten(-1, attention_size),
            "au_evidence": evidence.unflatten(-1, size),
        }


class Wanted(NamedTuple):
    """Optional outputs of a branch."""

    mean: bool = False
    mean_log: bool = False
    weights: bool = False
    evidence: bool = False


class AttentionSummary(NamedTuple):
    """Summary of the self-attention A (B, k, n, n) of a block.

    Attributes:
        mean: (B, n), A averaged over heads and queries (A^avg, Eq. 6).
        mean_log: (B, n), log A averaged over heads and queries.
        weights: A itself.
    """

    mean: Tensor | None = None
    mean_log: Tensor | None = None
    weights: Tensor | None = None

    def log(self, constraint: str) -> Tensor:
        """Return the logarithm for the attention loss: of the average, or averaged."""
        if constraint == "each":
            return self.mean_log  # type: ignore[return-value]
        mean: Tensor = self.mean  # type: ignore[assignment]
        return mean.clamp(min=torch.finfo(mean.dtype).tiny).log()


class BranchResult(NamedTuple):
    """Output of a branch: logit (B, 1), feature f (B, c), and if wanted attention and evidence (B, n)."""

    logit: Tensor
    feature: Tensor
    attention: AttentionSummary
    evidence: Tensor | None


class Ac2dTrunk(nn.Module):
    """Stem and two shared stages: picture -> rich feature (B, C, l/4, l/4)."""

    def __init__(self, config: Ac2dConfig):
        super().__init__()
        self.image_size = config.image_size
        self.stem = ConvStem(config)
        self.stage1 = make_stage(config, 0)
        self.embedding = PatchEmbedding(config, *config.hidden_sizes[:2])
        self.stage2 = make_stage(config, 1)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Return the maps of stem, first and second stage."""
        check_size(pixel_values, self.image_size)
        maps = [self.stem(pixel_values)]
        maps.append(self._run(self.stage1, maps[-1]))
        maps.append(self._run(self.stage2, self.embedding(maps[-1])))
        return tuple(maps)

    def _run(self, stage: nn.ModuleList, x: Tensor) -> Tensor:
        size, tokens = x.shape[-2:], to_tokens(x)
        for block in stage:
            tokens, _ = block(tokens, size)
        return to_map(tokens, size)


class AUBranch(nn.Module):
    """Branch of one action unit: third stage, pooling, intervention and classifier."""

    def __init__(self, config: Ac2dConfig):
        super().__init__()
        in_channels, channels = config.hidden_sizes[1:]
        if config.deconfounding == "shared":
            in_channels *= config.intervention_ratio
        self.embedding = PatchEmbedding(config, in_channels, channels)
        self.blocks = make_stage(config, 2)
        self.norm = nn.LayerNorm(channels, eps=config.layer_norm_eps)
        self.intervention = None
        if config.deconfounding in ("dynamic", "static"):
            self.intervention = CausalIntervention(config, channels)
            channels *= config.intervention_ratio
        self.classifier = nn.Linear(channels, 1)

    def forward(self, rich: Tensor, wanted: Wanted) -> BranchResult:
        """Rich feature (B, C, H, W) -> `BranchResult`."""
        x = self.embedding(rich)
        size, tokens = x.shape[-2:], to_tokens(x)
        attention = AttentionSummary()
        constrained = max(0, len(self.blocks) - 2)  # the (n3 - 1)-th block
        for i, block in enumerate(self.blocks):
            tokens, summary = block(tokens, size, wanted if i == constrained else None)
            attention = summary if i == constrained else attention
        tokens = self.norm(tokens)
        feature = tokens.mean(1)
        deconfounded = (
            feature if self.intervention is None else self.intervention(feature[:, None]).squeeze(1)
        )
        evidence = self._evidence(tokens) if wanted.evidence else None
        return BranchResult(self.classifier(deconfounded), feature, attention, evidence)

    def _evidence(self, tokens: Tensor) -> Tensor:
        """Return the contribution of each position to the logit, tokens (B, n, c) -> (B, n).

        As the layers after the pooling are affine, the contributions sum up to the logit plus a constant.
        """
        weight = linear_map(self.classifier)[0]
        if self.intervention is not None:
            weight = self.intervention.pull_back(weight)
        return (tokens @ weight.T).squeeze(-1) / tokens.shape[1]


class CausalIntervention(nn.Module):
    """Causal intervention module (Sec. 3.3), which deconfounds features from the training samples.

    It applies to the feature of an action unit, (B, 1, c), or to a map of features, (B, n, c), and has a
    prototype of the training samples for each of the n positions.
    """

    prototype: Tensor
    prototype_count: Tensor
    feature_sum: Tensor
    feature_count: Tensor

    def __init__(self, config: Ac2dConfig, channels: int, places: int = 1):
        super().__init__()
        self.config = config
        self.query = nn.Linear(channels, config.query_ratio * channels)  # W_Q
        self.key = nn.Linear(channels, config.query_ratio * channels)  # W_K
        self.feature_map = nn.Linear(channels, config.intervention_ratio * channels)  # W_X
        self.confounder_map = nn.Linear(channels, config.intervention_ratio * channels)  # W_Z
        # Mean feature and number of samples of the last epoch, and sums of the current one.
        self.register_buffer("prototype", torch.zeros(places, channels, dtype=torch.float32))
        self.register_buffer("prototype_count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("feature_sum", torch.zeros(places, channels, dtype=torch.float32))
        self.register_buffer("feature_count", torch.zeros((), dtype=torch.int64))

    def forward(self, features: Tensor) -> Tensor:
        """Features f (B, n, c) -> W_X f + W_Z E[g(z)] (B, n, c or 8c), Eq. 10."""
        prototype = self.prototype.to(features.dtype)
        query, key = self.query(features), self.key(prototype)  # Eqs. 12b, 12c
        # Over the single prototype of an action unit this is 1, whatever the query.
        alpha = torch.softmax(query @ key.T * key.shape[-1] ** -0.5, dim=-1)  # Eq. 12d
        if self.config.prototype_value == "mean_over_n":
            prototype = prototype / self.prototype_count.clamp(min=1)
        expectation = alpha @ prototype  # Eq. 13
        deconfounded = self.feature_map(features) + self.confounder_map(expectation)  # Eq. 10
        return self._where_active(deconfounded, features)

    def pull_back(self, weight: Tensor) -> Tensor:
        """Weights of the outputs (1, c or 8c) -> equivalent weights of the features (1, c)."""
        return self._where_active(weight @ linear_map(self.feature_map)[0], weight)

    def end_of_epoch(self) -> None:
        """Set the prototype to the mean of the features (Eq. 12a), and start over."""
        self.prototype.copy_(self.feature_sum / self.feature_count)
        self.prototype_count.copy_(self.feature_count)
        self.start_over()

    def start_over(self) -> None:
        """Reset the sums of the current epoch."""
        self.feature_sum.zero_()
        self.feature_count.zero_()

    def _where_active(self, active: Tensor, inactive: Tensor) -> Tensor:
        """Choose by whether the intervention is active."""
        if self.config.deconfounding_start == "immediately":
            return active
        return torch.where(self.prototype_count > 0, active, inactive)


class TrunkReader(nn.ModuleDict):
    """A linear layer on the rich feature for each action unit, for its logit and its two centres.

    Centres are (x, y) relative to the centre of the picture, in fifths of its side.
    """

    def __init__(self, config: Ac2dConfig):
        values = config.hidden_sizes[1] * config.map_sizes[2] ** 2
        super().__init__({name: ZeroLinear(values, 5) for name in module_names(config)})

    def forward(self, rich: Tensor) -> tuple[Tensor, Tensor]:
        """Rich feature (B, C, l/4, l/4) -> logits (B, m) and centres (B, m, 4)."""
        normed = F.layer_norm(rich.permute(0, 2, 3, 1), rich.shape[1:2]).permute(0, 3, 1, 2)
        values = F.avg_pool2d(normed, 2, ceil_mode=True).flatten(1)
        read = torch.stack([head(values) for head in self.values()], dim=1).float()
        return read[..., 0], read[..., 1:]


class ZeroLinear(nn.Linear):
    """A linear layer that is initialised with zeros."""


class ConvStem(nn.Module):
    """Stem of ResTv2: picture (B, 3, l, l) -> map (B, C, l/2, l/2)."""

    def __init__(self, config: Ac2dConfig):
        super().__init__()
        narrow, width = config.stem_channels, config.hidden_sizes[0]
        self.convs = nn.Sequential(
            nn.Conv2d(config.num_channels, narrow, 3, padding=1, bias=False),
            nn.BatchNorm2d(narrow),
            nn.ReLU(inplace=True),
            nn.Conv2d(narrow, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 1),
        )
        self.position = PixelAttention(width)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the first map."""
        return norm_map(self.norm, self.position(self.convs(pixel_values)))


class PatchEmbedding(nn.Module):
    """Patch embedding of ResTv2, which halves the map: (B, C, h, w) -> (B, C', h/2, w/2)."""

    def __init__(self, config: Ac2dConfig, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
        self.position = PixelAttention(out_channels)
        self.norm = nn.LayerNorm(out_channels, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Return the smaller map."""
        return norm_map(self.norm, self.position(self.conv(x)))


class PixelAttention(nn.Module):
    """Pixel attention, the position encoding of ResT: values are weighted by their neighbourhood."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same."""
        return x * self.conv(x).sigmoid()


class Ac2dBlock(GradientCheckpointingLayer):
    """Block of ResTv2: efficient self-attention and an MLP, each with a residual connection."""

    def __init__(self, config: Ac2dConfig, stage: int, drop_path_rate: float):
        super().__init__()
        channels = config.hidden_sizes[stage]
        self.norm1 = nn.LayerNorm(channels, eps=config.layer_norm_eps)
        self.attention = EfficientSelfAttention(config, stage)
        self.norm2 = nn.LayerNorm(channels, eps=config.layer_norm_eps)
        self.mlp = Perceptron(channels, config.mlp_ratio * channels)
        self.drop_path = DropPath(drop_path_rate)

    def forward(
        self, tokens: Tensor, size: Sequence[int], wanted: Wanted | None = None
    ) -> tuple[Tensor, AttentionSummary]:
        """Tokens (B, n, C) of a map of this size -> the same, and a summary of the attention."""
        attended, summary = self.attention(self.norm1(tokens), size, wanted)
        tokens = tokens + self.drop_path(attended)
        return tokens + self.drop_path(self.mlp(self.norm2(tokens))), summary


class EfficientSelfAttention(nn.Module):
    """Efficient multi-head self-attention (EMSAv2, Eqs. 1-2), with keys and values of a smaller map.

    With h' = h / reduction, n' = h' * w': A (B, heads, n, n'), and SA(Q, K, V) = A V + UP(V).
    """

    is_causal = False

    def __init__(self, config: Ac2dConfig, stage: int):
        super().__init__()
        self.config = config
        channels, reduction = config.hidden_sizes[stage], config.key_reductions[stage]
        self.num_heads = config.num_heads[stage]
        self.query = nn.Linear(channels, channels)
        self.reduction, self.reduction_norm = None, None
        if reduction > 1:
            self.reduction = nn.Conv2d(
                channels, channels, reduction + 1, reduction, reduction // 2, groups=channels
            )
            self.reduction_norm = nn.LayerNorm(channels, eps=config.layer_norm_eps)
        self.key_value = nn.Linear(channels, 2 * channels)
        self.upsample = nn.Conv2d(channels, channels * reduction**2, 3, padding=1, groups=channels)
        self.upsample_norm = nn.LayerNorm(channels, eps=config.layer_norm_eps)
        self.shuffle = PixelShuffle(reduction)
        self.output = nn.Linear(channels, channels)

    def forward(
        self, tokens: Tensor, size: Sequence[int], wanted: Wanted | None
    ) -> tuple[Tensor, AttentionSummary]:
        """Tokens (B, n, C) -> the same, and a summary of A."""
        small, small_size = tokens, size
        if self.reduction is not None:
            small_map = self.reduction(to_map(tokens, size))
            small_size = small_map.shape[-2:]
            small = self.reduction_norm(to_tokens(small_map))  # type: ignore[misc]
        keys, values = self.key_value(small).chunk(2, dim=-1)  # (B, n', C) each
        query, key, value = (self._split_heads(x) for x in (self.query(tokens), keys, values))
        attended, summary = self._attend(query, key, value, wanted)
        upsampled = to_tokens(self.shuffle(self.upsample(to_map(values, small_size))))
        return self.output(attended + self.upsample_norm(upsampled)), summary  # Eq. 2

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, n, d)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, wanted: Wanted | None
    ) -> tuple[Tensor, AttentionSummary]:
        """(B, heads, n or n', d) -> A V (B, n, C), and a summary of A (Eq. 1)."""
        scaling = query.shape[-1] ** -0.5
        wanted = wanted or Wanted()
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        if wanted.weights or query.shape[0] == 0:  # kernels return no weights and reject empty batches
            attend = eager_attention
        mean = mean_log = None
        if wanted.mean or wanted.mean_log:
            summed_up, mean, mean_log = SummarizedAttention.apply(query, key, value, scaling, wanted.mean_log)
            if not wanted.weights:
                return summed_up.transpose(1, 2).flatten(2), AttentionSummary(mean, mean_log)
        # The output is computed from the returned weights, so that these have gradients.
        attended, weights = attend(self, query, key, value, None, scaling=scaling, dropout=0.0)
        return attended.flatten(2), AttentionSummary(mean, mean_log, weights if wanted.weights else None)


class SummarizedAttention(torch.autograd.Function):
    """Attention and means of its weights A without storing A, neither forward nor backward.

    query (B, k, n, d), key and value (B, k, n', d) -> A V (B, k, n, d), the mean of A over heads and queries
    (B, n') and, if wanted, that of log A. With A = softmax(S), S = scaling * Q K^T, the gradients follow from

        dL/dA = G V^T + g / (k n)                              G, g, g_log: gradients of the three results
        dL/dS = A * (dL/dA - rowsum(A * dL/dA)) + (g_log - A * sum(g_log)) / (k n)

    which are computed for a chunk of samples at a time, from queries, keys and values.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, scaling: float, want_log: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return A V and the means."""
        results: list[tuple[Tensor, ...]] = []
        for q, k, v in chunks(query, key, value):
            scores = _scores(q, k, scaling)
            weights = scores.softmax(-1)
            logs = [scores.log_softmax(-1).mean((1, 2))] if want_log else []
            results.append((weights.to(v.dtype) @ v, weights.mean((1, 2)), *logs))
        attended, mean, *log = (torch.cat(parts) for parts in zip(*results, strict=True))
        return attended, mean, log[0] if want_log else None

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Save tensors for `backward`; separate from `forward` for `torch.func`."""
        query, key, value, ctx.scaling, ctx.want_log = inputs
        ctx.save_for_backward(query, key, value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of query, key and value."""
        query, key, value = ctx.saved_tensors
        grad_attended, grad_mean, grad_log = gradients
        channels = query.shape[1] * query.shape[2]
        kept = [grad_attended, grad_mean / channels]  # type: ignore[operator]
        if ctx.want_log:
            kept.append(grad_log / channels)  # type: ignore[operator]
        results = []
        for q, k, v, g, g_mean, *g_log in chunks(query, key, value, *kept):
            weights = _scores(q, k, ctx.scaling).softmax(-1)
            grad_weights = (g @ v.transpose(-1, -2)).to(weights.dtype) + g_mean[:, None, None]
            grad_scores = weights * grad_weights
            grad_scores = torch.addcmul(grad_scores, weights, grad_scores.sum(-1, keepdim=True), value=-1)
            for row in g_log:
                grad_scores = grad_scores + (row[:, None, None] - weights * row.sum(-1)[:, None, None, None])
            grad_scores = (grad_scores * ctx.scaling).to(q.dtype)
            grad_value = weights.to(g.dtype).transpose(-1, -2) @ g
            results.append((grad_scores @ k, grad_scores.transpose(-1, -2) @ q, grad_value))
        return (*(torch.cat(parts) for parts in zip(*results, strict=True)), None, None)


class PixelShuffle(nn.PixelShuffle):
    """Pixel shuffle whose gradient has the right shape for empty batches, unlike torch's."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C r^2, h, w) -> (B, C, h r, w r)."""
        if x.shape[0] != 0:  # not `len`, which would fix the batch size of exported graphs
            return super().forward(x)
        r = self.upscale_factor
        return x.reshape(0, x.shape[1] // r**2, x.shape[2] * r, x.shape[3] * r)


class Perceptron(nn.Module):
    """MLP with a hidden layer: tokens (B, n, C) -> the same."""

    def __init__(self, channels: int, hidden_channels: int):
        super().__init__()
        self.expand = nn.Linear(channels, hidden_channels)
        self.project = nn.Linear(hidden_channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return project(GELU(expand(tokens)))."""
        hidden = self.expand(tokens)
        if torch.jit.is_tracing() or not is_plain(self.project):  # TorchScript has no Python functions
            return self.project(F.gelu(hidden))
        return GeluLinear.apply(hidden, self.project.weight, self.project.bias)


class GeluLinear(torch.autograd.Function):
    """Linear layer on the GELU of its input, which is recomputed in `backward`.

    So training stores the hidden layer once, not twice, which saves a fifth of its memory.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """(..., H), (C, H) and (C,) -> (..., C)."""
        return F.linear(F.gelu(hidden), weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Save tensors for `backward`."""
        hidden, weight, bias = inputs
        ctx.save_for_backward(hidden, weight)
        ctx.bias_dtype = bias.dtype

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of hidden layer, weight and bias."""
        hidden, weight = ctx.saved_tensors
        grad_gelu = (gradient @ weight.to(gradient.dtype)).to(hidden.dtype)
        rows = gradient.flatten(0, -2)
        grad_weight = rows.T @ F.gelu(hidden).to(gradient.dtype).flatten(0, -2)
        grad_hidden = torch.ops.aten.gelu_backward(grad_gelu, hidden)
        return grad_hidden, grad_weight.to(weight.dtype), rows.sum(0).to(ctx.bias_dtype)


class DropPath(nn.Module):
    """Stochastic depth: in training, drop the residual of random samples, and scale that of the others."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> the same."""
        if not self.training or self.rate == 0:
            return x
        keep = torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), device=x.device) >= self.rate
        return x * keep.to(x.dtype) / (1 - self.rate)


def make_stage(config: Ac2dConfig, stage: int) -> nn.ModuleList:
    """Return the blocks of a stage."""
    return nn.ModuleList(Ac2dBlock(config, stage, rate) for rate in config.drop_path_rates[stage])


def to_tokens(x: Tensor) -> Tensor:
    """Map (B, C, h, w) -> tokens (B, n, C)."""
    return x.flatten(2).transpose(1, 2)


def to_map(tokens: Tensor, size: Sequence[int]) -> Tensor:
    """Tokens (B, n, C) -> map (B, C, h, w)."""
    return tokens.transpose(1, 2).unflatten(2, tuple(size))


def norm_map(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Normalise a map (B, C, h, w) over its channels."""
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention (Eq. 1): (B, n, heads, d), and A (B, heads, n, n')."""
    weights = _scores(query, key, scaling).softmax(-1).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def chunks(query: Tensor, key: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split all tensors along the batch into chunks with few attention weights."""
    budget = _CHUNK_ELEMENTS["cpu" if query.device.type == "cpu" else "other"]
    samples = max(1, budget // (query.shape[1] * query.shape[2] * key.shape[2]))
    return zip(*(tensor.split(samples) for tensor in (query, key, *others)), strict=True)


def _scores(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Scaled products of queries and keys, at least float32."""
    scores = (query * scaling) @ key.transpose(-1, -2)
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, which restores the mode of each module, as parts may be frozen."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


__all__ = ["Ac2dForAUDetection"]
