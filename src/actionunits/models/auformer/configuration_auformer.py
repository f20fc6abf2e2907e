"""Configuration of AUFormer.

Yuan, Yu, Liu, Xie, Yue, Yang: AUFormer: Vision transformers are parameter-efficient facial action unit
detectors. ECCV 2024. The defaults are the paper's for BP4D; `compact()` gives a small one for CPUs.
"""

import copy
from typing import Any, Literal, cast

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, ViTConfig

from actionunits.configuration_au import AUConfig

_FULL: dict[str, Any] = {"adaptation": "none", "freeze_backbone": False}
_WA: dict[str, Any] = {"margin": 0.0, "gamma_bounds": [1.0, 1.0]}
_NO_MRF: dict[str, Any] = {"mrf_dilations": []}
_NO_CA: dict[str, Any] = {"ca_neighborhood": 0}

ABLATIONS: dict[str, dict[str, Any]] = {
    "Baseline": {**_FULL, **_WA},
    "Baseline, MDWA": _FULL,
    "PETL": {"adaptation": "convpass", **_WA},
    "PETL, Collab.": {**_NO_MRF, **_NO_CA, **_WA},
    "PETL, Collab., MDWA": {**_NO_MRF, **_NO_CA},
    "PETL, MRF, CA": {"collaboration": False, **_WA},
    "PETL, Collab., MRF": {**_NO_CA, **_WA},
    "PETL, Collab., CA": {**_NO_MRF, **_WA},
    "PETL, Collab., MRF, CA": _WA,
    "PETL, Collab., MRF, CA, gamma": {"margin": 0.0},
    "AUFormer": {},
}
"""The rows of Table 4 as values of `AUFormerConfig`, in order; without MDWA the loss is WA."""

CHOICES: dict[str, dict[str, Any]] = {
    "Adapter": {"adaptation": "adapter", **_WA},
    "LoRA": {"adaptation": "lora", **_WA},
    "VPT": {"adaptation": "vpt", **_WA},
    "Convpass": {"adaptation": "convpass", **_WA},
    "dilated rates 1, 3": {"mrf_dilations": [1, 3]},
    "dilated rates 1": {"mrf_dilations": [1]},
    "dilated rates 1, 2, 3": {"mrf_dilations": [1, 2, 3]},
    "5 x 5": {"ca_neighborhood": 5},
    "7 x 7": {"ca_neighborhood": 7},
    "m = 0.01": {"margin": 0.01},
    "m = 0.05": {"margin": 0.05},
    "m = 0.2": {"margin": 0.2},
}
"""The other entries of Table 5; (a) with WA, as its Convpass has the same F1 as PETL in Table 4."""


@strict
class AUFormerConfig(AUConfig):
    """Configuration of AUFormer: vision transformer, adaptation and loss.

    Args:
        backbone_config: `ViTConfig` of the vision transformer, or its fields as a dictionary; ViT-B/16 at 224
            pixels by default. The keyword `image_size` replaces its `image_size`.
        backbone_name_or_path: Folder or Hub name of the backbone's pretrained ViT checkpoint, see
            `from_backbone`. `AutoModel.from_config` loads its weights. Only models with such a name can be
            saved without their backbone.
        backbone_revision: Branch, tag or commit of that checkpoint on the Hub.
        freeze_backbone: Train adapters and heads only. False with `adaptation="none"` is full fine-tuning,
            the baseline of Table 4.
        adapters_only: Whether the weights beside this file are adapters only. Set by `save_pretrained`.
        adaptation: Adaptation of the vision transformer: "moke", the experts (Secs. 3.2-3.3); or, as in Table
            5a, "convpass", "adapter", "lora", "vpt"; or "none".
        collaboration: Use an expert per action unit, whose knowledge goes to the next expert of its line and
            to its group (Sec. 3.2). If false, one expert per group serves all action units, without passing
            knowledge on or supervision (Table 4, rows with PETL but without Collab.).
        expert_channels: Channels of an expert between its 1x1 convolutions (d).
        mrf_dilations: Dilations of the multi-receptive field operator (r); none for no operator.
        ca_neighborhood: Side of the neighbourhood of the context-aware operator, an odd number (S); 0 for no
            operator.
        ca_border: Padding of the map for that operator: "zeros", keys and values of 0, which are part of the
            softmax; or "masked", none. The paper leaves it open.
        expert_dropout: Dropout of the experts' channels before their last convolution.
        adapter_channels: Hidden channels of "convpass" and "adapter", rank of "lora".
        num_prompts: Prompt tokens of "vpt".
        deep_prompts: New prompts before every block (VPT-deep), not only before the first (VPT-shallow).
        margin: Margin subtracted from the probability of a non-occurrence in the loss (m); 0 for none. The
            paper has 0.1 for BP4D, 0.15 for DISFA, 0.3 for CASME II.
        gamma_bounds: Exponents at occurrence rates of 0 and 1 (B_L, B_R); both 1 for none. Without
            `au_occurrence_rates` every exponent is the first.
        dice_smoothing: Smooth term of the dice loss (epsilon).
        dice_loss_weight: Weight of the dice loss (Eq. 8) in Eq. 9.
        expert_loss_weight: Weight of the loss of the experts' predictions (L') in Eq. 9.
        patch_loss_weight: Weight of an auxiliary loss that is not in the paper, whose backbone is pretrained:
            for each action unit a linear layer predicts occurrence and the two centres from all patches. A
            random backbone that is trained by [CLS] alone remains at chance for long.
    """

    model_type = "au-auformer"
    sub_configs_defaults = {"backbone_config": ViTConfig}  # type: ignore[dict-item]
    sub_configs = {"backbone_config": ViTConfig}  # read by transformers before 5.20

    _aligned_size, _crop_size = 256, 224

    # Backbone
    backbone_config: dict | ViTConfig | None = None
    backbone_name_or_path: str | None = None
    backbone_revision: str | None = None
    freeze_backbone: bool = True
    adapters_only: bool = False

    # Adaptation
    adaptation: Literal["moke", "convpass", "adapter", "lora", "vpt", "none"] = "moke"
    collaboration: bool = True
    expert_channels: int = 4
    mrf_dilations: list[int] | tuple[int, ...] = (1, 3, 5)
    ca_neighborhood: int = 3
    ca_border: Literal["zeros", "masked"] = "zeros"
    expert_dropout: float | int = 0.0
    adapter_channels: int = 8
    num_prompts: int = 10
    deep_prompts: bool = True

    # Loss
    margin: float | int = 0.1
    gamma_bounds: list[float | int] | tuple[float | int, ...] = (1.0, 2.0)
    dice_smoothing: float | int = 1.0
    dice_loss_weight: float | int = 1.0
    expert_loss_weight: float | int = 1.0
    patch_loss_weight: float | int = 0.0

    def __post_init__(self, **kwargs):
        """Convert the backbone's dictionary to a configuration, and tuples to lists, as JSON does."""
        given = self.backbone_config or {}
        # A copy, as `image_size` changes it.
        self.backbone_config = copy.copy(given) if isinstance(given, ViTConfig) else ViTConfig(**given)
        self.mrf_dilations = list(self.mrf_dilations)
        self.gamma_bounds = list(self.gamma_bounds)
        super().__post_init__(**kwargs)

    @classmethod
    def from_backbone(
        cls, backbone_name_or_path: str, backbone_revision: str | None = None, **kwargs: Any
    ) -> "AUFormerConfig":
        """Return the configuration for the backbone of a ViT checkpoint; only its `config.json` is read.

        Args:
            backbone_name_or_path: Folder or Hub name of a checkpoint of type "vit", whatever head it has.
            backbone_revision: Branch, tag or commit on the Hub.
            kwargs: Fields of the configuration, such as `aus`, or `image_size`.

        Raises:
            ValueError: The checkpoint is not a plain vision transformer.
        """
        source = AutoConfig.from_pretrained(backbone_name_or_path, revision=backbone_revision or "main")
        if type(source) is not ViTConfig:
            raise ValueError(
                f"{backbone_name_or_path} is a {source.model_type!r} checkpoint, but AUFormer adapts plain "
                'vision transformers: pass one of type "vit", such as google/vit-base-patch16-224.'
            )
        fields = {name: getattr(source, name) for name in ARCHITECTURE_FIELDS}
        return cls(
            backbone_config=ViTConfig(**fields),
            backbone_name_or_path=str(backbone_name_or_path),
            backbone_revision=backbone_revision,
            **kwargs,
        )

    @classmethod
    def compact(cls, **kwargs: Any) -> "AUFormerConfig":
        """Return a small configuration that a CPU trains without freezing; keywords replace its values."""
        backbone: dict[str, Any] = {
            "hidden_size": 192,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "intermediate_size": 576,
            "image_size": 112,
            "patch_size": 14,
            "initializer_range": 0.07,  # 1 / sqrt(192), three times the usual 0.02
        }
        defaults: dict[str, Any] = {"backbone_config": backbone, "freeze_backbone": False}
        return cls(**(defaults | kwargs))

    @property
    def vit_config(self) -> ViTConfig:
        """`backbone_config` as a `ViTConfig`."""
        return cast(ViTConfig, self.backbone_config)

    @property
    def image_size(self) -> int:
        """Height and width of the input in pixels: the backbone's."""
        return cast(int, self.vit_config.image_size)

    @image_size.setter
    def image_size(self, value: int) -> None:
        self.vit_config.image_size = value

    @property
    def patch_size(self) -> int:
        """Height and width of a patch in pixels."""
        return cast(int, self.vit_config.patch_size)

    @property
    def map_size(self) -> int:
        """Height and width of the map of patches (H, W)."""
        return self.image_size // self.patch_size

    @property
    def num_generations(self) -> int:
        """Groups of experts: one for the attention and one for the MLP of every block."""
        return 2 * self.vit_config.num_hidden_layers

    @property
    def has_au_experts(self) -> bool:
        """Whether every action unit has its own experts, which are supervised by its labels."""
        return self.adaptation == "moke" and self.collaboration

    def validate_architecture(self):
        """Check the sizes."""
        sizes = (self.vit_config.image_size, self.vit_config.patch_size)
        whole = all(isinstance(size, int) and size > 0 for size in sizes)
        if not whole or self.image_size % self.patch_size:
            raise ValueError(
                f"The backbone's image_size={sizes[0]} must be a number of pixels that its "
                f"patch_size={sizes[1]} divides: faces are square."
            )
        if self.ca_neighborhood < 0 or (self.ca_neighborhood and self.ca_neighborhood % 2 == 0):
            raise ValueError(
                f"ca_neighborhood={self.ca_neighborhood} must be odd, or 0 for no such operator."
            )
        if any(dilation < 1 for dilation in self.mrf_dilations):
            raise ValueError(f"mrf_dilations={self.mrf_dilations} must be 1 or more each.")
        for name in ("expert_channels", "adapter_channels", "num_prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if not 0 <= self.expert_dropout < 1:
            raise ValueError(f"expert_dropout={self.expert_dropout} must lie in [0, 1).")

    def validate_loss(self):
        """Check the parameters of the loss."""
        if not 0 <= self.margin < 1:
            raise ValueError(f"margin={self.margin} must lie in [0, 1).")
        if len(self.gamma_bounds) != 2 or min(self.gamma_bounds) <= 0:
            raise ValueError(f"gamma_bounds={self.gamma_bounds} must be two numbers above 0, B_L and B_R.")
        for name in ("dice_smoothing", "dice_loss_weight", "expert_loss_weight", "patch_loss_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")


ARCHITECTURE_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "layer_norm_eps",
    "image_size",
    "patch_size",
    "num_channels",
    "qkv_bias",
)
"""Fields of a ViT checkpoint's configuration that define the backbone."""

__all__ = ["ABLATIONS", "CHOICES", "AUFormerConfig"]
