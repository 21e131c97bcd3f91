"""Derives the polynomial coefficients of normal.rs (numpy only) and prints them with their error.

Each polynomial is the minimax one in relative error of the whole function (Lawson's iteratively reweighted least
squares on a dense grid, f64). Coefficients are rounded to f32 one at a time, the one that matters most first, and the
rest are fitted again around it, so that the rounding of one is made up for by the others.
"""

import numpy as np


def minimax(x, target, weight, powers):
    """Coefficients c minimising max |weight * (target - sum c_i x^powers_i)|."""
    basis = np.stack([x**p for p in powers], 1)
    lawson = np.ones_like(x)
    best, best_error = None, np.inf
    for _ in range(400):
        root = np.sqrt(lawson) * weight
        c = np.linalg.lstsq(basis * root[:, None], target * root, rcond=None)[0]
        error = np.abs(weight * (target - basis @ c))
        if error.max() < best_error:
            best, best_error = c, error.max()
        lawson *= error / error.max() + 1e-3
        lawson /= lawson.sum()
    return best, best_error


def rounded(x, target, weight, powers):
    fixed, rest = [], list(powers)
    left = target.copy()
    while rest:
        c, _ = minimax(x, left, weight, rest)
        fixed.append(np.float32(c[0]))
        left = left - np.float64(fixed[-1]) * x ** rest.pop(0)
    return fixed, np.abs(weight * left).max()


def report(name, x, target, weight, powers):
    _, ideal = minimax(x, target, weight, powers)
    coefficients, error = rounded(x, target, weight, powers)
    print(f"{name}: relative error {error:.2e} (unrounded {ideal:.2e})")
    print("    [" + ", ".join(f"{c!s}" for c in coefficients) + "]")


# ln(1+f) = f + f^2 (-1/2 + f P(f)), f in [sqrt(1/2) - 1, sqrt(2) - 1]
f = np.cos(np.linspace(0, np.pi, 6001)) * 0.35355339 + 0.06066017
f = f[np.abs(f) > 1e-3]
for n in (7, 8, 9):
    report(f"ln, {n} coefficients", f, (np.log1p(f) - f + f * f / 2) / f**3, np.abs(f**3 / np.log1p(f)), range(n))

# Angles in quarter turns: z in [-1/2, 1/2], even functions of z.
z = (np.cos(np.linspace(0, np.pi, 6001)) + 1) / 4
z = z[z > 1e-3]
angle = np.pi / 2 * z
for n in (4, 5):
    report(f"sin, {n} coefficients", z, np.sin(angle) / z, z / np.sin(angle), range(0, 2 * n, 2))
for n in (3, 4, 5):
    report(f"cos, {n} coefficients", z, (np.cos(angle) - 1) / z**2, z**2 / np.cos(angle), range(0, 2 * n, 2))
