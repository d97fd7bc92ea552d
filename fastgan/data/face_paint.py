"""The painter of drawn faces: shapes given by signed distances, laid over each other back to front.

Coverage is computed from the distance, so that a face looks the same at every size. Images are the
innermost axis: [3, rows, columns, images]. Every parameter is then a contiguous vector, and a part
of the face is painted in the small window that holds it in all images of the tile. Only exactly
rounded operations (+ - * / sqrt min max floor) touch pixels, so the bits depend neither on tiles
nor on threads.
"""

import numpy as np
import torch
from torch import Tensor

Number = Tensor | float  # one value an image, or the same for all

# The picture shows this much on either side of its middle, which is a little below the head's
VIEW, VIEW_Y = 0.88, 0.09


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


class Tile:
    """Rows first..last of a few images: colours [3, rows, size, images] and head coordinates."""

    def __init__(self, p: dict[str, Tensor], size: int, first: int, last: int) -> None:
        self.p, self.size, self.first, self.last, self.px = p, size, first, last, 2 * VIEW / size
        at = (torch.arange(size) + 0.5) * self.px - VIEW
        self.x = at.view(1, size, 1)
        self.y = at[first:last].view(-1, 1, 1) + VIEW_Y
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
        top, bottom = _extent(y - VIEW_Y, ry, self.px, self.first, self.last)
        return slice(top - self.first, bottom - self.first), slice(left, right)

    def pixels(self) -> np.ndarray:
        """uint8 [images, rows, size, 3]"""
        levels = self.canvas.mul_(255).add_(0.5).clamp_(0, 255).to(torch.uint8)
        return levels.permute(3, 1, 2, 0).numpy()


def _extent(centre: Tensor, reach: Tensor, px: float, low: int, high: int) -> tuple[int, int]:
    """First and last+1 pixel within 1 of centre +- reach in any image, cut to low..high."""
    first = int(((centre - reach).min().item() + VIEW) / px) - 2
    last = int(((centre + reach).max().item() + VIEW) / px) + 3
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


def paint_face(t: Tile) -> None:
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


def _background(t: Tile) -> None:
    p = t.p
    fall = (0.5 + 0.4 * t.y - 0.2 * t.x * p["light_x"]).clamp_(0, 1)
    t.canvas.copy_(p["c_back"] + fall * (p["c_back_dark"] - p["c_back"]))
    r = p["disc"]
    part = t.picture(0 * r, 0 * r, r, r)
    part.fill((part.u * part.u + part.v * part.v).sqrt_() - r, p["c_disc"])


def _back_hair(t: Tile) -> None:
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


def _body(t: Tile) -> None:
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


def _ear(t: Tile, side: int) -> None:
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


def _head(t: Tile) -> None:
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


def _nose(t: Tile) -> None:
    p = t.p
    r, lx = p["nose_size"], p["light_x"]
    part = t.head(p["turn"] * 1.5, 0.17, r * 1.1, r * 0.9)
    part.fill(_ellipse(part.u + lx * 0.012, part.v - 0.012, r, r * 0.62), p["c_skin_dark"])
    part.fill(_ellipse(part.u, part.v + 0.014, r * 0.95, r * 0.62), p["c_skin"])
    bridge = t.head(p["turn"] * 1.3, 0.07, 0.06, 0.13)
    spot = (bridge.u - lx * 0.02).div_(0.045).square_() + (bridge.v / 0.13).square_()
    bridge.paint((1 - spot).clamp_(min=0).mul_(0.8), p["c_skin_light"])


def _mouth(t: Tile) -> None:
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


def _eye(t: Tile, side: int) -> None:
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


def _brow(t: Tile, side: int) -> None:
    p = t.p
    w, r = p["eye_size"] * 1.05, p["brow_thickness"]
    cy = -0.13 - 0.055 * p["brow_height"]
    part = t.head(side * (p["eye_spacing"] + 0.01) + p["turn"], cy, w, r + 0.06)
    out = part.u * side / w
    v = part.v + p["brow_angle"] * 0.018 * out - (out * out - 0.4) * 0.035
    part.fill(torch.maximum(_ellipse(part.u, v, w, r), part.u.abs() - w), p["c_brow"])


def _hair(t: Tile) -> None:
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


def _glasses(t: Tile) -> None:
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
