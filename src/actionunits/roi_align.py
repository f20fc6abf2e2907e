"""Pooling of regions of interest (He et al., Mask R-CNN, ICCV 2017), written on PyTorch's `grid_sample`."""

import torch
import torch.nn.functional as F
from torch import Tensor


def roi_align(maps: Tensor, boxes: Tensor, output_size: int, samples: int = 2) -> Tensor:
    """Pool boxes of each map to a few cells, by means of bilinear samples.

    The same as `torchvision.ops.roi_align(..., aligned=True)` with boxes that are given in cells of the map.
    Samples up to a cell outside of the map take the value at its edge; farther out they are zero.

    Args:
        maps: (B, C, h, w).
        boxes: (B, R, 4) xmin, ymin, xmax, ymax in cells; origin: centre of the top-left cell.
        output_size: Cells of the result in height and in width (o).
        samples: Samples of a cell in either direction.

    Returns:
        (B, R, C, o, o) in at least float32.
    """
    dtype = torch.promote_types(maps.dtype, torch.float32)  # half precision has too few bits for places
    maps, boxes = maps.to(dtype), boxes.to(dtype)
    count = output_size * samples
    steps = (torch.arange(count, dtype=dtype, device=maps.device) + 0.5) / count
    start, extent = boxes[..., :2, None], (boxes[..., 2:] - boxes[..., :2])[..., None]
    x, y = (start + extent * steps).unbind(2)  # (B, R, count) each
    places = torch.stack(torch.broadcast_tensors(x[..., None, :], y[..., :, None]), -1)  # (B, R, n, n, 2)
    size = places.new_tensor([maps.shape[3], maps.shape[2]])
    is_near = ((places >= -1) & (places <= size)).all(-1)  # (B, R, n, n)
    # grid_sample counts from the map's outer edges, at -1 and 1.
    grid = ((2 * places + 1) / size - 1).flatten(1, 2)
    sampled = F.grid_sample(maps, grid, padding_mode="border", align_corners=False)
    sampled = sampled.unflatten(2, boxes.shape[1:2] + (count,)).movedim(2, 1) * is_near[:, :, None]
    return F.avg_pool2d(sampled.flatten(0, 1), samples).unflatten(0, boxes.shape[:2])


__all__ = ["roi_align"]
