"""From a box around a face to its 68 iBUG points, and whether it is a face at all.

A small residual network of our own, trained on the open synthetic corpus (`training/train_landmarks.py`). It
looks twice: first at the box, then at a crop that the first prediction centres, scales and levels, averaged
with the prediction for its mirror image. Uncertain faces get a third look. With `fine_look` a second network
of the same form, trained on such crops only, then refines each face twice: it need not find the face, only
tell how brows, lids and lips lie.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from actionunits.alignment import Alignment
from actionunits.landmarks import SCHEMES

NUM_POINTS = 68
CROP_MARGIN = 1.6  # side of the crop / longer side of the box of the inner points (17-67)
GIVE_UP = 0.02  # face score below which the first look is the last
SURE = 0.95  # face score that makes a third look unnecessary
FINE_FROM = 0.5  # face score from which the second network refines points
FINE_LOOKS = 2
GAPS = {
    "lip": ((61, 67), (62, 66), (63, 65)),  # inner lips
    "lid": ((37, 41), (38, 40), (43, 47), (44, 46)),
    "brow": ((17, 36), (19, 37), (21, 39), (26, 45), (24, 44), (22, 42)),  # and eye
    "frown": ((21, 22), (20, 23)),  # brow and brow
    "nose": ((39, 31), (42, 35)),  # inner corners of the eyes and wings
    "upper lip": ((31, 49), (33, 51), (35, 53)),  # and nose
    "red": ((51, 62), (66, 57)),  # outer and inner edge of the lips
    "chin": ((57, 8),),  # lower lip and chin
    "corner": ((36, 48), (45, 54)),  # outer corners of the eyes and those of the mouth
    "mouth": ((48, 54),),  # its corners
}
"""Pairs of iBUG points whose distance changes with action units."""
GAP_WEIGHT = 0.5  # of each kind of gap in the loss, relative to the points
MIRROR = list(SCHEMES["ibug68"].mirror)


@strict
class FaceLandmarkerConfig(PreTrainedConfig):
    """Configuration of `FaceLandmarker`.

    Args:
        image_size: side of the square input in pixels, a multiple of 16.
        hidden_sizes: channels of the stem and the four stages; each but the last halves the resolution.
        neck_size: channels of the last feature map.
        intermediate_size: width of the hidden fully connected layer.
        map_size: channels of the features behind the 68 heat maps; 0 for a network without heat maps.
        fine_look: whether there is a second network of these sizes, `fine`, for refinement.
    """

    model_type = "au-face-landmarker"

    image_size: int = 112
    hidden_sizes: list[int] | tuple[int, ...] = (24, 32, 64, 128, 128)
    neck_size: int = 64
    intermediate_size: int = 256
    map_size: int = 0
    fine_look: bool = False
    initializer_range: float | int = 0.02

    def validate_architecture(self) -> None:
        """Check that the sizes fit the network's four halvings."""
        if self.image_size % 16 or len(self.hidden_sizes) != 5:
            raise ValueError(
                f"image_size={self.image_size} must be a multiple of 16, "
                f"and hidden_sizes={self.hidden_sizes} must be five numbers."
            )


@dataclass
class FaceLandmarkerOutput(ModelOutput):
    """Output of `FaceLandmarker`.

    Args:
        loss: see `landmark_loss`; given labels.
        landmarks: (B, 68, 2) x and y in parts of the crop's side, from its left and top edge.
        face_logits: (B,) above 0 for a face that fits the crop.
    """

    loss: torch.Tensor | None = None
    landmarks: torch.Tensor | None = None
    face_logits: torch.Tensor | None = None


class FaceLandmarker(PreTrainedModel):
    """Box around a face -> 68 iBUG points and a face score."""

    config: FaceLandmarkerConfig
    base_model_prefix = "landmarker"
    main_input_name = "pixel_values"
    accepts_loss_kwargs = False
    _keys_to_ignore_on_load_unexpected = [r"^fine\."]  # left out by fine_look=False

    def __init__(self, config: FaceLandmarkerConfig):
        super().__init__(config)
        sizes = config.hidden_sizes
        self.stem = nn.Sequential(
            nn.Conv2d(3, sizes[0], 5, 2, 2, bias=False), nn.BatchNorm2d(sizes[0]), nn.ReLU()
        )
        strides = (2, 2, 2, 1)
        self.stages = nn.Sequential(
            *(FaceLandmarkerBlock(i, o, s) for i, o, s in zip(sizes, sizes[1:], strides, strict=False))
        )
        self.neck = nn.Conv2d(sizes[-1], config.neck_size, 1)
        self.hidden = nn.Linear(config.neck_size * (config.image_size // 16) ** 2, config.intermediate_size)
        self.points = nn.Linear(config.intermediate_size, 2 * NUM_POINTS)
        self.face = nn.Linear(config.intermediate_size, 1)
        self.maps = FaceLandmarkerMaps(sizes[1:4], config.map_size) if config.map_size else None
        self.fine = FaceLandmarker(_of_one_network(config)) if config.fine_look else None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @can_return_tuple
    def forward(self, pixel_values, labels=None, is_face=None, **kwargs):
        """Predict the points of each crop; `fine` is called separately.

        Args:
            pixel_values: (B, 3, S, S), RGB, (x / 255 - 0.5) / 0.5.
            labels: (B, 68, 2) points in parts of the crop's side.
            is_face: (B,) 1 or 0; where it is 0, the points are ignored.
            **kwargs: `return_dict=False` for a tuple; others are ignored.
        """
        stages = [self.stem(pixel_values)]
        for stage in self.stages:
            stages.append(stage(stages[-1]))
        hidden = F.relu(self.hidden(self.neck(stages[-1]).flatten(1)))
        landmarks = self.points(hidden).unflatten(1, (NUM_POINTS, 2))
        landmarks = landmarks + (0.5 if self.maps is None else self.maps(*stages[1:4]))
        face_logits = self.face(hidden).squeeze(1)
        loss = None if labels is None else landmark_loss(landmarks, face_logits, labels, is_face)
        return FaceLandmarkerOutput(loss, landmarks, face_logits)

    @torch.inference_mode()
    def locate(self, image: Image.Image, boxes: Sequence[Sequence[float]]) -> list[tuple[np.ndarray, float]]:
        """Find the points of the faces in boxes of a picture.

        Args:
            image: RGB picture.
            boxes: (xmin, ymin, xmax, ymax) each, in pixels, about from the brows to the chin.

        Returns:
            For each box the points (68, 2) in pixels of the picture and the face score 0..1.
        """
        if not len(boxes):
            return []
        points, scores = self._look(image, [self._crop_of_box(box) for box in boxes])
        again = [i for i, score in enumerate(scores) if score >= GIVE_UP]
        second = self._look(image, [self._crop_of_points(points[i]) for i in again], also_mirrored=True)
        for i, marks, score in zip(again, *second, strict=True):
            points[i], scores[i] = marks, score
        again = [i for i in again if GIVE_UP <= scores[i] < SURE]
        third = self._look(image, [self._crop_of_points(points[i]) for i in again], also_mirrored=True)
        for i, marks, score in zip(again, *third, strict=True):
            points[i] = marks if score > scores[i] else points[i]
            scores[i] = (scores[i] + score) / 2  # the maximum would let more clutter pass for a face
        if self.fine is not None:
            self._look_finely(image, points, [i for i, score in enumerate(scores) if score >= FINE_FROM])
        return list(zip(points, scores, strict=True))

    def _look_finely(self, image: Image.Image, points: list[np.ndarray], faces: list[int]) -> None:
        """Let the second network refine the points of these faces, in place; their scores stay."""
        assert self.fine is not None
        for _ in range(FINE_LOOKS):
            crops = [self._crop_of_points(points[i]) for i in faces]
            corrected, _ = self.fine._look(image, crops, also_mirrored=True)
            for i, marks in zip(faces, corrected, strict=True):
                points[i] = marks

    def _look(
        self, image: Image.Image, crops: list[Alignment], also_mirrored: bool = False
    ) -> tuple[list[np.ndarray], list[float]]:
        if not crops:
            return [], []
        pictures = np.stack([np.asarray(crop.warp(image)) for crop in crops]).transpose(0, 3, 1, 2)
        pixel_values = torch.from_numpy(pictures).to(self.device, self.dtype) / 127.5 - 1
        if also_mirrored:
            pixel_values = torch.cat([pixel_values, pixel_values.flip(3)])
        output = self(pixel_values, return_dict=True)
        landmarks, scores = output.landmarks.float(), torch.sigmoid(output.face_logits.float())
        if also_mirrored:
            (landmarks, mirrored), (scores, again) = landmarks.chunk(2), scores.chunk(2)
            mirrored = mirrored[:, MIRROR] * mirrored.new_tensor([-1, 1]) + mirrored.new_tensor([1, 0])
            landmarks, scores = (landmarks + mirrored) / 2, (scores + again) / 2
        places = landmarks.cpu().numpy() * self.config.image_size - 0.5
        points = [crop.inverse_transform(place) for crop, place in zip(crops, places, strict=True)]
        return points, scores.tolist()

    def _crop_of_box(self, box: Sequence[float]) -> Alignment:
        """The square around a box, as an `Alignment` to the network's input."""
        x0, y0, x1, y1 = box
        return self._crop(np.array([(x0 + x1) / 2, (y0 + y1) / 2]), max(x1 - x0, y1 - y0), np.zeros(2))

    def _crop_of_points(self, points: np.ndarray) -> Alignment:
        """The square around the inner points, with level eyes."""
        eyes = points[42:48].mean(0) - points[36:42].mean(0)
        inner = points[17:] @ _rotation(eyes).T
        low, high = inner.min(0), inner.max(0)
        return self._crop((low + high) / 2 @ _rotation(eyes), CROP_MARGIN * float((high - low).max()), eyes)

    def _crop(self, center: np.ndarray, side: float, level: np.ndarray) -> Alignment:
        """A square of `side` pixels around `center`, its horizontal in the direction `level`."""
        size = self.config.image_size
        linear = _rotation(level) * (size / max(side, 1.0))
        shift = (size - 1) / 2 - linear @ center
        return Alignment(np.c_[linear, shift], (size, size))


class FaceLandmarkerBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut: (B, in, H, W) -> (B, out, H / stride, W / stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        changes = stride != 1 or in_channels != out_channels
        self.shortcut = (
            nn.Conv2d(in_channels, out_channels, 1, stride, bias=False) if changes else nn.Identity()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
        hidden = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.shortcut(x) + self.norm2(self.conv2(hidden)))


class FaceLandmarkerMaps(nn.Module):
    """A heat map for each point, whose centre of mass is the point (soft-argmax), from a feature pyramid.

    Three feature maps, from fine to coarse, are added up. What a heat map cannot show, such as points outside
    of the crop, is left to the fully connected layers.
    """

    def __init__(self, in_channels: Sequence[int], channels: int):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(count, channels, 1, bias=False) for count in in_channels)
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 3, 1, 1)
        self.out = nn.Conv2d(channels, NUM_POINTS, 1)

    def forward(self, fine, middle, coarse) -> torch.Tensor:
        """Features (B, C, S/4, S/4), S/8 and S/16 -> points (B, 68, 2) in parts of the crop's side."""
        hidden = self.lateral[1](middle) + F.interpolate(self.lateral[2](coarse), scale_factor=2.0)
        hidden = F.relu(self.norm(self.lateral[0](fine) + F.interpolate(hidden, scale_factor=2.0)))
        maps = self.out(F.relu(self.conv(hidden))).float()
        side = maps.shape[-1]
        share = maps.flatten(2).softmax(-1).unflatten(2, (side, side))
        place = (torch.arange(side, device=maps.device) + 0.5) / side
        return torch.stack([(share.sum(axis) * place).sum(-1) for axis in (2, 3)], -1)


def landmark_loss(landmarks, face_logits, labels, is_face=None) -> torch.Tensor:
    """Smooth L1 of the points of faces (contour at half weight) and of `GAPS` + 0.1 x BCE of the face logits.

    Open mouths are rare, and a gap is small compared with the uncertainty of a box in place and size: from
    the points alone a small network learns to close all lips and rest all brows.
    """
    is_face = torch.ones_like(face_logits) if is_face is None else is_face.to(face_logits.dtype)
    landmarks = landmarks.float()
    labels = torch.where(is_face[:, None, None] > 0, labels.float(), 0.0)  # else nan would stay nan
    weight = torch.ones(NUM_POINTS, 1, device=landmarks.device)
    weight[:17] = 0.5
    distance = F.smooth_l1_loss(landmarks, labels, beta=0.01, reduction="none") * weight
    gaps = torch.zeros_like(face_logits, dtype=torch.float32)
    for pairs in GAPS.values():
        starts, ends = torch.tensor(pairs).T
        found, true = (points[:, ends] - points[:, starts] for points in (landmarks, labels))
        gaps = gaps + F.smooth_l1_loss(found, true, beta=0.02, reduction="none").mean((1, 2))
    points = ((distance.mean((1, 2)) + GAP_WEIGHT * gaps) * is_face).sum() / is_face.sum().clamp(min=1)
    return points + 0.1 * F.binary_cross_entropy_with_logits(face_logits.float(), is_face.float())


def _of_one_network(config: FaceLandmarkerConfig) -> FaceLandmarkerConfig:
    """The same configuration without the second network."""
    config = copy.deepcopy(config)
    config.fine_look = False
    return config


def _rotation(direction: np.ndarray) -> np.ndarray:
    """The 2x2 rotation that turns `direction` onto the x axis; the identity for a zero direction."""
    length = float(np.linalg.norm(direction))
    c, s = direction / length if length > 0 else (1.0, 0.0)
    return np.array([[c, s], [-s, c]])
