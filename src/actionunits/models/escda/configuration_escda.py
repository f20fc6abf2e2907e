"""Configurations of ESCDA's two networks and of their ensemble.

Shao, Chen, Zhou, Shi, Li, Ma, Yeung: Constrained and directional ensemble attention for facial action unit
detection. Pattern Recognition, 2025. The defaults are the paper's; `compact()` gives a small one for CPUs.
"""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict

from actionunits.configuration_au import AUConfig, CompositeAUConfig

Widths = list[int] | tuple[int, ...]
Shares = list[list[int]] | tuple[tuple[int, ...], ...]


@strict
class EscdaBackboneConfig(AUConfig):
    """Fields of the backbone, the enhanced MobileFaceNet that both networks use (Sec. 3.1.1).

    Each of its three stages is a block that halves the map, followed by residual blocks. A block's expansion
    channels are divided among depthwise kernels of 3x3, 5x5, 7x7, ...: shares [2, 1, 1] of 128 channels give
    64, 32 and 32; a remainder goes to the 3x3 kernel.

    Args:
        image_size: Height and width of the input in pixels (l).
        num_channels: Channels of the input.
        stem_channels: Channels of the stem's map, which has half the input's size.
        stage_channels: Channels of the stages, at a quarter, an eighth and a sixteenth of the input's size.
        stage_depths: Residual blocks of each stage.
        downsample_expansion: Expansion channels of the first block of each stage.
        residual_expansion: Expansion channels of the residual blocks.
        downsample_kernel_shares: Shares of the depthwise kernels in the first blocks.
        residual_kernel_shares: The same in the residual blocks.
        coordinate_reduction: Channel reduction factor of coordinate attention, which keeps at least eight.
        hidden_size: Channels of the last feature map (c).
    """

    image_size: int = 112
    num_channels: int = 3
    stem_channels: int = 64
    stage_channels: Widths = (64, 128, 256)
    stage_depths: Widths = (9, 16, 6)
    downsample_expansion: Widths = (128, 256, 1024)
    residual_expansion: Widths = (128, 256, 512)
    downsample_kernel_shares: Shares = (
        (2, 1, 1),
        (2, 1, 1),
        (1, 1, 1, 1),
    )
    residual_kernel_shares: Shares = ((3, 1), (3, 1), (1, 1, 1))
    coordinate_reduction: int = 32
    hidden_size: int = 512

    _stage_fields = (
        "stage_channels",
        "stage_depths",
        "downsample_expansion",
        "residual_expansion",
        "downsample_kernel_shares",
        "residual_kernel_shares",
    )

    def __post_init__(self, **kwargs):
        """Convert the stage fields to lists, as JSON does, so that a config equals its saved copy."""
        for name in self._stage_fields:
            values = [list(value) if isinstance(value, tuple) else value for value in getattr(self, name)]
            setattr(self, name, values)
        super().__post_init__(**kwargs)

    @property
    def map_size(self) -> int:
        """Height and width of the last feature map (h): a sixteenth of the input's, rounded up."""
        return -(-self.image_size // 16)

    def validate_architecture(self):
        """Check the number of stages, and the size of the picture."""
        lengths = {name: len(getattr(self, name)) for name in self._stage_fields}
        if set(lengths.values()) != {3}:
            raise ValueError(f"Each of these needs an entry for each of the 3 stages; got lengths {lengths}.")
        if self.image_size < 1:
            raise ValueError(f"image_size={self.image_size} must be a number of pixels, such as 112.")


_COMPACT_BACKBONE: dict[str, Any] = {
    "stem_channels": 16,
    "stage_channels": [24, 64, 128],
    "stage_depths": [1, 4, 2],
    "downsample_expansion": [32, 96, 256],
    "residual_expansion": [48, 128, 256],
    "hidden_size": 192,
}
_COMPACT_BRANCH = {"attention_channels": 64, "convolution_channels": 32, "mlp_channels": 192}


@strict
class LscConfig(EscdaBackboneConfig):
    """Configuration of the local self-attention constraining network (LSC, Sec. 3.1).

    Args:
        constraint: Factor of an action unit's self-attention: "adaptive", the mask with a learned epsilon
            (LSC); "fixed", the mask with epsilon 0 (LSC^fix); or "none" (LS).
        mask_sigma: Standard deviation of the masks' Gaussians in cells of the feature map (delta).
        epsilon_init: Initial epsilon of every action unit, above 0.
        attention_channels: Channels of a branch's self-attention, a multiple of `attention_head_dim`.
        attention_head_dim: Channels per head (d').
        convolution_channels: Channels of a branch's convolutional attention (MHCA), a multiple of
            `mhca_head_dim`.
        mhca_head_dim: Channels per head of the convolutional attention: 1 is a depthwise convolution, with
            the paper's number of parameters; Next-ViT has 32.
        mlp_channels: Hidden channels of a branch's MLP.

    Unless `constraint` is "none" the model needs `au_centers`, so landmarks, at inference, too.
    """

    model_type = "au-lsc"
    base_config_key = "lsc_config"

    constraint: Literal["adaptive", "fixed", "none"] = "adaptive"
    mask_sigma: float | int = 3.0
    epsilon_init: float | int = 0.1
    attention_channels: int = 384
    attention_head_dim: int = 32
    convolution_channels: int = 128
    mhca_head_dim: int = 1
    mlp_channels: int = 1024

    def validate_architecture(self):
        """Check that channels are multiples of heads and the mask's parameters are positive."""
        super().validate_architecture()
        for channels, head_dim in (
            ("attention_channels", "attention_head_dim"),
            ("convolution_channels", "mhca_head_dim"),
        ):
            if getattr(self, channels) % getattr(self, head_dim):
                values = f"{channels}={getattr(self, channels)}, {head_dim}={getattr(self, head_dim)}"
                raise ValueError(f"The channels must be a multiple of the channels of a head, got {values}.")
        if self.mask_sigma <= 0 or self.epsilon_init <= 0:
            raise ValueError(
                f"mask_sigma={self.mask_sigma} and epsilon_init={self.epsilon_init} must be above 0; "
                'for an epsilon of 0 use constraint="fixed".'
            )

    @classmethod
    def compact(cls, **kwargs) -> "LscConfig":
        """Return a small configuration that a CPU trains and runs; keywords replace its values."""
        return cls(**(_COMPACT_BACKBONE | _COMPACT_BRANCH | kwargs))


@strict
class GdaConfig(EscdaBackboneConfig):
    """Configuration of the global dual-directional attention network (GDA, Sec. 3.2).

    Args:
        attention_directions: "dual" (GDA), or for the unidirectional ablation (UA) "vertical", weights of
            rows, or "horizontal", weights of columns.
    """

    model_type = "au-gda"
    base_config_key = "gda_config"

    attention_directions: Literal["dual", "vertical", "horizontal"] = "dual"

    @classmethod
    def compact(cls, **kwargs) -> "GdaConfig":
        """Return a small configuration that a CPU trains and runs; keywords replace its values."""
        return cls(**(_COMPACT_BACKBONE | kwargs))


@strict
class EscdaConfig(CompositeAUConfig):
    """Configuration of the ensemble of LSC and GDA (ESCDA, Sec. 3.3).

    Both networks share the ensemble's action units and occurrence rates, which by default are those of the
    networks' configurations. Thresholds belong to the ensemble.

    Args:
        lsc_config: `LscConfig` or its fields as a dictionary.
        gda_config: `GdaConfig` or its fields as a dictionary.
        ensemble: "average" of the two probabilities (ESCDA) or "voting", their maximum (ESCDA-V).

    Raises:
        ValueError: Networks or ensemble name different action units.
    """

    model_type = "au-escda"
    sub_configs_defaults = {"lsc_config": LscConfig, "gda_config": GdaConfig}  # type: ignore[dict-item]
    sub_configs = {"lsc_config": LscConfig, "gda_config": GdaConfig}  # read by transformers before 5.20

    lsc_config: dict | LscConfig | None = None
    gda_config: dict | GdaConfig | None = None
    ensemble: Literal["average", "voting"] = "average"

    def __post_init__(self, **kwargs):
        """Use default values for networks that are not given."""
        self.lsc_config = self.lsc_config or {}
        self.gda_config = self.gda_config or {}
        super().__post_init__(**kwargs)

    @classmethod
    def compact(cls, **kwargs) -> "EscdaConfig":
        """Return the ensemble of both compact networks; keywords replace its values."""
        networks = {"lsc_config": _COMPACT_BACKBONE | _COMPACT_BRANCH, "gda_config": _COMPACT_BACKBONE}
        return cls(**(networks | kwargs))


__all__ = ["EscdaConfig", "GdaConfig", "LscConfig"]
