"""AC2D (Shao et al., IJCV 2025): self-attention held to where an AU shows, and causal deconfounding."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .configuration_ac2d import Ac2dConfig
from .modeling_ac2d import Ac2dForAUDetection

AutoConfig.register(Ac2dConfig.model_type, Ac2dConfig, exist_ok=True)
AutoModel.register(Ac2dConfig, Ac2dForAUDetection, exist_ok=True)
AutoModelForImageClassification.register(Ac2dConfig, Ac2dForAUDetection, exist_ok=True)

__all__ = ["Ac2dConfig", "Ac2dForAUDetection"]
