"""Render scenes: a character between its neighbours, bent, coloured and disturbed, as a 32x32 image.

Everything is batched tensor code without host synchronisation, so that it runs inside one CUDA graph together
with the training step.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGE, GLYPH, OVERSAMPLED = 32, 48, 64
COLORS = {
    "black": (0.05, 0.05, 0.05), "white": (0.97, 0.97, 0.97), "gray": (0.5, 0.5, 0.5), "red": (0.85, 0.1, 0.1),
    "green": (0.1, 0.6, 0.15), "blue": (0.1, 0.2, 0.85), "yellow": (0.95, 0.9, 0.15), "orange": (0.95, 0.55, 0.1),
    "purple": (0.5, 0.1, 0.6), "pink": (0.98, 0.6, 0.75), "brown": (0.45, 0.27, 0.1), "cyan": (0.2, 0.85, 0.9),
}  # fmt: skip
TEXTURES = ("plain", "striped", "checkered", "shaded", "cloudy")


@dataclass(frozen=True)
class Fonts:
    """Bitmaps of the faces in use and what their scenes need to know, all on one device."""

    coverage: Tensor  # (faces, 62, 48, 48) uint8
    width: Tensor  # (faces, 62) ink width in bitmap pixels
    palette: Tensor  # (colours, 3); kept here since a host-to-device copy may not be captured


@dataclass(frozen=True)
class Scene:
    """What is in each image of a batch; every field is (batch,) unless said otherwise."""

    face: Tensor
    character: Tensor  # (batch, 3): the character, its left and its right neighbour
    neighbours: Tensor  # 1 where the neighbours are drawn
    scale: Tensor  # 1: the 48 pixels of a bitmap fill the 32 of the image
    angle: Tensor  # radians, positive = anticlockwise
    shear: Tensor
    shift: Tensor  # (batch, 2) in image pixels
    ink: Tensor  # (batch,) index into COLORS
    paper: Tensor  # (batch,) index into COLORS
    texture: Tensor  # index into TEXTURES
    strength: Tensor  # how far the texture departs from the paper's colour
    stroke: Tensor  # -1: eroded by a pixel, +1: dilated by a pixel
    blur: Tensor  # 0 none, 1 binomial 5x5, 2 twice that
    noise: Tensor  # standard deviation on a scale where white - black = 1
    contrast: Tensor


def fonts(coverage: Tensor) -> Fonts:
    """Return the faces' bitmaps with the ink width of every character."""
    columns = (coverage.amax(2) > 64).float()  # (faces, 62, 48)
    place = torch.arange(GLYPH, device=coverage.device)
    last = (columns * (place + 1)).amax(-1)
    first = GLYPH - (columns * (GLYPH - place)).amax(-1)
    return Fonts(coverage, (last - first).clamp(min=2), torch.tensor([*COLORS.values()], device=coverage.device))


def ink_coverage(faces: Fonts, scene: Scene) -> Tensor:
    """Return how much of each pixel is ink, (batch, 1, 32, 32)."""
    chosen = faces.coverage[scene.face[:, None], scene.character].float() / 255  # (batch, 3, 48, 48)
    thick, thin = F.max_pool2d(chosen, 3, 1, 1), -F.max_pool2d(-chosen, 3, 1, 1)
    stroke = scene.stroke[:, None, None, None]
    chosen = chosen + stroke.clamp(min=0) * (thick - chosen) + stroke.clamp(max=0) * (chosen - thin)
    drawn = torch.stack([torch.ones_like(scene.neighbours), scene.neighbours, scene.neighbours], 1)
    chosen = chosen * drawn[:, :, None, None]
    grid = _sampling_grid(faces, scene)
    sampled = F.grid_sample(chosen.flatten(0, 1)[:, None], grid.flatten(0, 1), align_corners=False)
    ink = sampled.view(-1, 3, OVERSAMPLED, OVERSAMPLED).amax(1, keepdim=True)
    return F.avg_pool2d(ink, OVERSAMPLED // IMAGE)


def _sampling_grid(faces: Fonts, scene: Scene) -> Tensor:
    """Return where in the three bitmaps each oversampled pixel looks, (batch, 3, 64, 64, 2) in [-1, 1] units."""
    axis = (torch.arange(OVERSAMPLED, device=scene.face.device) + 0.5) * (IMAGE / OVERSAMPLED) - IMAGE / 2
    x = axis[None, None, :] - scene.shift[:, 0, None, None]
    y = axis[None, :, None] - scene.shift[:, 1, None, None]
    cos, sin = scene.angle.cos()[:, None, None], scene.angle.sin()[:, None, None]
    zoom = (GLYPH / IMAGE) / scene.scale[:, None, None]
    u, v = (cos * x - sin * y) * zoom, (sin * x + cos * y) * zoom
    u = u + scene.shear[:, None, None] * v
    width = faces.width[scene.face[:, None], scene.character]
    gap = 3.0
    left, right = (width[:, 0] + width[:, 1]) / 2 + gap, (width[:, 0] + width[:, 2]) / 2 + gap
    offset = torch.stack([torch.zeros_like(left), -left, right], 1)  # (batch, 3)
    u = u[:, None] - offset[:, :, None, None]
    return torch.stack([u, v[:, None].expand_as(u)], -1) / (GLYPH / 2)


def pattern(scene: Scene, generator: torch.Generator | None) -> Tensor:
    """Return the texture under the ink, values in [0, 1], (batch, 1, 32, 32)."""
    batch, device = len(scene.face), scene.face.device
    x, y = torch.meshgrid(*[torch.arange(IMAGE, device=device) / IMAGE - 0.5] * 2, indexing="xy")
    draw = torch.rand(batch, 4, 1, 1, generator=generator, device=device)
    turn, phase, waves = draw[:, 0] * math.tau, draw[:, 1] * math.tau, 3 + 4 * draw[:, 2]
    along = x * turn.cos() + y * turn.sin()
    across = y * turn.cos() - x * turn.sin()
    wave, other = (math.tau * waves * along + phase).sin(), (math.tau * waves * across + phase).sin()
    coarse = torch.rand(batch, 1, 6, 6, generator=generator, device=device)
    cloudy = F.interpolate(coarse, (IMAGE, IMAGE), mode="bilinear")[:, 0]
    kinds = [torch.zeros_like(wave), (wave > 0).float(), (wave * other > 0).float(), along + 0.5, cloudy]
    return torch.stack(kinds, 1).gather(1, scene.texture[:, None, None, None].expand(-1, 1, IMAGE, IMAGE))


def images(faces: Fonts, scene: Scene, generator: torch.Generator | None = None) -> Tensor:
    """Return the rendered scenes, (batch, 3, 32, 32) in [0, 1]."""
    ink, paper = (faces.palette[color][:, :, None, None] for color in (scene.ink, scene.paper))
    shade = paper + (0.5 - paper).sign() * 0.5  # towards the far side of mid grey
    under = paper + scene.strength[:, None, None, None] * pattern(scene, generator) * (shade - paper)
    image = torch.lerp(under, ink.expand_as(under), ink_coverage(faces, scene))
    image = blurred(image, scene.blur)
    image = 0.5 + (image - 0.5) * scene.contrast[:, None, None, None]
    noise = torch.randn(len(image), 1, IMAGE, IMAGE, generator=generator, device=image.device)  # grey, like grain
    return (image + noise * scene.noise[:, None, None, None]).clamp(0, 1)


def blurred(image: Tensor, amount: Tensor) -> Tensor:
    """Return the images mixed with their binomial blur: amount 1 is one 5x5 pass, 2 is two passes."""
    soft = [image]
    for _ in range(2):
        padded = F.pad(soft[-1], (2, 2, 2, 2), mode="replicate")
        soft.append(F.avg_pool2d(F.avg_pool2d(F.avg_pool2d(F.avg_pool2d(padded, 2, 1), 2, 1), 2, 1), 2, 1))
    a = amount[:, None, None, None]
    return soft[0] + a.clamp(0, 1) * (soft[1] - soft[0]) + (a - 1).clamp(0, 1) * (soft[2] - soft[1])


def normalized(image: Tensor) -> Tensor:
    """Return images in [0, 1] as the tower wants them: mean .5, standard deviation .5 (preprocessor_config.json)."""
    return (image - 0.5) / 0.5
