"""AUFormer: a frozen vision transformer with small parallel experts for every action unit.

Yuan, Yu, Liu, Xie, Yue, Yang: AUFormer: Vision transformers are parameter-efficient facial action unit
detectors. ECCV 2024. Equations, sections and tables below are those of the paper; the README beside this file
lists what it leaves open.

    block l:  X' = X  + MHSA(X)  + mean_i K_i      K_i = MoKE_i(X  + K_i of the block before)      (Eqs. 2-4)
              X  = X' + MLP(X')  + mean_i K_i'     K_i' = MoKE_i'(X' + K_i)

Every expert ends in a 1x1 convolution of d = 4 channels to D = 768, so its knowledge K_i = U_i z_i + b_i has
rank 4. Here experts pass on the codes z_i instead: W (U_i z_i) = (W U_i) z_i with a 4x4 matrix W U_i. So all
experts of a group are one product 768 -> N d, grouped convolutions, and one product N d -> 768, with the same
results.

Shapes: B pictures, N action units, D (d) channels of the backbone (an expert), T tokens ([CLS], prompts if
any, then H x W patches), G generations, which are the groups of experts in order: attention and MLP of the
first block, of the second, and so on.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViTModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.vit.modeling_vit import eager_attention_forward
from transformers.utils.generic import can_return_tuple

from actionunits.losses import difficulty_exponents, mdwa_loss, occurrence_weights, weighted_dice_loss
from actionunits.modeling_au import (
    AUClassifier,
    AUPreTrainedModel,
    check_size,
    module_names,
    on_device,
    or_default,
    parameter_of,
)
from actionunits.modeling_outputs import AUDetectionOutput

from .configuration_auformer import AUFormerConfig

HUB_ARGUMENTS = ("token", "cache_dir", "local_files_only", "force_download")


class AUFormerPreTrainedModel(AUPreTrainedModel):
    """Initialisation of adapters, and settings of the model for transformers."""

    config: AUFormerConfig
    _no_split_modules = [
        *("ViTEmbeddings", "ViTLayer", "AUFormerBlock", "ExpertLines"),
        *("ExpertClassifier", "PatchReader", "AUClassifier"),
    ]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As in Convpass, LoRA and VPT: adapters initially add 0 to the backbone, prompts are uniform."""
        if isinstance(module, ExpertLine):
            module.initialize()
        elif isinstance(module, ZeroLinear):
            init.zeros_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, Prompts):
            patch_values = 3 * self.config.patch_size**2
            bound = math.sqrt(6 / (patch_values + module.tokens.shape[-1]))
            init.uniform_(module.tokens, -bound, bound)
        else:
            super()._init_weights(module)


class AUFormerForAUDetection(AUFormerPreTrainedModel):
    """AUFormer: a frozen vision transformer that is adapted by experts.

    Only experts and heads require gradients. Made from a configuration, the backbone is random;
    `from_backbone` loads a pretrained one.

    Example:
        >>> model = AUFormerForAUDetection.from_backbone("google/vit-base-patch16-224", aus=[1, 2, 4, 6, 12])
        >>> model.save_pretrained("experts", adapters_only=True)  # a few MB; config.json names the backbone
        >>> model = AUFormerForAUDetection.from_pretrained("experts")
    """

    def __init__(self, config: AUFormerConfig):
        super().__init__(config)
        backbone = config.vit_config
        self.vit = Backbone(backbone, add_pooling_layer=False)
        self.blocks = nn.ModuleList(AUFormerBlock(config) for _ in range(backbone.num_hidden_layers))
        self.experts = ExpertLines(config) if config.adaptation in ("moke", "convpass") else None
        self.prompts = Prompts(config) if config.adaptation == "vpt" else None
        self.classifier = AUClassifier(config, backbone.hidden_size)
        self.expert_classifier = ExpertClassifier(config) if config.has_au_experts else None
        self.patch_reader = PatchReader(config) if config.patch_loss_weight else None
        if config.adaptation == "lora":
            for block, layer in zip(self.blocks, self.vit.layers, strict=True):
                block.attach(layer.attention)  # type: ignore[operator]
        if config.adapters_only:
            self._keys_to_ignore_on_load_missing = [r"^vit\."]  # type: ignore[assignment]
        self.post_init()
        self.freeze()

    @classmethod
    def from_backbone(
        cls,
        backbone_name_or_path: str | Path,
        backbone_revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        **config_kwargs: Any,
    ) -> "AUFormerForAUDetection":
        """Make a model on a pretrained vision transformer.

        Args:
            backbone_name_or_path: Folder or Hub name of a checkpoint of type "vit", whatever head it has.
                Position embeddings of another `image_size` are interpolated.
            backbone_revision: Branch, tag or commit on the Hub.
            dtype: Type of the weights.
            config_kwargs: Fields of `AUFormerConfig`, such as `aus`, or `image_size`.

        Raises:
            ValueError: The checkpoint is not a plain vision transformer, or lacks weights.
        """
        name = str(backbone_name_or_path)
        return cls._from_config(
            AUFormerConfig.from_backbone(name, backbone_revision, **config_kwargs), dtype=dtype
        )

    def load_named_parts(self) -> None:
        """Load the backbone if the configuration names one."""
        if self.config.backbone_name_or_path is not None:
            self.load_backbone()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a saved model; if it has adapters only, load the backbone that its configuration names."""
        hub_arguments = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        result = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = result[0] if isinstance(result, tuple) else result
        if model.config.adapters_only:
            model.load_backbone(**hub_arguments)
            model.config.adapters_only = False
        return result

    def freeze(self) -> None:
        """Freeze the vision transformer if the configuration says so."""
        self.vit.requires_grad_(not self.config.freeze_backbone)

    def save_pretrained(
        self, save_directory: Any, *args: Any, adapters_only: bool = False, **kwargs: Any
    ) -> None:
        """Save the model.

        Args:
            save_directory: Folder.
            adapters_only: Leave out the frozen backbone, which the configuration must name.
            args: Passed to `PreTrainedModel.save_pretrained`.
            kwargs: Passed likewise.

        Raises:
            ValueError: With `adapters_only`, the backbone was trained or has no name.
        """
        # With transformers' original names a resuming Trainer would not find the backbone.
        kwargs.setdefault("save_original_format", False)
        if adapters_only:
            self._check_backbone_is_elsewhere()
            weights = kwargs.pop("state_dict", None) or self.state_dict()
            kwargs["state_dict"] = {
                name: value for name, value in weights.items() if not name.startswith("vit.")
            }
        self.config.adapters_only = adapters_only
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.config.adapters_only = False

    def _check_backbone_is_elsewhere(self) -> None:
        name, frozen = self.config.backbone_name_or_path, self.config.freeze_backbone
        if name is None or not frozen:
            raise ValueError(
                f"adapters_only=True leaves the backbone out, but here backbone_name_or_path={name!r} and "
                f"freeze_backbone={frozen}: only a frozen backbone of from_backbone can be loaded again."
            )

    @torch.no_grad()
    def load_backbone(self, **hub_arguments: Any) -> None:
        """Load the backbone's weights from the checkpoint that the configuration names.

        Raises:
            OSError: There is no such checkpoint.
            ValueError: The checkpoint lacks weights of this backbone, or they have other shapes.
        """
        name = self.config.backbone_name_or_path
        try:
            loaded: Any = ViTModel.from_pretrained(
                name,
                revision=self.config.backbone_revision or "main",
                add_pooling_layer=False,
                dtype=self.dtype,
                output_loading_info=True,
                **hub_arguments,
            )
        except OSError as error:
            raise OSError(
                f"The backbone that config.json names, backbone_name_or_path={name!r}, cannot be loaded. "
                "If it is elsewhere, call from_pretrained(..., backbone_name_or_path=FOLDER)."
            ) from error
        source, info = loaded
        weights = source.state_dict()
        key = "embeddings.position_embeddings"
        weights[key] = resize_positions(weights[key], self.config.map_size)
        here = self.vit.state_dict()
        missing = sorted(info["missing_keys"])
        wrong = [key for key in here if key in weights and weights[key].shape != here[key].shape]
        if missing or wrong or here.keys() - weights.keys():
            raise ValueError(
                f"{name} is not the backbone that the configuration describes: weights missing "
                f"{missing or sorted(here.keys() - weights.keys())}, of another shape {wrong}. "
                "Use AUFormerForAUDetection.from_backbone, which reads the checkpoint's own configuration."
            )
        self.vit.load_state_dict(weights)

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
            au_centers: (B, N, 2, 2) the two centres (x, y) of every action unit, in pixels of `pixel_values`
                (origin: centre of the top-left pixel); for the auxiliary loss (`patch_loss_weight`).
            labels: (B, N) occurrences in [0, 1], or -1 for unknown; adds the loss (Eq. 9).
            output_au_attentions: Return `au_attentions` (B, N, H, W), the probability at each position from
                each action unit's last expert and its head for [CLS]; without experts, from the model's head.
            output_hidden_states: Return the patches' features (B, D, H, W) before the first and after every
                block.
            output_attentions: Return the backbone's attention matrices (B, heads, T, T), one per block,
                computed with attn_implementation="eager", whatever is set.
            kwargs: Ignored, so that all that the image processor returns can be passed on.

        Returns:
            With experts, also `branch_logits` (B, 2, N): `logits`, and those of the experts.

        Raises:
            ValueError: Pictures have another size, or centres for the auxiliary loss are missing or have
                another shape.
        """
        want_states = or_default(output_hidden_states, self.config.output_hidden_states)
        want_attentions = or_default(output_attentions, self.config.output_attentions)
        check_size(pixel_values, self.config.image_size)
        tokens, codes, states, attentions = self._encode(pixel_values, want_states, want_attentions)
        normed = self.vit.layernorm(tokens)
        logits = self.classifier(normed[:, 0])
        expert_logits = None
        if self.expert_classifier is not None:
            expert_logits = self._of_experts(codes[:, :1])[..., 0]  # type: ignore[index]
            expert_logits = on_device(expert_logits, logits.device)
        loss = None
        if labels is not None:
            loss = self._loss(logits, expert_logits, labels)
            if self.patch_reader is not None:
                patch_loss = self._patch_loss(normed, au_centers, labels).to(loss.device)
                loss = loss + self.config.patch_loss_weight * patch_loss
        output = AUDetectionOutput(
            loss=loss,
            logits=logits,
            branch_logits=None if expert_logits is None else torch.stack([logits, expert_logits], dim=1),
            hidden_states=tuple(states) if want_states else None,
            attentions=tuple(attentions) if want_attentions else None,
        )
        if output_au_attentions:
            output.au_attentions = torch.sigmoid(self._evidence(normed, codes))
        return output

    def au_embeddings(self, pixel_values: Tensor) -> Tensor:
        """Return the knowledge K (B, N, D) of each action unit's last expert at [CLS] (Sec. 3.4, Fig. 5).

        Raises:
            ValueError: Pictures have another size, or the model has no expert per action unit.
        """
        if self.expert_classifier is None:
            raise ValueError(
                'Only collaborating experts (adaptation="moke") have an embedding per action unit.'
            )
        check_size(pixel_values, self.config.image_size)
        codes = self._encode(pixel_values, want_states=False, want_attentions=False)[1][:, 0]  # type: ignore[index]
        weight, bias = self._last_expansions()
        return torch.einsum("bnd,nDd->bnD", codes.unflatten(-1, weight.shape[::2]), weight) + bias

    def _encode(
        self, pixel_values: Tensor, want_states: bool, want_attentions: bool
    ) -> tuple[Tensor, Tensor | None, list[Tensor], list[Tensor]]:
        """Return the last tokens and experts' codes, and if wanted maps and attentions of all blocks."""
        generations = (
            self.experts.fold() if self.experts is not None else [None] * self.config.num_generations
        )
        tokens, codes = self.vit.embeddings(self.in_own_type(pixel_values)), None
        states: list[Tensor] = []
        attentions: list[Tensor] = []
        tokens = self._show(tokens, states, want_states)
        for number, (block, layer) in enumerate(zip(self.blocks, self.vit.layers, strict=True)):
            if self.prompts is not None:
                tokens = self.prompts(tokens, number)
            pair = (generations[2 * number], generations[2 * number + 1])
            tokens, codes, attention = block(tokens, codes, Lent(layer), pair, want_attentions)
            tokens = self._show(tokens, states, want_states)
            attentions.append(attention)
        return tokens, codes, states, attentions

    def _show(self, tokens: Tensor, states: list[Tensor], wanted: bool) -> Tensor:
        """Add the map of the patches to the states, and return tokens that depend on it.

        So gradients with respect to the map are available.
        """
        if not wanted:
            return tokens
        size = (self.config.map_size, self.config.map_size)
        states.append(self._patches(tokens).mT.unflatten(-1, size))
        others = tokens[:, : -(self.config.map_size**2)]  # [CLS] and prompts
        return torch.cat([others, states[-1].flatten(2).mT], dim=1)

    def _of_experts(self, codes: Tensor) -> Tensor:
        """Logits of the last experts from their codes: (B, T, N d) -> (B, N, T)."""
        return self.expert_classifier(codes, *self._last_expansions())  # type: ignore[misc]

    def _last_expansions(self) -> tuple[Tensor, Tensor]:
        """Return the last layers of the last experts: U (N, D, d) and b (N, D)."""
        weight, bias = (self.experts.stack(name)[-1] for name in ("up_weight", "up_bias"))  # type: ignore[union-attr]
        return weight, bias

    def _evidence(self, normed: Tensor, codes: Tensor | None) -> Tensor:
        """Apply each action unit's head to the patches, as logits (B, N, H, W)."""
        if self.expert_classifier is not None:
            patches = self._of_experts(codes[:, 1:])  # type: ignore[index]
        else:
            patches = self.classifier(self._patches(normed)).mT
        return patches.unflatten(-1, (self.config.map_size, self.config.map_size))

    def _loss(self, logits: Tensor, expert_logits: Tensor | None, labels: Tensor) -> Tensor:
        """Eq. 9: L_MDWA + L_WDI + L'_MDWA."""
        config, rates = self.config, self.config.au_occurrence_rates
        weight = None if rates is None else occurrence_weights(rates)[0]
        gamma = config.gamma_bounds[0] if rates is None else difficulty_exponents(rates, config.gamma_bounds)
        loss = mdwa_loss(logits, labels, weight, gamma, config.margin)
        if config.dice_loss_weight:
            dice = weighted_dice_loss(logits, labels, weight, config.dice_smoothing)
            loss = loss + config.dice_loss_weight * dice
        if expert_logits is not None and config.expert_loss_weight:
            expert_loss = mdwa_loss(expert_logits, labels, weight, gamma, config.margin)
            loss = loss + config.expert_loss_weight * expert_loss
        return loss

    def _patch_loss(self, normed: Tensor, au_centers: Tensor | None, labels: Tensor) -> Tensor:
        """Auxiliary loss of occurrences and centres predicted from the patches.

        Unknown labels are ignored, but not the centres of their faces.
        """
        expected = (*labels.shape, 2, 2)
        if au_centers is None or tuple(au_centers.shape) != expected:
            got = None if au_centers is None else tuple(au_centers.shape)
            raise ValueError(
                f"patch_loss_weight={self.config.patch_loss_weight} needs au_centers of shape {expected}, "
                f"got {got}: pass all that the image processor or collator returns, model(**inputs), or set "
                "it to 0."
            )
        logits, centers = self.patch_reader(self._patches(normed))  # type: ignore[misc]
        places = (au_centers.flatten(2).to(centers) + 0.5) / self.config.image_size - 0.5
        return self.au_loss(logits, labels) + F.smooth_l1_loss(centers, 5 * places)

    def _patches(self, tokens: Tensor) -> Tensor:
        """Tokens without [CLS] and prompts: (B, T, D) -> (B, H W, D)."""
        return tokens[:, -(self.config.map_size**2) :]


@dataclass(frozen=True)
class Lent:
    """A module as an argument of another one, wrapped so that Accelerate does not move it."""

    module: Any


class AUFormerBlock(GradientCheckpointingLayer):
    """Runs a block of the vision transformer with its adapters (Eqs. 1 and 4)."""

    def __init__(self, config: AUFormerConfig):
        super().__init__()
        self.config = config
        size = config.vit_config.hidden_size
        if config.adaptation == "adapter":
            self.adapters = nn.ModuleList(BottleneckAdapter(size, config.adapter_channels) for _ in range(2))
        elif config.adaptation == "lora":
            self.query = LowRankUpdate(size, config.adapter_channels)
            self.key = LowRankUpdate(size, config.adapter_channels)

    def attach(self, attention: Any) -> None:
        """Let the low-rank updates act on the frozen projections of the block's attention."""
        # Bound methods are copied with the model.
        attention.q_proj.register_forward_hook(self.query.add)
        attention.k_proj.register_forward_hook(self.key.add)

    def forward(
        self,
        tokens: Tensor,
        codes: Tensor | None,
        lent: Lent,
        generations: tuple["Generation | None", "Generation | None"],
        want_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Tokens (B, T, D) and the last codes (B, T, N d) -> both after the block; if wanted, attentions."""
        layer = lent.module
        x = layer.layernorm_before(tokens)  # where Accelerate has put the layer
        tokens = on_device(tokens, x.device)
        codes = None if codes is None else on_device(codes, x.device)
        attended, attentions = self_attention(layer.attention, x, want_attentions)
        knowledge, codes = self._adapt(0, x, attended, codes, generations)
        tokens = tokens + layer.dropout(attended) + knowledge  # Eq. 4
        x = layer.layernorm_after(tokens)
        transformed = layer.mlp(x)
        knowledge, codes = self._adapt(1, x, transformed, codes, generations)
        return tokens + layer.dropout(transformed) + knowledge, codes, attentions

    def _adapt(
        self,
        half: int,
        x: Tensor,
        y: Tensor,
        codes: Tensor | None,
        generations: Sequence["Generation | None"],
    ) -> tuple[Tensor | float, Tensor | None]:
        """Return the adapter's addition to y, the output of attention or MLP for x, and the codes."""
        generation = generations[half]
        if generation is not None:
            dropout = self.config.expert_dropout if self.training else 0.0
            generation = generation.to(x.device)
            codes = expert_codes(x, codes, generation, self.config, dropout)
            return F.linear(codes, generation.up, generation.up_bias), codes  # Eq. 3
        if self.config.adaptation == "adapter":
            return on_device(self.adapters[half](y), y.device), None
        return 0.0, None


def self_attention(attention: Any, x: Tensor, want_weights: bool) -> tuple[Tensor, Tensor | None]:
    """Apply the backbone's attention to x (B, T, D); also return its matrices (B, heads, T, T) if wanted.

    For matrices, which kernels do not return, and for empty batches it is computed explicitly.
    """
    has_matrices = attention.config._attn_implementation == "eager"
    if x.shape[0] != 0 and (has_matrices or not want_weights):
        return attention(x)
    query, key, value = (
        project(x).unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)  # (B, heads, T, d)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    dropout = attention.attention_dropout if attention.training else 0.0
    attended, weights = eager_attention_forward(
        attention, query, key, value, None, scaling=attention.scaling, dropout=dropout
    )
    return attention.o_proj(attended.flatten(2)), weights


class Backbone(ViTModel):
    """The vision transformer; its initial position embeddings are sines and cosines."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.embeddings:
            positions = module.position_embeddings
            side = math.isqrt(positions.shape[1] - 1)
            init.copy_(positions, sine_cosine_positions(side, positions.shape[-1])[None])


class PatchReader(nn.ModuleDict):
    """A linear layer on all patches for each action unit, for its logit and its two centres.

    Centres are (x, y) relative to the centre of the picture, in fifths of its side.
    """

    def __init__(self, config: AUFormerConfig):
        values = config.map_size**2 * config.vit_config.hidden_size
        super().__init__({name: ZeroLinear(values, 5) for name in module_names(config)})

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Patches (B, H W, D) -> logits (B, N) and centres (B, N, 4)."""
        read = torch.stack([head(patches.flatten(1)) for head in self.values()], dim=1).float()
        return read[..., 0], read[..., 1:]


class ExpertLines(nn.ModuleDict):
    """The experts (MoKE, Sec. 3.3), a line of generations per action unit, by label.

    Without collaboration, and for Convpass, which is an expert without operators, there is one line, "all".
    """

    def __init__(self, config: AUFormerConfig):
        names = module_names(config) if config.has_au_experts else ["all"]
        super().__init__({name: ExpertLine(config) for name in names})
        self.hands_on = config.has_au_experts

    def fold(self) -> list["Generation"]:
        """Stack the experts of each group, and compose consecutive linear layers: G generations."""
        names = [name for name, _ in next(iter(self.values())).named_parameters()]
        p = {name: self.stack(name) for name in names}  # (G, N, ...)
        down, down_bias = p["down_weight"].flatten(1, 2), p["down_bias"]
        carries: list[Tensor | None] = [None] * len(down)
        if self.hands_on:  # Eq. 2: W (x + U z + b) + c = W x + (W U) z + (W b + c)
            inherited = (p["down_weight"][1:] @ p["up_bias"][:-1, ..., None]).squeeze(-1)
            down_bias = torch.cat([down_bias[:1], down_bias[1:] + inherited])
            carries[1:] = block_diagonal(p["down_weight"][1:] @ p["up_weight"][:-1]).unbind()
        up = p["up_weight"].transpose(1, 2).flatten(2) / len(self)  # Eq. 3, the mean
        up_bias = p["up_bias"].mean(1)
        conv = p["conv_weight"].unflatten(-1, (-1, 3, 3))
        mrf, mrf_bias = fold_mrf(p)
        return [
            Generation(
                down=down[g],
                down_bias=down_bias[g].flatten(),
                carry=carries[g],
                conv=conv[g],
                conv_bias=p["conv_bias"][g],
                mrf=None if mrf is None else mrf[g],
                mrf_bias=None if mrf_bias is None else mrf_bias[g],
                qkv=p["qkv_weight"][g] if "qkv_weight" in p else None,
                qkv_bias=p["qkv_bias"][g] if "qkv_bias" in p else None,
                up=up[g],
                up_bias=up_bias[g],
            )
            for g in range(len(down))
        ]

    def stack(self, name: str) -> Tensor:
        """Return a parameter of all lines, (G, N, ...)."""
        return torch.stack([parameter_of(line, name) for line in self.values()], dim=1)


class ExpertLine(nn.Module):
    """All generations of one action unit's experts: parameters with the generation first, kernels flat.

    An expert: 1x1 convolution D -> d ("down"), GELU, 3x3 convolution ("conv") = M'';
    multi-receptive field operator: dilated 3x3 convolutions ("mrf"), concatenated, 1x1 R d -> d ("fuse");
    context-aware operator: 1x1 d -> q, k, v ("qkv") and Eq. 5; sum of the three, GELU, 1x1 d -> D ("up").
    """

    def __init__(self, config: AUFormerConfig):
        super().__init__()
        generations, size = config.num_generations, config.vit_config.hidden_size
        is_moke = config.adaptation == "moke"
        d = config.expert_channels if is_moke else config.adapter_channels
        shapes: dict[str, tuple[int, ...]] = {"down": (d, size), "conv": (d, 9 * d), "up": (size, d)}
        if is_moke and (branches := len(config.mrf_dilations)):
            shapes |= {"mrf": (branches, d, 9 * d), "fuse": (d, branches * d)}
        if is_moke and config.ca_neighborhood:
            shapes |= {"qkv": (3 * d, d)}
        for name, shape in shapes.items():
            outputs = shape[:2] if name == "mrf" else shape[:1]
            self.register_parameter(f"{name}_weight", nn.Parameter(torch.empty(generations, *shape)))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(generations, *outputs)))

    def initialize(self) -> None:
        """Xavier initialisation of convolutions, 0 for biases and the last layer, which then adds nothing."""
        d, size = self.get_parameter("down_weight").shape[1:]
        inputs_and_outputs = {"down": size + d, "conv": 18 * d, "mrf": 18 * d, "qkv": 2 * d}
        if hasattr(self, "fuse_weight"):
            inputs_and_outputs["fuse"] = self.get_parameter("fuse_weight").shape[-1] + d
        for name, parameter in self.named_parameters():
            layer, kind = name.split("_")
            if kind == "bias" or layer == "up":
                init.zeros_(parameter)
            else:
                bound = math.sqrt(6 / inputs_and_outputs[layer])
                init.uniform_(parameter, -bound, bound)


class Generation(NamedTuple):
    """A group of N stacked experts, for `expert_codes`."""

    down: Tensor  # (N d, D)
    down_bias: Tensor  # (N d,), with the contribution of the previous generation's biases
    carry: Tensor | None  # (N d, N d) block-diagonal, from the previous generation's codes
    conv: Tensor  # (N, d, d, 3, 3), output channels first
    conv_bias: Tensor  # (N, d)
    mrf: Tensor | None  # (N, R, d, d, 3, 3), with "fuse" multiplied in
    mrf_bias: Tensor | None  # (N, d)
    qkv: Tensor | None  # (N, 3 d, d)
    qkv_bias: Tensor | None  # (N, 3 d)
    up: Tensor  # (D, N d), divided by N
    up_bias: Tensor  # (D,), the mean

    def to(self, device: torch.device) -> "Generation":
        """Move all tensors to a device."""
        return Generation(*(None if x is None else on_device(x, device) for x in self))  # type: ignore[arg-type]


def fold_mrf(p: dict[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """Compose the dilated convolutions with the 1x1 convolution on their concatenation."""
    if "mrf_weight" not in p:
        return None, None
    fuse = p["fuse_weight"].unflatten(-1, p["mrf_bias"].shape[2:])  # (G, N, d, R, d)
    weight = torch.einsum("gnorc,gnrck->gnrok", fuse, p["mrf_weight"]).unflatten(-1, (-1, 3, 3))
    return weight, torch.einsum("gnorc,gnrc->gno", fuse, p["mrf_bias"]) + p["fuse_bias"]


def expert_codes(
    x: Tensor, codes: Tensor | None, generation: Generation, config: AUFormerConfig, dropout: float
) -> Tensor:
    """Apply a group of experts without their last convolution: tokens x (B, T, D) -> codes z (B, T, N d)."""
    y = F.linear(x, generation.down, generation.down_bias)
    if codes is not None and generation.carry is not None:
        y = y + F.linear(codes, generation.carry)
    y = F.gelu(y)
    size = (config.map_size, config.map_size)
    patches = experts_on_map(y[:, 1:].mT.unflatten(-1, size), generation, config)
    cls = experts_on_cls(y[:, 0], generation, config)
    return F.dropout(F.gelu(torch.cat([cls.unsqueeze(1), patches.flatten(2).mT], dim=1)), dropout)


def experts_on_map(y: Tensor, generation: Generation, config: AUFormerConfig) -> Tensor:
    """M'' + K^MRF + K^CA of the patches: (B, N d, H, W) -> the same."""
    groups = len(generation.conv)
    basic = F.conv2d(
        y, generation.conv.flatten(0, 1), generation.conv_bias.flatten(), padding=1, groups=groups
    )
    result = basic
    if generation.mrf is not None and generation.mrf_bias is not None:
        for branch, dilation in enumerate(config.mrf_dilations):
            kernel = generation.mrf[:, branch].flatten(0, 1)
            bias = generation.mrf_bias.flatten() if branch == 0 else None
            result = result + F.conv2d(
                basic, kernel, bias, padding=dilation, dilation=dilation, groups=groups
            )
    if generation.qkv is not None and generation.qkv_bias is not None:
        kernel = generation.qkv.flatten(0, 1)[..., None, None]
        qkv = F.conv2d(basic, kernel, generation.qkv_bias.flatten(), groups=groups)
        query, key, value = (part.flatten(1, 2) for part in qkv.unflatten(1, (groups, 3, -1)).unbind(2))
        scale = generation.conv.shape[1] ** -0.5
        result = result + neighborhood_attention(
            query * scale, key, value, config.ca_neighborhood, config.ca_border == "masked"
        )
    return result


def experts_on_cls(y: Tensor, generation: Generation, config: AUFormerConfig) -> Tensor:
    """The same for [CLS], which is a map of one cell (Sec. 3.3): (B, N d) -> the same.

    Only the centre of each kernel applies to it; the rest is padding.
    """
    experts = y.unflatten(-1, (len(generation.conv), -1))  # (B, N, d)
    basic = torch.einsum("bni,noi->bno", experts, generation.conv[..., 1, 1]) + generation.conv_bias
    result = basic
    if generation.mrf is not None and generation.mrf_bias is not None:
        kernel = generation.mrf[..., 1, 1].sum(1)
        result = result + torch.einsum("bni,noi->bno", basic, kernel) + generation.mrf_bias
    if generation.qkv is not None and generation.qkv_bias is not None:
        qkv = torch.einsum("bni,noi->bno", basic, generation.qkv) + generation.qkv_bias
        query, key, value = qkv.unflatten(-1, (3, -1)).unbind(2)
        others = config.ca_neighborhood**2 - 1
        if config.ca_border == "zeros" and others:  # softmax of one score and of as many zeros as others
            score = query * key * generation.conv.shape[1] ** -0.5
            value = value * torch.sigmoid(score - math.log(others))
        result = result + value
    return result.flatten(1)


def neighborhood_attention(query: Tensor, key: Tensor, value: Tensor, size: int, masked: bool) -> Tensor:
    """Attention of every channel and position to its neighbourhood of size x size (Eq. 5).

    Args:
        query: (B, C, H, W), scaled.
        key: (B, C, H, W).
        value: (B, C, H, W).
        size: Odd side of the neighbourhood.
        masked: Ignore positions outside the map; otherwise their keys and values are 0.

    Returns:
        (B, C, H, W).
    """
    height, width = query.shape[-2:]
    border = [size // 2] * 4
    key, value = F.pad(key, border), F.pad(value, border)
    windows = [
        (..., slice(row, row + height), slice(column, column + width))
        for row in range(size)
        for column in range(size)
    ]
    scores = torch.stack([query * key[window] for window in windows])  # (S S, B, C, H, W)
    if masked:
        outside = F.pad(query.new_zeros(height, width), border, value=float("-inf"))
        scores = scores + torch.stack([outside[window] for window in windows])[:, None, None]
    weights = torch.softmax(scores, dim=0)
    return sum(weight * value[window] for weight, window in zip(weights.unbind(), windows, strict=True))  # type: ignore[return-value]


class ExpertClassifier(AUClassifier):
    """A linear output per action unit on the knowledge of its last expert (Sec. 3.4)."""

    def __init__(self, config: AUFormerConfig):
        super().__init__(config, config.vit_config.hidden_size)

    def forward(self, codes: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        """Codes (B, T, N d) -> logits (B, N, T): h (U z + b) + c = (h U) z + (h b + c).

        Args:
            codes: z.
            weight: U (N, D, d).
            bias: b (N, D).
        """
        on_codes = torch.einsum("nD,nDd->nd", self.weight, weight)
        constant = (self.weight * bias).sum(-1) + self.bias
        codes = codes.unflatten(-1, on_codes.shape)
        return torch.einsum("btnd,nd->bnt", codes, on_codes) + constant[:, None]


class BottleneckAdapter(nn.Module):
    """Residual of an adapter (Houlsby et al., ICML 2019) after attention or MLP."""

    def __init__(self, size: int, channels: int):
        super().__init__()
        self.down = nn.Linear(size, channels)
        self.up = ZeroLinear(channels, size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> the same."""
        return self.up(F.gelu(self.down(x)))


class LowRankUpdate(nn.Module):
    """LoRA (Hu et al., ICLR 2022): a low-rank update of a frozen projection."""

    def __init__(self, size: int, rank: int):
        super().__init__()
        self.down = nn.Linear(size, rank, bias=False)
        self.up = ZeroLinear(rank, size, bias=False)

    def add(self, projection: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Forward hook of the frozen projection."""
        return output + on_device(self.up(self.down(inputs[0])), output.device)


class ZeroLinear(nn.Linear):
    """A linear layer that is initialised with zeros."""


class Prompts(nn.Module):
    """Visual prompt tuning (VPT; Jia et al., ECCV 2022): learned tokens between [CLS] and the patches."""

    def __init__(self, config: AUFormerConfig):
        super().__init__()
        backbone = config.vit_config
        depth = backbone.num_hidden_layers if config.deep_prompts else 1
        size = backbone.hidden_size
        self.tokens = nn.Parameter(torch.empty(depth, config.num_prompts, size))

    def forward(self, tokens: Tensor, block: int) -> Tensor:
        """Insert the prompts of a block, replacing those of the block before."""
        if block >= len(self.tokens):
            return tokens
        prompts = self.tokens[block].expand(len(tokens), -1, -1)
        patches = tokens[:, 1 if block == 0 else 1 + prompts.shape[1] :]
        return torch.cat([tokens[:, :1], prompts, patches], dim=1)


def block_diagonal(matrices: Tensor) -> Tensor:
    """(..., N, d, e) -> (..., N d, N e) with the matrices along the diagonal."""
    eye = torch.eye(matrices.shape[-3], dtype=matrices.dtype, device=matrices.device)
    return (matrices[..., None, :] * eye[:, None, :, None]).flatten(-2).flatten(-3, -2)


def sine_cosine_positions(side: int, channels: int) -> Tensor:
    """Initial position embeddings without pretraining, as in MAE (He et al., CVPR 2022).

    Args:
        side: Height and width of the map in patches.
        channels: Channels, a quarter each for sine and cosine of row and column.

    Returns:
        (1 + side^2, channels), row by row; 0 for [CLS] and for the remainder of channels by four.
    """
    count = channels // 4
    frequencies = 10000.0 ** -(torch.arange(count) / max(count, 1))
    angles = torch.arange(side)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (side, 2 count)
    shape = (side, side, 2 * count)
    both = torch.cat([axis[:, None].expand(shape), axis[None].expand(shape)], dim=-1).flatten(0, 1)
    return F.pad(both, (0, channels - 4 * count, 1, 0))


def resize_positions(positions: Tensor, map_size: int) -> Tensor:
    """Interpolate position embeddings (1, 1 + H W, D), [CLS] first, to another square map."""
    old_size = math.isqrt(positions.shape[1] - 1)
    if old_size == map_size:
        return positions
    patches = positions[:, 1:].mT.unflatten(-1, (old_size, old_size)).float()
    patches = F.interpolate(patches, size=(map_size, map_size), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], patches.flatten(2).mT.to(positions.dtype)], dim=1)


__all__ = ["AUFormerForAUDetection", "AUFormerPreTrainedModel"]
