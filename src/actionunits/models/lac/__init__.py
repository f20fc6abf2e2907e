"""LAC, Lock and Check (Huang et al.): find where action units show, then decide whether they do."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .configuration_lac import LacConfig
from .modeling_lac import LacForAUDetection
from .stream import LacStream

AutoConfig.register(LacConfig.model_type, LacConfig, exist_ok=True)
AutoModel.register(LacConfig, LacForAUDetection, exist_ok=True)
AutoModelForImageClassification.register(LacConfig, LacForAUDetection, exist_ok=True)

__all__ = ["LacConfig", "LacForAUDetection", "LacStream"]
