"""Settings with which a stage can be trained on given devices, and which fit."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import jax
from jax.sharding import Mesh

from imagen_jax.batch import batch_spec
from imagen_jax.config import MeshConfig, StageConfig, TrainingConfig
from imagen_jax.models import network
from imagen_jax.planning import compile as planning
from imagen_jax.planning.chips import CHIPS
from imagen_jax.planning.compile import Figures, shard_gib
from imagen_jax.sharding import make_mesh, on_mesh, on_rows
from imagen_jax.training.state import TrainState, abstract_state

REMAT = ("none", "activations", "blocks")
# Guesses were within 1.6 of the paper's compiled stages, above and below.
_HOPELESS = 2.5
# What GPU programs keep of what JAX would keep for the backward pass: 26 to 38 % in the
# paper's stages. They fuse norms and activations, which are most of it.
_KEPT_BY_GPUS = 0.4


def plan(
    cfg: StageConfig, devices: Sequence[jax.Device], what: str, quick: bool = True
) -> Figures:
    """The figures of a stage's training step ("train") or sampler ("sample").

    A step that cannot fit, or is guessed to be far too large, is not compiled, as
    compilers try for very long: then "guessed" is True.
    """
    mesh, limit = make_mesh(cfg.mesh, devices), _limit_gib(devices)
    if what == "sample":
        return planning.compile_sampling(cfg, mesh, quick)[1]
    if limit < math.inf:
        held, needed = held_gib(cfg, devices), guess_gib(cfg, devices)
        if held > limit or needed > _HOPELESS * limit:
            why = f"{held:.2f} GiB are state and batch, the rest a guess: not compiled"
            found = {"fits": False, "hbm_gib_per_chip": needed, "guessed": True}
            return found | {"hbm_limit_gib": limit, "why": why}
    return planning.compile_step(cfg, mesh, quick)[1]


def nearest(cfg: StageConfig, devices: Sequence[jax.Device]) -> Figures | None:
    """The first setting that is guessed to fit, with its flags; nothing is compiled.

    Settings with the same remat and mesh come first, as others take seconds to trace.
    """

    def differs(setting):
        return setting.model.remat != cfg.model.remat, setting.mesh != cfg.mesh

    for setting in sorted(settings(cfg), key=differs):
        if (needed := guess_gib(setting, devices)) <= _limit_gib(devices):
            found = {"flags": flags(setting), "fits": True, "hbm_gib_per_chip": needed}
            return found | {"guessed": True, "why": "a guess"}
    return None


def _limit_gib(devices: Sequence[jax.Device]) -> float:
    chip = CHIPS.get(devices[0].device_kind)
    return chip.memory_gib if chip else math.inf


def flags(cfg: StageConfig) -> str:
    """What to write on the command line to get the setting of `cfg`."""
    axes = [f"{axis}:{size}" for axis, size in dataclasses.asdict(cfg.mesh).items()]
    return (
        f"--mesh={','.join(axes)} --config.model.remat={cfg.model.remat} "
        f"--config.training.microbatches={cfg.training.microbatches}"
    )


def settings(cfg: StageConfig) -> Iterator[StageConfig]:
    """`cfg` with each division of data and fsdp, remat, and microbatches of 1 to 16.

    Those that are likely to be fast come first: few microbatches before little remat
    before little fsdp. No size of the mesh of `cfg` is -1.
    """
    ways = cfg.mesh.data * cfg.mesh.fsdp
    fsdps = [n for n in range(1, ways + 1) if ways % n == 0]
    for parts, remat, fsdp in itertools.product((1, 2, 4, 8, 16), REMAT, fsdps):
        if cfg.training.batch_size % (ways * parts) == 0:
            yield dataclasses.replace(
                cfg,
                mesh=dataclasses.replace(cfg.mesh, data=ways // fsdp, fsdp=fsdp),
                model=dataclasses.replace(cfg.model, remat=remat),
                training=dataclasses.replace(cfg.training, microbatches=parts),
            )


def compile_settings(
    cfg: StageConfig, devices: Sequence[jax.Device], tries: int, needed_gib: float = 0
) -> Iterator[Figures]:
    """Figures of the first `tries` settings that are guessed to fit, each compiled.

    What `cfg` is known to take of one device, `needed_gib`, corrects the guesses.
    """
    factor = max(1.0, needed_gib / guess_gib(cfg, devices))
    for setting in settings(cfg):
        if not tries:
            return
        guessed = guess_gib(setting, devices)
        if guessed * factor > _limit_gib(devices):
            continue
        tries -= 1
        print(f"compiling {flags(setting)}", flush=True)
        found = {"flags": flags(setting), **plan(setting, devices, "train")}
        print(planning.summary(found), flush=True)
        if not found["fits"]:
            factor = max(factor, found["hbm_gib_per_chip"] / guessed)
        yield found


def guess_gib(cfg: StageConfig, devices: Sequence[jax.Device]) -> float:
    """What a training step would take of one device, by its shapes.

    For the backward pass a compiler keeps less, as it fuses operations.
    """
    mesh = make_mesh(cfg.mesh, devices)
    # What is kept of an image does not depend on where weights lie.
    ways, parts = mesh.shape["data"] * mesh.shape["fsdp"], cfg.training.microbatches
    places = mesh.devices.reshape(ways, 1, *mesh.devices.shape[2:])
    kept = _kept_gib(_alike(cfg), Mesh(places, mesh.axis_names))
    # Of several microbatches also the sum of gradients.
    gradients = min(parts, 2) * shard_gib(_state(cfg, mesh).params)
    rows = cfg.training.batch_size / ways / parts
    kept *= _KEPT_BY_GPUS if devices[0].platform == "gpu" else 1
    return held_gib(cfg, devices) + gradients + rows * kept


def held_gib(cfg: StageConfig, devices: Sequence[jax.Device]) -> float:
    """What state and batch take of one device: exact, but for tiles' padding."""
    mesh = make_mesh(cfg.mesh, devices)
    return shard_gib(_state(cfg, mesh)) + shard_gib(on_rows(batch_spec(cfg), mesh))


def _alike(cfg: StageConfig) -> StageConfig:
    """What is traced for all settings alike, but for what remat keeps."""
    return dataclasses.replace(cfg, mesh=MeshConfig(), training=TrainingConfig())


def _state(cfg: StageConfig, mesh: Mesh) -> TrainState:
    cfg = _alike(cfg)
    model = dataclasses.replace(cfg.model, remat="none")
    return abstract_state(dataclasses.replace(cfg, model=model), mesh)


@functools.lru_cache
def _kept_gib(cfg: StageConfig, mesh: Mesh) -> float:
    """What JAX's backward pass keeps of an image."""

    def residuals(params, *inputs):
        return jax.vjp(lambda p: network.apply(cfg.model, p, *inputs).sum(), params)[1]

    params, *inputs = network.abstract_inputs(cfg)
    # Many rows, so that residuals of the weights are negligible.
    rows = 64 * mesh.shape["data"]
    inputs = jax.tree.map(lambda x: x.update(shape=(rows, *x.shape[1:])), inputs)
    kept = jax.tree.leaves(jax.eval_shape(on_mesh(residuals, mesh), params, *inputs))
    return sum(x.size * x.dtype.itemsize for x in kept) / rows / planning.GIB
