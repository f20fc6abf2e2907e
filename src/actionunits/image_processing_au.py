"""The image processor of all models: photo and landmarks in, aligned face and AU centres out.

The parameters of the alignment are saved with a model in `preprocessor_config.json`. The default is that of
ESCDA and its predecessors (JAA-Net, AC2D): a 200 x 200 picture with level eyes, centre-cropped to 176 x 176
and resized to the model's input. The papers' code interpolates at each of these steps; here they are composed
into one map and the photo is interpolated once, which keeps it sharper.
"""

# mypy: disable-error-code="override"
# (transformers' image processors take their options as **kwargs, against their base class' annotations)

import copy
import difflib
from collections.abc import Mapping
from contextlib import nullcontext
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import torch
from huggingface_hub.dataclasses import validate_typed_dict
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature, get_size_dict
from transformers.processing_utils import ImagesKwargs

from actionunits.action_units import CORPUS_AUS, au_name, check_aus
from actionunits.alignment import Alignment, five_point, identity, level_eyes
from actionunits.au_regions import au_centers
from actionunits.face_detection import FaceDetector, check_boxes
from actionunits.landmarks import check_inside, check_landmarks, get_scheme
from actionunits.pictures import load_picture, naming

ALIGNMENTS = {"level_eyes": level_eyes, "five_point": five_point}


class AUImageProcessorKwargs(ImagesKwargs, total=False):
    """The options that `AUImageProcessor` adds to those of every image processor."""

    do_align: bool
    align: str
    aligned_size: int
    landmark_scheme: str | None
    aus: list[int]
    au_definition: str
    antialias: bool
    sharpen: int | float
    alignment_version: int


class AUImageProcessor(PilBackend):
    """Aligns the face of each picture, with its landmarks.

    Args:
        do_align: Align by landmarks. If false, pictures must be aligned already: square, of any size, framed
            as `align` would frame them.
        align: "level_eyes" (ESCDA, AC2D) or "five_point" (a similarity template, for 224 or 256 pixels).
        aligned_size: Width and height of the aligned picture.
        crop_size: Size of its centre crop; `aligned_size` to keep it all.
        size: Width and height of the model's input.
        antialias: Average photo pixels where the face shrinks to less than half.
        sharpen: Amount of unsharp masking of the input (by a Gaussian of one pixel); 0 for none.
        landmark_scheme: Scheme of given landmarks; by default the one with their number of points.
        aus: Action units whose centres are emitted, in the order of the model's outputs.
        au_definition: Their definition, "shao" or "lac" (see `au_regions`), or "none" for no centres.
        do_rescale: Multiply pixels by `rescale_factor`.
        do_normalize: Subtract `image_mean`, then divide by `image_std`.
        alignment_version: Version of the alignment's rules, so that saved models keep theirs.
        face_detector: `FaceDetector` (or any callable that returns faces, largest first) for pictures without
            landmarks and boxes, of which the largest face is taken. Not saved.

    Example:
        >>> processor = AUImageProcessor()
        >>> inputs = processor("photo.jpg", landmarks=points, return_tensors="pt")  # points (68, 2)
        >>> inputs["pixel_values"].shape, inputs["au_centers"].shape
        (torch.Size([1, 3, 112, 112]), torch.Size([1, 12, 2, 2]))
    """

    valid_kwargs = AUImageProcessorKwargs
    model_input_names = ["pixel_values", "au_centers"]

    do_align = True
    align = "level_eyes"
    aligned_size = 200
    crop_size = {"height": 176, "width": 176}
    size = {"height": 112, "width": 112}
    antialias = True
    sharpen = 0.0
    landmark_scheme = None
    aus = list(CORPUS_AUS["bp4d"])
    au_definition = "shao"
    do_convert_rgb = True
    do_rescale = True
    do_normalize = True
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    alignment_version = 1

    def __init__(self, face_detector: Any = None, **kwargs):
        self._check_names(kwargs)
        kwargs.pop("auto_map", None)  # of a self-contained folder; the code is not saved along
        super().__init__(**kwargs)
        self.face_detector = face_detector
        self._validate_preprocess_kwargs(**{name: getattr(self, name) for name in self._valid_kwargs_names})

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs):
        """Make a processor from a saved one; the detector, which is not saved, can be a keyword."""
        face_detector = kwargs.pop("face_detector", None)
        result = super().from_dict(image_processor_dict, **kwargs)
        processor = result[0] if isinstance(result, tuple) else result  # with return_unused_kwargs=True
        processor.face_detector = face_detector
        return result

    def preprocess(
        self, images: Any, landmarks: Any = None, boxes: Any = None, face_detector: Any = None, **kwargs
    ) -> BatchFeature:
        """Prepare one picture or several, with one face each.

        Args:
            images: Anything that `load_picture` takes, a list of these, or a batch (B, H, W, C) or
                (B, C, H, W).
            landmarks: (N, 2) per picture, x and y in pixels of the upright picture: one array for one
                picture, a list or a batch (B, N, 2) for several. Entries may be None where there is a box
                or a detector.
            boxes: (4,) xmin, ymin, xmax, ymax per picture, likewise; landmarks are found in the box.
            face_detector: See the class; takes precedence over the one given there.
            **kwargs: Options of the class for this call, and `return_tensors`.

        Returns:
            BatchFeature with
            `pixel_values` (B, 3, S, S) float32, the model's input;
            `alignment` (B, 2, 3) float32, the map from photo pixels (x, y, 1) to pixels of the input;
            `au_centers` (B, m, 2, 2) float32, the two centres x, y of each action unit in pixels of the
            input; left out if a picture has no landmarks, or too few for centres (five).

        Raises:
            ValueError: No landmarks, boxes or detector (unless `do_align=False`), no face found, landmarks or
                boxes of the wrong number or shape or outside of the picture, or an unusable picture. The
                message says which of several pictures: "images[3]: ..." is the fourth.
        """
        return super().preprocess(images, landmarks, boxes, face_detector, **kwargs)

    def photo_to_input(
        self, photo_size: tuple[int, int], landmarks: Any = None, scheme: Any = None, **options
    ) -> Alignment:
        """Return the map from a photo to the model's input: align, centre-crop, resize.

        Args:
            photo_size: (width, height) of the photo in pixels.
            landmarks: (N, 2) landmarks of the face; not needed with `do_align=False`.
            scheme: Their scheme; by default the one with N points.
            **options: Options of the class that replace its own.

        Raises:
            TypeError: There is no such option.
        """
        options = {k: v for k, v in options.items() if v is not None}
        self._check_names(options)
        options |= {k: get_size_dict(v) for k, v in options.items() if k in ("size", "crop_size")}
        return self._photo_to_input(photo_size, landmarks, scheme, {**vars(self), **options})

    @staticmethod
    def _photo_to_input(
        photo_size: tuple[int, int], landmarks: Any, scheme: Any, options: dict[str, Any]
    ) -> Alignment:
        use = SimpleNamespace(**options)
        side = use.aligned_size
        if use.do_align:
            alignment = ALIGNMENTS[use.align](landmarks, scheme, side)
        elif photo_size[0] == photo_size[1]:
            alignment = identity(photo_size, (side, side))
        else:
            raise ValueError(
                f"With do_align=False pictures must be aligned ones, which are square; this one is "
                f"{photo_size[0]}x{photo_size[1]}. Crop it, or pass landmarks with do_align=True."
            )
        crop, size = use.crop_size["height"], use.size["height"]
        return alignment.crop((side - crop) / 2, (side - crop) / 2, crop, crop).resize(size, size)

    def post_process_au_detection(
        self,
        outputs: Any,
        config: Any,
        threshold: float | Mapping[str, float] | None = None,
        top_k: int | None = None,
    ) -> list[list[dict[str, Any]]]:
        """Turn a model's output into named action units.

        Args:
            outputs: Output of the model, with `logits` (B, m).
            config: The model's config, with the labels and thresholds of the outputs.
            threshold: See `decision_thresholds`.
            top_k: Keep only this many, the highest scores first.

        Returns:
            For each face a list, in the order of the outputs, of
            `{"label": "AU12", "name": "lip corner puller", "score": 0.93, "active": True}`.
        """
        thresholds = decision_thresholds(config, threshold)
        faces = []
        for scores in torch.sigmoid(outputs["logits"].detach().float()).tolist():
            units = [
                {"label": label, "name": au_name(label) or label, "score": score, "active": score >= limit}
                for (label, limit), score in zip(thresholds.items(), scores, strict=True)
            ]
            if top_k is not None:
                units = sorted(units, key=lambda unit: -unit["score"])[:top_k]
            faces.append(units)
        return faces

    def to_dict(self) -> dict[str, Any]:
        """Return what is saved: all but the detector."""
        bare = copy.copy(self)
        del bare.face_detector
        return super(AUImageProcessor, bare).to_dict()

    def _preprocess_image_like_inputs(
        self, images, landmarks, boxes, face_detector, return_tensors=None, **kwargs
    ) -> BatchFeature:
        images = _as_list(images)
        landmarks = _one_each("landmarks", landmarks, len(images), 2)
        boxes = _one_each("boxes", boxes, len(images), 1)
        detector, options = face_detector or self.face_detector, SimpleNamespace(**kwargs)
        rows = []
        for i, (image, points, box) in enumerate(zip(images, landmarks, boxes, strict=True)):
            with naming(f"images[{i}]") if len(images) > 1 else nullcontext():
                rows.append(self._prepare(load_picture(image), points, box, detector, options))
        names = ("pixel_values", "alignment", "au_centers")
        data = {name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
        if any(centers is None for centers in data["au_centers"]):
            del data["au_centers"]
        return BatchFeature(data, tensor_type=return_tensors)

    def _prepare(self, picture: Image.Image, points, box, detector, options):
        """One face -> pixels (3, S, S), alignment (2, 3), centres (m, 2, 2) or None."""
        points, scheme = _find_landmarks(picture, points, box, detector, options)
        alignment = self._photo_to_input(picture.size, points, scheme, {**vars(self), **vars(options)})
        pixels = np.asarray(alignment.warp(picture, antialias=options.antialias), np.float32)
        pixels = _sharpened(pixels, options.sharpen).transpose(2, 0, 1)
        if options.do_rescale:
            pixels = self.rescale(pixels, options.rescale_factor)
        if options.do_normalize:
            pixels = self.normalize(pixels, options.image_mean, options.image_std)
        centers = None if points is None else _centers(alignment.transform(points), scheme, options)
        return pixels.astype(np.float32), alignment.matrix.astype(np.float32), centers

    def _check_names(self, kwargs: dict[str, Any]) -> None:
        """Refuse options that do not exist or have the wrong type, which transformers accepts."""
        known = [*self.valid_kwargs.__annotations__, *_SAVED_WITH_IT]
        for name in kwargs:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"it takes {sorted(known)}."
                raise TypeError(f"AUImageProcessor has no option {name!r}; {hint}")
        options = {k: v for k, v in kwargs.items() if k not in _SAVED_WITH_IT}
        validate_typed_dict(self.valid_kwargs, options)  # type: ignore[type-var]

    def _validate_preprocess_kwargs(self, **kwargs) -> None:
        options = SimpleNamespace(**kwargs)
        _check_effect(options)  # first: transformers would ask for further options without effect
        super()._validate_preprocess_kwargs(**kwargs)
        _check_options(options)


def decision_thresholds(
    config: Any, threshold: float | Mapping[str, float] | None = None
) -> dict[str, float]:
    """Return the score from which each output counts as active, by label.

    Args:
        config: A model's config, with `id2label` and its calibrated `au_thresholds` (None: 0.5).
        threshold: One number for all, or {"AU12": 0.3} for some; the others keep those of the config.

    Raises:
        TypeError: A threshold is not a number.
        ValueError: A threshold is outside of 0..1, or for a label that the model does not have.
    """
    labels = [config.id2label[i] for i in range(len(config.id2label))]
    calibrated = getattr(config, "au_thresholds", None) or [0.5] * len(labels)
    thresholds = dict(zip(labels, (float(value) for value in calibrated), strict=True))
    if threshold is None:
        return thresholds
    chosen = threshold if isinstance(threshold, Mapping) else dict.fromkeys(labels, threshold)
    for label, value in chosen.items():
        if label not in thresholds:
            raise ValueError(f"threshold names {label!r}, but the model's labels are {labels}.")
        if isinstance(value, bool) or np.ndim(value) or not hasattr(value, "__float__"):
            raise TypeError(
                f"threshold must be a number, or one for each of some labels as in {{'AU12': 0.3}}; "
                f"got {value!r} for {label}."
            )
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"threshold must lie in 0..1, got {value} for {label}.")
    return {**thresholds, **{label: float(value) for label, value in chosen.items()}}


# Keys that transformers saves beside the options.
_SAVED_WITH_IT = ("image_processor_type", "processor_class", "feature_extractor_type", "auto_map")
# Options of other image processors that have no effect here.
_WITHOUT_EFFECT = ("do_resize", "do_center_crop", "do_pad", "pad_size", "resample")


def _check_effect(options: Any) -> None:
    """Refuse options without effect."""
    for name in _WITHOUT_EFFECT:
        if getattr(options, name, None) is not None:
            raise ValueError(
                f"{name} has no effect here; use aligned_size, crop_size and size to crop and resize."
            )


def _check_options(options: Any) -> None:
    """Check the values of the options."""
    if getattr(options, "data_format", None) not in (None, "channels_first"):
        raise ValueError(
            f"data_format={options.data_format!r}: the models take (B, 3, S, S); leave it out, and move the "
            "axis of pixel_values yourself where you need it last."
        )
    if options.alignment_version != 1:
        raise ValueError(
            f"alignment_version {options.alignment_version} is unknown, known is 1; update actionunits."
        )
    if options.align not in ALIGNMENTS:
        raise ValueError(f"Unknown align {options.align!r}; choose from {sorted(ALIGNMENTS)}.")
    for name in ("size", "crop_size"):
        box = getattr(options, name)
        if box is None or (box.height or 0) < 1 or box.height != box.width:
            got = None if box is None else dict(box)
            raise ValueError(f"{name} must be a square of pixels such as 112, got {got}.")
    if not 0 < options.crop_size.height <= options.aligned_size:
        raise ValueError(
            f"crop_size {options.crop_size.height} must lie in 1..aligned_size, so 1..{options.aligned_size}."
        )
    _check_numbers(options)
    if options.landmark_scheme is not None:
        get_scheme(options.landmark_scheme)
    check_aus(options.aus)
    if options.au_definition != "none":
        try:  # WFLW's 98 points serve every definition
            au_centers(np.zeros((98, 2)), "wflw98", options.aus, options.au_definition)
        except ValueError as error:
            raise ValueError(f"{error} Use au_definition='none' for models without centres.") from error


def _check_numbers(options: Any) -> None:
    """Check the numbers by which pixels are added to, multiplied and divided."""
    if options.sharpen < 0 or not _are_finite(options.sharpen):
        raise ValueError(
            f"sharpen={options.sharpen} must be 0 (no sharpening), or positive and finite in float32, "
            "such as 1.5."
        )
    if options.do_rescale and not (_are_finite(options.rescale_factor) and options.rescale_factor):
        raise ValueError(
            f"rescale_factor multiplies the pixels, so it cannot be {options.rescale_factor}; take 1 / 255."
        )
    if not options.do_normalize:
        return
    for name in ("image_mean", "image_std"):
        values = getattr(options, name)
        if np.shape(values) not in ((), (3,)) or not _are_finite(values):
            raise ValueError(f"{name} must be a number, or three for red, green and blue, got {values}.")
    if not np.all(options.image_std):
        raise ValueError(f"image_std divides the pixels, so it cannot be {options.image_std}.")


def _are_finite(values: Any) -> bool:
    """Whether numbers are finite in the float32 of the pixels."""
    return all(abs(value) <= float(np.finfo(np.float32).max) for value in np.ravel(values))


def _find_landmarks(
    picture: Image.Image, points, box, detector, options
) -> tuple[np.ndarray | None, str | None]:
    """The given landmarks, else those in the box, else those of the largest face."""
    if points is not None:
        points, scheme = check_landmarks(points, options.landmark_scheme)
        check_inside(points, *picture.size)
        return points, scheme.name
    if box is not None:
        box = check_boxes(box, picture.size)
        if len(box) != 1:
            raise ValueError(f"A picture takes one box, the face to align; got {len(box)} of them.")
        face = (detector or _default_detector()).locate(picture, box)[0]
    elif not options.do_align:
        return None, None
    elif detector is None:
        raise ValueError(
            "A picture without landmarks cannot be aligned: pass landmarks= or boxes=, or "
            "face_detector=FaceDetector() to find them, or do_align=False if it is an aligned face already."
        )
    else:
        faces = detector(picture)
        if not faces:
            raise ValueError(
                "No face found in the picture; pass landmarks= or boxes=, or leave the picture out."
            )
        face = faces[0]
    return face.landmarks, face.scheme


@lru_cache(maxsize=1)
def _default_detector() -> FaceDetector:
    return FaceDetector()


def _sharpened(pixels: np.ndarray, amount: float) -> np.ndarray:
    """Unsharp masking of a picture (S, S, 3) in [0, 255], as float32."""
    if not amount:
        return pixels
    return (pixels + amount * (pixels - cv2.GaussianBlur(pixels, (0, 0), sigmaX=1))).clip(0, 255)


def _centers(points: np.ndarray, scheme: Any, options: Any) -> np.ndarray | None:
    if options.au_definition == "none":
        return None
    try:
        return au_centers(points, scheme, options.aus, options.au_definition).astype(np.float32)
    except ValueError:  # too few landmarks, such as five; models that need centres will ask for them
        return None


def _as_list(images: Any) -> list[Any]:
    if isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4:
        images = list(images)
    images = list(images) if isinstance(images, list | tuple) else [images]
    if not images:
        raise ValueError("images is empty; pass at least one picture.")
    return images


def _one_each(name: str, values: Any, count: int, ndim: int) -> list[Any]:
    """Return one entry (an array of `ndim` axes, or None) for each of `count` pictures."""
    if values is None:
        return [None] * count
    none_given = isinstance(values, list | tuple) and values and all(value is None for value in values)
    if _depth(values) == ndim and not none_given:  # [None] is a box for no picture, not a box of no number
        values = [values]
    if len(values) != count:
        raise ValueError(
            f"{count} pictures but {len(values)} {name}; pass one entry per picture, one face each."
        )
    return list(values)


def _depth(values: Any) -> int:
    """Number of axes of arrays and nested lists, by the first entry that is not None."""
    if isinstance(values, list | tuple):
        return 1 + max((_depth(value) for value in values if value is not None), default=0)
    return getattr(values, "ndim", 0)
