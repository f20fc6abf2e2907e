"""GTLE-Net (An et al., 2022): AU maps and masks out of features that were pretrained on expressions."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .configuration_gtlenet import GlobalExpressionEncoderConfig, GtleNetConfig
from .modeling_gtlenet import GlobalExpressionEncoder, GtleNetForAUDetection

AutoConfig.register(GlobalExpressionEncoderConfig.model_type, GlobalExpressionEncoderConfig, exist_ok=True)
AutoConfig.register(GtleNetConfig.model_type, GtleNetConfig, exist_ok=True)
AutoModel.register(GlobalExpressionEncoderConfig, GlobalExpressionEncoder, exist_ok=True)
AutoModel.register(GtleNetConfig, GtleNetForAUDetection, exist_ok=True)
AutoModelForImageClassification.register(GtleNetConfig, GtleNetForAUDetection, exist_ok=True)

__all__ = [
    "GlobalExpressionEncoder",
    "GlobalExpressionEncoderConfig",
    "GtleNetConfig",
    "GtleNetForAUDetection",
]
