"""Plans a stage for devices that may not be here: does it fit, what will it cost?

python -m imagen_jax.plan --config=configs/base64.py --topology=v4-512 \
    --mesh=data:-1,fsdp:16 [--json=FILE]
python -m imagen_jax.plan --config=configs/sr256.py --topology=v5p-256 --search
python -m imagen_jax.plan --config=configs/sr1024.py --topology=v4-8 --what=sample

Compiles the real training step, or sampler, for a TPU slice (pip install libtpu), or,
without --topology, for the devices here, and prints what it takes of each chip. Exit
status 1 when it does not fit, with the nearest setting that does. docs/plan.md tells
how to read it.
"""

import dataclasses
import gc
import itertools
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_flags

from imagen_jax import cli
from imagen_jax.config import StageConfig, from_dict
from imagen_jax.errors import UserError, did_you_mean
from imagen_jax.planning import printed
from imagen_jax.planning.chips import chip_of, slice_devices
from imagen_jax.planning.compile import DoesNotFit, compile_sampling, compile_step
from imagen_jax.planning.report import figures, memory_limit_gib
from imagen_jax.planning.search import Setting, guess, next_settings, settings
from imagen_jax.sharding import AXES, check_batch_size, make_mesh

# Programs that are compiled to find one that fits.
_ATTEMPTS = 3
# Guesses were within 1.6 of the paper's compiled stages, above and below.
_HOPELESS = 3.0


def with_mesh(cfg: StageConfig, text: str) -> StageConfig:
    """`cfg` with the mesh "data:-1,fsdp:16"; axes that are not named stay.

    Raises:
      UserError: for anything else.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, colon, size = (word.strip() for word in part.partition(":"))
        if axis not in AXES:
            raise UserError(
                f"--mesh={text}: there is no axis {axis!r}{did_you_mean(axis, AXES)}; "
                f"write for example data:-1,fsdp:16, of {', '.join(AXES)}"
            )
        if axis in sizes:
            raise UserError(f"--mesh={text}: {axis} is there twice")
        try:
            sizes[axis] = int(size)
        except ValueError:
            raise UserError(
                f"--mesh={text}: {axis}{colon}{size} has no whole number behind a "
                "colon; write for example fsdp:16, or data:-1 for all that are left"
            ) from None
    return dataclasses.replace(cfg, mesh=dataclasses.replace(cfg.mesh, **sizes))


def check_guess(cfg: StageConfig, mesh: Mesh) -> None:
    """Spares the compiler what is hopeless: it would try for long to make it fit.

    Raises:
      DoesNotFit: for a state that is too large, or a step that is by far.
    """
    limit = memory_limit_gib(mesh)
    if limit is None:
        return
    first = guess(cfg, mesh, None)
    where = f"{limit:.2f} GiB of each of {mesh.size} devices"
    if first.state_gib > limit:
        raise DoesNotFit(
            "parameters, optimizer, EMA and batch alone take "
            f"{first.state_gib:.2f} of {where}",
            first.gib,
        )
    if first.gib > _HOPELESS * limit:
        raise DoesNotFit(
            f"a training step is guessed, not compiled, to take {first.gib:.0f} of "
            f"{where}",
            first.gib,
        )


def plan(cfg: StageConfig, mesh: Mesh, what: str) -> dict[str, Any]:
    """The figures of a stage on a mesh.

    Raises:
      DoesNotFit: into the memory of a device.
    """
    if what == "train":
        check_guess(cfg, mesh)
    made = (compile_step if what == "train" else compile_sampling)(cfg, mesh)
    found = figures(cfg, mesh, made, what)
    if not found["fits"]:
        raise DoesNotFit(
            f"the {what} program takes {found['hbm_gib_per_chip']:.2f} of "
            f"{found['hbm_limit_gib']:.2f} GiB of each of {mesh.size} devices",
            found["hbm_gib_per_chip"],
        )
    return found


def nearest(
    cfg: StageConfig, devices: Sequence[jax.Device], mesh: Mesh, needed: float
) -> tuple[Setting, dict[str, Any]] | None:
    """The nearest setting of a training that fits, compiled; None if none was found.

    A guess of each, made right by what this one needs, says which are compiled.

    Args:
      cfg: the stage, that does not fit.
      devices: that it should fit.
      mesh: of `cfg`.
      needed: GiB of one device, or 0.
    """
    chip, limit = chip_of(mesh.devices.flat[0]), memory_limit_gib(mesh)
    own = guess(cfg, mesh, chip)
    # As much more as this one needs than was guessed: unless nobody knows.
    factor = max(1.0, (needed - own.state_gib) / own.step_gib) if needed else 1.0
    attempts = 0
    for setting in next_settings(cfg, mesh):
        changed = setting.apply(cfg)
        other = make_mesh(changed.mesh, devices)
        first = guess(changed, other, chip)
        if limit and first.state_gib + factor * first.step_gib > limit:
            continue
        print(f"trying {setting.flags(Setting.of(cfg, mesh))}", flush=True)
        try:
            return setting, plan(changed, other, "train")
        except DoesNotFit as error:
            if error.needed_gib:
                more = (error.needed_gib - first.state_gib) / first.step_gib
                factor = max(factor, more)
        attempts += 1
        if attempts == _ATTEMPTS:
            return None
    return None


def search(
    cfg: StageConfig, devices: Sequence[jax.Device], mesh: Mesh, tries: int
) -> list[dict[str, Any]]:
    """Figures of the settings that are guessed to be fastest, the fastest first.

    Each row is printed when it is known.
    """
    chip, limit = chip_of(mesh.devices.flat[0]), memory_limit_gib(mesh)
    guessed = []
    for setting in settings(cfg, mesh):
        changed = setting.apply(cfg)
        guessed.append(
            (guess(changed, make_mesh(changed.mesh, devices), chip), setting)
        )
    fitting = [pair for pair in guessed if not limit or pair[0].gib <= limit]
    # Guesses are high; where none fits, the smallest may.
    pool = fitting or sorted(guessed, key=lambda pair: pair[0].gib)[:tries]
    pool.sort(key=lambda pair: (pair[0].seconds, pair[0].gib))
    print(
        f"{len(guessed)} settings, {len(fitting)} of them guessed to fit; "
        f"compiling the fastest {min(tries, len(pool))}\n\n{printed.HEADER}",
        flush=True,
    )
    rows = []
    for first, setting in itertools.islice(pool, tries):
        changed = setting.apply(cfg)
        other = make_mesh(changed.mesh, devices)
        try:
            row = plan(changed, other, "train")
        except DoesNotFit as error:
            row = {
                "fits": False,
                "hbm_gib_per_chip": error.needed_gib or None,
                "step_seconds": None,
            }
        row = {
            "setting": setting.flags(Setting.of(cfg, mesh)) or "as it is",
            "guess": {"gib": first.gib, "seconds": first.seconds},
            **row,
        }
        rows.append(row)
        print(printed.row(setting.text(), row), flush=True)
    rows.sort(key=lambda r: (not r["fits"], r["step_seconds"] or 0, _gib(r)))
    return rows


def _gib(row: dict[str, Any]) -> float:
    return row["hbm_gib_per_chip"] or 0.0


def define_flags() -> None:
    """Defines this door's flags; main() reads them."""
    config_flags.DEFINE_config_file("config", None, "FILE.py[:variant]")
    flags.DEFINE_string("topology", None, "slice to plan for: v4-512, v5litepod-16 ...")
    flags.DEFINE_string("mesh", None, "for example data:-1,fsdp:16")
    flags.DEFINE_enum("what", "train", ["train", "sample"], "which program")
    flags.DEFINE_bool("search", False, "try meshes, microbatches and remat, rank them")
    flags.DEFINE_integer("tries", 4, "with --search: how many to compile", 1)
    flags.DEFINE_string("json", None, "file that gets the figures")
    flags.mark_flags_as_required(["config"])


def main() -> None:
    """Plans what the flags ask for."""
    args = flags.FLAGS
    cli.check_json(args.json)
    if args.search and args.what == "sample":
        raise UserError("--search is for training; a sampler has only its mesh to vary")
    cfg = from_dict(cli.config_values())
    if args.mesh is not None:
        cfg = with_mesh(cfg, args.mesh)
    devices = slice_devices(args.topology) if args.topology else jax.devices()
    mesh = make_mesh(cfg.mesh, devices)
    if args.what == "train":
        parts = cfg.training.microbatches
        check_batch_size(cfg.training.batch_size, mesh, "training.batch_size", parts)
    where = args.topology or f"the {mesh.size} devices here"
    named = {"topology": args.topology or "here"}
    print(f"compiling for {where}; minutes, if the network is large", flush=True)
    if args.search:
        rows = search(cfg, devices, mesh, args.tries)
        cli.write_json(args.json, {**named, **rows[0], "settings": rows})
        if not rows[0]["fits"]:
            raise UserError("none of these fits; take more chips or smaller batches")
        print(f"\nbest: {rows[0]['setting']}\n\n{printed.report(rows[0])}")
        return
    # Of the millions of objects that tracing makes next to none are garbage: looking
    # for it takes a seventh of the time.
    gc.disable()
    try:
        found = plan(cfg, mesh, args.what)
    except DoesNotFit as error:
        _refuse(cfg, devices, mesh, error, {**named, "stage": cfg.name})
    cli.write_json(args.json, {**named, **found})
    print(printed.report(found))


def _refuse(cfg, devices, mesh, error: DoesNotFit, named: dict[str, Any]) -> None:
    """Raises `UserError` with the nearest setting that fits."""
    args = flags.FLAGS
    print(f"{error}\nlooking for a setting that fits", flush=True)
    found = None
    if args.what == "train":
        found = nearest(cfg, devices, mesh, error.needed_gib)
    report = {
        **named,
        "fits": False,
        "hbm_gib_per_chip": error.needed_gib or None,
        "hbm_limit_gib": memory_limit_gib(mesh),
        "nearest": None,
    }
    advice = "take more chips, or fewer pictures (config.sampler.batch_size)"
    if args.what == "train":
        advice = (
            "no setting of fsdp, remat and microbatches was found that does; take "
            "more chips or a smaller config.training.batch_size"
        )
    if found:
        setting, figures_ = found
        changes = setting.flags(Setting.of(cfg, mesh))
        report["nearest"] = {"flags": changes, **figures_}
        advice = (
            f"nearest that does (compiled, {figures_['hbm_gib_per_chip']:.2f} GiB): "
            + changes
        )
    cli.write_json(args.json, report)
    raise UserError(f"{error}; {advice}") from None


if __name__ == "__main__":
    define_flags()
    cli.run(main)
