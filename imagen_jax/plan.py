"""Plans a stage for devices that may be absent: does it fit, what will it cost?

python -m imagen_jax.plan --config=base64 --topology=v4-512 \
    --mesh=data:-1,fsdp:16 [--json=FILE]
python -m imagen_jax.plan --config=sr256 --topology=v5p-256 --search
python -m imagen_jax.plan --config=sr1024 --topology=v4-8 --what=sample
python -m imagen_jax.plan --config=base64:300m --topology=h100-8

Compiles the training step, or sampler, for a TPU slice (pip install libtpu), for GPUs
(pip install 'imagen-jax[plan-gpu]') or for the devices here, and prints what it takes
of each chip: see docs/plan.md. Exit status 1 when it does not fit, with the nearest
setting that does.
"""

import contextlib
import ctypes
import dataclasses
import gc

import jax
from absl import flags
from ml_collections import config_flags

from imagen_jax import cli
from imagen_jax.config import MeshConfig, from_dict
from imagen_jax.errors import UserError
from imagen_jax.planning import search
from imagen_jax.planning.chips import slice_devices
from imagen_jax.planning.compile import ASSUMPTIONS, summary
from imagen_jax.sharding import check_batch_size, make_mesh

# glibc's M_ARENA_MAX and M_TRIM_THRESHOLD, and what they are set to.
_MALLOC = {-8: 1, -1: 128 * 1024}


def mesh_sizes(text: str) -> dict[str, int]:
    """The sizes of "data:-1,fsdp:16" by axis, or `UserError`."""
    try:
        pairs = [part.split(":") for part in text.split(",")]
        return {axis.strip(): int(size) for axis, size in pairs}
    except ValueError:
        raise UserError(
            f"--mesh={text} is not a list of axes with sizes, as data:-1,fsdp:16"
        ) from None


def define_flags() -> None:
    """Defines this door's flags; main() reads them."""
    config_flags.DEFINE_config_file("config", None, "NAME or FILE.py[:variant]")
    flags.DEFINE_string("topology", None, "what to plan for: v4-512, h100-8 ...")
    flags.DEFINE_string("mesh", None, "for example data:-1,fsdp:16")
    flags.DEFINE_enum("what", "train", ["train", "sample"], "which program")
    flags.DEFINE_bool("quick", True, "compile what is quick to compile")
    flags.DEFINE_bool("cycles", False, "the compiler's own estimate too: --noquick")
    flags.DEFINE_bool("search", False, "try meshes, microbatches and remat, rank them")
    flags.DEFINE_integer("tries", 3, "with --search: how many to compile", 1)
    flags.DEFINE_string("json", None, "file that gets the figures")
    flags.mark_flags_as_required(["config"])


def main() -> None:
    """Plans what the flags ask for."""
    args = flags.FLAGS
    # glibc keeps what the compiler's threads free, each in an arena of its own: a fifth
    # of the peak.
    with contextlib.suppress(AttributeError):  # another C library has no `mallopt`
        for name, value in _MALLOC.items():
            ctypes.CDLL(None).mallopt(name, value)
    cli.check_json(args.json)
    if args.search and args.what == "sample":
        raise UserError("--search is for training; a sampler has only its mesh to vary")
    values = cli.config_values()
    values["mesh"].update(mesh_sizes(args.mesh) if args.mesh is not None else {})
    cfg = from_dict(values)
    devices = slice_devices(args.topology) if args.topology else jax.devices()
    mesh = make_mesh(cfg.mesh, devices)
    cfg = dataclasses.replace(cfg, mesh=MeshConfig(**mesh.shape))
    if args.what == "train":
        parts = cfg.training.microbatches
        check_batch_size(cfg.training.batch_size, mesh, "training.batch_size", parts)
    print("compiling; minutes, if the network is large", flush=True)
    # Tracing makes millions of objects and next to no garbage.
    gc.disable()
    found = {"topology": args.topology or "here", "stage": cfg.name}
    if args.search:
        rows = list(search.compile_settings(cfg, devices, args.tries))
        rows.sort(key=lambda row: (not row["fits"], row.get("step_seconds") or 0))
        best, others = (rows or [{"fits": False}])[0], {"settings": rows}
    else:
        quick = args.quick and not args.cycles
        best, others = search.plan(cfg, devices, args.what, quick), {}
        if not best["fits"]:
            print(f"{summary(best)}\nlooking for a setting that fits", flush=True)
            others["nearest"] = None
            if best.get("guessed"):
                others["nearest"] = search.nearest(cfg, devices)
            elif args.what == "train":
                needed = best["hbm_gib_per_chip"]
                rows = search.compile_settings(cfg, devices, 3, needed)
                others["nearest"] = next((row for row in rows if row["fits"]), None)
    found |= best | {"host_memory_gib": cli.peak_memory_gib()}
    cli.write_json(args.json, found | others)
    if not found["fits"]:
        advice = "nothing that fits was found; take more chips or a smaller batch"
        if nearest := others.get("nearest"):
            advice = f"{nearest['flags']} {summary(nearest)}"
        raise UserError(advice if args.search else f"{summary(found)}; {advice}")
    print(f"{cli.table(found)}\n\nassumed: {ASSUMPTIONS}\n\n{summary(found)}")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
