"""The factors of drawn faces: their table, how they are drawn, and what follows from them.

A row of factors is everything that a face is; `parameters` turns it into the lengths, positions
and colours that the painter needs.
"""

import numpy as np

# NumPy imports it at its first use, and a signal that comes then is lost in its extension modules.
from numpy.random import PCG64, Generator

# Lengths are in units of which the picture is 2 * face_paint.VIEW wide, y runs down; angles are in
# radians. name: (lowest, highest, meaning)
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


def factors(count: int, seed: int = 0) -> np.ndarray:
    """Draw the factors of faces: float32 [count, len(FACTOR_NAMES)], within FACTORS' ranges.

    Row i depends on (seed, i) only. Hair tends to be darker on deeper skin and beards come more
    often with short hair; everything else is independent and uniform.
    """
    if count < 0:
        raise ValueError(f"factors: count must be at least 0, got {count}")
    return factor_rows(0, count, seed)


def factor_rows(start: int, count: int, seed: int) -> np.ndarray:
    """Rows start .. start+count of `factors`, without drawing those before."""
    source = PCG64(seed)
    source.advance(start * len(FACTORS))  # one 64-bit draw is one number
    unit = Generator(source).random((count, len(FACTORS)))
    col = {name: unit[:, i] for i, name in enumerate(FACTORS)}
    col["hair_tone"] *= 0.25 + 0.75 * col["skin_tone"]
    col["beard"] *= 1 - 0.35 * col["hair_length"]
    low, high = np.array([bounds[:2] for bounds in FACTORS.values()]).T
    return (low + unit * (high - low)).astype(np.float32)


def _ramp(stops: str, t: np.ndarray) -> np.ndarray:
    """Colour [3, n] in 0..1 at t in 0..1 along evenly spaced hexadecimal stops."""
    rgb = np.array([list(bytes.fromhex(stop)) for stop in stops.split()]) / 255
    at = np.linspace(0, 1, len(rgb))
    return np.stack([np.interp(t, at, rgb[:, c]) for c in range(3)])


def _mix(a: np.ndarray, b: np.ndarray | tuple[float, ...], t: np.ndarray | float) -> np.ndarray:
    return a + (np.reshape(np.array(b), (3, -1)) - a) * t


def _step(t: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.clip((t - low) / (high - low), 0, 1)


def parameters(factors: np.ndarray) -> dict[str, np.ndarray]:
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
