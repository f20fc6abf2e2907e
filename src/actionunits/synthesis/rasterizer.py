"""A z-buffer rasteriser, vertex normals and interpolation, compiled with numba."""

from __future__ import annotations

import numba
import numpy as np


@numba.njit(cache=True, fastmath=True, nogil=True)
def rasterize(points: np.ndarray, triangles: np.ndarray, height: int, width: int):
    """Find the nearest front-facing triangle at every pixel centre.

    Args:
        points: (V, 3) x right and y down in pixels (pixel centres at integers), z = distance from the camera.
        triangles: (T, 3) counter-clockwise in a y-up view, hence negative area here.
        height: height of the picture in pixels.
        width: width of the picture in pixels.

    Returns:
        Triangle (height, width) int32, -1 where there is none; depth (height, width); barycentric weights
        (height, width, 2) of the triangle's second and third corner.
    """
    triangle_at = np.full((height, width), -1, np.int32)
    depth = np.full((height, width), np.inf, np.float32)
    weights = np.zeros((height, width, 2), np.float32)
    for t in range(triangles.shape[0]):
        a, b, c = triangles[t, 0], triangles[t, 1], triangles[t, 2]
        x0, y0 = points[a, 0], points[a, 1]
        x1, y1 = points[b, 0], points[b, 1]
        x2, y2 = points[c, 0], points[c, 1]
        area = (x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)
        if area >= -1e-9:  # seen from behind, or no area
            continue
        inverse = 1.0 / area
        top, bottom = int(np.ceil(min(y0, y1, y2))), int(np.floor(max(y0, y1, y2)))
        left, right = int(np.ceil(min(x0, x1, x2))), int(np.floor(max(x0, x1, x2)))
        for y in range(max(0, top), min(height - 1, bottom) + 1):
            for x in range(max(0, left), min(width - 1, right) + 1):
                w1 = ((x - x0) * (y2 - y0) - (x2 - x0) * (y - y0)) * inverse
                w2 = ((x1 - x0) * (y - y0) - (x - x0) * (y1 - y0)) * inverse
                w0 = 1.0 - w1 - w2
                if w0 < 0.0 or w1 < 0.0 or w2 < 0.0:
                    continue
                z = w0 * points[a, 2] + w1 * points[b, 2] + w2 * points[c, 2]
                if z < depth[y, x]:
                    depth[y, x] = z
                    triangle_at[y, x] = t
                    weights[y, x, 0] = w1
                    weights[y, x, 1] = w2
    return triangle_at, depth, weights


@numba.njit(cache=True, fastmath=True, nogil=True)
def vertex_normals(vertices: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """Unit normals (V, 3), area-weighted means over the adjacent triangles."""
    normals = np.zeros_like(vertices)
    for t in range(triangles.shape[0]):
        a, b, c = triangles[t, 0], triangles[t, 1], triangles[t, 2]
        x, y, z = vertices[a, 0], vertices[a, 1], vertices[a, 2]
        ux, uy, uz = vertices[b, 0] - x, vertices[b, 1] - y, vertices[b, 2] - z
        vx, vy, vz = vertices[c, 0] - x, vertices[c, 1] - y, vertices[c, 2] - z
        nx, ny, nz = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
        for k in (a, b, c):
            normals[k, 0] += nx
            normals[k, 1] += ny
            normals[k, 2] += nz
    for i in range(vertices.shape[0]):
        length = np.sqrt(normals[i, 0] ** 2 + normals[i, 1] ** 2 + normals[i, 2] ** 2) + 1e-9
        normals[i] /= length
    return normals


@numba.njit(cache=True, fastmath=True, nogil=True)
def interpolate(
    triangle_at: np.ndarray, weights: np.ndarray, triangles: np.ndarray, values: np.ndarray
) -> np.ndarray:
    """Interpolate vertex values (V, C) at every pixel (height, width, C); zero where there is no triangle."""
    height, width = triangle_at.shape
    channels = values.shape[1]
    out = np.zeros((height, width, channels), np.float32)
    for y in range(height):
        for x in range(width):
            t = triangle_at[y, x]
            if t < 0:
                continue
            w1, w2 = weights[y, x, 0], weights[y, x, 1]
            w0 = 1.0 - w1 - w2
            a, b, c = triangles[t, 0], triangles[t, 1], triangles[t, 2]
            for k in range(channels):
                out[y, x, k] = w0 * values[a, k] + w1 * values[b, k] + w2 * values[c, k]
    return out
