"""Draw scenes at random: the wild ones of pre-training, the book page of fine-tuning, and the page's shifts."""

import math
from dataclasses import replace

import torch
from render import COLORS, TEXTURES, Scene
from torch import Tensor

STYLE_SHARES = {"serif": 0.08, "sans": 0.30, "mono": 0.17, "script": 0.15, "decorative": 0.30}
BLACK, WHITE = list(COLORS).index("black"), list(COLORS).index("white")
PLAIN = TEXTURES.index("plain")


def uniform(
    size: int | tuple[int, ...], low: float, high: float, like: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Return uniform draws in [low, high) on the device of `like`."""
    size = (size,) if isinstance(size, int) else size
    return low + (high - low) * torch.rand(size, generator=generator, device=like.device)


def choice(cumulative: Tensor, size: int, generator: torch.Generator | None) -> Tensor:
    """Return indices drawn by cumulative shares; searchsorted, as torch.multinomial would synchronise."""
    draws = torch.rand(size, generator=generator, device=cumulative.device)
    return torch.searchsorted(cumulative, draws).clamp(max=len(cumulative) - 1)


def cumulative_shares(face_styles: list[str]) -> Tensor:
    """Return cumulative probabilities of faces: STYLE_SHARES between styles, equal shares within one."""
    weights = [STYLE_SHARES[style] / face_styles.count(style) for style in face_styles]
    return torch.tensor(weights, dtype=torch.float64).cumsum(0).div(sum(weights)).float()


def characters(classes: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return a character (0..61) of each class (0..35): letters in either case."""
    upper = torch.rand(classes.shape, generator=generator, device=classes.device) < 0.5
    return torch.where(classes < 26, classes + 26 * upper, classes + 26)


def _indices(size: tuple[int, ...], high: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randint(high, size, generator=generator, device=like.device)


def _around(classes: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return each class's character with two random neighbours, (batch, 3)."""
    others = _indices((len(classes), 2), 36, classes, generator)
    return characters(torch.cat([classes[:, None], others], 1), generator)


def wild(faces: Tensor, classes: Tensor, generator: torch.Generator | None = None) -> Scene:
    """Return pre-training scenes: large characters under everything at once, a sixth of them nearly undistorted.

    The undistorted sixth matters: without it a tiny model stays at loss = log(batch) for a thousand steps.
    """
    n, like = len(faces), faces

    def signed(bound: float) -> Tensor:
        return uniform(n, -bound, bound, like, generator) * hard

    def at_most(bound: float) -> Tensor:
        return uniform(n, 0, bound, like, generator) * hard

    hard = (uniform(n, -0.2, 1.0, like, generator)).clamp(min=0)
    ink = _indices((n,), len(COLORS), like, generator)
    paper = (ink + 1 + _indices((n,), len(COLORS) - 1, like, generator)) % len(COLORS)
    return Scene(
        face=faces,
        character=_around(classes, generator),
        neighbours=(uniform(n, 0, 1, like, generator) < 0.3).float(),
        scale=1 - at_most(0.5),
        angle=signed(math.radians(20)),
        shear=signed(0.3),
        shift=torch.stack([signed(4), signed(4)], 1),
        ink=ink,
        paper=paper,
        texture=_indices((n,), len(TEXTURES), like, generator),
        strength=0.15 + at_most(0.45),
        stroke=signed(1.0),
        blur=at_most(1.5),
        noise=at_most(0.12),
        contrast=1 - at_most(0.3),
    )


def page(faces: Tensor, classes: Tensor, generator: torch.Generator | None = None) -> Scene:
    """Return book-page scenes: small, upright, black on white, between neighbours, slightly blurred."""
    n, like = len(faces), faces
    flat = torch.zeros(n, device=like.device)
    return Scene(
        face=faces,
        character=_around(classes, generator),
        neighbours=flat + 1,
        scale=uniform(n, 0.45, 0.65, like, generator),
        angle=uniform(n, -0.03, 0.03, like, generator),
        shear=flat,
        shift=uniform((n, 2), -2, 2, like, generator),
        ink=torch.full_like(faces, BLACK),
        paper=torch.full_like(faces, WHITE),
        texture=torch.full_like(faces, PLAIN),
        strength=flat,
        stroke=uniform(n, -0.3, 0.3, like, generator),
        blur=uniform(n, 0.2, 0.8, like, generator),
        noise=uniform(n, 0, 0.04, like, generator),
        contrast=flat + 1,
    )


def colored(scene: Scene, generator: torch.Generator | None) -> Scene:
    """Return the page in two different colours, on any texture."""
    n, like = len(scene.face), scene.face
    ink = _indices((n,), len(COLORS), like, generator)
    paper = (ink + 1 + _indices((n,), len(COLORS) - 1, like, generator)) % len(COLORS)
    texture = _indices((n,), len(TEXTURES), like, generator)
    return replace(scene, ink=ink, paper=paper, texture=texture, strength=uniform(n, 0.2, 0.5, like, generator))


def rotated(scene: Scene, generator: torch.Generator | None) -> Scene:
    """Return the page turned by 15 to 40 degrees either way."""
    n, like = len(scene.face), scene.face
    side = (uniform(n, 0, 1, like, generator) < 0.5).float() * 2 - 1
    return replace(scene, angle=side * uniform(n, math.radians(15), math.radians(40), like, generator))


def corrupted(scene: Scene, generator: torch.Generator | None) -> Scene:
    """Return the page with one of three defects: strong noise, strong blur, little contrast with some noise."""
    n, like = len(scene.face), scene.face
    kind = _indices((n,), 3, like, generator)
    noise = torch.where(kind == 0, 0.3, torch.where(kind == 2, 0.08, scene.noise))
    blur = torch.where(kind == 1, uniform(n, 1.4, 2.0, like, generator), scene.blur)
    contrast = torch.where(kind == 2, uniform(n, 0.15, 0.35, like, generator), scene.contrast)
    return replace(scene, noise=noise, blur=blur, contrast=contrast)
