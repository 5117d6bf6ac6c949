"""Rendered scenes: a color image with exact depth, sky and camera, from one place or several.

Rooms, streets of boxes, fields and table tops of boxes, spheres and pillars are cast ray by ray in
NumPy, with patterned surfaces, a lamp or a sun, shadows, haze, and the faults of a camera. A seed and an
index decide everything, so the same scene can be rendered again in any size.

Camera frame: x right, y down, z forward. A ray's third component is one, so its parameter is the depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

FAR = 30.0  # meters; farther pixels take no part in training or figures
_NOISE = 256  # side of the noise tile
_LONGEST_BASELINE = 3.0  # meters between the first camera and another
_CLOSEST = 0.25  # meters between a camera and the nearest surface
_OVERLAP = 0.4  # share of what the first camera sees that another one sees too
_COARSE = 12  # rows and columns of the rays that find a place for a camera
_TRIES = 8
_EPS = 1e-3

Floats = NDArray[np.float32]
Random = np.random.Generator


@dataclass(frozen=True)
class Scene:
    """One rendered scene.

    Attributes
    ----------
    rgb : NDArray[np.uint8]
        [H, W, 3].
    depth : NDArray[np.float32]
        [H, W], meters along the camera's axis, infinite in the sky.
    sky : NDArray[np.bool_]
        [H, W].
    intrinsics : NDArray[np.float32]
        [3, 3], pixels.
    extrinsics : NDArray[np.float32]
        [3, 4], world to camera. The world is level, and the scene's first camera is its origin.
    """

    rgb: NDArray[np.uint8]
    depth: Floats
    sky: NDArray[np.bool_]
    intrinsics: Floats
    extrinsics: Floats

    @property
    def valid(self) -> NDArray[np.bool_]:
        """Pixels whose depth counts, [H, W]."""
        return self.depth < FAR


@dataclass(frozen=True)
class Surface:
    """How an object looks: a pattern between two colors.

    Attributes
    ----------
    colors : NDArray[np.float32]
        [2, 3], 0 to 1.
    pattern : str
        Name of a function of :data:`PATTERNS`.
    scale : float
        Periods of the pattern per metre.
    grain : float
        Strength of the fine noise on top.
    """

    colors: Floats
    pattern: str
    scale: float
    grain: float


@dataclass(frozen=True)
class Solid:
    """One object.

    Attributes
    ----------
    kind : str
        ``plane`` (y = center's y), ``room`` (a box seen from inside), ``box``, ``sphere`` or
        ``pillar`` (a vertical cylinder).
    center, half : NDArray[np.float32]
        Center, and half the extent along its own axes; a sphere's or pillar's radius is the first.
    yaw : float
        Turn about the vertical.
    surface : Surface
        How it looks.
    """

    kind: str
    center: Floats
    half: Floats
    yaw: float
    surface: Surface

    @property
    def radius(self) -> float:
        """Radius of the sphere about its center that encloses it; infinite for planes and rooms."""
        if self.kind in ("plane", "room"):
            return math.inf
        return float(self.half[0]) if self.kind == "sphere" else float(np.linalg.norm(self.half))

    def local(self, points: Floats) -> Floats:
        """Directions [N, 3] turned into the object's axes."""
        c, s = math.cos(self.yaw), math.sin(self.yaw)
        turn = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]], np.float32)
        return points @ turn


@dataclass
class World:
    """Objects, light and air of one scene."""

    solids: list[Solid]
    light: Floats  # unit vector towards the sun, or position of the lamp
    lamp: bool
    ambient: float
    horizon: Floats
    zenith: Floats
    haze: float  # meters over which the air hides two thirds of a color; 0 for none
    noise: Floats = field(default_factory=lambda: np.zeros((_NOISE, _NOISE), np.float32))


def render(seed: int, index: int, height: int, width: int) -> Scene:
    """The scene number ``index`` of ``seed``, rendered at ``height`` x ``width``."""
    return render_views(seed, index, 1, height, width)[0]


def render_views(seed: int, index: int, views: int, height: int, width: int) -> list[Scene]:
    """The same scene from several places that see much of the same; the first is :func:`render`'s."""
    rng = np.random.default_rng([seed, index])
    layout = LAYOUTS[int(rng.integers(len(LAYOUTS)))]
    world, tilt = layout(rng)
    world.noise = _noise_tile(rng)
    # The long side sees 45 to 85 degrees, as a phone's lenses do.
    focal = max(width, height) / 2 / math.tan(math.radians(rng.uniform(45, 85)) / 2)
    first = Camera(np.zeros(3, np.float32), _rotation(tilt, math.radians(rng.normal(0, 2))))
    scenes = [_take(world, first, focal, height, width, rng)]
    reach = (width / 2 / focal, height / 2 / focal)
    for _ in range(views - 1):
        camera = _second_camera(world.solids, first, reach, rng)
        scenes.append(_take(world, camera, focal, height, width, rng))
    return scenes


def render_flight(seed: int, layout: int, frames: int, height: int, width: int) -> Iterator[Scene]:
    """A scene seen from a camera that flies around a loop and ends next to where it began.

    ``layout`` is an index of :data:`LAYOUTS`.
    """
    rng = np.random.default_rng(seed)
    world, tilt = LAYOUTS[layout](rng)
    world.noise = _noise_tile(rng)
    for turn in np.arange(frames) / frames * 2 * math.pi:
        place = np.array([0.5 * math.sin(turn), -0.1 * math.sin(2 * turn), 0.4 - 0.4 * math.cos(turn)])
        c, s = math.cos(0.15 * math.sin(turn)), math.sin(0.15 * math.sin(turn))
        yaw = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
        camera = Camera(np.asarray(place, np.float32), np.asarray(yaw @ _rotation(tilt, 0), np.float32))
        # One camera with one exposure.
        yield _take(world, camera, 0.9 * width, height, width, np.random.default_rng(seed))


# Cameras.


@dataclass(frozen=True)
class Camera:
    """Where a camera stands, [3], and its rotation from the camera's to the level frame, [3, 3]."""

    center: Floats
    rotation: Floats

    @property
    def extrinsics(self) -> Floats:
        """World to camera, [3, 4]."""
        inverse = self.rotation.T
        return np.concatenate((inverse, -(inverse @ self.center)[:, None]), axis=1)


def _take(world: World, camera: Camera, focal: float, height: int, width: int, rng: Random) -> Scene:
    rays = _pinhole_rays(focal, height, width) @ camera.rotation.T
    depth, owner = _cast(world.solids, camera.center, rays)
    color = _shade(world, camera.center, rays, depth, owner, 1 / focal)
    rgb = _photograph(color.reshape(height, width, 3), rng)
    depth = depth.reshape(height, width)
    intrinsics = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], np.float32)
    return Scene(rgb, depth, ~np.isfinite(depth), intrinsics, camera.extrinsics)


def _pinhole_rays(focal: float, height: int, width: int) -> Floats:
    """Rays [H W, 3] through the pixels' centers, in the camera's frame."""
    x = (np.arange(width, dtype=np.float32) + 0.5 - width / 2) / focal
    y = (np.arange(height, dtype=np.float32) + 0.5 - height / 2) / focal
    rays = np.broadcast_arrays(x[None], y[:, None], np.float32(1))
    return np.stack(rays, axis=-1).reshape(-1, 3)


def _second_camera(
    solids: list[Solid], first: Camera, reach: tuple[float, float], rng: Random
) -> Camera:
    """Another camera that looks at much of what the first one sees.

    It moves by a share of the distance to what is in the middle, and turns towards that, too little or
    too far. ``reach`` is the slope of the rays at the right and the lower edge of the image.
    """
    rays = _coarse_rays(reach)
    level = rays @ first.rotation.T
    depth, _ = _cast(solids, first.center, level)
    seen = depth < FAR
    points = level[seen] * depth[seen, None]
    distance = float(np.clip(np.median(depth[seen]), 1, 12)) if seen.any() else 5.0
    target = first.rotation @ np.array([0, 0, distance], np.float32)
    share = math.exp(rng.uniform(math.log(0.04), math.log(0.6)))
    for _ in range(_TRIES):
        way = rng.normal(0, (1, 0.3, 0.6))
        center = (way / np.linalg.norm(way) * min(share * distance, _LONGEST_BASELINE)).astype(
            np.float32
        )
        aim = target - center * np.float32(rng.uniform(-0.2, 1.2))
        turned = _facing(first.rotation, aim, rng)
        camera = Camera(center, turned)
        if (
            _is_free(solids, center, rays @ turned.T)
            and _overlap(solids, camera, points, reach) > _OVERLAP
        ):
            return camera
        share *= 0.8
    return Camera(first.center, _facing(first.rotation, target, rng))


def _coarse_rays(reach: tuple[float, float]) -> Floats:
    grid = (np.arange(_COARSE, dtype=np.float32) + 0.5) / _COARSE * 2 - 1
    rays = np.broadcast_arrays(grid[None] * reach[0], grid[:, None] * reach[1], np.float32(1))
    return np.stack(rays, axis=-1).reshape(-1, 3)


def _facing(rotation: Floats, aim: Floats, rng: Random) -> Floats:
    """``rotation`` turned by the least angle so that its axis is along ``aim``, then at random."""
    axis = rotation[:, 2]
    turn, _ = cv2.Rodrigues(_between(axis, aim / np.linalg.norm(aim)))
    shake, _ = cv2.Rodrigues(np.radians(rng.normal(0, (4, 9, 3))))
    return np.asarray(turn @ rotation @ shake, np.float32)


def _between(start: Floats, end: Floats) -> NDArray[np.float64]:
    """The rotation vector of the least turn between two unit vectors."""
    normal = np.cross(start, end).astype(np.float64)
    sine = float(np.linalg.norm(normal))
    return normal / max(sine, 1e-9) * math.atan2(sine, float(start @ end))


def _is_free(solids: list[Solid], center: Floats, rays: Floats) -> bool:
    """Whether nothing stands between the first camera and ``center``, nor close before its lens."""
    between, _ = _cast(solids, np.zeros(3, np.float32), center[None])
    nearest, _ = _cast(solids, center, rays)
    return bool(between[0] > 1.2 and nearest.min() > _CLOSEST)


def _overlap(solids: list[Solid], camera: Camera, points: Floats, reach: tuple[float, float]) -> float:
    """Share of ``points`` [N, 3] that a camera sees."""
    if not len(points):
        return 1.0
    x, y, z = ((points - camera.center) @ camera.rotation).T
    inside = (z > _CLOSEST) & (np.abs(x) < reach[0] * z) & (np.abs(y) < reach[1] * z)
    hit, _ = _cast(solids, camera.center, (points - camera.center)[inside])
    return float((hit > 0.98).sum() / len(points))


# Layouts: where objects stand. The camera is the origin; the ground is below it, at positive y.


def _room(rng: Random) -> tuple[World, float]:
    half = np.array([rng.uniform(1.5, 4), rng.uniform(1.2, 1.8), rng.uniform(2, 6)], np.float32)
    share = rng.uniform((-0.5, -0.2, -0.9), (0.5, 0.3, -0.1))
    center = -(half * share).astype(np.float32)
    yaw = math.radians(rng.uniform(-30, 30))
    room = Solid("room", _turned(center, yaw), half, yaw, _surface(rng, 0.5))
    floor = float(center[1] + half[1])
    carpet = np.array([0, floor - _EPS, 0], np.float32)
    solids = [room, Solid("plane", carpet, half, 0, _surface(rng, 1))]
    for _ in range(int(rng.integers(3, 11))):
        position = center + half * rng.uniform((-0.85, 0, -0.2), (0.85, 0, 0.95))
        solids.append(_standing(rng, _turned(position, yaw), floor, rng.uniform(0.2, 0.9)))
    for _ in range(int(rng.integers(0, 5))):  # paintings and shelves
        side = float(rng.choice([-1, 1]))
        position = center + half * np.array([side, rng.uniform(-0.6, 0.3), rng.uniform(-0.5, 0.9)])
        size = np.array([0.05, rng.uniform(0.15, 0.5), rng.uniform(0.15, 0.7)], np.float32)
        solids.append(Solid("box", _turned(position, yaw), size, yaw, _surface(rng, 2)))
    lamp = center + half * rng.uniform((-0.5, -0.9, -0.5), (0.5, -0.7, 0.7))
    return _world(rng, solids, lamp=_turned(lamp, yaw)), math.radians(rng.normal(8, 10))


def _street(rng: Random) -> tuple[World, float]:
    floor = rng.uniform(1.2, 2.4)
    yaw = math.radians(rng.normal(0, 12))
    solids = [_ground(rng, floor)]
    for side in (-1, 1):
        offset, along = rng.uniform(3.5, 12), rng.uniform(-6, 8)
        while along < 100:
            half = rng.uniform((2, 2, 2.5), (6, 12, 9)).astype(np.float32)
            position = np.array(
                [side * (offset + half[0]), floor - half[1], along + half[2]], np.float32
            )
            solids.append(Solid("box", _turned(position, yaw), half, yaw, _surface(rng, 0.4)))
            along += 2 * half[2] + (rng.uniform(0, 8) if rng.uniform() < 0.5 else 0)
    for _ in range(int(rng.integers(2, 12))):  # cars, posts, trees, people
        position = np.array([rng.uniform(-7, 7), 0, 3 + 30 * rng.uniform() ** 1.5], np.float32)
        solids.append(_standing(rng, _turned(position, yaw), floor, rng.uniform(0.4, 2)))
    return _world(rng, solids), math.radians(rng.normal(0, 6))


def _field(rng: Random) -> tuple[World, float]:
    floor = rng.uniform(1.3, 4)
    solids = [_ground(rng, floor)]
    for _ in range(int(rng.integers(3, 16))):
        distance = 2.5 + 30 * rng.uniform() ** 2
        position = np.array([distance * rng.uniform(-0.8, 0.8), 0, distance], np.float32)
        solids.append(_standing(rng, position, floor, rng.uniform(0.4, 1 + distance / 8)))
    return _world(rng, solids), math.radians(rng.normal(4, 8))


def _table(rng: Random) -> tuple[World, float]:
    floor = rng.uniform(0.4, 1.2)
    tilt = math.radians(rng.uniform(18, 55))
    solids = [_ground(rng, floor)]
    reach = floor / math.tan(tilt)
    for _ in range(int(rng.integers(3, 12))):
        position = np.array([rng.normal(0, 0.6 * reach), 0, reach * rng.uniform(0.6, 2.2)], np.float32)
        solids.append(_standing(rng, position, floor, floor * rng.uniform(0.08, 0.35)))
    if rng.uniform() < 0.5:
        wall = np.array([0, floor - 2, reach * rng.uniform(2, 4)], np.float32)
        size = np.array([20, 4, 0.1], np.float32)
        solids.append(Solid("box", wall, size, math.radians(rng.normal(0, 15)), _surface(rng, 1)))
    return _world(rng, solids), tilt


LAYOUTS: tuple[Callable[[Random], tuple[World, float]], ...] = (_room, _street, _field, _table)


def _ground(rng: Random, floor: float) -> Solid:
    zero = np.zeros(3, np.float32)
    center = np.array([0, floor, 0], np.float32)
    return Solid("plane", center, zero, math.radians(rng.uniform(0, 90)), _surface(rng, 0.7))


def _standing(rng: Random, position: NDArray[np.floating], floor: float, size: float) -> Solid:
    """A box, sphere or pillar of about ``size`` meters that stands on the floor."""
    kind = str(rng.choice(["box", "box", "sphere", "pillar"]))
    half = (size * rng.uniform(0.25, 0.6, 3)).astype(np.float32)
    if kind == "pillar":
        half[:2] = half[0] * 0.4, half[1] * rng.uniform(1, 4)
    height = half[0] if kind == "sphere" else half[1]
    center = np.array([position[0], floor - height, position[2]], np.float32)
    return Solid(kind, center, half, math.radians(rng.uniform(0, 90)), _surface(rng, 1.5 / size))


def _surface(rng: Random, scale: float) -> Surface:
    base = _color(rng)
    other = _color(rng) if rng.uniform() < 0.4 else np.clip(base * rng.uniform(0.5, 1.4), 0, 1)
    pattern = str(rng.choice(list(PATTERNS)))
    colors = np.stack((base, other)).astype(np.float32)
    return Surface(colors, pattern, scale * float(rng.uniform(0.6, 3)), float(rng.uniform(0, 0.5)))


def _color(rng: Random) -> Floats:
    """A color, most often a dull one."""
    gray = rng.uniform(0.08, 0.95)
    tint = rng.normal(0, 0.25 if rng.uniform() < 0.3 else 0.07, 3)
    return np.asarray(np.clip(gray + tint, 0.02, 1), np.float32)


def _world(rng: Random, solids: list[Solid], lamp: NDArray[np.floating] | None = None) -> World:
    sun = rng.normal(0, 1, 3)
    sun[1] = -abs(sun[1]) - 0.3
    light = sun / np.linalg.norm(sun) if lamp is None else lamp
    bright = rng.uniform(0.5, 1)
    horizon = bright * np.array([rng.uniform(0.7, 1), rng.uniform(0.75, 1), rng.uniform(0.8, 1)])
    zenith = bright * np.array([rng.uniform(0.2, 0.8), rng.uniform(0.4, 0.85), rng.uniform(0.6, 1)])
    haze = rng.uniform(40, 400) if lamp is None and rng.uniform() < 0.7 else 0.0
    return World(
        solids,
        np.asarray(light, np.float32),
        lamp is not None,
        float(rng.uniform(0.25, 0.6)),
        np.asarray(horizon, np.float32),
        np.asarray(zenith, np.float32),
        float(haze),
    )


def _turned(position: NDArray[np.floating], yaw: float) -> Floats:
    """A position given in axes rotated by ``yaw``, converted to the camera's level frame."""
    c, s = math.cos(yaw), math.sin(yaw)
    turn = np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]])
    return np.asarray(position @ turn, np.float32)


def _rotation(tilt: float, roll: float) -> Floats:
    """Camera to level frame: rolled about the axis, then tilted down."""
    ct, st, cr, sr = math.cos(tilt), math.sin(tilt), math.cos(roll), math.sin(roll)
    down = np.array([[1, 0, 0], [0, ct, st], [0, -st, ct]])
    return np.asarray(down @ np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]]), np.float32)


# Casting rays.


def _cast(solids: list[Solid], origins: Floats, rays: Floats) -> tuple[Floats, NDArray[np.int16]]:
    """Distance [N] along each ray [N, 3] to the first object, infinite without one, and its index.

    ``origins`` is [3], common to all rays, or [N, 3].
    """
    nearest = np.full(len(rays), np.inf, np.float32)
    owner = np.full(len(rays), -1, np.int16)
    common = origins.ndim == 1
    unit = rays / np.sqrt(np.einsum("ij,ij->i", rays, rays))[:, None]
    along = unit @ origins if common else np.einsum("ij,ij->i", unit, origins)
    square = origins @ origins if common else np.einsum("ij,ij->i", origins, origins)
    with np.errstate(divide="ignore", invalid="ignore"):
        for index, solid in enumerate(solids):
            radius = solid.radius
            if np.isfinite(radius):
                # Only the rays that pass through its bounding sphere.
                closest = along - unit @ solid.center
                away = square - 2 * origins @ solid.center + solid.center @ solid.center
                rows = np.flatnonzero(away - closest * closest < radius * radius)
                distance = _distance(solid, origins if common else origins[rows], rays[rows])
            else:
                rows = np.arange(len(rays))
                distance = _distance(solid, origins, rays)
            closer = (distance > _EPS) & (distance < nearest[rows])
            nearest[rows[closer]] = distance[closer]
            owner[rows[closer]] = index
    return nearest, owner


def _distance(solid: Solid, origins: Floats, rays: Floats) -> Floats:
    """Ray parameter [N] of the first hit, infinite or negative where there is none."""
    offset = origins - solid.center
    if solid.kind == "plane":
        return np.asarray(-offset[..., 1] / rays[:, 1], np.float32)
    if solid.kind == "sphere":
        return _quadratic(rays, np.broadcast_to(offset, rays.shape), solid.half[0])
    start, way = solid.local(np.atleast_2d(offset)), solid.local(rays)
    if solid.kind == "pillar":
        start = np.broadcast_to(start, way.shape)
        flat = [0, 2]
        around = _quadratic(way[:, flat], start[:, flat], solid.half[0])
        high = np.abs(start[:, 1] + around * way[:, 1]) <= solid.half[1]
        side = np.where(high, around, np.inf)
        lid = (-np.sign(way[:, 1]) * solid.half[1] - start[:, 1]) / way[:, 1]
        at = start[:, flat] + lid[:, None] * way[:, flat]
        lid = np.where((at * at).sum(1) <= solid.half[0] ** 2, lid, np.inf)
        return np.minimum(np.where(side > _EPS, side, np.inf), np.where(lid > _EPS, lid, np.inf))
    # A ray along a face must not make 0 / 0.
    inverse = 1 / np.where(np.abs(way) < 1e-9, np.float32(1e-9), way)
    middle, reach = -start * inverse, np.abs(solid.half * inverse)
    enter, leave = (middle - reach).max(axis=1), (middle + reach).min(axis=1)
    if solid.kind == "room":
        return np.where(leave > _EPS, leave, np.inf).astype(np.float32)
    return np.where((enter <= leave) & (enter > _EPS), enter, np.inf).astype(np.float32)


def _quadratic(rays: Floats, start: Floats, radius: float) -> Floats:
    """First crossing of a circle or sphere about the origin."""
    a = (rays * rays).sum(1)
    b = (rays * start).sum(1)
    c = (start * start).sum(1) - radius * radius
    root = b * b - a * c
    return np.where(root > 0, (-b - np.sqrt(np.maximum(root, 0))) / a, np.inf).astype(np.float32)


# Colors.


def _shade(
    world: World,
    center: Floats,
    rays: Floats,
    depth: Floats,
    owner: NDArray[np.int16],
    pixel: float,
) -> Floats:
    """Color [N, 3], 0 to 1, of rays from ``center``; ``pixel`` is a pixel's width at a depth of one."""
    color = _sky(world, rays)
    hit = owner >= 0
    points = center + rays[hit] * depth[hit, None]
    paint = np.empty_like(points)
    normals = np.empty_like(points)
    for index in np.unique(owner[hit]):
        mine = owner[hit] == index
        solid = world.solids[index]
        paint[mine], normals[mine] = _paint(solid, points[mine], depth[hit][mine] * pixel, world.noise)
    towards = world.light - points if world.lamp else np.broadcast_to(world.light, points.shape)
    length = np.linalg.norm(towards, axis=1, keepdims=True)
    facing = (normals * towards).sum(1) / length[:, 0]
    # Inner walls show their back.
    lit = np.abs(facing) if world.lamp else np.maximum(facing, 0)
    casters = [solid for solid in world.solids if solid.kind not in ("plane", "room")]
    reach, _ = _cast(casters, points + normals * 0.01 * np.sign(facing)[:, None], towards)
    shadow = reach < (1 if world.lamp else np.inf)
    lit = np.where(shadow, lit * 0.15, lit)
    if world.lamp:
        lit = lit * 1.6 / (1 + (length[:, 0] / 4) ** 2)
    shaded = paint * (world.ambient + (1 - world.ambient) * lit)[:, None]
    if world.haze:
        clear = np.exp(-depth[hit] / world.haze)[:, None]
        shaded = shaded * clear + world.horizon * (1 - clear)
    color[hit] = shaded
    return color


def _sky(world: World, rays: Floats) -> Floats:
    up = np.clip(-rays[:, 1] / np.linalg.norm(rays, axis=1), 0, 1)[:, None]
    color = world.horizon + (world.zenith - world.horizon) * np.sqrt(up)
    low = up[:, 0] + 0.15
    cloud = _look_up(world.noise, rays[:, 0] / low * 20, rays[:, 2] / low * 20)
    return np.asarray(color + (np.maximum(cloud - 0.5, 0) * up[:, 0])[:, None], np.float32)


def _paint(solid: Solid, points: Floats, width: Floats, noise: Floats) -> tuple[Floats, Floats]:
    """Color and outward normal, [N, 3] each, of points on an object; ``width`` [N] is a pixel's."""
    local = solid.local(points - solid.center)
    if solid.kind == "plane":
        normal = np.broadcast_to(np.array([0, -1, 0], np.float32), local.shape)
        u, v = local[:, 0], local[:, 2]
    elif solid.kind == "sphere":
        normal = local / solid.half[0]
        u, v = np.arctan2(local[:, 0], local[:, 2]) * solid.half[0], local[:, 1]
    elif solid.kind == "pillar":
        lid = np.abs(local[:, 1]) > solid.half[1] - _EPS
        normal = local / solid.half[0]
        normal[:, 1] = 0
        normal[lid] = np.stack([[0, 1, 0]]) * np.sign(local[lid, 1:2])
        u = np.where(lid, local[:, 0], np.arctan2(local[:, 0], local[:, 2]) * solid.half[0])
        v = np.where(lid, local[:, 2], local[:, 1])
    else:
        axis = np.argmax(np.abs(local) / solid.half, axis=1)
        rows = np.arange(len(local))
        normal = np.zeros_like(local)
        normal[rows, axis] = np.sign(local[rows, axis])
        u, v = local[rows, (axis == 0) * 2], local[rows, np.where(axis == 1, 2, 1)]
    surface = solid.surface
    s = surface.scale
    mix = PATTERNS[surface.pattern](u * s, v * s, noise)
    grain = _look_up(noise, u * s * 60, v * s * 60) - 0.5
    # A pattern finer than a pixel is its mean.
    blur = np.clip(1.5 - 2 * width * s, 0, 1)
    fine = np.clip(1.5 - 2 * width * s * 30, 0, 1)
    mix = 0.5 + (mix - 0.5) * blur
    a, b = surface.colors
    color = (a + (b - a) * mix[:, None]) * (1 + surface.grain * grain * fine)[:, None]
    c, sn = math.cos(solid.yaw), math.sin(solid.yaw)
    back = np.array([[c, 0, -sn], [0, 1, 0], [sn, 0, c]], np.float32)
    return np.asarray(color, np.float32), np.asarray(normal @ back, np.float32)


def _look_up(noise: Floats, u: Floats, v: Floats) -> Floats:
    """Noise [N] at places in units of its tile's texels."""
    x = np.mod(u, _NOISE).astype(np.float32)[None]
    y = np.mod(v, _NOISE).astype(np.float32)[None]
    # OpenCV takes maps of up to 32767 columns.
    pieces = [slice(i, i + 30000) for i in range(0, x.shape[1], 30000)]
    parts = [
        cv2.remap(noise, x[:, at], y[:, at], cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
        for at in pieces
    ]
    return np.concatenate(parts, axis=1)[0] if parts else np.zeros(0, np.float32)


def _checker(u: Floats, v: Floats, noise: Floats) -> Floats:
    return np.asarray((np.floor(u) + np.floor(v)) % 2, np.float32)


def _stripes(u: Floats, v: Floats, noise: Floats) -> Floats:
    return np.asarray(np.mod(u, 1) < 0.4, np.float32)


def _bricks(u: Floats, v: Floats, noise: Floats) -> Floats:
    row = np.floor(2 * v)
    joint = (np.mod(2 * v, 1) < 0.12) | (np.mod(u + 0.5 * (row % 2), 1) < 0.06)
    return np.where(joint, 1, 0.3 * _look_up(noise, u * 9, v * 9)).astype(np.float32)


def _windows(u: Floats, v: Floats, noise: Floats) -> Floats:
    inside = (np.abs(np.mod(u, 1) - 0.5) < 0.28) & (np.abs(np.mod(v, 1) - 0.5) < 0.32)
    return np.asarray(inside, np.float32)


def _cloudy(u: Floats, v: Floats, noise: Floats) -> Floats:
    return _look_up(noise, u * 12, v * 12)


def _plain(u: Floats, v: Floats, noise: Floats) -> Floats:
    return 0.2 * _look_up(noise, u * 3, v * 3)


PATTERNS: dict[str, Callable[[Floats, Floats, Floats], Floats]] = {
    "checker": _checker,
    "stripes": _stripes,
    "bricks": _bricks,
    "windows": _windows,
    "cloudy": _cloudy,
    "plain": _plain,
}


def _noise_tile(rng: Random) -> Floats:
    """Noise of five octaves, 0 to 1, that repeats without a seam."""
    total = np.zeros((_NOISE, _NOISE), np.float32)
    for octave in range(3, 8):
        size = 2**octave
        coarse = np.pad(rng.uniform(0, 1, (size, size)).astype(np.float32), 1, mode="wrap")
        step = _NOISE // size
        smooth = cv2.resize(coarse, None, fx=step, fy=step, interpolation=cv2.INTER_LINEAR)
        total += smooth[step:-step, step:-step] / 2 ** (octave - 3)
    low, high = float(total.min()), float(total.max())
    return np.asarray((total - low) / (high - low), np.float32)


def _photograph(color: Floats, rng: Random) -> NDArray[np.uint8]:
    """What a camera makes of it: exposure, white balance, blur, noise, compression."""
    level = np.clip(rng.uniform(0.25, 0.6) / max(float(color.mean()), 0.02), 0.5, 4)
    exposure = level * rng.uniform(0.93, 1.07, 3)
    image = np.clip(color * exposure, 0, 1) ** rng.uniform(0.6, 1.1)
    if rng.uniform() < 0.5:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 0.9))
    image = image * 255 + rng.normal(0, rng.uniform(0.3, 5), image.shape)
    pixels = np.clip(image, 0, 255).astype(np.uint8)
    if rng.uniform() < 0.4:
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(50, 96))]
        pixels = np.asarray(cv2.imdecode(cv2.imencode(".jpg", pixels, quality)[1], cv2.IMREAD_COLOR))
    return np.asarray(pixels, np.uint8)
