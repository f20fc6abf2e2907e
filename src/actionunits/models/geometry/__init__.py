"""Geometry: action units from the places of lips, lids and brows alone; no paper's network."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .configuration_geometry import GeometryConfig
from .modeling_geometry import GeometryForAUDetection

AutoConfig.register(GeometryConfig.model_type, GeometryConfig, exist_ok=True)
AutoModel.register(GeometryConfig, GeometryForAUDetection, exist_ok=True)
AutoModelForImageClassification.register(GeometryConfig, GeometryForAUDetection, exist_ok=True)

__all__ = ["GeometryConfig", "GeometryForAUDetection"]
