"""Operators for channels-last CNNs: batch norm + activation, image gather. Imports torch, never
fastgan.
"""

from .bn_act import BatchNormAct2d, bn_act, bn_act_ref
from .gather_u8 import gather_u8, gather_u8_ref

__all__ = ["BatchNormAct2d", "bn_act", "bn_act_ref", "gather_u8", "gather_u8_ref"]
