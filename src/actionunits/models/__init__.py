"""The published methods, geometry and their mean, a folder each; importing this registers them all."""

from .ac2d import Ac2dConfig, Ac2dForAUDetection
from .auformer import AUFormerConfig, AUFormerForAUDetection
from .ensemble import EnsembleConfig, EnsembleForAUDetection
from .escda import (
    EscdaConfig,
    EscdaForAUDetection,
    GdaConfig,
    GdaForAUDetection,
    LscConfig,
    LscForAUDetection,
)
from .geometry import GeometryConfig, GeometryForAUDetection
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
    "EnsembleConfig",
    "EnsembleForAUDetection",
    "EscdaConfig",
    "EscdaForAUDetection",
    "GdaConfig",
    "GdaForAUDetection",
    "GeometryConfig",
    "GeometryForAUDetection",
    "GlobalExpressionEncoder",
    "GlobalExpressionEncoderConfig",
    "GtleNetConfig",
    "GtleNetForAUDetection",
    "LacConfig",
    "LacForAUDetection",
    "LscConfig",
    "LscForAUDetection",
]
