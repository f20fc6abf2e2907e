"""Read corpora, align their faces once, augment them and collate batches."""

from actionunits.data.aligned_faces import AlignedFaces, check_people_apart, prepare_faces
from actionunits.data.augmentation import NO_AUGMENTATION, Augmentation, InputGeometry
from actionunits.data.collator import AUCollator, stack_samples
from actionunits.data.corpora import load_corpus
from actionunits.data.preparing import open_prepared, prepare_corpus
from actionunits.data.synthetic import load_synthetic, prepare_synthetic, read_manifest

__all__ = [
    "NO_AUGMENTATION",
    "AUCollator",
    "AlignedFaces",
    "Augmentation",
    "InputGeometry",
    "check_people_apart",
    "load_corpus",
    "load_synthetic",
    "open_prepared",
    "prepare_corpus",
    "prepare_faces",
    "prepare_synthetic",
    "read_manifest",
    "stack_samples",
]
