import numpy as np

from actionunits.synthesis.rasterizer import interpolate, rasterize, vertex_normals


def naive(points, triangles, height, width):
    """Every pixel against every triangle, in float64."""
    triangle_at = np.full((height, width), -1)
    depth = np.full((height, width), np.inf)
    for t, corners in enumerate(triangles):
        a, b, c = points[corners].astype(np.float64)
        basis = np.array([b[:2] - a[:2], c[:2] - a[:2]]).T
        if np.linalg.det(basis) >= 0:
            continue
        for y in range(height):
            for x in range(width):
                w1, w2 = np.linalg.solve(basis, [x - a[0], y - a[1]])
                z = a[2] + w1 * (b[2] - a[2]) + w2 * (c[2] - a[2])
                if min(w1, w2, 1 - w1 - w2) >= 0 and z < depth[y, x]:
                    triangle_at[y, x], depth[y, x] = t, z
    return triangle_at, depth


def test_agrees_with_the_naive_rasterizer_where_triangles_overlap():
    rng = np.random.default_rng(3)
    points = np.c_[rng.uniform(-4, 28, (30, 2)), rng.uniform(1, 9, 30)].astype(np.float32)
    triangles = rng.integers(0, 30, (20, 3)).astype(np.int32)
    triangle_at, depth, _ = rasterize(points, triangles, 20, 24)
    expected, expected_depth = naive(points, triangles, 20, 24)
    assert (triangle_at == expected).mean() > 0.995  # pixels exactly on an edge may fall to either side
    assert (triangle_at >= 0).sum() > 50
    same = (triangle_at == expected) & (expected >= 0)
    np.testing.assert_allclose(depth[same], expected_depth[same], rtol=1e-3)


def test_interpolation_reproduces_a_linear_function():
    points = np.array([[1, 1, 5], [2, 17, 5], [18, 3, 5]], np.float32)
    triangles = np.array([[0, 1, 2]], np.int32)
    triangle_at, _, weights = rasterize(points, triangles, 20, 20)
    values = (3 * points[:, :1] - 2 * points[:, 1:2] + 1).astype(np.float32)
    drawn = interpolate(triangle_at, weights, triangles, values)[..., 0]
    y, x = np.nonzero(triangle_at >= 0)
    assert len(y) > 80
    np.testing.assert_allclose(drawn[y, x], 3 * x - 2 * y + 1, atol=1e-3)
    assert not drawn[triangle_at < 0].any()


def test_normals_of_a_sphere_are_its_radii():
    lat, lon = np.meshgrid(np.linspace(0.2, np.pi - 0.2, 40), np.linspace(0, 2 * np.pi, 60, endpoint=False))
    sphere = np.stack([np.sin(lat) * np.cos(lon), np.cos(lat), np.sin(lat) * np.sin(lon)], -1).reshape(-1, 3)
    index = np.arange(60 * 40).reshape(60, 40)
    a, b = index[:, :-1].ravel(), index[:, 1:].ravel()
    c, d = np.roll(index, -1, 0)[:, 1:].ravel(), np.roll(index, -1, 0)[:, :-1].ravel()
    triangles = np.concatenate([np.stack([a, c, b], 1), np.stack([a, d, c], 1)]).astype(np.int32)
    normals = vertex_normals(sphere.astype(np.float32), triangles)
    inner = index[:, 3:-3].ravel()
    assert (np.abs((normals * sphere).sum(1)[inner]) > 0.999).all()
    assert np.sign((normals * sphere).sum(1)[inner]).std() == 0
