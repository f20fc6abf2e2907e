"""Facial action unit detection, the Hugging Face way.

Importing it registers the models with transformers' Auto classes, and the pipeline "au-detection".
"""

from transformers import AutoModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from actionunits import checkpoints, models
from actionunits.face_detection import FaceDetector
from actionunits.image_processing_au import AUImageProcessor
from actionunits.models import (
    Ac2dConfig,
    Ac2dForAUDetection,
    AUFormerConfig,
    AUFormerForAUDetection,
    EnsembleConfig,
    EnsembleForAUDetection,
    EscdaConfig,
    EscdaForAUDetection,
    GdaConfig,
    GdaForAUDetection,
    GeometryConfig,
    GeometryForAUDetection,
    GlobalExpressionEncoder,
    GlobalExpressionEncoderConfig,
    GtleNetConfig,
    GtleNetForAUDetection,
    LacConfig,
    LacForAUDetection,
    LscConfig,
    LscForAUDetection,
)
from actionunits.pipelines import AUDetectionPipeline

__version__ = "0.1.0"

__all__ = [
    "AUDetectionPipeline",
    "AUFormerConfig",
    "AUFormerForAUDetection",
    "AUImageProcessor",
    "Ac2dConfig",
    "Ac2dForAUDetection",
    "EnsembleConfig",
    "EnsembleForAUDetection",
    "EscdaConfig",
    "EscdaForAUDetection",
    "FaceDetector",
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


def _register() -> None:
    for name in models.__all__:
        if name.endswith("Config"):
            # the same class whether or not torchvision is there
            classes: dict[str, type] = {"pil": AUImageProcessor, "torchvision": AUImageProcessor}
            AutoImageProcessor.register(getattr(models, name), image_processor_classes=classes, exist_ok=True)
    if "au-detection" not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(
            "au-detection",
            pipeline_class=AUDetectionPipeline,
            pt_model=AutoModel,
            default={"model": (str(checkpoints.FOLDER / "default"), "main")},
            type="image",
        )
        # else saved folders would carry a copy of the pipeline's code and ask for trust_remote_code
        del AUDetectionPipeline._registered_impl  # type: ignore[attr-defined]


_register()
