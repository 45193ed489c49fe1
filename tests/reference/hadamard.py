"""What the Hadamard ops compute, with matrices made here from the definitions.

n = p 2^k, p odd: the base order m is 1 for p = 1 and 4p for p = 3, 5, ... 15.
H = H_m (x) H_{n/m} / sqrt(n).
H_m by Paley over a field of q elements, Q[a][b] = chi(a - b):
  q = 3 mod 4, m = q + 1:    H = I + [[0, 1], [-1, Q]]
  q = 1 mod 4, m = 2(q + 1): H = C (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]]
                             with C = [[0, 1], [1, Q]]
"""

import functools

import torch

from .quantize import quantize, scale_from_amax

MAX_SIZE = 32768
FIELD_ORDER = {12: 11, 20: 19, 28: 13, 36: 17, 44: 43, 52: 25, 60: 59}


def subtract(q, a, b):
    """a - b in the field of q elements; 25 is pairs a0 + a1 t mod 5, index a0 + 5 a1."""
    if q == 25:
        return (a % 5 - b % 5) % 5 + 5 * ((a // 5 - b // 5) % 5)
    return (a - b) % q


def square(q, a):
    """a^2; in the field of 25, t^2 = 2."""
    if q == 25:
        low, high = a % 5, a // 5
        return (low * low + 2 * high * high) % 5 + 5 * (2 * low * high % 5)
    return a * a % q


def jacobsthal(q):
    squares = {square(q, a) for a in range(1, q)}
    chi = torch.tensor([0] + [1 if a in squares else -1 for a in range(1, q)])
    return torch.tensor([[int(chi[subtract(q, a, b)]) for b in range(q)] for a in range(q)])


@functools.cache
def base_matrix(m):
    """H_m, entries +-1, float64."""
    if m == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    q = FIELD_ORDER[m]
    bordered = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    bordered[0, 1:] = 1
    bordered[1:, 0] = -1 if q % 4 == 3 else 1
    bordered[1:, 1:] = jacobsthal(q)
    eye = torch.eye(q + 1, dtype=torch.float64)
    if q % 4 == 3:
        return eye + bordered
    off = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
    diagonal = torch.tensor([[1, -1], [-1, -1]], dtype=torch.float64)
    return torch.kron(bordered, off) + torch.kron(eye, diagonal)


def base_order(n):
    """m, or None for a size without a transform."""
    p, power = n, 1
    while p % 2 == 0:
        p, power = p // 2, power * 2
    if n > MAX_SIZE or p > 15 or (p > 1 and power < 4):
        return None
    return 1 if p == 1 else 4 * p


def matrix(n):
    """(n, n), float64, orthonormal."""
    m = base_order(n)
    dense = base_matrix(m)
    for _ in range((n // m).bit_length() - 1):
        dense = torch.kron(dense, torch.tensor([[1, 1], [1, -1]], dtype=torch.float64))
    return dense / n**0.5


def unnormalized(x, inverse=False):
    """x H sqrt(n) in float64, block by block; exact for integers. For sizes beyond matrix()."""
    tokens, n = x.shape
    base = base_matrix(base_order(n))
    width = n // base.shape[0]
    blocks = x.double().reshape(tokens, base.shape[0], width)
    blocks = torch.einsum("tij,ir->trj", blocks, base.T if inverse else base)
    stride = 1
    while stride < width:
        pairs = blocks.reshape(tokens, n // (2 * stride), 2, stride)
        upper, lower = pairs[:, :, 0], pairs[:, :, 1]
        blocks = torch.stack([upper + lower, upper - lower], dim=2)
        stride *= 2
    return blocks.reshape(tokens, n)


def transform(x, inverse=False):
    """float64."""
    return unnormalized(x, inverse) / x.shape[1] ** 0.5


def hadamard_quantize(x, scale=None):
    """q, scale (empty when given)."""
    y = transform(x).float()
    if scale is not None:
        return quantize(y, scale), torch.empty(0)
    dynamic = scale_from_amax(y.abs().amax(dim=1))
    return quantize(y, dynamic, None, 0), dynamic
