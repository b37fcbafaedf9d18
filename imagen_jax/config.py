"""The config of a stage: frozen, hashable dataclasses, checked when they are made.

`configs/*.py` build an `ml_collections.ConfigDict` with these groups and fields, and
`from_dict` freezes it. A checkpoint carries its stage's `to_json`, so that sampling
never restates an architecture. A field's type says what it takes: one of some words, or
a number in an interval ("[0, 1)" holds 0 but not 1; none holds NaN or an infinity).
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

from imagen_jax.errors import UserError, did_you_mean
from imagen_jax.validate import check_stage

Count = Annotated[int, "[1, inf)"]
CountOrZero = Annotated[int, "[0, inf)"]
Size = Annotated[int, "[1, 65536]"]
SizeOrZero = Annotated[int, "[0, 65536]"]
Devices = Annotated[int, "[-1, inf)"]
Real = Annotated[float, "(-inf, inf)"]
Positive = Annotated[float, "(0, inf)"]
PositiveOrZero = Annotated[float, "[0, inf)"]
Share = Annotated[float, "[0, 1]"]
Rate = Annotated[float, "[0, 1)"]
# Beyond these the signal or the noise is lost to float32.
LogSNR = Annotated[float, "[-80, 80]"]

# Keys of earlier versions: the value that changes nothing, and advice for any other.
_STACKED = "its parameters are stacked; use the version that trained it, or train anew"
_REMOVED = {("model", "scan_blocks"): (False, _STACKED)}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network. Tuples have one entry per resolution level, the finest first.

    Attributes:
      architecture: the U-Net of ADM (paper F.1) or the Efficient U-Net (paper B.1).
      channels, num_res_blocks: width and number of residual blocks of each level.
      self_attention: whether a level attends to its own pixels.
      text_attention: whether a level attends to the text.
      text_conditioning: paper D.3.1. "concatenate" appends the text's keys and values
        to those of self-attention, "cross" attends to it afterwards. With the others no
        level attends to the text, which is only pooled and added to the time embedding
        (all but "mean_pool" pool it by attention).
      text_features: width the text is projected to first; 0 leaves it as it is.
      text_norm: whether attention and pooling layer-normalise the text first.
      head_channels: channels of one attention head.
      skip_scale: factor on the sums of residual and attention blocks (B.1: 0.5**0.5).
      skips: whose outputs a level of the Efficient U-Net hands to the way up
        ("last_block": Fig. A.29).
      patch_size: side of the squares of pixels folded into channels before the first
        convolution (space-to-depth); 1 is the paper's network.
      dropout: rate inside residual blocks.
      dtype: type that is computed in; parameters are float32.
      remat: what the backward pass recomputes: "activations", all but convolutions and
        matrix products, or "blocks", all but the input of each block.
    """

    architecture: Literal["unet", "efficient_unet"] = "unet"
    channels: tuple[Size, ...] = (512, 1024, 1536, 2048)
    num_res_blocks: tuple[Size, ...] = (3, 3, 3, 3)
    self_attention: tuple[bool, ...] = (False, True, True, True)
    text_attention: tuple[bool, ...] = (False, True, True, True)
    text_conditioning: Literal[
        "concatenate", "cross", "attention_pool", "mean_pool"
    ] = "concatenate"
    text_features: SizeOrZero = 0
    text_norm: bool = True
    head_channels: Size = 64
    skip_scale: Positive = 1.0
    skips: Literal["every_block", "last_block"] = "every_block"
    patch_size: Size = 1
    dropout: Rate = 0.0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    remat: Literal["none", "activations", "blocks"] = "none"


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """The forward process, and what the network predicts.

    Attributes:
      schedule: continuous in time; "linear" is in beta, from 1e-4 to 0.02.
      weighting: weight of the squared error at each log-SNR (`diffusion/loss.py`).
      min_snr_gamma: SNR above which "min_snr" no longer counts the error of x0 more.
      sigmoid_bias: log-SNR at which "sigmoid" is one half.
      logsnr_min, logsnr_max: bounds to which the schedule's log-SNR is clipped.
      text_dropout: share of captions replaced by the null text (paper 4.1: 0.1).
      lowres_augmentation: noises the low-resolution input and says how much (2.4).
    """

    schedule: Literal["cosine", "linear"] = "cosine"
    prediction: Literal["eps", "x0", "v"] = "eps"
    weighting: Literal["plain", "min_snr", "sigmoid"] = "plain"
    min_snr_gamma: Positive = 5.0
    sigmoid_bias: LogSNR = 2.0
    logsnr_min: LogSNR = -20.0
    logsnr_max: LogSNR = 20.0
    text_dropout: Share = 0.1
    lowres_augmentation: bool = True


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The examples.

    Attributes:
      records: a folder that `prepare` wrote, a .npz file of it (read without
        TensorFlow), "tfds:NAME", or a mixture: "DIR:WEIGHT,DIR:WEIGHT".
      shuffle_examples: examples in the shuffle buffers of all readers and folders.
      readers: readers of the records over all hosts, each for its part of a batch: a
        divisor of the batch size, at least the number of hosts (docs/prepare.md). The
        order of the examples depends on it. 0 takes 8 or fewer, as the records allow.
      seed: seed of the order of the examples and of their crops.
      square: which square of an image is trained on; a random one changes every epoch.
      flip: whether a random half of the images is mirrored in each epoch. Captions that
        tell left from right are then wrong half of the time.
    """

    records: str = ""
    shuffle_examples: Count = 10_000
    readers: CountOrZero = 0
    seed: int = 0
    square: Literal["middle", "random"] = "middle"
    flip: bool = False


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The text embeddings that the stage is trained on.

    Attributes:
      length: tokens per caption after padding; longer ones are cut. 0: the records'.
      dim: width of one token's embedding (T5-XXL: 4096). 0: the records'.
      encoder: identity of the frozen encoder; "" until the records are read.
    """

    length: SizeOrZero = 0
    dim: SizeOrZero = 0
    encoder: str = ""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer, learning-rate schedule and EMA.

    Attributes:
      learning_rate: peak of the schedule.
      warmup_steps: steps of the linear rise from 0 to the peak.
      decay_steps: step at which a cosine has brought the rate to 0; 0 keeps the peak.
      b1, b2, eps: Adam's.
      parameter_scale: scales Adafactor's steps by the parameter's root mean square.
      clip_norm: global gradient norm above which gradients are scaled down.
      ema_decay: decay of the averaged parameters, reached after a warm-up.
    """

    name: Literal["adam", "adafactor"] = "adam"
    learning_rate: Positive = 1e-4
    warmup_steps: CountOrZero = 10_000
    decay_steps: CountOrZero = 2_500_000
    b1: Rate = 0.9
    b2: Rate = 0.999
    eps: PositiveOrZero = 1e-8
    parameter_scale: bool = True
    clip_norm: Positive = 1.0
    ema_decay: Share = 0.9999


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The training loop.

    Attributes:
      batch_size: images per step, over all devices and hosts.
      microbatches: sequential parts of a batch: less memory, the same gradient.
      steps: number of the last step.
      seed: seed of the first parameters and of the training noise.
      log_every_steps: steps between two lines of metrics.jsonl.
      sample_every_steps: steps between two preview grids; 0 makes none.
      checkpoint_every_steps: steps between two checkpoints; the last step always saves.
      keep_checkpoints: number of newest checkpoints that are kept.
      keep_every_steps: checkpoints at its multiples are kept too; 0 for none.
      keep_best_checkpoints: number with the lowest `best_metric` that are kept too.
      best_metric: a loss in metrics.jsonl, averaged over the steps since the checkpoint
        before: "loss" or "loss_by_logsnr/RANGE".
      init_from: workdir (averaged parameters) or `export` to start from; "" for none.
      preview_images: images of a preview grid.
      spike_factor: updates are skipped whose loss or gradient norm is above this
        multiple of its running average over 100 updates; 0 skips only those that are
        not finite.
      skip_budget_steps: skipped updates, less a tenth of the others, at which the run
        gives up; 0 never gives up.
      on_spent_budget: "rollback" goes on from the newest checkpoint with the next data
        and noise; both leave a bundle for --replay.
      hang_seconds: a step that takes longer has the stacks of all threads printed to
        stderr; 0 never prints.
    """

    batch_size: Count = 2048
    microbatches: Count = 1
    steps: Count = 2_500_000
    seed: int = 0
    log_every_steps: Count = 100
    sample_every_steps: CountOrZero = 10_000
    checkpoint_every_steps: Count = 5_000
    keep_checkpoints: Count = 3
    keep_every_steps: CountOrZero = 0
    keep_best_checkpoints: CountOrZero = 0
    best_metric: str = "loss"
    init_from: str = ""
    preview_images: Count = 16
    spike_factor: PositiveOrZero = 0.0
    skip_budget_steps: CountOrZero = 20
    on_spent_budget: Literal["stop", "rollback"] = "stop"
    hang_seconds: CountOrZero = 600


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 takes all that are left.

    Attributes:
      data: copies of the model, each with its share of the batch.
      fsdp: shards of parameters, optimizer state and EMA, and of the batch.
      spatial: shards of an image's rows; neighbours exchange the rows at borders.
      tensor: shards of channels and heads.
    """

    data: Devices = -1
    fsdp: Devices = 1
    spatial: Devices = 1
    tensor: Devices = 1


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How the stage is sampled unless the command says otherwise.

    Attributes:
      name: "ddpm" (ancestral, paper Eq. 6), "ddim" (Eq. 5) or "dpmpp"
        (DPM-Solver++(2M), second order: for few steps).
      steps: network evaluations; with guidance, pairs of them.
      schedule: maps even times to log-SNRs; "trained" is the training's.
      grid: what the steps are even in.
      logsnr_min, logsnr_max: where sampling starts and ends, within the training's.
      gamma: stochasticity of "ddpm": 0 takes the lower, 1 the upper variance.
      guidance: w of Eq. 2; 1 is no guidance.
      guidance_schedule: w of each step, the noisiest first; () for one w. Steps with
        w = 1 run the network once.
      guidance_batched: makes the two passes of guidance one call on twice the batch,
        not two calls with half of the activations at a time.
      percentile: percentile of |x0| for the "dynamic" threshold (paper A.10: 99.5).
      aug_level: time of the forward process that the low-resolution input is noised to.
      batch_size: images in one call of the compiled sampler.
    """

    name: Literal["ddpm", "ddim", "dpmpp"] = "ddpm"
    steps: Size = 256
    schedule: Literal["trained", "cosine", "linear"] = "trained"
    grid: Literal["time", "logsnr"] = "time"
    logsnr_min: LogSNR = -20.0
    logsnr_max: LogSNR = 20.0
    gamma: Share = 0.1
    guidance: Real = 1.0
    guidance_schedule: tuple[Real, ...] = ()
    guidance_batched: bool = True
    threshold: Literal["none", "static", "dynamic"] = "dynamic"
    percentile: Annotated[float, "(0, 100]"] = 99.5
    aug_level: Share = 0.1
    batch_size: Size = 64


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage of a cascade; stages differ in values only.

    Attributes:
      name: shown in logs.
      image_size: side of the images that the stage makes, in pixels.
      lowres_size: side of the stage's input images, in pixels; 0 for a base.
      crop_size: side of the square cut from the image in training; 0 for none.
    """

    name: str = "base"
    image_size: Size = 64
    lowres_size: SizeOrZero = 0
    crop_size: SizeOrZero = 0
    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    data: DataConfig = DataConfig()
    text: TextConfig = TextConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    mesh: MeshConfig = MeshConfig()
    sampler: SamplerConfig = SamplerConfig()

    def __post_init__(self):
        for field in dataclasses.fields(self):
            _cast(field.type, getattr(self, field.name), f"config.{field.name}")
        check_stage(self)

    @property
    def train_size(self) -> int:
        """Side of the images that reach the training step."""
        return self.crop_size or self.image_size

    @property
    def train_lowres_size(self) -> int:
        """Side of the low-resolution input in training; 0 for a base."""
        return self.train_size * self.lowres_size // self.image_size


def from_dict(values: Mapping[str, Any]) -> StageConfig:
    """Freezes nested groups and fields; what is left out keeps its default.

    Raises:
      UserError: for an unknown key (naming the nearest right one) or a wrong value.
    """
    return _cast(StageConfig, values, "config")


def from_json(text: str | Mapping | None, where: str = "config.json") -> StageConfig:
    """Reads what `to_json` wrote (or that, parsed), in this version or an earlier one.

    Raises:
      UserError: when the content of the file `where` is no config for this version.
    """
    try:
        values = json.loads(text) if isinstance(text, str) else text
        for (group, key), (kept, advice) in _REMOVED.items():
            fields = values.get(group) if isinstance(values, dict) else None
            value = fields.pop(key, kept) if isinstance(fields, dict) else kept
            if value != kept:
                raise UserError(f"config.{group}.{key} is {value!r}; {advice}")
        return from_dict(values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON: {error}") from None


def to_json(cfg: StageConfig) -> str:
    """Every field, in the order of declaration."""
    return json.dumps(dataclasses.asdict(cfg), indent=2) + "\n"


def difference(old: Any, new: Any, path: str = "") -> list[str]:
    """Lines "model.dropout: 0.0 -> 0.1" for every field of two stages that differs."""
    lines = []
    for name, before in vars(old).items():
        after = getattr(new, name)
        if dataclasses.is_dataclass(before):
            lines += difference(before, after, f"{path}{name}.")
        elif before != after:
            lines.append(f"{path}{name}: {before!r} -> {after!r}")
    return lines


def _cast(kind, value, path):
    """`value` as `kind`: a mapping becomes a group, a list a tuple, an int a float."""
    if dataclasses.is_dataclass(kind):
        value = vars(value) if isinstance(value, kind) else value
        if not isinstance(value, Mapping):
            raise UserError(f"{path} is {value!r}; it must be a group of fields")
        types = {field.name: field.type for field in dataclasses.fields(kind)}
        for key in value:
            if key not in types:
                hint = did_you_mean(key, types)
                raise UserError(f"{path}.{key} does not exist{hint}")
        return kind(**{k: _cast(types[k], v, f"{path}.{k}") for k, v in value.items()})
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{path} is {value!r}; it must be a tuple")
        return tuple(_cast(get_args(kind)[0], item, path) for item in value)
    if get_origin(kind) is Literal:
        words = get_args(kind)
        if value not in words:
            hint = did_you_mean(str(value), words)
            raise UserError(f"{path} is {value!r}; it takes one of {list(words)}{hint}")
        return value
    interval = getattr(kind, "__metadata__", ("",))[0]
    kind = getattr(kind, "__origin__", kind)
    if kind is float and type(value) is int:
        value = float(value)
    # Not isinstance: a bool is an int in Python, and must not pass for a count.
    if type(value) is not kind:
        what = f"{value!r} ({type(value).__name__})"
        raise UserError(f"{path} is {what}; it must be of type {kind.__name__}")
    if interval and not _lies_in(value, interval):
        raise UserError(f"{path} is {value!r}; it must be in {interval}")
    return value


def _lies_in(value, interval):
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    return above and (value <= high if interval[-1] == "]" else value < high)
