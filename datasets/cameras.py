"""Cameras as tensors: pinholes (3, 4) in a world whose z axis points up, with an object at its origin.

The columns of a camera are three vectors x, y and f and the position o of the pinhole. The point (u, v) of the square
image, from (-1/2, -1/2) at its upper left to (1/2, 1/2) at its lower right, is seen along the ray o + s (u x + v y + f)
with s > 0. The unit vector f points forward, x points right and y points down. The length of x and y is 1 over the
focal length in widths of the image. A camera therefore holds its rotation, its position and its focal length.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ABOVE = 1e-3  # sine of the angle from the vertical below which a camera counts as straight above the object


@dataclass(frozen=True)
class Photograph:
    """Photograph of an object from a known camera.

    Attributes:
        file: path of the image below the folder of all objects.
        of: path of the object's folder below it.
        camera: (3, 4) float32.
    """

    file: str
    of: str
    camera: Tensor


def sphere_camera(polar: float, azimuth: float, focal: float) -> Tensor:
    """Returns the camera (3, 4) float32 on the unit sphere that looks at the origin, without roll.

    Its position is (sin p cos a, sin p sin a, cos p). A camera straight above (polar 0) has the limit of the cameras
    below it: the top of its image points away from its azimuth.

    Args:
        polar: angle p from the vertical in degrees, from 0 (above) to 180 (below).
        azimuth: angle a about the vertical in degrees, counter-clockwise if seen from above.
        focal: focal length in widths of the image.
    """
    p, a = math.radians(polar), math.radians(azimuth)
    right = (-math.sin(a), math.cos(a), 0.0)
    down = (math.cos(p) * math.cos(a), math.cos(p) * math.sin(a), -math.sin(p))
    position = (math.sin(p) * math.cos(a), math.sin(p) * math.sin(a), math.cos(p))
    scaled = [[value / focal for value in axis] for axis in (right, down)]
    return torch.tensor([*scaled, [-value for value in position], position], dtype=torch.float64).T.float()


def opengl_camera(camera_to_world: Tensor, focal: float) -> Tensor:
    """Returns the camera (3, 4) float32 of a matrix (4, 4) or (3, 4) from camera to world, in OpenGL's convention.

    OpenGL's axes are right, up and backward.

    Args:
        focal: focal length in widths of the image.
    """
    right, up, backward, position = camera_to_world[:3].double().unbind(dim=1)
    return torch.stack([right / focal, -up / focal, -backward, position], dim=1).float()


def rays(cameras: Tensor, size: int) -> Tensor:
    """Returns the rays (..., 6, size, size) through the centres of the pixels of cameras (..., 3, 4).

    Channels 0 to 2 are the position of the camera, and channels 3 to 5 are the direction of the ray, a unit vector.
    """
    points = (torch.arange(size, device=cameras.device) + 0.5) / size - 0.5
    x, y, forward, position = cameras[..., None, None].unbind(dim=-3)  # (..., 3, 1, 1) each
    directions = x * points + y * points[:, None] + forward  # (..., 3, size, size)
    directions = directions * directions.square().sum(dim=-3, keepdim=True).rsqrt()  # faster than `norm` on CPUs
    return torch.cat([position.expand_as(directions), directions], dim=-3)


def canonical(cameras: Tensor, reference: Tensor) -> Tensor:
    """Returns cameras (..., 3, 4), turned about the vertical axis by the angle that turns `reference` to azimuth 0.

    Heights, rolls and the differences of azimuth stay the same.

    Args:
        reference: cameras whose shape can be broadcast to that of `cameras`.
    """
    return turn(cameras, -azimuth_of(reference))


def turn(cameras: Tensor, angle: Tensor) -> Tensor:
    """Turns cameras (..., 3, 4) about the vertical axis by angles in radians, counter-clockwise seen from above."""
    cosine, sine, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    rows = [cosine, -sine, zero, sine, cosine, zero, zero, zero, zero + 1]
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3)) @ cameras


def azimuth_of(cameras: Tensor) -> Tensor:
    """Returns the azimuths (...) of the positions of cameras (..., 3, 4), in radians.

    A position straight above or below the origin has no azimuth. For such a camera, returns the azimuth of its x axis
    minus 90 degrees, as `sphere_camera` defines it.
    """
    right, position = cameras[..., 0], cameras[..., 3]
    is_above = position[..., :2].norm(dim=-1) < ABOVE * position.norm(dim=-1)
    of_right = torch.atan2(-right[..., 0], right[..., 1])
    return torch.where(is_above, of_right, torch.atan2(position[..., 1], position[..., 0]))


def polar_of(cameras: Tensor) -> Tensor:
    """Returns the angles (...) of the positions of cameras (..., 3, 4) from the vertical, in radians."""
    position = cameras[..., 3]
    return torch.atan2(position[..., :2].norm(dim=-1), position[..., 2])
