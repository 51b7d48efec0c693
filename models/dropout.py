"""Dropout that no packing, micro-batch or number of ranks changes: what is dropped follows from what a number is, not where it lies.

A draw is a hash of (seed, step, row of the step, position, layer, feature), so it is also the same when a layer is computed again.
"""

import zlib

import torch
from torch import nn


def row_keys(seed, step, rows):
    """Keys of the rows of a step, (R,) int64; rows: their numbers in the step, (R,)."""
    return mix(mix(mix(torch.tensor(seed % 2**63)) + step) + rows)


def token_keys(keys, width):
    """(R,) keys of rows -> (R, T) keys of their tokens."""
    return mix(keys[:, None] + torch.arange(width))


def mix(h):
    """The last steps of splitmix64: neighbouring integers become unrelated ones; int64, which wraps around."""
    h = (h ^ (h >> 30)) * -0x40A7B892E31B1A47
    h = (h ^ (h >> 27)) * -0x6B2FB644ECCEEE15
    return h ^ (h >> 31)


class KeyedDropout(nn.Module):
    keys = None  # of this layer and the tokens (N,) int64 that the next call has; the seam sets them before each forward pass

    def __init__(self, p, name):
        super().__init__()
        self.p, self.salt = p, zlib.crc32(name.encode()) << 24

    def expect(self, keys):
        """Keys of the next forward pass's tokens (N,), or None. Salted here: in `forward`, each layer would be a graph of its own."""
        self.keys = None if keys is None else keys + self.salt

    def forward(self, x):
        """x: (1, N, H) or (N, H)."""
        if not self.training:
            return x
        features = torch.arange(x.shape[-1], device=x.device)  # (H,)
        draws = mix(self.keys[:, None] + features) & 0xFFFFFF  # (N, H)
        return x * (draws >= self.p * 2**24) / (1 - self.p)
