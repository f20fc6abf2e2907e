"""AUFormer (Yuan et al., ECCV 2024): a frozen vision transformer with small experts for each AU."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .configuration_auformer import AUFormerConfig
from .modeling_auformer import AUFormerForAUDetection

AutoConfig.register(AUFormerConfig.model_type, AUFormerConfig, exist_ok=True)
AutoModel.register(AUFormerConfig, AUFormerForAUDetection, exist_ok=True)
AutoModelForImageClassification.register(AUFormerConfig, AUFormerForAUDetection, exist_ok=True)

__all__ = ["AUFormerConfig", "AUFormerForAUDetection"]
