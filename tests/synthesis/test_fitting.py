import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from actionunits.synthesis.fitting import CAMERA_DISTANCE, Camera, fit_head
from actionunits.synthesis.head_model import LANDMARK_VERTICES


def test_projection_by_hand():
    camera = Camera(np.eye(3), np.array([100.0, 50.0]), 2.0)
    [[x, y, distance]] = camera.project(np.array([[3.0, 4.0, 10.0]]))
    assert distance == CAMERA_DISTANCE - 10
    assert x == pytest.approx(100 + 2 * 3 * CAMERA_DISTANCE / distance)
    assert y == pytest.approx(50 - 2 * 4 * CAMERA_DISTANCE / distance)


def test_turning_moves_the_nose_as_named():
    camera, nose = Camera(np.eye(3), np.zeros(2), 1.0), np.array([[0.0, 0.0, 10.0]])
    assert camera.turned(yaw=0.3).project(nose)[0, 0] > 1  # towards the picture's right
    assert camera.turned(pitch=0.3).project(nose)[0, 1] > 1  # down
    np.testing.assert_allclose(camera.turned(roll=0.3).project(nose), camera.project(nose))


def test_moved_camera_is_scaled_and_shifted_pixels():
    camera = Camera(Rotation.from_rotvec([0.1, 0.2, 0.3]).as_matrix(), np.array([4.0, 5.0]), 3.0)
    points = np.random.default_rng(0).normal(size=(5, 3))
    expected = camera.project(points)[:, :2] * 1.7 + [8, -9]
    np.testing.assert_allclose(camera.moved(1.7, np.array([8, -9])).project(points)[:, :2], expected)


def test_recovers_a_known_head(head):
    rng = np.random.default_rng(1)
    weights = rng.normal(0, 0.7, 60)
    camera = Camera(Rotation.from_rotvec([0.05, 0.2, -0.1]).as_matrix(), np.array([310.0, 330.0]), 21.0)
    points = camera.project(head.identity(weights)[LANDMARK_VERTICES].astype(np.float64))[:, :2]
    found, _, error = fit_head(head, points, modes=60)
    assert error[17:].mean() < 0.005
    assert Rotation.from_matrix(found.rotation @ camera.rotation.T).magnitude() < 0.1
    assert found.scale == pytest.approx(camera.scale, rel=0.05)
