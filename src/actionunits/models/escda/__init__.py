"""ESCDA (Shao et al., Pattern Recognition 2025): local (LSC) and global attention (GDA), and the ensemble."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .configuration_escda import EscdaConfig, GdaConfig, LscConfig
from .modeling_escda import EscdaForAUDetection, GdaForAUDetection, LscForAUDetection

for _config, _model in (
    (LscConfig, LscForAUDetection),
    (GdaConfig, GdaForAUDetection),
    (EscdaConfig, EscdaForAUDetection),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForImageClassification.register(_config, _model, exist_ok=True)

__all__ = [
    "EscdaConfig",
    "EscdaForAUDetection",
    "GdaConfig",
    "GdaForAUDetection",
    "LscConfig",
    "LscForAUDetection",
]
