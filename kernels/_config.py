"""tiles"""
from __future__ import annotations
from typing import NamedTuple
import torch
from torch import Tensor


class Tile(NamedTuple):
    block_n: int
    block_m: int
    block_d: int
    num_warps: int
    num_stages: int

COMBINE = Tile(64, 0, 0, 4, 1)
MERGE = 128

def choose(kind: str, products: int, like: Tensor, N: int, M: int) -> Tile:
    return Tile(32, 32, 32, 4, 2)

def rectangle(N: int, M: int, tile: Tile, device: torch.device) -> tuple[int, int]:
    return 2*tile.block_n, 2*tile.block_m
