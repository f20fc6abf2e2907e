"""Configuration of LAC, its ablations, and a compact one for CPUs.

Huang, Gao, Cai, Chen, Hu, Gao, Gao: Lock and Check: A novel approach for facial action unit recognition.
IEEE Transactions on Affective Computing (manuscript of 2025). The defaults are the paper's.
"""

from typing import Any, Literal, cast

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, ResNetConfig

from actionunits.configuration_au import AUConfig

NO_ROI_LOSS: dict[str, Any] = {
    "localization_weight": 0.0,
    "activation_weight": 0.0,
    "consistency_weight": 0.0,
}
NO_ST: dict[str, Any] = {"spatial": "none", "temporal": "none"}

ABLATIONS: dict[str, dict[str, Any]] = {
    "backbone": {"state_detection": False, "au_loss_type": "cross_entropy", **NO_ROI_LOSS},
    "ST": {"au_loss_type": "cross_entropy", **NO_ROI_LOSS},
    "L_loc+L_act": {"au_loss_type": "cross_entropy", "consistency_weight": 0.0, **NO_ST},
    "L_loc+L_act+L_l2g": {"au_loss_type": "cross_entropy", **NO_ST},
    "L_CE": {"au_loss_type": "cross_entropy"},
    "L_WA": {"au_loss_type": "weighted"},
    "L_DWA": {},
}
"""The variants of Tables IV and VII as values of `LacConfig`; TS, the temporal sampling strategy, belongs to
the recipe (`actionunits.data.sampling`). The last row of Table IV is "L_DWA", the one before it "L_CE"."""


@strict
class LacConfig(AUConfig):
    """Configuration of LAC: a ResNet, its class weights that point to action units, and the ST module.

    Args:
        backbone_config: `ResNetConfig` of the backbone, or its fields as a dictionary; ResNet-50 if left out.
        backbone_name_or_path: Folder or Hub name of the ResNet checkpoint that the backbone's weights come
            from, see `from_backbone`. A model made of a config that names one by `AutoModel.from_config`
            starts with its weights.
        backbone_revision: Branch, tag or commit of that checkpoint on the Hub.
        image_size: Height and width of the input in pixels. Other sizes work too: nothing depends on it but
            `processor_options`.
        state_detection: The "check" step. If false, the class weights' answer y' is the model's: a ResNet
            with a linear layer (Table IV, rows "Backbone" and "TS").
        hidden_size: Numbers of an AU vector in the ST module.
        spatial: How action units inform each other: "confidence", by a graph as far as y' is uncertain
            (Eqs. 7-11); "graph", by the graph alone (Eqs. 7-9); or "none".
        graph_edges: Neighbours of an action unit: "cross_region", itself and those of the two other regions
            of the face (Table I); or "all".
        num_graph_layers: Graph attention layers one after the other.
        temporal: "lstm", which carries AU vectors from frame to frame, or "none".
        clip_length: Frames of a clip (t), in training and where a video is detected clip by clip.
        num_subsequences: Parts of a sequence, each of which gives a training clip an epoch (N_sep).
        roi_ratio: Side of the square regions of interest over the input's width.
        roi_cells: Cells of a pooled region of interest in height and in width.
        au_loss_type: "dynamic" (DWA, Eqs. 13-16), "weighted" (WA, Eq. 12) or "cross_entropy" (CE) of Table
            VII. The first two start with weights from `au_occurrence_rates`, or equal ones without.
        localization_weight: Weight of L_loc (eta_1, Eq. 17).
        activation_weight: Weight of L_act (eta_2).
        balance_activation: Let L_act weigh an action unit's occurrences of a batch as much as the rest, which
            a backbone without pretraining needs.
        consistency_weight: Weight of L_l2g (eta_3).
        first_answer_weight: Weight of the loss of y' (eta_4).
        answer_weight: Weight of the loss of y'' (eta_5).
        difficulty_momentum: What an epoch leaves of the difficulty weights (beta_1).
        distribution_momentum: What an epoch leaves of the distribution weights (beta_2).
        difficulty_share: Part of the difficulty in the weights of the dynamic loss (delta).
        share_floor: Smallest recall and occurrence rate that Eqs. 13-14 divide by.
    """

    model_type = "au-lac"
    sub_configs_defaults = {"backbone_config": ResNetConfig}  # type: ignore[dict-item]
    sub_configs = {"backbone_config": ResNetConfig}  # read by transformers before 5.20

    _aligned_size, _crop_size = 256, 224

    # Backbone
    backbone_config: dict | ResNetConfig | None = None
    backbone_name_or_path: str | None = None
    backbone_revision: str | None = None
    image_size: int = 224

    # Spatial-temporal module (Sec. III-B)
    state_detection: bool = True
    hidden_size: int = 512
    spatial: Literal["confidence", "graph", "none"] = "confidence"
    graph_edges: Literal["cross_region", "all"] = "cross_region"
    num_graph_layers: int = 2
    temporal: Literal["lstm", "none"] = "lstm"

    # Temporal sampling (Algorithm 1)
    clip_length: int = 16
    num_subsequences: int = 12

    # Regions of interest, which only training needs
    roi_ratio: float = 0.14
    roi_cells: int = 2

    # Loss (Sec. III-C)
    au_loss_type: Literal["dynamic", "weighted", "cross_entropy"] = "dynamic"
    localization_weight: float | int = 0.5
    activation_weight: float | int = 0.5
    balance_activation: bool = False
    consistency_weight: float | int = 0.01
    first_answer_weight: float | int = 0.5
    answer_weight: float | int = 1.0
    difficulty_momentum: float | int = 0.9
    distribution_momentum: float | int = 0.9
    difficulty_share: float | int = 0.5
    share_floor: float = 0.01

    def __post_init__(self, **kwargs):
        """Make a configuration of the backbone's dictionary."""
        given = self.backbone_config or {}
        self.backbone_config = given if isinstance(given, ResNetConfig) else ResNetConfig(**given)
        super().__post_init__(**kwargs)

    @classmethod
    def from_backbone(
        cls, backbone_name_or_path: str, backbone_revision: str | None = None, **kwargs: Any
    ) -> "LacConfig":
        """Return the configuration for the backbone of a ResNet checkpoint; only its `config.json` is read.

        Args:
            backbone_name_or_path: Folder or Hub name of a checkpoint of type "resnet", whatever head it has.
            backbone_revision: Branch, tag or commit on the Hub.
            kwargs: Fields of the configuration, such as `aus`.

        Raises:
            ValueError: The checkpoint is no ResNet.
        """
        source = AutoConfig.from_pretrained(backbone_name_or_path, revision=backbone_revision or "main")
        if not isinstance(source, ResNetConfig):
            raise ValueError(
                f"{backbone_name_or_path} is a {source.model_type!r} checkpoint, but LAC builds on ResNets: "
                'pass one of type "resnet", such as microsoft/resnet-50.'
            )
        fields = {name: getattr(source, name) for name in ARCHITECTURE_FIELDS}
        return cls(
            backbone_config=ResNetConfig(**fields),
            backbone_name_or_path=str(backbone_name_or_path),
            backbone_revision=backbone_revision,
            **kwargs,
        )

    @classmethod
    def compact(cls, **kwargs: Any) -> "LacConfig":
        """Return a small configuration that a CPU trains and runs; keywords replace its values.

        Its ResNet of three stages has the paper's map of 7 x 7 cells already at 112 pixels.
        """
        backbone: dict[str, Any] = {
            "embedding_size": 32,
            "hidden_sizes": [32, 64, 128],
            "depths": [2, 2, 2],
            "layer_type": "basic",
        }
        return cls(**{"backbone_config": backbone, "image_size": 112, "hidden_size": 64, **kwargs})

    @property
    def resnet_config(self) -> ResNetConfig:
        """`backbone_config`, which is a `ResNetConfig` once this configuration is made."""
        return cast(ResNetConfig, self.backbone_config)

    @property
    def num_features(self) -> int:
        """Channels of the backbone's last map (N)."""
        return cast(list[int], self.resnet_config.hidden_sizes)[-1]

    @property
    def needs_rois(self) -> bool:
        """Whether the loss looks at regions of interest, so that training needs `au_centers`."""
        return bool(self.localization_weight or self.activation_weight or self.consistency_weight)

    @property
    def processor_options(self) -> dict[str, Any]:
        """Options of the image processor that fits; colours are scaled as ImageNet's ResNets know them."""
        return super().processor_options | {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}

    def validate_architecture(self):
        """Check what no model can be built of, and no clip cut by."""
        for name in ("hidden_size", "num_graph_layers", "clip_length", "num_subsequences", "roi_cells"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        backbone: Any = self.backbone_config
        stages, depths = backbone.hidden_sizes, backbone.depths
        if not len(stages) == len(depths) > 0:
            raise ValueError(
                f"The backbone's hidden_sizes={stages} and depths={depths} need as many stages, one at least."
            )
        if not 0 < self.roi_ratio <= 1:
            raise ValueError(f"roi_ratio={self.roi_ratio} must lie in (0, 1]: a part of the input's width.")

    def validate_loss(self):
        """Check the numbers of the loss."""
        for name in LOSS_WEIGHTS:
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")
        for name in ("difficulty_momentum", "distribution_momentum", "difficulty_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1].")
        if not 0 < self.share_floor < 1:
            raise ValueError(f"share_floor={self.share_floor} must lie in (0, 1): shares are divided by it.")


ARCHITECTURE_FIELDS = (
    "num_channels",
    "embedding_size",
    "hidden_sizes",
    "depths",
    "layer_type",
    "hidden_act",
    "downsample_in_first_stage",
    "downsample_in_bottleneck",
)
"""What of a ResNet checkpoint's configuration makes the backbone; the rest is its head and its labels."""

LOSS_WEIGHTS = (
    "localization_weight",
    "activation_weight",
    "consistency_weight",
    "first_answer_weight",
    "answer_weight",
)
"""eta_1 to eta_5 of Eq. 17."""

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

__all__ = ["ABLATIONS", "LacConfig"]
