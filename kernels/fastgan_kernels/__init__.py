"""Operators for channels-last CNNs: batch norm + activation, a DCGAN's convolutions, image gather,
Adam, and what watches a step on the device. Imports torch and triton, never fastgan.
"""

from ._launch import INTERPRETED
from .adam import Adam
from .adam_ema import Average, adam_ema, adam_ema_ref
from .batch_norm_act import BatchNormAct2d
from .bn_act import bn_act, bn_act_ref
from .conv4x4 import (
    conv4x4,
    conv4x4_ref,
    conv4x4_runs,
    conv_transpose4x4,
    conv_transpose4x4_ref,
)
from .gather_u8 import gather_u8, gather_u8_ref
from .guard import guard, guard_ref
from .tally import tally, tally_ref

__all__ = [
    "INTERPRETED",
    "Adam",
    "Average",
    "BatchNormAct2d",
    "adam_ema",
    "adam_ema_ref",
    "bn_act",
    "bn_act_ref",
    "conv4x4",
    "conv4x4_ref",
    "conv4x4_runs",
    "conv_transpose4x4",
    "conv_transpose4x4_ref",
    "gather_u8",
    "gather_u8_ref",
    "guard",
    "guard_ref",
    "tally",
    "tally_ref",
]
