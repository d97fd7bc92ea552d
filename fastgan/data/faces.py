"""Drawn faces: flat-illustration portraits whose every generative factor is known.

`fastgan train` without a folder learns from these, so they are aligned, bold enough to read at
64 px, and cost no download. A face is a stack of shapes given by signed distances and painted back
to front; coverage is computed from the distance, so that a face looks the same at every size.

While painting, images are the innermost axis: [3, rows, columns, images]. Every parameter is then
a contiguous vector, and a part of the face is painted in the small window that holds it in all
images of the tile. Only exactly rounded operations (+ - * / sqrt min max floor) touch pixels, so
the bits depend neither on tiles nor on threads.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

FACES_VERSION = 1  # raise when any pixel changes: caches of drawn faces are rebuilt by it

# Lengths are in units of which the picture is 2 * _VIEW wide, y runs down; angles are in radians.
# name: (lowest, highest, meaning)
FACTORS: dict[str, tuple[float, float, str]] = {
    "skin_tone": (0, 1, "deep to light"),
    "skin_warmth": (-1, 1, "cool, rosy to warm, golden"),
    "head_width": (0.43, 0.50, "half-width of the head"),
    "head_height": (0.53, 0.60, "half-height of the head"),
    "jaw": (0, 1, "broad and square to pointed"),
    "tilt": (-0.09, 0.09, "rotation of the head"),
    "turn": (-1, 1, "features shifted left or right on the head"),
    "shift_x": (-0.04, 0.04, "position of the head"),
    "shift_y": (-0.03, 0.03, "position of the head"),
    "hair_style": (0, 8, "shaved, crop, side part, fringe, curtains, curls, bun, quiff"),
    "hair_length": (0, 1, "chin to below the shoulders, for fringe and curtains; slight otherwise"),
    "hair_volume": (0, 1, "close to the head to full"),
    "hair_part": (-1, 1, "where the parting or the slant of the hairline is"),
    "hair_tone": (0, 1, "black, brown, chestnut, ginger, blond"),
    "hair_grey": (0, 1, "grey comes in above 0.8"),
    "ear_size": (0.08, 0.12, "half-height of the ears"),
    "eye_size": (0.115, 0.145, "half-width of the eyes"),
    "eye_round": (0.62, 0.9, "height of the eyes over their width"),
    "eye_tone": (0, 1, "dark brown, hazel, green, blue, grey"),
    "eye_spacing": (0.185, 0.22, "half the distance between the eyes"),
    "eye_lid": (0, 1, "wide open to half closed"),
    "gaze_x": (-1, 1, "looking left to right"),
    "gaze_y": (-1, 1, "looking up to down"),
    "brow_height": (0, 1, "low to raised"),
    "brow_angle": (-1, 1, "worried to stern"),
    "brow_thickness": (0.016, 0.034, "half-thickness of the eyebrows"),
    "nose_size": (0.065, 0.1, "half-width of the nose"),
    "mouth_width": (0.19, 0.24, "half-width of the mouth"),
    "mouth_smile": (-0.2, 1, "flat to a wide smile"),
    "mouth_open": (0, 1, "closed below 0.4, then open with teeth"),
    "lip_tone": (0, 1, "natural to red"),
    "lip_full": (0, 1, "thin to full lips"),
    "blush": (0, 1, "colour of the cheeks"),
    "beard": (0, 1, "none below 0.7, then stubble to full"),
    "glasses": (0, 1, "worn above 0.7"),
    "glasses_shape": (0, 1, "round to square"),
    "glasses_tone": (0, 1, "colour of the frame"),
    "earrings": (0, 1, "worn above 0.7"),
    "light_angle": (-1.2, 1.2, "where the light comes from, 0 is above"),
    "light_strength": (0.3, 1, "depth of the shadows"),
    "cloth_hue": (0, 1, "colour of the clothes, along a palette"),
    "cloth_stripes": (0, 1, "striped above 0.7"),
    "neckline": (0, 1, "high to wide"),
    "shoulders": (0.62, 0.85, "half-width of the shoulders"),
    "background_hue": (0, 1, "colour of the background, along a palette"),
    "background_tone": (0, 1, "dim to bright"),
    "background_disc": (0, 1, "radius of the disc behind the head, none below 0.3"),
}
FACTOR_NAMES: tuple[str, ...] = tuple(FACTORS)

Number = Tensor | float  # one value an image, or the same for all

# Colours along each palette, from 0 to 1
_SKIN = "5a3628 7b4c36 9e6a49 bd8860 d6a37a e7bb96 f3cfb1 fbe0cc"
_HAIR = "17141a 2b1d1a 452b1f 6b3f25 8f4a25 b8652f c9924f e6c585"
_EYES = "3a2115 5b3a1e 7a6a2f 4f7f4b 3f7f9f 5a8fc8 77879a"
_CLOTH = "243b63 1f6f78 3f7d58 d9a43b d4694a a23b4c 6b4a83 3b3f4c ece6da"
_BACKGROUND = "7fb7be 8fb3dd a99fd6 d99bb5 f0a58c f2c879 b5c98a 7fb79a"
_FRAMES = "1d1d24 5a3220 8a2f3c 27497a b98a3a"

# One row a style. top, side: what the hair adds to the head; line: height of the hairline; left,
# right, curve: its slopes on either side of the parting and its curvature; curtain: where the hair
# beside the face begins; curl: depth of the locks; back_lo, back_hi: reach of the back hair,
# shortest and longest; bun: its radius; cover: opacity.
_STYLE_COLUMNS = (
    "top", "side", "line", "left", "right", "curve", "curtain", "curl", "back_lo", "back_hi",
    "bun", "cover",
)  # fmt: skip
_STYLES = np.array([
    [0.020, 0.01, -0.36, 0.00, 0.00, 0.35, 0.39, 0.000, 0.02, 0.08, 0.00, 0.70],  # shaved
    [0.080, 0.03, -0.31, 0.10, -0.1, 0.50, 0.39, 0.010, 0.02, 0.10, 0.00, 1.00],  # crop
    [0.090, 0.04, -0.42, 0.10, 0.45, 0.60, 0.39, 0.000, 0.04, 0.12, 0.00, 1.00],  # side part
    [0.080, 0.07, -0.20, 0.00, 0.00, 0.15, 0.36, 0.000, 0.62, 1.15, 0.00, 1.00],  # fringe
    [0.080, 0.07, -0.48, 0.70, 0.70, 0.00, 0.38, 0.000, 0.62, 1.15, 0.00, 1.00],  # curtains
    [0.160, 0.17, -0.31, 0.00, 0.00, 0.50, 0.42, 0.034, 0.35, 0.70, 0.00, 1.00],  # curls
    [0.045, 0.02, -0.39, 0.00, 0.00, 0.70, 0.39, 0.000, 0.02, 0.08, 0.18, 1.00],  # bun
    [0.130, 0.02, -0.35, -0.2, 0.25, 0.60, 0.39, 0.012, 0.02, 0.08, 0.00, 1.00],  # quiff
])  # fmt: skip

# The picture shows this much on either side of its middle, which is a little below the head's
_VIEW, _VIEW_Y = 0.88, 0.09

# 8,192 faces at 64 px on 2 cores: 2.0 s so, 2.4 s with 32 images and 2^17 pixels, 3.4 s with 2^16
_TILE_IMAGES = 64
_TILE_PIXELS = 1 << 18
_BLOCK_IMAGES = 1024  # parameters are worked out for this many at a time


def factors(count: int, seed: int = 0) -> np.ndarray:
    """Draw the factors of faces: float32 [count, len(FACTOR_NAMES)], within FACTORS' ranges.

    Row i depends on (seed, i) only. Hair tends to be darker on deeper skin and beards come more
    often with short hair; everything else is independent and uniform.
    """
    if count < 0:
        raise ValueError(f"factors: count must be at least 0, got {count}")
    return _factor_rows(0, count, seed)


def _factor_rows(start: int, count: int, seed: int) -> np.ndarray:
    """Rows start .. start+count of `factors`, without drawing those before."""
    source = np.random.PCG64(seed)
    source.advance(start * len(FACTORS))  # one 64-bit draw is one number
    unit = np.random.Generator(source).random((count, len(FACTORS)))
    col = {name: unit[:, i] for i, name in enumerate(FACTORS)}
    col["hair_tone"] *= 0.25 + 0.75 * col["skin_tone"]
    col["beard"] *= 1 - 0.35 * col["hair_length"]
    low, high = np.array([bounds[:2] for bounds in FACTORS.values()]).T
    return (low + unit * (high - low)).astype(np.float32)


def render(factors: np.ndarray, size: int) -> np.ndarray:
    """Paint faces: factors [n, len(FACTOR_NAMES)] -> uint8 [n, size, size, 3], sRGB.

    Works in as many threads as torch is set to, at most 16, each in a few tens of megabytes at any
    size. Raises ValueError for a size below 16, for factors of another shape, and for values that
    are not finite.
    """
    factors = np.asarray(factors, dtype=np.float32)
    if size < 16:
        raise ValueError(f"render: size must be at least 16, got {size}")
    if factors.ndim != 2 or factors.shape[1] != len(FACTORS):
        raise ValueError(
            f"render: factors must have shape (n, {len(FACTORS)}), got {factors.shape}"
        )
    if not np.isfinite(factors).all():
        raise ValueError("render: factors must be finite, got NaN or infinity")
    out = np.empty((len(factors), size, size, 3), np.uint8)
    images = _TILE_IMAGES if size <= 160 else 1
    rows = min(size, max(8, _TILE_PIXELS // (images * size)))
    # glibc keeps freed blocks up to the size of the largest it has seen go, below 32 MiB. After
    # this it reuses the planes of a tile instead of unmapping them and faulting them in again:
    # 2.0 s for 8,192 faces at 64 px on 2 cores, 3.3 s without.
    torch.empty(30 << 20, dtype=torch.uint8)
    # One thread a tile. Threads that share each operation spin until the last is done, hundreds of
    # times a tile: on a machine busy with something else that took thirty times as long.
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(min(threads, 16), "faces", torch.set_num_threads, (1,)) as pool:
            for block in range(0, len(factors), _BLOCK_IMAGES):
                params = _parameters(factors[block : block + _BLOCK_IMAGES])
                here = out[block : block + _BLOCK_IMAGES]
                jobs = [
                    pool.submit(_render_tile, params, i, r, here[i : i + images, r : r + rows])
                    for i in range(0, len(here), images)
                    for r in range(0, size, rows)
                ]
                for job in jobs:
                    job.result()
    finally:
        torch.set_num_threads(threads)  # new threads start from what was set last
    return out


def _render_tile(params: dict[str, np.ndarray], image: int, row: int, out: np.ndarray) -> None:
    """Paint the rows from `row` of the images from `image`: uint8 [images, rows, size, 3]."""
    count, rows, size, _ = out.shape
    with torch.inference_mode():
        p = {k: torch.from_numpy(v[..., image : image + count]) for k, v in params.items()}
        tile = _Tile(p, size, row, row + rows)
        _paint_face(tile)
        out[:] = tile.pixels()


def draw_faces(count: int, size: int, seed: int = 0, start: int = 0) -> np.ndarray:
    """Faces start .. start+count of a seed: uint8 [count, size, size, 3]; errors as in `render`."""
    if count < 0 or start < 0:
        raise ValueError(f"draw_faces: count and start must be at least 0, got {count}, {start}")
    return render(_factor_rows(start, count, seed), size)


def _ramp(stops: str, t: np.ndarray) -> np.ndarray:
    """Colour [3, n] in 0..1 at t in 0..1 along evenly spaced hexadecimal stops."""
    rgb = np.array([list(bytes.fromhex(stop)) for stop in stops.split()]) / 255
    at = np.linspace(0, 1, len(rgb))
    return np.stack([np.interp(t, at, rgb[:, c]) for c in range(3)])


def _mix(a: np.ndarray, b: np.ndarray | tuple[float, ...], t: np.ndarray | float) -> np.ndarray:
    return a + (np.reshape(np.array(b), (3, -1)) - a) * t


def _step(t: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.clip((t - low) / (high - low), 0, 1)


def _parameters(factors: np.ndarray) -> dict[str, np.ndarray]:
    """Factors by name and what follows from them: float32 [n], colours [3, 1, 1, n]."""
    f = factors.astype(np.float64)
    p: dict[str, np.ndarray] = {name: f[:, i] for i, name in enumerate(FACTORS)}
    style = _STYLES[np.clip(p["hair_style"].astype(int), 0, len(_STYLES) - 1)]
    p |= {f"hair_{name}": style[:, i] for i, name in enumerate(_STYLE_COLUMNS)}
    volume, length = p["hair_volume"], p["hair_length"]
    p["hair_top"] = p["hair_top"] * (0.75 + 0.5 * volume)
    p["hair_side"] = p["hair_side"] * (0.7 + 0.6 * volume)
    p["hair_back"] = p["hair_back_lo"] + (p["hair_back_hi"] - p["hair_back_lo"]) * length
    long = p["hair_back_hi"] > 0.5
    p["hair_front"] = np.where(long, 0.8 * p["hair_back"], 0.34)
    # how far down the sides come: sideburns, or all the way
    p["hair_end"] = np.where(long, 3, 0.08)
    # the taller the head, the higher the hairline
    p["hair_line"] = p["hair_line"] + 0.56 - p["head_height"]
    p["hair_curtain"] = p["hair_curtain"] + p["head_width"] - 0.46
    p["hair_part"] = p["hair_part"] * 0.2
    p["cos"], p["sin"] = np.cos(p["tilt"]), np.sin(p["tilt"])
    p["light_x"], p["light_y"] = np.sin(p["light_angle"]), -np.cos(p["light_angle"])
    p["shift_y"] = p["shift_y"] + 0.06
    p["turn"] = p["turn"] * 0.045
    p["taper"] = -0.02 + 0.36 * p["jaw"]
    p["square"] = 0.5 * (1 - p["jaw"])
    p["lid"] = p["eye_size"] * p["eye_round"] * (0.9 - 0.6 * p["eye_lid"])
    # a mouth that opens without a smile looks cross, so it opens less
    p["open"] = 0.012 + 0.075 * _step(p["mouth_open"], 0.4, 1) * _step(p["mouth_smile"], -0.6, 0.4)
    p["lips"] = p["open"] + 0.018 + 0.028 * p["lip_full"]
    p["bend"] = 0.018 + 0.07 * p["mouth_smile"]
    p["beard"] = 0.9 * _step(p["beard"], 0.7, 0.9)
    p["glasses"] = (p["glasses"] > 0.7) * 1.0
    p["earrings"] = (p["earrings"] > 0.7) * 1.0
    p["stripes"] = (p["cloth_stripes"] > 0.7) * 0.75
    disc = p["background_disc"]
    p["disc"] = np.where(disc > 0.3, 0.55 + 0.4 * disc, -1)
    p |= _colours(p)
    return {
        k: np.ascontiguousarray(v if v.ndim == 1 else v[:, None, None], np.float32)
        for k, v in p.items()
    }


def _colours(p: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Colours [3, n] in 0..1; a name that ends in _dark is the same colour in shadow."""
    skin = _ramp(_SKIN, p["skin_tone"])
    skin = skin + np.array([[0.012], [0.008], [-0.03]]) * p["skin_warmth"]
    hair = _mix(_ramp(_HAIR, p["hair_tone"]), (0.74, 0.74, 0.77), _step(p["hair_grey"], 0.8, 1))
    shaved = p["hair_cover"] < 1
    hair = np.where(shaved, _mix(skin, hair, p["hair_cover"]), hair)
    back = _ramp(_BACKGROUND, p["background_hue"])
    back = _mix(back * 0.8, np.minimum(back * 1.12, 1), p["background_tone"])
    cloth = _ramp(_CLOTH, p["cloth_hue"])
    dark = np.array([[0.76], [0.62], [0.60]])
    iris = _ramp(_EYES, p["eye_tone"])
    lip = _mix(
        skin * np.array([[0.88], [0.62], [0.6]]), (0.78, 0.16, 0.22), 0.65 * p["lip_tone"] ** 2
    )
    return {
        "c_skin": skin,
        "c_skin_dark": skin * dark,
        "c_skin_light": _mix(skin, (1.0, 0.95, 0.85), 0.4),
        "c_blush": _mix(skin, (0.93, 0.34, 0.32), 0.25 + 0.17 * p["skin_tone"]),
        "c_hair": hair,
        "c_hair_dark": hair * 0.68,
        "c_hair_light": _mix(hair, (1.0, 0.93, 0.82), 0.28),
        "c_brow": _mix(hair * 0.62, skin * 0.35, 0.3),
        "c_lash": _mix(skin * 0.22, (0.07, 0.05, 0.07), 0.6),
        "c_white": _mix(skin, (0.98, 0.98, 0.97), 0.92),
        "c_iris": iris,
        "c_iris_dark": iris * 0.45,
        "c_lip": lip,
        "c_lip_dark": lip * 0.78,
        "c_inside": lip * 0.3,
        "c_beard": hair * 0.8,
        "c_gold": np.broadcast_to(np.array([[0.93], [0.76], [0.35]]), skin.shape),
        "c_frame": _ramp(_FRAMES, p["glasses_tone"]),
        "c_cloth": cloth,
        "c_cloth_dark": cloth * 0.72,
        "c_cloth_light": _mix(cloth, (1.0, 0.98, 0.93), 0.55),
        "c_back": back,
        "c_back_dark": back * np.array([[0.74], [0.76], [0.84]]),
        "c_disc": _mix(back, (1.0, 0.97, 0.9), 0.42),
    }


class _Part:
    """A window of a tile: coordinates about a centre, the pixels there, and paint."""

    def __init__(self, u: Tensor, v: Tensor, canvas: Tensor, px: float) -> None:
        self.u, self.v, self.canvas, self.px = u, v, canvas, px

    def cover(self, distance: Tensor) -> Tensor:
        """Share of each pixel inside a shape, from the signed distance to its edge."""
        return (0.5 - distance / self.px).clamp_(0, 1)

    def paint(self, alpha: Tensor, colour: Number) -> None:
        self.canvas.mul_(1 - alpha).add_(alpha * colour)

    def fill(self, distance: Tensor, colour: Number, opacity: Number | None = None) -> None:
        cover = self.cover(distance)
        self.paint(cover if opacity is None else cover.mul_(opacity), colour)


class _Tile:
    """Rows first..last of a few images: colours [3, rows, size, images] and head coordinates."""

    def __init__(self, p: dict[str, Tensor], size: int, first: int, last: int) -> None:
        self.p, self.size, self.first, self.last, self.px = p, size, first, last, 2 * _VIEW / size
        at = (torch.arange(size) + 0.5) * self.px - _VIEW
        self.x = at.view(1, size, 1)
        self.y = at[first:last].view(-1, 1, 1) + _VIEW_Y
        dx, dy = self.x - p["shift_x"], self.y - p["shift_y"]
        self.u = dx * p["cos"] + dy * p["sin"]
        self.v = dy * p["cos"] - dx * p["sin"]
        self.canvas = torch.zeros(3, last - first, size, len(p["cos"]))

    def head(self, cx: Number, cy: Number, rx: Number, ry: Number) -> "_Part":
        """The part around (cx, cy) of the head, in its tilted frame, that reaches rx and ry."""
        p = self.p
        x, y = cx * p["cos"] - cy * p["sin"], cx * p["sin"] + cy * p["cos"]
        ex, ey = rx * p["cos"] + ry * p["sin"].abs(), rx * p["sin"].abs() + ry * p["cos"]
        rows, cols = self._window(x + p["shift_x"], y + p["shift_y"], ex, ey)
        u, v = self.u[rows, cols] - cx, self.v[rows, cols] - cy
        return _Part(u, v, self.canvas[:, rows, cols], self.px)

    def picture(self, cx: Tensor, cy: Tensor, rx: Tensor, ry: Tensor) -> _Part:
        """The same in the upright frame of the picture."""
        rows, cols = self._window(cx, cy, rx, ry)
        u, v = self.x[:, cols] - cx, self.y[rows] - cy
        return _Part(u, v, self.canvas[:, rows, cols], self.px)

    def _window(self, x: Tensor, y: Tensor, rx: Tensor, ry: Tensor) -> tuple[slice, slice]:
        left, right = _extent(x, rx, self.px, 0, self.size)
        top, bottom = _extent(y - _VIEW_Y, ry, self.px, self.first, self.last)
        return slice(top - self.first, bottom - self.first), slice(left, right)

    def pixels(self) -> np.ndarray:
        """uint8 [images, rows, size, 3]"""
        levels = self.canvas.mul_(255).add_(0.5).clamp_(0, 255).to(torch.uint8)
        return levels.permute(3, 1, 2, 0).numpy()


def _extent(centre: Tensor, reach: Tensor, px: float, low: int, high: int) -> tuple[int, int]:
    """First and last+1 pixel within 1 of centre +- reach in any image, cut to low..high."""
    first = int(((centre - reach).min().item() + _VIEW) / px) - 2
    last = int(((centre + reach).max().item() + _VIEW) / px) + 3
    return min(max(first, low), high), max(min(last, high), low)


def _ellipse(u: Tensor, v: Tensor, rx: Number, ry: Number) -> Tensor:
    """Distance to an ellipse, to first order: F / |grad F| of F = (u/rx)^2 + (v/ry)^2 - 1."""
    x, y = u / rx, v / ry
    gx, gy = x / rx, y / ry
    return (x * x + y * y - 1) / ((gx * gx + gy * gy).sqrt_() * 2 + 1e-6)


def _box(u: Tensor, v: Tensor, rx: Number, ry: Number, r: Number) -> Tensor:
    """Distance to a box with corners of radius r."""
    x, y = u.abs() - (rx - r), v.abs() - (ry - r)
    ox, oy = x.clamp(min=0), y.clamp(min=0)
    return (ox * ox + oy * oy).sqrt_() + torch.maximum(x, y).clamp_(max=0) - r


def _egg(
    u: Tensor, v: Tensor, rx: Tensor, up: Number, low: Number, taper: Number, square: Number
) -> tuple[Tensor, Tensor, Tensor]:
    """Distance to an egg, to first order, and the coordinates that are 1 on its edge.

    Half-width rx, `up` above and `low` below the middle; below it the width shrinks by
    1 - taper * v and `square` in 0..1 fills the corners: F = x^2 (1 - square y^2) + y^2 - 1.
    """
    below = v.clamp(min=0)
    narrow = 1 / ((1 - taper * below) * rx)
    x = u * narrow
    iy = torch.where(v < 0, 1 / up, 1 / low)
    y = v * iy
    xx, yy = x * x, y * y
    corner = 1 - square * (below / low).square_().clamp_(max=1)
    gx = x * corner * narrow
    gy = y * iy * (1 - square * xx.clamp(max=1)) + xx * corner * taper * rx * narrow
    d = (xx * corner + yy - 1) / ((gx * gx + gy * gy).sqrt_() * 2 + 1e-6)
    return d, x, y


def _wave(t: Tensor) -> Tensor:
    """A smooth wave of period 1 in -1..1, without a sine."""
    c = (t - t.floor() - 0.5).abs_() * 2
    return c * c * (6 - 4 * c) - 1


def _paint_face(t: _Tile) -> None:
    """Everything, back to front."""
    _background(t)
    _back_hair(t)
    _body(t)
    for side in (-1, 1):
        _ear(t, side)
    _head(t)
    _nose(t)
    _mouth(t)
    _hair(t)
    for side in (-1, 1):
        _eye(t, side)
        _brow(t, side)
    _glasses(t)


def _background(t: _Tile) -> None:
    p = t.p
    fall = (0.5 + 0.4 * t.y - 0.2 * t.x * p["light_x"]).clamp_(0, 1)
    t.canvas.copy_(p["c_back"] + fall * (p["c_back_dark"] - p["c_back"]))
    r = p["disc"]
    part = t.picture(0 * r, 0 * r, r, r)
    part.fill((part.u * part.u + part.v * part.v).sqrt_() - r, p["c_disc"])


def _back_hair(t: _Tile) -> None:
    p = t.p
    rx, up = p["head_width"] + p["hair_side"], p["head_height"] + p["hair_top"]
    low = p["hair_back"]
    part = t.head(0, 0, rx * 1.2 + 0.05, torch.maximum(up, low) + 0.05)
    d, _, y = _egg(part.u, part.v, rx, up, low, -0.12, 0.85)
    d += p["hair_curl"] * _wave(part.u * 4) * _wave(part.v * 4)
    # short hair ends flat, and the distance to a flat shape is too short beyond its tips
    d = torch.maximum(d, part.u.abs() - rx * 1.2)
    part.fill(d, p["c_hair_dark"])
    r = p["hair_bun"]
    part = t.head(0, -p["head_height"] - 0.08, r, r)
    cover = part.cover((part.u * part.u + part.v * part.v).sqrt_() - r).mul_(r > 0)
    part.paint(cover, p["c_hair"])
    r2 = r * 0.95
    lit = (part.u * p["light_x"] + part.v * p["light_y"]) / (r2 + 0.01)
    part.paint(cover * (0.1 - lit).clamp_(0, 0.6), p["c_hair_dark"])
    part.paint(cover * (lit - 0.35).clamp_(0, 0.6), p["c_hair_light"])


def _body(t: _Tile) -> None:
    p = t.p
    sx, lx, chin = p["shift_x"], p["light_x"], p["shift_y"] + p["head_height"]
    one = torch.ones_like(sx)
    body = t.picture(sx * 0.6, one * 1.15, p["shoulders"], one * 0.45)
    d, x, _ = _egg(body.u, -body.v, p["shoulders"], 0.4, 0.42, 0.25, 0.75)
    cover = body.cover(d)
    body.paint(cover, p["c_cloth"])
    stripe = ((body.v * 7).sub_((body.v * 7).floor()) - 0.5).abs_().sub_(0.22) / 7
    body.paint(cover * body.cover(stripe) * p["stripes"], p["c_cloth_light"])
    body.paint(cover * (0.25 - x * lx).clamp_(0, 0.45) * p["light_strength"], p["c_cloth_dark"])
    rx, ry = 0.19 + 0.1 * p["neckline"], 0.09 + 0.13 * p["neckline"]
    u, v = body.u - sx * 0.4, body.v + 0.42  # sx away from the picture's middle, as the neck
    body.fill(torch.maximum(_ellipse(u, v, rx + 0.035, ry + 0.035), d), p["c_cloth_light"])
    body.fill(torch.maximum(_ellipse(u, v, rx, ry), d), p["c_skin"])
    # over the neckline, so that the edge of the clothes leaves no seam
    neck = t.picture(sx, one * 0.73, one * 0.17, one * 0.3)
    opening = torch.minimum(_ellipse(neck.u, neck.v, rx, ry), neck.v - 0.02)
    column = torch.maximum(neck.u.abs() - 0.17, -0.29 - neck.v)
    neck.fill(torch.maximum(column, opening), p["c_skin"])
    # the head's shadow falls away from the light
    under = t.picture(sx, chin - 0.06, one * 0.3, one * 0.2)
    inside = torch.maximum(under.u.abs() - 0.17, under.v * 0)
    shade = _ellipse(under.u + lx * 0.07, under.v, 0.25, 0.15)
    under.fill(torch.maximum(inside, shade), p["c_skin_dark"], 0.4 + 0.5 * p["light_strength"])


def _ear(t: _Tile, side: int) -> None:
    p = t.p
    r = p["ear_size"]
    cx = side * (p["head_width"] + 0.01) - p["turn"] * 0.6
    part = t.head(cx, 0.06, r * 0.62, r)
    part.fill(_ellipse(part.u, part.v, r * 0.62, r), p["c_skin"])
    part.fill(_ellipse(part.u - side * 0.005, part.v, r * 0.36, r * 0.62), p["c_skin_dark"], 0.8)
    part = t.head(cx, 0.085 + r, 0.034, 0.034)
    d = (part.u * part.u + part.v * part.v).sqrt_()
    part.fill(d - 0.032, 0.45, p["earrings"])
    part.fill(d - 0.027, p["c_gold"], p["earrings"])


def _head(t: _Tile) -> None:
    p = t.p
    a, b = p["head_width"], p["head_height"]
    part = t.head(0, 0, a * 1.03, b)
    d, x, y = _egg(part.u, part.v, a, b, b, p["taper"], p["square"])
    cover = part.cover(d)
    part.paint(cover, p["c_skin"])
    lit = x * p["light_x"] + y * p["light_y"]
    part.paint(cover * (0.05 - lit).clamp_(0, 0.7) * p["light_strength"], p["c_skin_dark"])
    part.paint(cover * (lit - 0.1).clamp_(0, 0.5), p["c_skin_light"])
    across = (part.u - p["turn"]).abs_()
    spot = ((across - 0.27) / 0.17).square_() + ((part.v - 0.2) / 0.12).square_()
    part.paint(cover * (1 - spot).clamp_(min=0) * p["blush"], p["c_blush"])
    # a moustache, a dip beside the mouth, then up to the ears; soft, as hair grows
    edge = 0.26 + 1.1 * across * across - 9 * (across - 0.24).clamp_(min=0).square_()
    soft = (0.5 + (part.v - edge) / (t.px + 0.03)).clamp_(0, 1)
    part.paint(cover * soft * p["beard"], p["c_beard"])


def _nose(t: _Tile) -> None:
    p = t.p
    r, lx = p["nose_size"], p["light_x"]
    part = t.head(p["turn"] * 1.5, 0.17, r * 1.1, r * 0.9)
    part.fill(_ellipse(part.u + lx * 0.012, part.v - 0.012, r, r * 0.62), p["c_skin_dark"])
    part.fill(_ellipse(part.u, part.v + 0.014, r * 0.95, r * 0.62), p["c_skin"])
    bridge = t.head(p["turn"] * 1.3, 0.07, 0.06, 0.13)
    spot = (bridge.u - lx * 0.02).div_(0.045).square_() + (bridge.v / 0.13).square_()
    bridge.paint((1 - spot).clamp_(min=0).mul_(0.8), p["c_skin_light"])


def _mouth(t: _Tile) -> None:
    p = t.p
    w, inner = p["mouth_width"], p["open"]
    part = t.head(p["turn"] * 1.1, 0.365, w + 0.02, p["lips"] + 1.2 * p["bend"].abs() + 0.02)
    # the corners of a smile are bent upwards
    v = part.v + p["bend"] * ((part.u / w).square_() * 1.4 - 0.7)
    # the distance to a flat ellipse comes out too short beyond its tips
    tips = part.u.abs() - w
    lips = torch.maximum(_ellipse(part.u, v, w, p["lips"]), tips)
    cover = part.cover(lips)
    part.paint(cover, p["c_lip"])
    part.paint(cover * part.cover(v), p["c_lip_dark"])
    mouth = torch.maximum(_ellipse(part.u, v, w * 0.88, inner), tips)
    part.fill(mouth, p["c_inside"])
    teeth = torch.maximum(mouth + 0.006, v + inner * 0.15)
    part.fill(teeth, 0.96, (inner > 0.02).float())


def _eye(t: _Tile, side: int) -> None:
    p = t.p
    w, h = p["eye_size"], p["eye_size"] * p["eye_round"]
    cx = side * p["eye_spacing"] + p["turn"]
    part = t.head(cx, 0.03, w * 1.12, h * 1.12 + 0.02)
    u, v = part.u, part.v
    lid = -p["lid"] * (1 - 0.45 * (u / w).square_()) - v
    rim = _ellipse(u, v, w, h)
    part.fill(_ellipse(u, v + 0.012, w * 1.06, h * 1.12), p["c_skin_dark"], 0.75)
    # the lash line is the rim of the lid, thicker towards the temple
    brim = lid - 0.022 - side * 0.06 * u
    part.fill(torch.maximum(rim - 0.012, brim), p["c_lash"])
    white = torch.maximum(rim, lid)
    part.fill(white, p["c_white"])
    u, v = u - p["gaze_x"] * w * 0.22, v - p["gaze_y"] * h * 0.12
    d = (u * u + v * v).sqrt_()
    r = w * 0.64
    part.fill(torch.maximum(d - r, white), p["c_iris_dark"])
    part.fill(torch.maximum(d - r * 0.84, white), p["c_iris"])
    part.fill(torch.maximum(d - r * 0.5, white), 0.04)
    gu, gv = u - p["light_x"] * 0.03, v + 0.032
    part.fill(torch.maximum((gu * gu + gv * gv).sqrt_() - r * 0.27, white), 1.0)


def _brow(t: _Tile, side: int) -> None:
    p = t.p
    w, r = p["eye_size"] * 1.05, p["brow_thickness"]
    cy = -0.13 - 0.055 * p["brow_height"]
    part = t.head(side * (p["eye_spacing"] + 0.01) + p["turn"], cy, w, r + 0.06)
    out = part.u * side / w
    v = part.v + p["brow_angle"] * 0.018 * out - (out * out - 0.4) * 0.035
    part.fill(torch.maximum(_ellipse(part.u, v, w, r), part.u.abs() - w), p["c_brow"])


def _hair(t: _Tile) -> None:
    p = t.p
    rx, up = p["head_width"] + p["hair_side"], p["head_height"] + p["hair_top"]
    low = p["hair_front"]
    part = t.head(0, 0, rx * 1.2 + 0.04, torch.maximum(up, low) + 0.05)
    u, v = part.u, part.v
    d, x, y = _egg(u, v, rx, up, low, -0.05, 0.8)
    d += p["hair_curl"] * _wave(u * 4) * _wave(v * 4)
    s = u - p["hair_part"]
    away = u.abs() - p["hair_curtain"]
    line = p["hair_line"] + p["hair_curve"] * s * s + 7 * away.clamp(min=0)
    line += p["hair_right"] * s.clamp(min=0) - p["hair_left"] * s.clamp(max=0)
    slope = 2 * p["hair_curve"] * s.abs() + torch.where(s > 0, p["hair_right"], p["hair_left"])
    slope = (slope + 7 * (away > 0)) * (line < p["hair_end"])
    d_line = (v - torch.minimum(line, p["hair_end"])) / (1 + slope * slope).sqrt_()
    face = _egg(u, v, p["head_width"], p["head_height"], p["head_height"], p["taper"], p["square"])
    part.fill(torch.maximum(face[0], d_line - 0.035), p["c_skin_dark"], 0.5 * p["light_strength"])
    cover = part.cover(torch.maximum(d, d_line))
    part.paint(cover, p["c_hair"])
    lit = x * p["light_x"] + y * p["light_y"]
    part.paint(cover * (0.1 - lit).clamp_(0, 0.6) * p["light_strength"], p["c_hair_dark"])
    ring = (x * x + y * y).sqrt_() - 0.8 + 0.025 * _wave(u * 8)
    gloss = (1 - (ring * 9).square_()).clamp_(min=0) * (lit * 1.6 - 0.6).clamp_(0, 1)
    part.paint(cover * gloss, p["c_hair_light"])


def _glasses(t: _Tile) -> None:
    p = t.p
    on, cx = p["glasses"], p["turn"] * 1.1
    rx, ry = p["eye_spacing"] - 0.03, p["eye_spacing"] * 0.76
    part = t.head(cx, 0.035, p["head_width"] + 0.05, ry + 0.03)
    across = part.u.abs()
    lens = _box(across - p["eye_spacing"], part.v, rx, ry, ry * (0.98 - 0.65 * p["glasses_shape"]))
    part.fill(lens, 1.0, on * 0.08)
    glare = (part.u - part.v * 0.6) * 3.2 + 0.1
    part.fill(torch.maximum(lens, _wave(glare) * 0.1 + 0.05), 1.0, on * 0.1)
    frame = lens.abs() - 0.014
    arm = torch.maximum((part.v + 0.03).abs_() - 0.012, p["eye_spacing"] + rx - across)
    behind = torch.minimum(p["head_width"] - 0.01, p["hair_curtain"] + 0.06)
    arm = torch.maximum(arm, (part.u + cx).abs_() - behind)
    nose = torch.maximum((part.v + 0.03).abs_() - 0.012, across - p["eye_spacing"] + rx)
    part.fill(torch.minimum(frame, torch.minimum(arm, nose)), p["c_frame"], on)
