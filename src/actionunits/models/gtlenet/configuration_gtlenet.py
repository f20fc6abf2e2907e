"""Configurations of GTLE-Net and of its expression encoder, the ablations, and a compact one for CPUs.

An, Zhang, Zeng, Chen, Deng, Ding: Global-to-local expression-aware embeddings for facial action unit
detection. 2022. The paper does not give the widths of its two extractors: the defaults are small ones,
`paper()` has about its size.
"""

import copy
from typing import Any, Literal, cast

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from actionunits.configuration_au import AUConfig

Widths = list[int] | tuple[int, ...]
Pretraining = Literal["none", "expression", "emotion", "imagenet", "faces"]

ABLATIONS: dict[str, dict[str, Any]] = {
    "w/o pretrain": {"pretraining": "none"},
    "w. GEE Emotion": {"pretraining": "emotion"},
    "w. GEE ImageNet": {"pretraining": "imagenet"},
    "w. GEE fixed": {"pretraining": "expression", "freeze_encoder": True},
    "w/o E_m & E_a": {"pretraining": "expression", "local_module": "none"},
    "w/o E_m": {"pretraining": "expression", "local_module": "features"},
    "w/o E_m & w. CNN": {"pretraining": "expression", "local_module": "cnn"},
    "GTLE-Net": {"pretraining": "expression"},
}
"""The variants of Table 6 as values of `GtleNetConfig`."""


@strict
class GlobalExpressionEncoderConfig(PreTrainedConfig):
    """Configuration of the global expression encoder (GEE, Sec. 3.2), an InceptionResnetV1.

    Args:
        image_size: Height and width of the input in pixels.
        num_channels: Channels of the input.
        width_multiplier: Channels of all layers relative to InceptionResnetV1's.
        depths: Residual blocks of the three stages; the last stage has one more, without activation.
        padding: "same" gives maps of 16 x 16 at 256 pixels, as in the paper; "valid", as in the published
            InceptionResnetV1, of 14 x 14. The weights are the same.
        embedding_size: Size of an embedding.
        dropout: Dropout before the embedding.
        pretraining: Task that the weights were trained for: "expression" triplets, "emotion" classes,
            "imagenet" classes, "faces" (identities), or "none".
    """

    model_type = "au-expression-encoder"

    image_size: int = 256
    num_channels: int = 3
    width_multiplier: float | int = 1.0
    depths: Widths = (5, 10, 5)
    padding: Literal["same", "valid"] = "same"
    embedding_size: int = 16
    dropout: float | int = 0.0
    pretraining: Pretraining = "none"

    def __post_init__(self, **kwargs):
        """Convert the depths to a list, as JSON does, so that a config equals its saved copy."""
        self.depths = list(self.depths)
        super().__post_init__(**kwargs)

    @property
    def processor_options(self) -> dict[str, Any]:
        """Options of the image processor that fits, `AUImageProcessor(**config.processor_options)`."""
        crop, size = ({"height": side, "width": side} for side in (176, self.image_size))
        return {"aligned_size": 200, "crop_size": crop, "size": size, "au_definition": "none"}

    def validate_architecture(self):
        """Check what no network can be built of."""
        if len(self.depths) != 3 or min(self.depths) < 0:
            raise ValueError(f"depths={self.depths} must be three numbers of blocks, one per stage.")
        if self.image_size < 32 or self.width_multiplier <= 0 or self.embedding_size < 1:
            raise ValueError(
                f"image_size={self.image_size} must be at least 32, width_multiplier={self.width_multiplier} "
                f"above 0 and embedding_size={self.embedding_size} at least 1."
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1).")

    @classmethod
    def compact(cls, **kwargs: Any) -> "GlobalExpressionEncoderConfig":
        """Return the configuration of a small encoder, `GtleNetConfig.compact`'s; keywords replace values."""
        return cls(**{**_COMPACT_ENCODER, **kwargs})


@strict
class GtleNetConfig(AUConfig):
    """Configuration of GTLE-Net: encoder, extractors of feature maps and masks, classifiers, loss.

    Args:
        encoder_config: `GlobalExpressionEncoderConfig`, or its fields as a dictionary. The keyword
            `image_size` replaces its `image_size`.
        encoder_name_or_path: Folder or Hub name of a pretrained `GlobalExpressionEncoder`, see
            `from_encoder`. `AutoModel.from_config` loads its weights.
        encoder_revision: Branch, tag or commit of that checkpoint on the Hub.
        pretraining: Task that these weights must have been trained for, else they are rejected.
        freeze_encoder: Do not train the encoder, and do not update its batch statistics.
        local_module: Input of the classifiers: "masked" features (GTLE-Net, Eq. 5); "features" without masks
            (w/o E_m); the same of a "cnn" without residual connections; or "none", the encoder's map (w/o
            E_m & E_a).
        feature_channels: Channels of the stages of the feature map extractor E_a, each of which doubles the
            size of the map; four give the size of the picture.
        feature_depth: Residual blocks per stage of E_a.
        mask_channels: Channels of the stages of the mask extractor E_m, as many.
        mask_depth: Residual blocks per stage of E_m.
        classifier_channels: Channels of the convolutions of a classifier g^i, each of which halves the map;
            the last is the size of an AU embedding.
        classifier_kernel_size: Side of their kernels, an odd number.
        reconstruction_loss_weight: Weight of the reconstruction loss (lambda, Eq. 9); 0 for none.
        reconstruction_reduction: Whether Eq. 11 is the "mean" over pixels, as its name in the text says, or
            their "sum", as printed.
    """

    model_type = "au-gtlenet"
    sub_configs_defaults = {"encoder_config": GlobalExpressionEncoderConfig}  # type: ignore[dict-item]
    sub_configs = {"encoder_config": GlobalExpressionEncoderConfig}  # read by transformers before 5.20

    # Global expression encoder
    encoder_config: dict | GlobalExpressionEncoderConfig | None = None
    encoder_name_or_path: str | None = None
    encoder_revision: str | None = None
    pretraining: Pretraining = "none"
    freeze_encoder: bool = False

    # Local AU features module
    local_module: Literal["masked", "features", "cnn", "none"] = "masked"
    feature_channels: Widths = (256, 128, 64, 32)
    feature_depth: int = 1
    mask_channels: Widths = (256, 128, 64, 32)
    mask_depth: int = 1

    # AU classifiers
    classifier_channels: Widths = (16, 32, 64, 128, 256)
    classifier_kernel_size: int = 7

    # Loss
    reconstruction_loss_weight: float | int = 0.001
    reconstruction_reduction: Literal["mean", "sum"] = "mean"

    def __post_init__(self, **kwargs):
        """Convert the encoder's dictionary to a configuration, and tuples to lists, as JSON does."""
        given: Any = self.encoder_config or {}
        is_config = isinstance(given, PreTrainedConfig)
        # A copy, as `image_size` changes it.
        self.encoder_config = copy.copy(given) if is_config else GlobalExpressionEncoderConfig(**given)
        for name in ("feature_channels", "mask_channels", "classifier_channels"):
            setattr(self, name, list(getattr(self, name)))
        super().__post_init__(**kwargs)

    @classmethod
    def from_encoder(
        cls, encoder_name_or_path: str, encoder_revision: str | None = None, **kwargs: Any
    ) -> "GtleNetConfig":
        """Return the configuration for a pretrained expression encoder; only its `config.json` is read.

        Args:
            encoder_name_or_path: Folder or Hub name of a `GlobalExpressionEncoder`.
            encoder_revision: Branch, tag or commit on the Hub.
            kwargs: Fields of the configuration, such as `aus`, `image_size` or a row of `ABLATIONS`.

        Raises:
            ValueError: The checkpoint is another model.
        """
        source = AutoConfig.from_pretrained(encoder_name_or_path, revision=encoder_revision or "main")
        if source.model_type != GlobalExpressionEncoderConfig.model_type:
            raise ValueError(
                f"{encoder_name_or_path} is a {source.model_type!r} checkpoint, but GTLE-Net starts from a "
                f"{GlobalExpressionEncoderConfig.model_type!r}: train one with "
                "training/pretrain_expression.py, or convert weights with convert_facenet_to_hf."
            )
        source.name_or_path = ""
        fields = {
            "encoder_config": source,
            "encoder_name_or_path": str(encoder_name_or_path),
            "encoder_revision": encoder_revision,
            "pretraining": source.pretraining,
        }
        return cls(**{**fields, **kwargs})

    @classmethod
    def paper(cls, **kwargs: Any) -> "GtleNetConfig":
        """Return a configuration of about the paper's size; keywords replace its values.

        E_a has 15.7 M parameters; the paper says "around 16.6M" of the block that replaces it.
        """
        channels = [512, 256, 128, 64]
        fields = {
            "feature_channels": channels,
            "feature_depth": 2,
            "mask_channels": channels,
            "mask_depth": 2,
        }
        return cls(**{**fields, **kwargs})

    @classmethod
    def compact(cls, **kwargs: Any) -> "GtleNetConfig":
        """Return a small configuration that a CPU trains and runs; keywords replace its values.

        Its maps have half the height and width of the picture.
        """
        fields = {
            "encoder_config": dict(_COMPACT_ENCODER),
            "feature_channels": [64, 32, 16],
            "mask_channels": [32, 16, 8],
            "classifier_channels": [8, 16, 32, 32],
            "classifier_kernel_size": 5,
        }
        return cls(**{**fields, **kwargs})

    @property
    def encoder(self) -> GlobalExpressionEncoderConfig:
        """`encoder_config` as a `GlobalExpressionEncoderConfig`."""
        return cast(GlobalExpressionEncoderConfig, self.encoder_config)

    @property
    def image_size(self) -> int:
        """Height and width of the input in pixels: the encoder's."""
        return self.encoder.image_size

    @image_size.setter
    def image_size(self, value: int) -> None:
        self.encoder.image_size = value

    @property
    def map_size(self) -> int:
        """Height and width of feature maps and masks (H, W)."""
        return self.image_size // 16 * 2 ** len(self.feature_channels)

    def validate_architecture(self):
        """Check what no model can be built of."""
        self.encoder.validate_architecture()
        if self.image_size % 16 or self.encoder.padding != "same":
            raise ValueError(
                f"image_size={self.image_size} must be a multiple of 16, and the encoder's padding="
                f'{self.encoder.padding!r} "same", for the masks to match the picture.'
            )
        if self.local_module == "masked" and len(self.feature_channels) != len(self.mask_channels):
            raise ValueError(
                f"feature_channels={self.feature_channels} and mask_channels={self.mask_channels} need as "
                "many stages, as masks are multiplied with feature maps."
            )
        if not 1 <= len(self.feature_channels) <= 4:
            raise ValueError(f"feature_channels={self.feature_channels} must have one to four stages.")
        if self.classifier_kernel_size % 2 == 0 or not self.classifier_channels:
            raise ValueError(
                f"classifier_kernel_size={self.classifier_kernel_size} must be odd, and classifier_channels="
                f"{self.classifier_channels} not empty."
            )
        for name in ("feature_depth", "mask_depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.reconstruction_loss_weight < 0:
            raise ValueError(
                f"reconstruction_loss_weight={self.reconstruction_loss_weight} must not be negative."
            )


_COMPACT_ENCODER: dict[str, Any] = {"image_size": 112, "width_multiplier": 0.25, "depths": [2, 4, 2]}

__all__ = ["ABLATIONS", "GlobalExpressionEncoderConfig", "GtleNetConfig"]
