"""Pipelines: pictures in, action units out."""

from actionunits.pipelines.au_detection import AUDetectionPipeline

__all__ = ["AUDetectionPipeline"]
