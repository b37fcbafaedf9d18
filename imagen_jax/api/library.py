"""The library's face: a trained cascade that stays loaded between calls."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Unpack

import jax
import numpy as np
import tqdm
from jax.sharding import Mesh
from PIL import Image

from imagen_jax.api.cascade import Sampling, about, open_stages, with_sampler
from imagen_jax.api.loaded import Loaded
from imagen_jax.config import MeshConfig, StageConfig
from imagen_jax.diffusion.cascade import Stage, check_order, sample_cascade
from imagen_jax.errors import UserError
from imagen_jax.images import Unusable
from imagen_jax.preparing.images import stored_square
from imagen_jax.sharding import make_mesh
from imagen_jax.training.weights import Weights

# `(stage, step, estimate)`: both count from 0; the estimate of x0 is of the pictures
# that are made together, `[n, h, w, 3]` uint8.
Callback = Callable[[int, int, np.ndarray], None]
# Pictures and their prompts to whether each may be shown.
Safety = Callable[[list[Image.Image], list[str]], Sequence[bool]]


class Options(Sampling, total=False):
    """What `Cascade.sample` takes and explains."""

    seed: int
    seeds: Sequence[int] | None
    callback: Callback | None


class Result(NamedTuple):
    """What `Cascade.sample` returns, for N prompts."""

    images: np.ndarray  # [N, H, W, 3] uint8, of the last stage
    stages: list[np.ndarray]  # those of each stage that ran, if they were asked for
    seeds: np.ndarray  # [N] uint32
    about: list[dict[str, str]]  # of each picture, for `images.save`


def load_cascade(
    *paths: str | os.PathLike, encoder_weights: str = "", mesh: Mesh | None = None
) -> "Cascade":
    """Opens a trained cascade; weights are loaded when they are first needed.

    Args:
      paths: the stages' workdirs or exported folders, base first; local or gs://. A
        cascade without a base only enlarges.
      encoder_weights: file or folder of the text encoder, if it has none built in.
      mesh: by default all devices of this process, each with a copy of the weights.

    Raises:
      UserError: when a stage cannot be read, or does not take what the one before it
        makes.
    """
    if not paths:
        raise UserError("load_cascade() takes the folder of at least one stage")
    return Cascade(open_stages([os.fspath(p) for p in paths]), encoder_weights, mesh)


class Cascade:
    """A trained cascade, to be called with prompts.

    Weights, text encoder and embeddings of repeated prompts stay in memory between
    calls while they fit (`api.loaded`). A program is compiled at the first call of its
    settings and number of rows. Threads take turns.
    """

    def __init__(
        self,
        trained: Sequence[Weights],
        encoder_weights: str = "",
        mesh: Mesh | None = None,
    ):
        """Of opened stages, base first; all else as in `load_cascade`."""
        self.trained = tuple(trained)
        self.config: tuple[StageConfig, ...] = tuple(one.cfg for one in trained)
        check_order(self.config, made=self.config[0].lowres_size)
        mesh = mesh or make_mesh(MeshConfig(), jax.local_devices())
        self.loaded = Loaded(self.trained, encoder_weights, mesh)
        self._steps = _Steps()
        self._turn = threading.Lock()

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        safety: Safety | None = None,
        **options: Unpack[Options],
    ) -> list[Image.Image]:
        """The last stage's pictures, one for each prompt; a str is one prompt.

        Their `info` tells what made them; `imagen_jax.images.save(path, picture)` keeps
        it in the file. Where `safety`, given the pictures and the prompts, does not
        answer True, they are black.
        """
        prompts = _checked(prompts)
        return _pictures(self.sample(prompts, **options), prompts, safety)

    def upscale(
        self,
        image: Image.Image | bytes,
        prompt: str,
        *,
        safety: Safety | None = None,
        **options: Unpack[Options],
    ) -> Image.Image:
        """A picture, enlarged by the super-resolution stages.

        Its middle square is cut and reduced as `prepare` does it with the file `image`;
        a Pillow image is taken as a PNG file of it. Raises `UserError` when it is
        smaller than what these stages start from, or damaged.
        """
        size = self.config[self._enlarging()].lowres_size
        try:
            lowres = stored_square(image, size)[None]
        except (OSError, SyntaxError, ValueError, Unusable) as error:
            raise UserError(f"the picture cannot be enlarged: {error}") from None
        result = self.sample(prompt, lowres=lowres, **options)
        return _pictures(result, [prompt], safety)[0]

    def sample(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        lowres: np.ndarray | None = None,
        return_stages: bool = False,
        callback: Callback | None = None,
        **settings: Unpack[Sampling],
    ) -> Result:
        """Samples N prompts, a picture each.

        Args:
          prompts: N at least 1; a str is one.
          seed: of the first picture, in [0, 2**32); the next one has the next.
          seeds: of each picture, instead.
          lowres: `[N, h, h, 3]` uint8, for the first super-resolution stage to start
            from; the base is left out.
          return_stages: whether `Result.stages` is wanted.
          callback: called in another thread after each step of each batch. Pictures are
            the same with and without it, and programs are others. What it raises is
            raised after the batch.
          settings: those of `Sampling`.

        Raises:
          UserError: for anything that cannot be sampled.
        """
        prompts, steps = _checked(prompts), self._steps
        count = len(prompts)
        counted = [seed + i for i in range(count)]
        drawn = _drawn(counted if seeds is None else seeds, count)
        first = self._enlarging() if lowres is not None else 0
        used = with_sampler(self.trained, **settings)[first:]
        configs = [one.cfg for one in used]
        if lowres is None:
            check_order(configs)
        else:
            _check_lowres(lowres, count, configs[0].lowres_size)

        def stages() -> Iterator[Stage]:
            for number, cfg in enumerate(configs, first):
                steps.stage, steps.left = number, count
                yield self.loaded.stage(number, cfg)

        def report(made: int) -> None:
            bar.update(made)
            steps.end(made)

        with (
            self._turn,
            tqdm.tqdm(
                total=count * len(configs),
                desc="sample",
                unit="picture",
                disable=callback is not None,
            ) as bar,
        ):
            steps.callback, steps.error = callback, None
            made, _ = sample_cascade(
                stages(),
                *self.loaded.encode(prompts),
                drawn,
                self.loaded.mesh,
                lowres,
                report=report,
                on_step=steps if callback else None,
            )
        told = [about(*one, used, configs) for one in zip(prompts, drawn)]
        return Result(made[-1], made if return_stages else [], drawn, told)

    def encode(self, prompts: str | Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings of N prompts, `[N, L, D]` bfloat16, and their mask `[N, L]`."""
        with self._turn:
            return self.loaded.encode(_checked(prompts))

    def _enlarging(self) -> int:
        """The number of the first super-resolution stage."""
        numbers = [i for i, cfg in enumerate(self.config) if cfg.lowres_size]
        if not numbers:
            raise UserError(
                "this cascade has no super-resolution stage to enlarge with"
            )
        return numbers[0]


class _Steps:
    """What programs call after each step, for good: it holds no weights."""

    callback: Callback | None = None
    error: Exception | None = None
    stage = left = 0  # the stage that runs, and pictures that it has yet to make

    def __call__(self, step: jax.Array, estimate: jax.Array) -> None:
        """`estimate` is of a whole batch, which may be filled up."""
        if self.callback and not self.error:
            try:
                shown = np.asarray(estimate)[: self.left]
                self.callback(self.stage, int(step), shown)
            except Exception as error:  # JAX would wrap it in a page of its own.
                self.error = error

    def end(self, made: int) -> None:
        """After a batch of so many pictures; raises what the callback raised."""
        if self.callback:
            jax.effects_barrier()
        self.left -= made
        if self.error:
            raise self.error


def _pictures(
    result: Result, prompts: list[str], safety: Safety | None
) -> list[Image.Image]:
    """The pictures with their `info`; black where they may not be shown."""
    pictures = [Image.fromarray(each) for each in result.images]
    for picture, told in zip(pictures, result.about):
        picture.info.update(told)
    if not safety:
        return pictures
    answers = list(safety(pictures, prompts))
    if len(answers) != len(pictures):
        raise UserError(f"safety gave {len(answers)} answers for {len(pictures)}")
    for i, answer in enumerate(answers):
        if not answer:
            print(f"picture {i} is replaced by a black one: safety does not pass it")
            pictures[i] = Image.new("RGB", pictures[i].size)
            pictures[i].info.update(result.about[i], safety="replaced")
    return pictures


def _checked(prompts: str | Sequence[str]) -> list[str]:
    """A list of at least one prompt that is text."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise UserError("there are no prompts")
    for prompt in prompts:
        try:
            str.encode(prompt)
        except (TypeError, UnicodeEncodeError):
            raise UserError(f"the prompt {prompt!r} is no text") from None
    return prompts


def _drawn(seeds: Sequence[int], count: int) -> np.ndarray:
    """Seeds as `[count]` uint32."""
    if len(seeds) != count:
        raise UserError(f"{len(seeds)} seeds are given for {count} prompts")
    whole = [isinstance(each, int | np.integer) for each in seeds]
    if not (all(whole) and all(0 <= each < 2**32 for each in seeds)):
        raise UserError("seeds are whole numbers in [0, 2**32)")
    return np.array(seeds, np.uint32)


def _check_lowres(lowres: np.ndarray, count: int, size: int) -> None:
    found, want = (lowres.shape, lowres.dtype), ((count, size, size, 3), np.uint8)
    if found != want:
        raise UserError(
            f"lowres is {found[1]}{list(found[0])}; for {count} prompts this cascade "
            f"takes uint8{list(want[0])}"
        )
