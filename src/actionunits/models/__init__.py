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

__all__ = [
    "AUFormerConfig",
    "AUFormerForAUDetection",
    "Ac2dConfig",
    "Ac2dForAUDetection",
    "EscdaConfig",
    "EscdaForAUDetection",
    "GdaConfig",
    "GdaForAUDetection",
    "LscConfig",
    "LscForAUDetection",
]
