"""Geometry: action units from AU centres only; not from a paper."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .configuration_geometry import GeometryConfig
from .modeling_geometry import GeometryForAUDetection

AutoConfig.register(GeometryConfig.model_type, GeometryConfig, exist_ok=True)
AutoModel.register(GeometryConfig, GeometryForAUDetection, exist_ok=True)
AutoModelForImageClassification.register(GeometryConfig, GeometryForAUDetection, exist_ok=True)

__all__ = ["GeometryConfig", "GeometryForAUDetection"]
