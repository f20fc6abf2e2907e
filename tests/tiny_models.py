"""A model of every method small enough for tests, by name."""

from actionunits import (
    Ac2dConfig,
    Ac2dForAUDetection,
    AUFormerConfig,
    AUFormerForAUDetection,
    EscdaConfig,
    EscdaForAUDetection,
    GdaConfig,
    GdaForAUDetection,
    GtleNetConfig,
    GtleNetForAUDetection,
    LacConfig,
    LacForAUDetection,
    LscConfig,
    LscForAUDetection,
)

BACKBONE = {
    "stem_channels": 8,
    "stage_channels": [8, 8, 16],
    "stage_depths": [1, 1, 1],
    "downsample_expansion": [16, 16, 16],
    "residual_expansion": [16, 16, 16],
    "hidden_size": 16,
}
BRANCH = {"attention_channels": 32, "convolution_channels": 8, "mlp_channels": 16}


def _gda():
    return GdaForAUDetection(GdaConfig.compact(**BACKBONE))


def _lsc():
    return LscForAUDetection(LscConfig.compact(**BACKBONE, **BRANCH))


def _escda():
    return EscdaForAUDetection(EscdaConfig(lsc_config=BACKBONE | BRANCH, gda_config=BACKBONE))


def _ac2d():
    sizes = {"image_size": 48, "stem_channels": 4, "hidden_sizes": [8, 8, 8], "depths": [1, 1, 2]}
    return Ac2dForAUDetection(Ac2dConfig(**sizes, num_heads=[1, 2, 2], mlp_ratio=2, query_ratio=2))


def _auformer():
    vit = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return AUFormerForAUDetection(AUFormerConfig(backbone_config=vit | {"image_size": 64, "patch_size": 16}))


def _lac():
    resnet = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    return LacForAUDetection(LacConfig(backbone_config=resnet, image_size=64, hidden_size=8))


def _gtlenet():
    encoder = {"image_size": 48, "width_multiplier": 0.125, "depths": [1, 1, 1]}
    widths = {"feature_channels": [8, 6], "mask_channels": [6, 4], "classifier_channels": [4, 8]}
    return GtleNetForAUDetection(GtleNetConfig(encoder_config=encoder, **widths))


TINY_MODELS = {
    "gda": _gda,
    "lsc": _lsc,
    "escda": _escda,
    "ac2d": _ac2d,
    "auformer": _auformer,
    "lac": _lac,
    "gtlenet": _gtlenet,
}
