"""The published methods, a folder each; importing this registers them with transformers' Auto classes."""

from .ac2d import Ac2dConfig, Ac2dForAUDetection
from .auformer import AUFormerConfig, AUFormerForAUDetection
from .escda import (
    EscdaConfig,
    EscdaForAUDetection,
    GdaConfig,
    GdaForAUDetection,
    LscConfig,
    LscForAUDetection,
)
from .gtlenet import (
    GlobalExpressionEncoder,
    GlobalExpressionEncoderConfig,
    GtleNetConfig,
    GtleNetForAUDetection,
)
from .lac import LacConfig, LacForAUDetection

__all__ = [
    "AUFormerConfig",
    "AUFormerForAUDetection",
    "Ac2dConfig",
    "Ac2dForAUDetection",
    "EscdaConfig",
    "EscdaForAUDetection",
    "GdaConfig",
    "GdaForAUDetection",
    "GlobalExpressionEncoder",
    "GlobalExpressionEncoderConfig",
    "GtleNetConfig",
    "GtleNetForAUDetection",
    "LacConfig",
    "LacForAUDetection",
    "LscConfig",
    "LscForAUDetection",
]
