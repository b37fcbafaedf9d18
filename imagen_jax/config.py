"""What a stage is: frozen, hashable dataclasses, checked when they are made.

`configs/*.py` build an `ml_collections.ConfigDict` with these groups and fields;
`from_dict` freezes it. A checkpoint carries `to_json` of its stage, so sampling
never restates an architecture.
"""

import dataclasses
import json
import typing
from collections.abc import Mapping
from typing import Any

from imagen_jax.errors import UserError, did_you_mean
from imagen_jax.validate import check_stage


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network. One entry per resolution level, finest first.

    Attributes:
      architecture: "unet" (ADM style, paper F.1) or "efficient_unet" (paper B.1).
      channels: width of each level.
      num_res_blocks: residual blocks of each level.
      self_attention: whether a level attends over its own pixels.
      text_attention: whether a level attends to the text.
      text_conditioning: how (paper D.3.1): "concatenate" puts the text's keys and
        values beside those of self-attention, "cross" has a cross-attention after
        it; where a level has no self-attention the two are the same.
        "attention_pool" and "mean_pool" do without either: the text is only added to
        the time embedding, pooled. The first three pool by attention.
      text_features: width that the text is projected to first; 0 leaves it.
      text_norm: whether the text is layer-normalised in attention and pooling.
      head_channels: channels of one attention head.
      skip_scale: factor on the sums of residual and attention blocks; the paper's
        1 / sqrt(2) (B.1) is 0.5**0.5.
      skips: what a level of the Efficient U-Net hands to the way up: "every_block",
        each residual block's output to one of its own, or "last_block" (Fig. A.29).
      patch_size: pixels of a p x p square folded into channels before the first
        convolution (space-to-depth); 1 is the paper's network.
      dropout: rate inside residual blocks.
      dtype: compute type, "bfloat16" or "float32"; parameters are float32.
      remat: what the backward pass recomputes instead of keeping: "none", "activations"
        (all but convolutions and products) or "blocks" (all but each block's input).
    """

    architecture: str = "unet"
    channels: tuple[int, ...] = (512, 1024, 1536, 2048)
    num_res_blocks: tuple[int, ...] = (3, 3, 3, 3)
    self_attention: tuple[bool, ...] = (False, True, True, True)
    text_attention: tuple[bool, ...] = (False, True, True, True)
    text_conditioning: str = "concatenate"
    text_features: int = 0
    text_norm: bool = True
    head_channels: int = 64
    skip_scale: float = 1.0
    skips: str = "every_block"
    patch_size: int = 1
    dropout: float = 0.0
    dtype: str = "bfloat16"
    remat: str = "none"


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """The forward process and what the network predicts.

    Attributes:
      schedule: "cosine" or "linear" (beta from 1e-4 to 0.02), continuous in t.
      prediction: "eps", "x0" or "v".
      weighting: of the squared error, by log-SNR: "plain" (that of what is predicted;
        with "eps" the paper's), "min_snr" or "sigmoid" (`diffusion/loss.py`).
      min_snr_gamma: the SNR from which on "min_snr" counts x0's error no more.
      sigmoid_bias: the log-SNR at which "sigmoid" is a half.
      logsnr_min: lower clip of the schedule's log-SNR.
      logsnr_max: upper clip of the schedule's log-SNR.
      text_dropout: share of captions replaced by the null text (paper 4.1: 0.1).
      lowres_augmentation: whether a super-resolution stage's input is noised, and
        the network told how much (paper 2.4).
    """

    schedule: str = "cosine"
    prediction: str = "eps"
    weighting: str = "plain"
    min_snr_gamma: float = 5.0
    sigmoid_bias: float = 2.0
    logsnr_min: float = -20.0
    logsnr_max: float = 20.0
    text_dropout: float = 0.1
    lowres_augmentation: bool = True


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the examples come from.

    Attributes:
      records: a folder written by `prepare` (holds manifest.json), a .npz file of it
        (read without TensorFlow), "tfds:NAME", or a mixture, "DIR:WEIGHT,DIR:WEIGHT".
      shuffle_examples: size of the shuffle buffers of all readers together, in
        examples; folders that are mixed have their shares of it.
      readers: parts of a batch, each read by itself, on one host or another: a divisor
        of the batch size, at least the number of hosts (docs/prepare.md). The order of
        the examples depends on it. 0: 8 or less, by the records and the batch size.
      seed: of the order of the examples, and of where they are cut.
      square: which square of a picture is trained on: the "middle" one, or a "random"
        one, every epoch another.
      flip: whether every epoch half of the pictures are mirrored, others each time.
        Captions that tell left from right are then wrong as often.
    """

    records: str = ""
    shuffle_examples: int = 10_000
    readers: int = 0
    seed: int = 0
    square: str = "middle"
    flip: bool = False


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The text embeddings that the stage is trained on.

    Attributes:
      length: tokens per caption after padding; longer captions are cut.
      dim: width of one token's embedding (T5-XXL: 4096).
      encoder: identity of the frozen encoder, from the manifest; "" before
        training has read it.
    """

    length: int = 128
    dim: int = 4096
    encoder: str = ""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer, learning-rate schedule and EMA.

    Attributes:
      name: "adam" or "adafactor".
      learning_rate: its peak.
      warmup_steps: linear from 0 to the peak.
      decay_steps: the step at which a cosine has brought it to 0; 0 keeps the peak.
      b1, b2, eps: Adam's.
      parameter_scale: whether Adafactor's steps are multiplied by the parameter's
        root mean square (at least 1e-3), optax's default.
      clip_norm: global gradient norm above which gradients are scaled down.
      ema_decay: of the averaged parameters, reached after a warm-up.
    """

    name: str = "adam"
    learning_rate: float = 1e-4
    warmup_steps: int = 10_000
    decay_steps: int = 2_500_000
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    parameter_scale: bool = True
    clip_norm: float = 1.0
    ema_decay: float = 0.9999


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The loop.

    Attributes:
      batch_size: images per step over all devices and hosts.
      microbatches: parts that a batch is worked through in, one after the other: less
        memory for activations, the same gradient.
      steps: the last step.
      seed: of the parameters and of the training noise.
      log_every_steps: between two lines of metrics.jsonl.
      sample_every_steps: between two preview grids; 0 makes none.
      checkpoint_every_steps: between two checkpoints (the last step always saves).
      keep_checkpoints: how many of the newest stay.
      keep_every_steps: checkpoints of its multiples stay too; 0 for none.
      keep_best_checkpoints: how many stay of those with the lowest `best_metric`.
      best_metric: "loss" or "loss_by_logsnr/RANGE" (a name of metrics.jsonl), the mean
        over the steps since the checkpoint before.
      init_from: what a run without checkpoints starts from: a workdir, whose averaged
        parameters it takes, or weights of `export`; "" for random parameters.
      preview_images: pictures of a preview grid.
      spike_factor: a loss or gradient norm above so many times its running average
        over 100 updates is a spike; 0 turns it off. The update of a spike is skipped,
        and always that of a loss or gradient that is not finite.
      skip_budget_steps: after how many skipped updates the run gives up, ten that are
        done making up for one; 0 never.
      on_spent_budget: "stop", or "rollback": go on from the newest checkpoint with the
        data and noise that come next; both leave a bundle for --replay.
      hang_seconds: a step that takes longer has the stacks of all threads printed to
        stderr; 0 never prints.
    """

    batch_size: int = 2048
    microbatches: int = 1
    steps: int = 2_500_000
    seed: int = 0
    log_every_steps: int = 100
    sample_every_steps: int = 10_000
    checkpoint_every_steps: int = 5_000
    keep_checkpoints: int = 3
    keep_every_steps: int = 0
    keep_best_checkpoints: int = 0
    best_metric: str = "loss"
    init_from: str = ""
    preview_images: int = 16
    spike_factor: float = 0.0
    skip_budget_steps: int = 20
    on_spent_budget: str = "stop"
    hang_seconds: int = 600


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 takes all that are left.

    Attributes:
      data: copies of the model, each with its share of the batch.
      fsdp: shards of parameters, optimizer and EMA (and of the batch).
      spatial: shards of a picture's rows; what lies at a border is exchanged.
      tensor: shards of channels and heads.
    """

    data: int = -1
    fsdp: int = 1
    spatial: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How the stage is sampled unless the command says otherwise.

    Attributes:
      name: "ddpm" (ancestral, paper Eq. 6), "ddim" (Eq. 5) or "dpmpp"
        (DPM-Solver++(2M), of second order: for few steps).
      steps: network evaluations (with guidance, pairs of them).
      schedule: "trained", "cosine" or "linear": what turns even times into log-SNRs.
      grid: "time", steps even in time, or "logsnr", even in log-SNR.
      logsnr_min: where sampling starts, if the training's clip is lower.
      logsnr_max: where it ends, if the training's clip is higher.
      gamma: stochasticity of "ddpm": 0 takes the lower, 1 the upper variance.
      guidance: w of Eq. 2; 1 is no guidance.
      guidance_schedule: w of each step, from the noisiest on, instead of one for all;
        () for none. Steps of 1 run the network once.
      guidance_batched: whether the two passes of guidance are one call on twice the
        batch, or two calls with half of the activations at a time.
      threshold: of the guided x0: "none", "static" or "dynamic".
      percentile: of |x0| for "dynamic" (paper A.10: 99.5).
      aug_level: time in [0, 1] of the noise on the low-resolution input.
      batch_size: pictures in one call of the compiled sampler.
    """

    name: str = "ddpm"
    steps: int = 256
    schedule: str = "trained"
    grid: str = "time"
    logsnr_min: float = -20.0
    logsnr_max: float = 20.0
    gamma: float = 0.1
    guidance: float = 1.0
    guidance_schedule: tuple[float, ...] = ()
    guidance_batched: bool = True
    threshold: str = "dynamic"
    percentile: float = 99.5
    aug_level: float = 0.1
    batch_size: int = 64


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage of a cascade; stages differ in values only.

    Attributes:
      name: of the stage, for logs.
      image_size: pixels of a side of what the stage makes.
      lowres_size: pixels of a side of the stage's input picture; 0 for a base.
      crop_size: side of the square cut from the picture in training; 0 for none.
    """

    name: str = "base"
    image_size: int = 64
    lowres_size: int = 0
    crop_size: int = 0
    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    data: DataConfig = DataConfig()
    text: TextConfig = TextConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    mesh: MeshConfig = MeshConfig()
    sampler: SamplerConfig = SamplerConfig()

    def __post_init__(self):
        check_stage(self)

    @property
    def train_size(self) -> int:
        """Side of the pictures that reach the training step."""
        return self.crop_size or self.image_size

    @property
    def train_lowres_size(self) -> int:
        """Side of the low-resolution input in training; 0 for a base."""
        return self.train_size * self.lowres_size // self.image_size


def from_dict(values: Mapping[str, Any]) -> StageConfig:
    """Freezes a nested mapping into a `StageConfig`.

    Args:
      values: groups and fields; what is left out keeps its default.

    Raises:
      UserError: for an unknown key (with the nearest right one) or a wrong type.
    """
    return _freeze(StageConfig, values, "config")


def _freeze(cls, values, path):
    if not isinstance(values, Mapping):
        raise UserError(f"{path} is {values!r}; it must be a group of fields")
    hints = typing.get_type_hints(cls)
    kwargs = {}
    for key, value in values.items():
        if key not in hints:
            raise UserError(f"{path}.{key} does not exist{did_you_mean(key, hints)}")
        kind = hints[key]
        where = f"{path}.{key}"
        if dataclasses.is_dataclass(kind):
            kwargs[key] = _freeze(kind, value, where)
        elif typing.get_origin(kind) is tuple:
            if not isinstance(value, (list, tuple)):
                raise UserError(f"{where} is {value!r}; it must be a tuple")
            item = typing.get_args(kind)[0]
            kwargs[key] = tuple(_cast(v, item, where) for v in value)
        else:
            kwargs[key] = _cast(value, kind, where)
    return cls(**kwargs)


def _cast(value, kind, where):
    # bool is an int in Python, so `True` must not pass for a count.
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise UserError(
            f"{where} is {value!r} ({type(value).__name__}); "
            f"it must be of type {kind.__name__}"
        )
    return value


def to_json(cfg: StageConfig) -> str:
    """The inverse of `from_json`: every field, sorted as declared."""
    return json.dumps(dataclasses.asdict(cfg), indent=2) + "\n"


def from_json(text: str, where: str = "config.json") -> StageConfig:
    """Reads what `to_json` wrote.

    Raises:
      UserError: when `text` (which came from the file `where`) is no such config.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON: {error}") from None
    return from_dict(values)


def difference(old: StageConfig, new: StageConfig) -> list[str]:
    """Lines "model.dropout: 0.0 -> 0.1" for every field that differs."""
    return _difference(dataclasses.asdict(old), dataclasses.asdict(new), "")


def _difference(old, new, path):
    lines = []
    for key in old:
        if isinstance(old[key], dict):
            lines += _difference(old[key], new[key], f"{path}{key}.")
        elif old[key] != new[key]:
            lines.append(f"{path}{key}: {old[key]!r} -> {new[key]!r}")
    return lines
