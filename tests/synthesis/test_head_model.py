import json

import numpy as np
import pytest

from actionunits.action_units import CORPUS_AUS
from actionunits.synthesis.head_model import AU_SHAPES, LANDMARK_VERTICES, SKIN, TEETH, HeadModel


def write_obj(path, vertices, faces=""):
    path.write_text("# a comment\n" + "".join(f"v {x} {y} {z}\n" for x, y, z in vertices) + faces)


def test_every_labelled_action_unit_has_shapes():
    assert sorted(AU_SHAPES) == sorted(CORPUS_AUS["synthetic"])


def test_reads_the_original_folder_of_obj_files(tmp_path):
    rng = np.random.default_rng(0)
    neutral, smile, mode = (rng.normal(size=(6, 3)).round(4) for _ in range(3))
    faces = (
        "usemtl M_Face\nf 1/1 2/2 3/3 4/4\nusemtl M_EyeLashes\nf 1/1 2/2 3/3\nusemtl M_Teeth\nf 3/1 4/1 5/1\n"
    )
    write_obj(tmp_path / "generic_neutral_mesh.obj", neutral, faces)
    write_obj(tmp_path / "mouthSmile_L.obj", smile)
    write_obj(tmp_path / "identity000.obj", mode)
    (tmp_path / "vertex_indices.json").write_text(
        json.dumps({"idx_to_landmark_verts": LANDMARK_VERTICES.tolist()})
    )

    head = HeadModel.load(tmp_path)

    np.testing.assert_allclose(head.vertices, neutral[:5], rtol=1e-6)  # the sixth is on no drawn surface
    assert head.triangles.tolist() == [[0, 1, 2], [0, 2, 3], [2, 3, 4]]  # the quadrangle became a fan
    assert head.surface.tolist() == [SKIN, SKIN, TEETH]
    assert head.expression_names == ("mouthSmile_L",)
    np.testing.assert_allclose(head.expression_shapes[0], (smile - neutral)[:5], atol=1e-6)
    np.testing.assert_allclose(
        head.identity(np.array([2.0])), (neutral + 2 * (mode - neutral))[:5], atol=1e-5
    )


def test_other_landmark_vertices_are_refused(tmp_path):
    write_obj(tmp_path / "generic_neutral_mesh.obj", np.zeros((3, 3)), "usemtl M_Face\nf 1/1 2/2 3/3\n")
    (tmp_path / "vertex_indices.json").write_text(json.dumps({"idx_to_landmark_verts": [1, 2, 3]}))
    with pytest.raises(ValueError, match="68 landmarks"):
        HeadModel.load(tmp_path)


def test_a_folder_without_a_head_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        HeadModel.load(tmp_path)


def test_weights_are_gain_times_intensity_times_side(head):
    weights = head.expression_weights({4: 0.5, 26: 1.0}, left=0.8, right=1.2)
    by_name = dict(zip(head.expression_names, weights, strict=True))
    gain = AU_SHAPES[4]["browDown"]
    assert by_name["browDown_L"] == pytest.approx(0.5 * gain * 0.8)
    assert by_name["browDown_R"] == pytest.approx(0.5 * gain * 1.2)
    assert by_name["jawOpen"] == pytest.approx(AU_SHAPES[26]["jawOpen"])
    assert np.count_nonzero(weights) == 3


def test_shape_is_linear(head):
    weights = head.expression_weights({12: 1.0, 1: 0.3})
    naive = head.vertices.astype(np.float64).copy()
    for weight, shape in zip(weights, head.expression_shapes, strict=True):
        naive += float(weight) * shape
    np.testing.assert_allclose(head.shape(head.vertices, weights), naive, atol=1e-4)


def test_an_unknown_shape_names_the_known_ones(head):
    with pytest.raises(KeyError, match="jawOpen"):
        head.expression_index("earWiggle")
