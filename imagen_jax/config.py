"""The config of a stage: frozen, hashable dataclasses, checked when they are made.

`configs/*.py` build an `ml_collections.ConfigDict` with these groups and fields, and
`from_dict` freezes it. A checkpoint carries its stage's `to_json`, so that sampling
never restates an architecture. A field's type says what it takes: one of a fixed set of
words, or a number in an interval ("[0, 1)" holds 0 but not 1; none holds NaN or what is
infinite as a float32).
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
# 32 bits, with a sign or without: of more, jax would take the lowest.
Seed = Annotated[int, "[-2147483648, 4294967295]"]
# Far beyond any use; its products with a network's estimates stay finite.
Guidance = Annotated[float, "[-1000, 1000]"]
Steps = Annotated[int, "[-1, inf)"]
Positive = Annotated[float, "(0, inf)"]
PositiveOrZero = Annotated[float, "[0, inf)"]
Share = Annotated[float, "[0, 1]"]
Rate = Annotated[float, "[0, 1)"]
# Beyond these the signal or the noise is lost to float32.
LogSNR = Annotated[float, "[-80, 80]"]

# Fields that also take "own:NAME", which the user's code has put into
# `models.network.ARCHITECTURES` or `diffusion.sampler.STEPS`.
_OWN = ("config.model.architecture", "config.sampler.name")
# Where numbers end whose interval does not: as devices compute and count.
_MOST = {float: 3e38, int: 2**31 - 1}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network. Tuples have one entry per resolution level, the finest first."""

    # The U-Net of ADM (paper F.1), the Efficient U-Net (paper B.1), or "own:NAME"
    # (docs/extending.md).
    architecture: Literal["unet", "efficient_unet"] = "unet"
    # Width and number of residual blocks of each level.
    channels: tuple[Size, ...] = (512, 1024, 1536, 2048)
    num_res_blocks: tuple[Size, ...] = (3, 3, 3, 3)
    # Whether a level attends to its own pixels, and to the text.
    self_attention: tuple[bool, ...] = (False, True, True, True)
    text_attention: tuple[bool, ...] = (False, True, True, True)
    # Paper D.3.1. "concatenate" appends the text's keys and values to those of
    # self-attention, "cross" attends to it afterwards. With the others no level attends
    # to the text, which is only pooled and added to the time embedding (all but
    # "mean_pool" pool it by attention).
    text_conditioning: Literal[
        "concatenate", "cross", "attention_pool", "mean_pool"
    ] = "concatenate"
    # Width that the text is projected to first; 0 leaves it as it is.
    text_features: SizeOrZero = 0
    text_norm: bool = True  # attention and pooling layer-normalise the text first
    head_channels: Size = 64  # channels of one attention head
    # Factor on the sums of residual and attention blocks (B.1: 0.5**0.5).
    skip_scale: Positive = 1.0
    # Whose outputs a level of the Efficient U-Net hands to the way up ("last_block":
    # Fig. A.29).
    skips: Literal["every_block", "last_block"] = "every_block"
    # Side of the squares of pixels folded into channels before the first convolution
    # (space-to-depth); 1 is the paper's network.
    patch_size: Size = 1
    dropout: Rate = 0.0  # inside residual blocks
    # Type that is computed in; parameters are float32.
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    # What the backward pass recomputes: "activations", all but convolutions and matrix
    # products, or "blocks", all but the input of each block.
    remat: Literal["none", "activations", "blocks"] = "none"


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """The forward process, and what the network predicts."""

    # Continuous in time; "linear" is in beta, from 1e-4 to 0.02.
    schedule: Literal["cosine", "linear"] = "cosine"
    prediction: Literal["eps", "x0", "v"] = "eps"  # what the network predicts
    # Weight of the squared error at each log-SNR (`diffusion/loss.py`).
    weighting: Literal["plain", "min_snr", "sigmoid"] = "plain"
    # SNR above which "min_snr" no longer counts the error of x0 more.
    min_snr_gamma: Positive = 5.0
    sigmoid_bias: LogSNR = 2.0  # log-SNR at which "sigmoid" is one half
    # Bounds to which the schedule's log-SNR is clipped.
    logsnr_min: LogSNR = -20.0
    logsnr_max: LogSNR = 20.0
    # Share of captions replaced by the null text (paper 4.1: 0.1).
    text_dropout: Share = 0.1
    # Noises the low-resolution input, and tells the network how much (2.4).
    lowres_augmentation: bool = True


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The examples."""

    # A folder that `prepare` wrote, a .npz file of it (read without TensorFlow),
    # "tfds:NAME", or a mixture: "DIR:WEIGHT,DIR:WEIGHT".
    records: str = ""
    # Examples in the shuffle buffers of all readers and folders.
    shuffle_examples: Count = 10_000
    # Readers of the records over all hosts, each for its part of a batch: a divisor of
    # the batch size, at least the number of hosts (docs/prepare.md). The order of the
    # examples depends on it. 0 takes 8 or fewer, as the records allow.
    readers: CountOrZero = 0
    seed: Seed = 0  # of the order of the examples and of their crops
    # Which square of an image is trained on; a random one changes every epoch.
    square: Literal["middle", "random"] = "middle"
    # Mirrors a random half of the images in each epoch. Captions that tell left from
    # right are then wrong half of the time.
    flip: bool = False
    # Tests of scores that records must pass, as ('aesthetic>=5', 'nsfw<0.5').
    filter: tuple[str, ...] = ()
    # Share of records, drawn by their numbers, that is never trained on.
    heldout_share: Rate = 0.0
    # Records that cannot be decoded are told, and others take their places; more on a
    # host stop the run.
    max_damaged: CountOrZero = 100


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The text embeddings that the stage is trained on."""

    # Tokens per caption after padding; longer ones are cut. 0: the records'.
    length: SizeOrZero = 0
    # Width of one token's embedding (T5-XXL: 4096). 0: the records'.
    dim: SizeOrZero = 0
    # Identity of the frozen encoder; "" until the records are read.
    encoder: str = ""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer, learning-rate schedule and EMA."""

    name: Literal["adam", "adafactor"] = "adam"  # "adafactor": the paper's base
    learning_rate: Positive = 1e-4  # peak of the schedule
    warmup_steps: CountOrZero = 10_000  # of the linear rise from 0 to the peak
    # Step at which a cosine has brought the rate to 0: 0 for training.steps, the last
    # one; -1 keeps the peak.
    decay_steps: Steps = 0
    b1: Rate = 0.9  # these three are Adam's
    b2: Rate = 0.999
    eps: PositiveOrZero = 1e-8
    # Scales Adafactor's steps by the parameter's root mean square.
    parameter_scale: bool = True
    clip_norm: Positive = 1.0  # global gradient norm above which gradients are scaled
    ema_decay: Share = 0.9999  # of the averaged parameters, reached after a warm-up


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The training loop."""

    batch_size: Count = 2048  # images per step, over all devices and hosts
    # Sequential parts of a batch: less memory, the same gradient.
    microbatches: Count = 1
    steps: Count = 2_500_000  # number of the last step
    seed: Seed = 0  # of the first parameters and of the training noise
    log_every_steps: Count = 100  # steps between two lines of metrics.jsonl
    sample_every_steps: CountOrZero = 10_000  # between two preview grids; 0 makes none
    # Steps between two checkpoints; the last step always saves.
    checkpoint_every_steps: Count = 5_000
    keep_checkpoints: Count = 3  # the newest ones
    keep_every_steps: CountOrZero = 0  # and those at its multiples; 0 for none
    keep_best_checkpoints: CountOrZero = 0  # and those with the lowest `best_metric`
    # A loss in metrics.jsonl: "heldout_loss", "heldout_ema_loss" or one of their
    # ranges; or, averaged over the steps since the checkpoint before, "loss" or
    # "loss_by_logsnr/RANGE".
    best_metric: str = "loss"
    # Workdir (averaged parameters), `export` or .safetensors file to start from; ""
    # for none.
    init_from: str = ""
    # Steps between two measures of the held-out loss; 0: at each checkpoint.
    heldout_every_steps: CountOrZero = 0
    heldout_images: Count = 1024  # examples that it is of, in whole batches
    preview_images: Count = 16  # examples of a preview grid
    # Captions of your own that previews show, too: ('a red circle', 'two squares').
    preview_prompts: tuple[str, ...] = ()
    # File or folder of the text encoder of these, if it has none built in.
    encoder_weights: str = ""
    # Updates are skipped whose loss or gradient norm is above this multiple of its
    # running average over 100 updates; 0 skips only those that are not finite.
    spike_factor: PositiveOrZero = 0.0
    # Skipped updates, less a tenth of the others, at which the run gives up; 0: never.
    skip_budget_steps: CountOrZero = 20
    # "rollback" goes on from the newest checkpoint with the next data and noise; both
    # leave a bundle for --replay.
    on_spent_budget: Literal["stop", "rollback"] = "stop"
    # A step that takes longer has the stacks of all threads printed to stderr; 0 never.
    hang_seconds: CountOrZero = 600


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 takes all that are left."""

    data: Devices = -1  # copies of the model, each with its share of the batch
    # Shards of parameters, optimizer state and EMA, and of the batch.
    fsdp: Devices = 1
    # Shards of an image's rows; neighbours exchange the rows at borders.
    spatial: Devices = 1
    tensor: Devices = 1  # shards of channels and heads


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How the stage is sampled unless the command says otherwise."""

    # "ddpm" (ancestral, paper Eq. 6), "ddim" (Eq. 5) or "dpmpp" (DPM-Solver++(2M),
    # second order: for few steps); "own:NAME" (docs/extending.md).
    name: Literal["ddpm", "ddim", "dpmpp"] = "ddpm"
    steps: Size = 256  # network evaluations; with guidance, pairs of them
    # Maps even times to log-SNRs; "trained" is the training's.
    schedule: Literal["trained", "cosine", "linear"] = "trained"
    grid: Literal["time", "logsnr"] = "time"  # what the steps are even in
    # Where sampling starts and ends, within the training's.
    logsnr_min: LogSNR = -20.0
    logsnr_max: LogSNR = 20.0
    # Stochasticity of "ddpm": 0 takes the lower, 1 the upper variance.
    gamma: Share = 0.1
    guidance: Guidance = 1.0  # w of Eq. 2; 1 is no guidance
    # w of each step, the noisiest first; () for one w. Steps with w = 1 run the network
    # once.
    guidance_schedule: tuple[Guidance, ...] = ()
    # Makes the two passes of guidance one call on twice the batch, not two calls with
    # half of the activations at a time.
    guidance_batched: bool = True
    # What is done to x0 outside of [-1, 1] (paper 2.3).
    threshold: Literal["none", "static", "dynamic"] = "dynamic"
    # Percentile of |x0| for the "dynamic" threshold (paper A.10: 99.5).
    percentile: Annotated[float, "(0, 100]"] = 99.5
    # Time of the forward process that the low-resolution input is noised to.
    aug_level: Share = 0.1
    batch_size: Size = 64  # images in one call of the compiled sampler


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage of a cascade; stages differ in values only."""

    name: str = "base"  # shown in logs
    image_size: Size = 64  # side of the images that the stage makes, in pixels
    lowres_size: SizeOrZero = 0  # side of the stage's input images; 0 for a base
    crop_size: SizeOrZero = 0  # side of the square cut out in training; 0 for none
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


def from_json(values: Any, where: str) -> StageConfig:
    """The stage that `to_json` wrote, in this version or an earlier one.

    Raises:
      UserError: when the parsed content of the file `where` is no config.
    """
    groups = values if isinstance(values, dict) else {}
    model, optimizer, training = map(groups.get, ("model", "optimizer", "training"))
    # Until there was `preview_prompts`, 0 kept the peak.
    if isinstance(training, dict) and "preview_prompts" not in training:
        if isinstance(optimizer, dict) and optimizer.get("decay_steps") == 0:
            optimizer["decay_steps"] = -1
    # Earlier versions could stack the parameters of equal blocks.
    if isinstance(model, dict) and model.pop("scan_blocks", False):
        raise UserError(
            f"{where}: config.model.scan_blocks is True: the parameters are stacked; "
            "use the version that trained it, or train anew"
        )
    try:
        return from_dict(values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


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
        is_own = path in _OWN and str(value).startswith("own:")
        if value not in words and not is_own:
            hint = did_you_mean(str(value), words)
            raise UserError(f"{path} is {value!r}; it takes one of {list(words)}{hint}")
        return value
    interval = getattr(kind, "__metadata__", ("",))[0]
    kind = getattr(kind, "__origin__", kind)
    if kind is float and type(value) is int and abs(value) < _MOST[float]:
        value = float(value)
    # Not isinstance: a bool is an int in Python, and must not pass for a count.
    if type(value) is not kind:
        what = f"{value!r} ({type(value).__name__})"
        raise UserError(f"{path} is {what}; it must be of type {kind.__name__}")
    if interval and not _lies_in(value, interval):
        most = f", below {_MOST[kind]}" if "inf" in interval else ""
        raise UserError(f"{path} is {value!r}; it must be in {interval}{most}")
    return value


def _lies_in(value, interval):
    most = str(_MOST[type(value)])
    low, high = map(float, interval[1:-1].replace("inf", most).split(","))
    above = value >= low if interval[0] == "[" else value > low
    return above and (value <= high if interval[-1] == "]" else value < high)
