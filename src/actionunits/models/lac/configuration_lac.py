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
"""The variants of Tables IV and VII as values of `LacConfig`, without TS, the temporal sampling strategy,
which recipes set (`actionunits.data.sampling`). The last row of Table IV is "L_DWA", the one before it
"L_CE"."""


@strict
class LacConfig(AUConfig):
    """Configuration of LAC: a ResNet, class weights that localise action units, and the ST module.

    Args:
        backbone_config: `ResNetConfig` of the backbone, or its fields as a dictionary; ResNet-50 by default.
        backbone_name_or_path: Folder or Hub name of the backbone's pretrained ResNet checkpoint, see
            `from_backbone`. `AutoModel.from_config` loads its weights.
        backbone_revision: Branch, tag or commit of that checkpoint on the Hub.
        image_size: Height and width of the input in pixels, for `processor_options`; the model accepts other
            sizes.
        state_detection: The "check" step. If false, the model predicts y', as a ResNet with a linear layer
            (Table IV, rows "Backbone" and "TS").
        hidden_size: Size of an AU vector in the ST module.
        spatial: Relations of action units: "confidence", by a graph according to the uncertainty of y' (Eqs.
            7-11); "graph", by the graph alone (Eqs. 7-9); or "none".
        graph_edges: Neighbours of an action unit: "cross_region", itself and those of the two other regions
            of the face (Table I); or "all".
        num_graph_layers: Number of graph attention layers.
        temporal: "lstm" over the AU vectors of the frames, or "none".
        clip_length: Frames per clip (t), in training and detection.
        num_subsequences: Subsequences of a sequence, with one training clip per epoch each (N_sep).
        roi_ratio: Side of the square regions of interest relative to the input's width.
        roi_cells: Height and width of pooled regions of interest in cells.
        au_loss_type: "dynamic" (DWA, Eqs. 13-16), "weighted" (WA, Eq. 12) or "cross_entropy" (CE) of Table
            VII. The first two start with weights from `au_occurrence_rates`, or without them equal ones.
        localization_weight: Weight of L_loc (eta_1, Eq. 17).
        activation_weight: Weight of L_act (eta_2).
        balance_activation: Weight occurrences and non-occurrences of an action unit in a batch equally in
            L_act, which a backbone without pretraining needs.
        consistency_weight: Weight of L_l2g (eta_3).
        first_answer_weight: Weight of the loss of y' (eta_4).
        answer_weight: Weight of the loss of y'' (eta_5).
        difficulty_momentum: Momentum of the difficulty weights (beta_1).
        distribution_momentum: Momentum of the distribution weights (beta_2).
        difficulty_share: Share of the difficulty weights in the dynamic loss (delta).
        share_floor: Lower bound of the recalls and occurrence rates that Eqs. 13-14 divide by.
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

    # Regions of interest, for training only
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
        """Convert the backbone's dictionary to a configuration."""
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
            ValueError: The checkpoint is not a ResNet.
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

        Its ResNet of three stages has the paper's map of 7 x 7 cells at 112 pixels.
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
        """`backbone_config` as a `ResNetConfig`."""
        return cast(ResNetConfig, self.backbone_config)

    @property
    def num_features(self) -> int:
        """Channels of the backbone's last map (N)."""
        return cast(list[int], self.resnet_config.hidden_sizes)[-1]

    @property
    def needs_rois(self) -> bool:
        """Whether the loss has regions of interest, for which training needs `au_centers`."""
        return bool(self.localization_weight or self.activation_weight or self.consistency_weight)

    @property
    def processor_options(self) -> dict[str, Any]:
        """Options of the image processor that fits the model, with ImageNet's mean and standard deviation."""
        return super().processor_options | {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}

    def validate_architecture(self):
        """Check the sizes."""
        sizes = ("image_size", "hidden_size", "roi_cells")
        for name in (*sizes, "num_graph_layers", "clip_length", "num_subsequences"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        backbone: Any = self.backbone_config
        stages, depths = backbone.hidden_sizes, backbone.depths
        if not len(stages) == len(depths) > 0:
            raise ValueError(
                f"The backbone's hidden_sizes={stages} and depths={depths} need as many stages, at least one."
            )
        if not 0 < self.roi_ratio <= 1:
            raise ValueError(f"roi_ratio={self.roi_ratio} must lie in (0, 1]: a part of the input's width.")

    def validate_loss(self):
        """Check the parameters of the loss."""
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
"""Fields of a ResNet checkpoint's configuration that define the backbone."""

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
