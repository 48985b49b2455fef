"""The options of a training run."""

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Self

from .._files import CONFIG_FILE as CONFIG_FILE
from .._files import read_json_object
from .loss_config import LossConfig, check_loss, require
from .option_types import convert_options, option_types

# what a resumed run may change: its length, and what does not change what it learns; `out` and `resume` only say where
# the run folder is, and `data` where its images are, whose content is compared
FREE_ON_RESUME = {"data", "out", "resume", "epochs", "device", "workers", "cache", "log", "shard", "strict"}
FREE_ON_RESUME |= {"log_every", "checkpoint_every"}
FROM_ZERO = frozenset({"warmup_steps", "workers", "beta_delay", "capacity_steps"})
MOST = 2**31 - 1  # sizes and numbers of steps, so that no product of two of them overflows int64
SEEDS = 2**64


@dataclass(frozen=True)
class TrainConfig(LossConfig):
    """Everything that decides a training run; the same config gives the same weights, bit for bit, on one CPU.

    Raises:
        ValueError: an option is outside its range (says which, and what is allowed).
    """

    data: str = "fashion-mnist"
    """Images to learn: "fashion-mnist" (comes with fastvae), "photos" (colour crops of photographs that scikit-image
    and scikit-learn carry), a folder of images, x.npy, x.npz, idx:DIR or hf:NAME[:SPLIT[:COLUMN]]. A run keeps the
    absolute path, and a resumed run checks that the images are the same wherever they lie."""
    out: Path | None = None
    """Run folder to create; runs/DATA-TIMESTAMP if not given. Nothing is ever overwritten in it."""
    resume: Path | None = None
    """Run folder to continue from its last checkpoint; the other options are taken from it. More --epochs extend it."""
    init_from: Path | None = None
    """Run folder (or its folder best, or one of save_pretrained) whose weights a new run starts from."""
    image_size: tuple[int, int] | None = None
    """Height and width to resize every image to, cropped at the centre where its aspect ratio differs; the images' own
    size if not given."""
    flip: bool = False
    """Mirror half of the training images left to right, drawn anew in each epoch."""
    strict: bool = False
    """Stop at a damaged image, or at a folder that cannot be listed, instead of leaving it out and listing it in
    skipped.json."""
    validation: float = 0.1
    """Share of the images held out for validation; which images does not depend on the seed."""
    epochs: int = 20
    """Passes over the training images."""
    batch_size: int = 64
    """Images in a training step, of all processes together; those that fill no last batch wait for another epoch."""
    accumulate: int = 1
    """Parts that each process computes its share of a batch in, one after the other, to need less memory."""
    learning_rate: float = 4e-3
    """Peak learning rate of AdamW."""
    warmup_steps: int = 100
    """Steps of linear warm-up before the cosine decay, at most a tenth of the run."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    clip_norm: float = 100.0
    """Largest norm of the gradient; a larger one is scaled down to it."""
    ema: float = 0.995
    """Decay of an average of the weights over the steps, to evaluate, draw and export; smaller in the first steps. 0
    averages nothing."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the model: fp32, or autocast to bf16 or fp16 (fp16 with loss scaling)."""
    seed: int = 0
    """Seed of the weights, the noise and the order of the images."""
    device: str = "auto"
    """Where to train: "auto" (the accelerator if there is one, else the CPU), "cpu", "cuda", "cuda:1", "mps", ..."""
    workers: int = 0
    """Processes that load images; 0 loads them in the training process."""
    cache: Literal["auto", "device", "none"] = "auto"
    """Where training images stay between epochs: "device" keeps them there (on a CPU, in its memory), "none" loads them
    anew, "auto" keeps them on an accelerator with room for four times as much."""
    log_every: int = 20
    """Steps between two lines of training metrics."""
    checkpoint_every: int = 200
    """Steps between two checkpoints; the last step is always saved."""
    log: Literal["tensorboard", "csv"] | None = None
    """Write the figures of metrics.jsonl for other programs too: "tensorboard" with pictures and options, or "csv"."""
    backbone: Literal["conv", "mlp", "autoencoder_kl"] = "conv"
    """Encoder and decoder: convolutional, fully connected, or the residual autoencoder of latent diffusion."""
    latent_dim: int = 32
    """Dimensions of the latent space."""
    width: int = 32
    """Channels of the first convolutional stage (conv)."""
    residual: bool = True
    """Residual blocks, and no checkerboard in the images; without them a step is faster (conv)."""
    hidden: int = 400
    """Units of the hidden layers (mlp)."""
    latent_channels: int = 4
    """Channels of the latent map (autoencoder_kl)."""
    channels_last: bool = False
    """Keep images and convolutions in the memory format that tensor cores convolve fastest in; CPUs gain by it from
    about 64 x 64 pixels on, and lose below."""
    shard: bool = False
    """Under torchrun: spread weights, gradients and optimizer state over the processes (FSDP2) instead of keeping
    copies of them."""
    compile: bool = False
    """Let torch.compile generate code for the model and its loss."""
    checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""

    def __post_init__(self) -> None:
        convert_options(self)
        for name, option in option_types(type(self)).items():
            value = getattr(self, name)
            if option.kind is int and option.length is None and value is not None and name != "seed":
                least = 0 if name in FROM_ZERO else 1
                require(value >= least, self, name, f"at least {least}")
                require(value <= MOST, self, name, f"at most {MOST}")
        require(0 <= self.seed < SEEDS, self, "seed", "at least 0 and below 2**64")
        for name in ("learning_rate", "clip_norm"):
            require(getattr(self, name) > 0, self, name, "a positive finite number")
        require(self.weight_decay >= 0, self, "weight_decay", "a finite number, at least 0")
        require(0 <= self.ema < 1, self, "ema", "at least 0 and below 1")
        require(0 < self.validation < 1, self, "validation", "between 0 and 1, both excluded")
        size = self.image_size
        require(size is None or min(size) >= 1, self, "image_size", "two sizes of at least 1")
        require(size is None or max(size) <= MOST, self, "image_size", f"two sizes of at most {MOST}")
        unscaled = not (self.shard and self.precision == "fp16")
        require(unscaled, self, "precision", "fp32 or bf16 with shard, where the losses have no common scale")
        check_loss(self)

    def to_json(self) -> dict[str, Any]:
        """The options as plain JSON values; what `from_json` reads."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The config that `to_json` wrote, in this version or a former one, whose defaults were others.

        Raises:
            ValueError: a name is no option of this version, or its value is not allowed.
        """
        unknown = sorted(values.keys() - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(
                f"a run's config has options that this version of fastvae does not know: {', '.join(unknown)}. "
                "Use the version that wrote it."
            )
        if "residual" not in values:
            former = {"residual": False, "ema": 0.0} | ({"likelihood": "l2"} if values.get("preset") is None else {})
            values = values | {name: value for name, value in former.items() if values.get(name) is None}
        return cls(**values)

    @classmethod
    def from_run(cls, run: Path) -> Self:
        """The config of a run folder, set to resume it.

        Raises:
            FileNotFoundError: the folder holds no run.
            ValueError: its config.json cannot be read.
        """
        values = read_run_config(run)
        try:
            return replace(cls.from_json(values), out=None, resume=run)
        except ValueError as error:
            raise ValueError(f"{run / CONFIG_FILE}: {error}") from error

    def require_same(self, other: Self, owner: str) -> None:
        """Check that `other` would learn what this config learns; `owner` says in the error whose config this is.

        Raises:
            ValueError: names the options that differ, with both values.
        """
        different = [
            f"{field.name} was {getattr(self, field.name)!r}, now {getattr(other, field.name)!r}"
            for field in fields(self)
            if field.name not in FREE_ON_RESUME and getattr(self, field.name) != getattr(other, field.name)
        ]
        if different:
            raise ValueError(
                f"{owner} has other options: {'; '.join(different)}. Leave them as they were, or start a new run."
            )


def read_run_config(run: Path) -> dict[str, Any]:
    """The JSON object in a run folder's config.json.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a JSON object.
    """
    path = run / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{run} is not a run folder: it has no {CONFIG_FILE}. Pass a folder that training made."
        )
    return read_json_object(path)
