"""Work of one chip on slices of several sizes, with the same share of the batch.

python -m benchmarks.growth [--svg=docs/growth.svg]

Compiles sr256's tiny form, in bfloat16, for TPU v4 slices, 16 images per chip, weights
split over 8 chips. Prints a table; --svg draws it.
"""

import argparse
import dataclasses
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from imagen_jax.config import MeshConfig, StageConfig, from_dict
from imagen_jax.configs import sr256
from imagen_jax.planning.chips import slice_devices
from imagen_jax.planning.compile import compile_step
from imagen_jax.sharding import make_mesh

SLICES = ("v4-16", "v4-64", "v4-256", "v4-1024")
A_CHIP = 16
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute")
COLUMNS = {
    "GFLOP": lambda row: row["flops_per_chip"] / 1e9,
    "MB of HBM": lambda row: row["bytes_per_chip"] / 1e6,
    **{
        f"MiB of {name}": lambda row, name=name: row["memory_gib"][name] * 1024
        for name in ("arguments", "temporaries", "program")
    },
    "MB sent": lambda row: row["collective_bytes_per_chip"] / 1e6,
    **{
        f"of it {kind}": lambda row, kind=kind: (
            row["collectives"].get(kind, {"bytes": 0})["bytes"] / 1e6
        )
        for kind in KINDS
    },
}
COLOURS = ("#1b6ca8", "#c1440e", "#3a7d44", "#7b4ea3", "#999999", "#d19c1d", "#222222")


def stage(chips: int) -> StageConfig:
    """sr256's tiny form with a batch for so many chips."""
    values = sr256.get_config("tiny")
    values.model.update(dtype="bfloat16")
    values.training.batch_size = A_CHIP * chips
    return from_dict(values.to_dict())


def measure(name: str) -> dict:
    """Figures of the training step, compiled for one slice."""
    devices = slice_devices(name)
    cfg = dataclasses.replace(stage(len(devices)), mesh=MeshConfig(fsdp=8))
    return compile_step(cfg, make_mesh(cfg.mesh, devices))[1]


def table(rows: list[dict]) -> str:
    """A Markdown table with one row per slice."""
    lines = [
        "| chips | " + " | ".join(COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for row in rows:
        values = [f"{value(row):.4g}" for value in COLUMNS.values()]
        lines.append(f"| {row['chips']} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def draw(rows: list[dict]) -> str:
    """An SVG of each column relative to its value on the smallest slice."""
    width, height, left, top = 640, 360, 56, 20
    inner, tall = 380, 280
    curves = {}
    for name, value in COLUMNS.items():
        first = value(rows[0])
        if first > 0:
            curves[name] = [value(row) / first for row in rows]
    highest = max(2.0, *(max(curve) for curve in curves.values())) * 1.05

    def x(i):
        return left + inner * i / (len(rows) - 1)

    def y(ratio):
        return top + tall * (1 - ratio / highest)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    step = 0.5 if highest < 5 else 2
    for n in range(int(highest / step) + 1):
        line = y(n * step)
        parts.append(
            f'<line x1="{left}" x2="{left + inner}" y1="{line:.1f}" y2="{line:.1f}" '
            f'stroke="#ddd"/><text x="{left - 8}" y="{line + 4:.1f}" '
            f'text-anchor="end">{n * step:g}</text>'
        )
    for i, row in enumerate(rows):
        parts.append(
            f'<text x="{x(i):.1f}" y="{top + tall + 18}" text-anchor="middle">'
            f"{row['chips']}</text>"
        )
    parts.append(
        f'<text x="{left + inner / 2}" y="{height - 16}" text-anchor="middle">'
        "chips, the same share of the batch each</text>"
        f'<text x="14" y="{top + tall / 2}" text-anchor="middle" transform="rotate('
        f'-90 14 {top + tall / 2})">a chip, relative to {rows[0]["chips"]} chips</text>'
    )
    for i, (name, curve) in enumerate(curves.items()):
        points = " ".join(f"{x(n):.1f},{y(r):.1f}" for n, r in enumerate(curve))
        line = f'fill="none" stroke="{COLOURS[i % len(COLOURS)]}" stroke-width="2"'
        key, row = left + inner + 14, top + 20 * i + 6
        parts.append(
            f'<polyline points="{points}" {line}/>'
            f'<polyline points="{key},{row} {key + 20},{row}" {line}/>'
            f'<text x="{key + 26}" y="{row + 4}">{name}</text>'
        )
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    """Prints the table, and draws it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--svg", type=Path)
    args = parser.parse_args()
    rows = []
    for name in SLICES:
        rows.append(measure(name))
        print(f"{name}: compiled in {rows[-1]['compile_seconds']:.0f} s", flush=True)
    print(table(rows))
    if args.svg:
        args.svg.write_text(draw(rows))


if __name__ == "__main__":
    main()
