"""Configuration of AC2D, its ablations, and a compact one for CPUs.

Shao, Zhu, Zhou, Xiang, Liu, Yao, Ma: Facial action unit detection by adaptively constraining self-attention
and causally deconfounding sample. International Journal of Computer Vision, 2025.
The defaults are the paper's.
"""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict

from actionunits.configuration_au import AUConfig

Widths = list[int] | tuple[int, ...]

ABLATIONS: dict[str, dict[str, Any]] = {
    "B-Net": {"constraint": "none", "deconfounding": "none"},
    "A^v-Net": {"constraint": "average", "deconfounding": "none"},
    "A^e-Net": {"constraint": "each", "deconfounding": "none"},
    "AC2D": {"constraint": "average", "deconfounding": "dynamic"},
    "A^vC^e(s)-Net": {"constraint": "average", "deconfounding": "static"},
    "A^vC^s(d)-Net": {"constraint": "average", "deconfounding": "shared"},
}
"""The variants of Table 8 as values of `Ac2dConfig`."""


@strict
class Ac2dConfig(AUConfig):
    """Configuration of AC2D.

    The network is a stem, two shared stages, and a third stage per action unit, its branch. Stem, second and
    third stage halve the map.

    Args:
        image_size: Height and width of the input in pixels (l).
        num_channels: Channels of the input.
        stem_channels: Channels of the stem's first convolution.
        hidden_sizes: Channels of the three stages, multiples of their `num_heads`; the last is c.
        depths: Blocks of the three stages (n1, n2, n3).
        num_heads: Heads of the stages' self-attention; the last is k.
        key_reductions: Downsampling factor of each stage's map for keys and values, in height and width.
        mlp_ratio: Hidden channels of a block's MLP relative to its channels.
        drop_path_rate: Rate of stochastic depth in the last block, growing linearly from 0 in the first.
        layer_norm_eps: Epsilon of the layer normalisations.
        initializer_range: Standard deviation of the initial weights.
        constraint: Self-attention that the attention loss compares with the predefined attention: the
            "average" of all channels (A^v, Eqs. 6-7), "each" of them (A^e), or "none".
        constraint_weight: Weight of the attention loss (lambda_a, Eq. 15).
        attention_sigma: Standard deviation of the predefined attention in cells of the branch's map (delta).
        round_centers: Round the predefined attention's centres to cells, as in the authors' code.
        trunk_loss_weight: Weight of an auxiliary loss that is not in the paper, for training on few pictures:
            for each action unit a linear layer on the normalised rich feature, at the resolution of the
            branches' map, predicts its logit, and its centres in fifths of the picture from the middle; 0 for
            none.
        deconfounding: Deconfounding of samples: "dynamic" in each branch, with prototypes gathered during an
            epoch (C^e(d)); "static", with prototypes from another pass at its end (C^e(s)); "shared", dynamic
            and on the shared map (C^s(d)); or "none".
        intervention_ratio: Outputs of W_X and W_Z relative to c: 1 gives the number of parameters in the
            paper, its Eq. 10 has 8.
        query_ratio: Outputs of W_Q and W_K relative to c (8).
        prototype_value: Value of the prototype in Eq. 13: the "mean" of the features, or "mean_over_n", the
            mean divided by the number of samples again, as in the authors' code.
        deconfounding_start: "immediately", with a prototype of zeros, or "second_epoch", in which features
            are not changed before there is a prototype, as in the authors' code.
    """

    model_type = "au-ac2d"

    # Architecture
    image_size: int = 176
    num_channels: int = 3
    stem_channels: int = 32
    hidden_sizes: Widths = (64, 64, 64)
    depths: Widths = (1, 6, 3)
    num_heads: Widths = (1, 2, 4)
    key_reductions: Widths = (4, 2, 1)
    mlp_ratio: int = 4
    drop_path_rate: float | int = 0.1
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    # Adaptive constraining on self-attention (Sec. 3.2)
    constraint: Literal["average", "each", "none"] = "average"
    constraint_weight: float | int = 12800.0
    attention_sigma: float | int = 3.0
    round_centers: bool = True
    trunk_loss_weight: float | int = 0.0

    # Causal deconfounding of the sample confounder (Sec. 3.3)
    deconfounding: Literal["dynamic", "static", "shared", "none"] = "dynamic"
    intervention_ratio: int = 1
    query_ratio: int = 8
    prototype_value: Literal["mean", "mean_over_n"] = "mean"
    deconfounding_start: Literal["immediately", "second_epoch"] = "immediately"

    _stage_fields = ("hidden_sizes", "depths", "num_heads", "key_reductions")

    def __post_init__(self, **kwargs):
        """Convert the stage fields to lists, as JSON does, so that a config equals its saved copy."""
        for name in self._stage_fields:
            setattr(self, name, list(getattr(self, name)))
        super().__post_init__(**kwargs)

    @property
    def map_sizes(self) -> list[int]:
        """Height and width of the stages' maps."""
        sizes = [self.image_size]
        for _ in range(3):
            sizes.append(-(-sizes[-1] // 2))
        return sizes[1:]

    @property
    def attention_size(self) -> int:
        """Height and width of the attention of an action unit."""
        return self.map_sizes[2] // self.key_reductions[2]

    @property
    def drop_path_rates(self) -> list[list[float]]:
        """Rates of stochastic depth of all blocks, a list per stage; branches have the same."""
        step = self.drop_path_rate / max(1, sum(self.depths) - 1)
        starts = (0, self.depths[0], self.depths[0] + self.depths[1])
        return [
            [step * (start + i) for i in range(depth)]
            for start, depth in zip(starts, self.depths, strict=True)
        ]

    def validate_architecture(self):
        """Check the fields."""
        lengths = {name: len(getattr(self, name)) for name in self._stage_fields}
        if set(lengths.values()) != {3}:
            raise ValueError(f"Each of these needs an entry for each of the 3 stages; got lengths {lengths}.")
        for channels, heads in zip(self.hidden_sizes, self.num_heads, strict=True):
            if channels % heads:
                raise ValueError(
                    f"{heads} heads do not divide {channels} channels; see hidden_sizes, num_heads."
                )
        for size, reduction in zip(self.map_sizes, self.key_reductions, strict=True):
            if size < 1 or size % reduction:
                raise ValueError(
                    f"image_size={self.image_size} gives maps of {self.map_sizes} cells, which "
                    f"key_reductions={self.key_reductions} do not divide; use a multiple of 8, such as 176."
                )
        if self.constraint != "none" and self.depths[2] < 2:
            raise ValueError(
                f"depths={self.depths}: the constraint acts on the last block but one of a branch, which so "
                'needs two blocks; or use constraint="none".'
            )
        if self.trunk_loss_weight < 0:
            raise ValueError(f"trunk_loss_weight={self.trunk_loss_weight} must not be negative.")
        if self.attention_sigma <= 0 or self.constraint_weight < 0 or not 0 <= self.drop_path_rate < 1:
            raise ValueError(
                f"attention_sigma={self.attention_sigma} must be above 0, constraint_weight="
                f"{self.constraint_weight} not below 0, drop_path_rate={self.drop_path_rate} in [0, 1)."
            )
        if self.deconfounding_start == "second_epoch" and self.intervention_ratio != 1:
            raise ValueError(
                f"intervention_ratio={self.intervention_ratio}, but must be 1 with deconfounding_start="
                '"second_epoch", which at first replaces the intervention by the identity.'
            )

    @classmethod
    def compact(cls, **kwargs: Any) -> "Ac2dConfig":
        """Return a small configuration that a CPU trains and runs; keywords replace its values.

        The predefined attention has the paper's width relative to the face, on a smaller map of 10 x 10
        cells. The weight of the attention loss is effectively a fortieth of the paper's, and there is an
        auxiliary loss of the trunk: otherwise a network this small does not start to learn from random
        weights.
        """
        return cls(
            **{
                "image_size": 80,
                "stem_channels": 16,
                "hidden_sizes": [16, 24, 24],
                "depths": [1, 2, 2],
                "num_heads": [1, 2, 2],
                "mlp_ratio": 2,
                "initializer_range": 0.2,  # 1 / sqrt(24), ten times the usual 0.02
                "constraint_weight": 65.0,
                "attention_sigma": 1.4,
                "trunk_loss_weight": 1.0,
                "query_ratio": 2,
                **kwargs,
            }
        )


__all__ = ["ABLATIONS", "Ac2dConfig"]
