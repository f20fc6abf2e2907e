"""The mean of several networks, which errs less on photographs than each of them."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .configuration_ensemble import EnsembleConfig
from .modeling_ensemble import EnsembleForAUDetection

AutoConfig.register(EnsembleConfig.model_type, EnsembleConfig, exist_ok=True)
AutoModel.register(EnsembleConfig, EnsembleForAUDetection, exist_ok=True)
AutoModelForImageClassification.register(EnsembleConfig, EnsembleForAUDetection, exist_ok=True)

__all__ = ["EnsembleConfig", "EnsembleForAUDetection"]
