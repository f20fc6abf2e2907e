"""Fit the head model to the 68 points of a neutral photograph: perspective camera and identity weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import least_squares
from scipy.spatial.transform import Rotation

from .head_model import LANDMARK_VERTICES, HeadModel

CAMERA_DISTANCE = 60.0  # model units (cm) between camera and the head's origin: a portrait lens

# Weights of the points: on the contour template and mesh agree least; eyes and mouth matter most.
POINT_WEIGHTS = np.ones(68)
POINT_WEIGHTS[:17] = 0.15
POINT_WEIGHTS[36:48] = 2.0
POINT_WEIGHTS[48:] = 1.5


@dataclass(frozen=True)
class Camera:
    """A head pose in front of a perspective camera; pictures have x right, y down, in pixels.

    Attributes:
        rotation: (3, 3) of the head.
        center: (2,) projection of the head's origin, in pixels.
        scale: pixels per model unit at the origin.
    """

    rotation: np.ndarray
    center: np.ndarray
    scale: float

    def project(self, vertices: np.ndarray) -> np.ndarray:
        """Model points (V, 3) -> (V, 3): x, y in pixels and the distance from the camera in model units."""
        turned = vertices @ self.rotation.T.astype(vertices.dtype)
        distance = CAMERA_DISTANCE - turned[:, 2]
        zoom = self.scale * CAMERA_DISTANCE / distance
        return np.stack(
            [self.center[0] + zoom * turned[:, 0], self.center[1] - zoom * turned[:, 1], distance], 1
        )

    def turned(self, yaw: float = 0.0, pitch: float = 0.0, roll: float = 0.0) -> Camera:
        """The camera with the head turned further by these angles, in radians."""
        extra = Rotation.from_euler("YXZ", [yaw, pitch, roll]).as_matrix()
        return replace(self, rotation=extra @ self.rotation)

    def moved(self, scale: float, shift: np.ndarray) -> Camera:
        """The camera of the picture whose pixels are `scale` x old pixels + `shift`."""
        return replace(self, center=self.center * scale + shift, scale=self.scale * scale)


def fit_head(head: HeadModel, points: np.ndarray, modes: int = 80, ridge: float = 0.6, rounds: int = 6):
    """Fit camera and identity alternately to 68 points (68, 2) in pixels.

    Returns:
        The `Camera`, the identity weights (modes,), and the distance of each point from its vertex (68,), in
        parts of the face's width.
    """
    mean = head.vertices[LANDMARK_VERTICES].astype(np.float64)
    basis = head.identity_modes[:modes, LANDMARK_VERTICES].astype(np.float64)
    width = np.ptp(points[17:48, 0])
    weights = np.zeros(len(basis))
    scale = width / np.ptp(mean[17:48, 0])
    pose = np.r_[0, 0, 0, points[17:].mean(0) + [0, scale * mean[17:, 1].mean()], scale]
    for _ in range(rounds):
        shape = mean + np.tensordot(weights, basis, 1)
        pose = least_squares(
            lambda p, shape=shape: _residual(_camera(p), shape, points, width),
            pose,
            x_scale=[1, 1, 1, 100, 100, 10],
        ).x
        weights = _identity_step(_camera(pose), shape, basis, weights, points, width, ridge)
    camera = _camera(pose)
    fitted = camera.project(mean + np.tensordot(weights, basis, 1))[:, :2]
    return camera, weights, np.linalg.norm(fitted - points, axis=1) / width


def _camera(pose: np.ndarray) -> Camera:
    return Camera(Rotation.from_rotvec(pose[:3]).as_matrix(), pose[3:5], float(pose[5]))


def _residual(camera: Camera, shape: np.ndarray, points: np.ndarray, width: float) -> np.ndarray:
    """Weighted residuals in percent of the face's width, flat."""
    return ((camera.project(shape)[:, :2] - points) * (POINT_WEIGHTS[:, None] / width * 100)).ravel()


def _identity_step(camera, shape, basis, weights, points, width, ridge) -> np.ndarray:
    """One ridge-regularised Gauss-Newton step for the identity weights, clipped to 3.5 deviations."""
    turned, moves = shape @ camera.rotation.T, basis @ camera.rotation.T
    distance = CAMERA_DISTANCE - turned[:, 2]
    zoom = camera.scale * CAMERA_DISTANCE / distance
    du = zoom * (moves[..., 0] + turned[:, 0] * moves[..., 2] / distance)
    dv = -zoom * (moves[..., 1] + turned[:, 1] * moves[..., 2] / distance)
    jacobian = (np.stack([du, dv], -1) * (POINT_WEIGHTS[:, None] / width * 100)).reshape(len(basis), -1).T
    residual = -_residual(camera, shape, points, width)
    normal = jacobian.T @ jacobian + ridge**2 * np.eye(len(basis))
    return np.clip(weights + np.linalg.solve(normal, jacobian.T @ residual - ridge**2 * weights), -3.5, 3.5)
