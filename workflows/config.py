"""The configuration of a run: typed, frozen, unknown keys refused, defaults only here.

A run's settings come from, in rising order: the defaults below, a preset, a YAML file, `--set a.b=c`. The same dotted
keys serve the command line, the search space and the search's `best.yaml`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from hvqd_model.config import EACH, ONE, ConditionName, PriorArchitecture, Settings, VQArchitecture, VQConfig

Share = Field(ge=0, lt=1)
_Scale = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _scale_form(value: object) -> str:
    return EACH if isinstance(value, dict) else ONE


OneOrByCondition = Annotated[
    Annotated[_Scale, Tag(ONE)] | Annotated[dict[ConditionName, _Scale], Tag(EACH)], Discriminator(_scale_form)
]
"""One scale of guidance, or one a condition."""


class DataSettings(Settings):
    """Where the pictures come from and what is made of them."""

    source: str = "emoji"
    """`emoji` (bundled), a folder of pictures (class = sub-folder), WebDataset tar shards, or parquet."""
    limit: int | None = Field(None, ge=2)
    """Take only this many pictures, chosen by a hash of their names; null takes all."""
    image_size: tuple[int, int] = (32, 32)
    """Height and width that every picture is resized to."""
    resize: Literal["crop", "pad", "stretch"] = "crop"
    """Keep the middle, keep everything on a background, or ignore the aspect ratio."""
    background: tuple[int, int, int] = (255, 255, 255)
    """RGB behind transparent pixels and padding."""
    min_side: int = Field(8, ge=1)
    """Pictures with a shorter side, in pixels, are rejected."""
    max_pixels: int = Field(50_000_000, ge=1)
    """Pictures with more pixels are rejected before they are decoded."""
    max_rejected_share: float = Field(0.1, ge=0, le=1)
    """The job fails when a larger share of the pictures is rejected."""
    small_classes: Literal["refuse", "drop", "keep"] = "refuse"
    """What to do with a class of a single picture."""
    validation_share: float = Field(0.06, gt=0, lt=1)
    """Share of the groups held out for early stopping and search."""
    test_share: float = Field(0.05, gt=0, lt=1)
    """Share of the groups held out for evaluation and gates."""
    image_column: str = "image"
    """Parquet: column with the encoded pictures."""
    class_column: str | None = None
    """Parquet: column with the class names."""
    group_column: str | None = None
    """Parquet: column that keeps related pictures in one split; without it every picture is its own group."""
    shard_rows: int = Field(2048, ge=1)
    """Pictures in a shard, on average."""


class TrainSettings(Settings):
    """One stage's optimisation. Progress is counted in images, so that the result does not depend on the machine."""

    images: int = Field(60_000, ge=1)
    """Training budget."""
    global_batch: int = Field(32, ge=1)
    """Images an optimizer step, over all workers."""
    micro_batch: int = Field(16, ge=1)
    """Images a worker computes at once; the rest of the global batch is accumulated."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate of AdamW."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's decay rates."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's decoupled weight decay."""
    warmup_images: int = Field(1_000, ge=0)
    """Images over which the learning rate rises linearly."""
    decay_start: float = Field(0.3, ge=0, le=1)
    """Share of the budget after which a cosine takes the learning rate down."""
    final_learning_rate_share: float = Field(0.02, ge=0, le=1)
    """Where the cosine ends, relative to the peak."""
    gradient_clip: float = Field(1.0, gt=0)
    """Largest norm of the gradient."""
    ema_half_life_images: int = Field(0, ge=0)
    """Half-life of the weights' moving average, which is what gets exported; 0 exports the weights themselves."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What DeepSpeed shards: nothing, optimizer state, also gradients, also parameters."""
    offload_optimizer: bool = False
    """Keep the optimizer state in the host's memory."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic; auto is bf16 where the processor has matrix units for it."""
    log_every_images: int = Field(1_600, ge=1)
    """Interval of logged metrics."""
    evaluate_every_images: int = Field(16_000, ge=1)
    """Interval of validation."""
    checkpoint_every_images: int = Field(16_000, ge=1)
    """Interval of checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many of the newest checkpoints stay."""


class AdversarialSettings(Settings):
    """A small network that learns to tell patches of reconstructions from real ones, against the tokenizer."""

    weight: float = Field(0.0, ge=0)
    """Strength of the adversarial gradient, relative to that of the reconstruction (0.1 to 0.8 is usual); 0 is off."""
    start: float = Field(0.5, gt=0, lt=1)
    """Share of the budget after which it begins; there must be an evaluation before, with all codebooks started."""
    learning_rate: float = Field(2e-4, gt=0)
    """Peak learning rate of its AdamW; it falls as the tokenizer's does."""
    width: int = Field(32, ge=8, multiple_of=8)
    """Channels after its first halving of the resolution, doubled at each further one."""
    halvings: int = Field(2, ge=1, le=6)
    """How often it halves the resolution: 1, 2, 3 judge patches of 12, 26, 54 pixels."""
    guard_psnr_drop: float = Field(1.0, gt=0)
    """It is switched off for good when the validation PSNR falls by more dB than this below the best from before."""


class VQTrainSettings(TrainSettings):
    """The tokenizer's optimisation."""

    codebook_start: float = Field(0.04, ge=0, lt=1)
    """Share of the budget after which the codebooks start from k-means; before it the model is a plain auto-encoder."""
    perceptual_weight: float = Field(0.0, ge=0)
    """Weight of the distance (0 to 4) of pictures in the feature maps of EfficientNet-Lite0; 0 is off."""
    perceptual_network: str | None = None
    """File with other weights for those maps (.safetensors, or a torch state dict), readable by every worker; null:
    ImageNet weights from the installed package."""
    adversarial: AdversarialSettings = AdversarialSettings()
    """The adversarial loss."""

    @model_validator(mode="after")
    def _check_adversarial(self) -> Self:
        if self.adversarial.weight == 0:
            return self
        if self.zero_stage == 3:
            raise ValueError(
                "adversarial.weight must be 0 with zero_stage=3, which hides weights that its adaptive factor needs: "
                f"{self.adversarial.weight}\nhint: set zero_stage=2, or adversarial.weight=0"
            )
        begins = self.adversarial.start * self.images
        judged = begins // self.evaluate_every_images * self.evaluate_every_images
        codebooks = self.codebook_start * self.images + self.global_batch
        if judged <= codebooks:
            raise ValueError(
                "adversarial.start must leave an evaluation between the codebooks' start and itself, for its guard: "
                f"start={self.adversarial.start} is after {begins:.0f} images, evaluate_every_images="
                f"{self.evaluate_every_images}\n"
                "hint: a later adversarial.start, or a smaller evaluate_every_images"
            )
        return self


class VQStage(Settings):
    """Stage 1: pictures <-> codes."""

    model: VQArchitecture = VQArchitecture()
    """The tokenizer."""
    train: VQTrainSettings = VQTrainSettings()
    """Its optimisation."""


class PriorStage(Settings):
    """Stage 2: codes <- noise."""

    model: PriorArchitecture = PriorArchitecture()
    """The prior."""
    train: TrainSettings = TrainSettings(learning_rate=3e-3, betas=(0.9, 0.98), ema_half_life_images=4_000)
    """Its optimisation."""
    text_encoder: str | None = None
    """Folder of the network that embeds captions (config.json, model.safetensors and tokenizer.json of a BERT sentence
    encoder), readable by every worker; null: the installed all-MiniLM-L6-v2."""


class WorkerRange(Settings):
    """How many workers a training may have; it takes as many as the cluster offers."""

    min: int = Field(1, ge=1)
    """With fewer it waits."""
    max: int = Field(ge=1)
    """More than these are of no use to it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"workers must rise from min to max: {self.min} to {self.max}\nhint: {{min: 1, max: 4}}")
        return self


def _worker_form(value: object) -> str:
    return EACH if isinstance(value, dict | WorkerRange) else ONE


Workers = Annotated[
    Annotated[int, Field(ge=1), Tag(ONE)] | Annotated[WorkerRange, Tag(EACH)], Discriminator(_worker_form)
]


class KeepSettings(Settings):
    """Checkpoints beyond the newest ones (`train.keep_checkpoints`), and how they are written."""

    best: int = Field(0, ge=0)
    """So many with the best validation figure stay, too."""
    every_images: int = Field(0, ge=0)
    """The first one at or after each multiple of this stays, too; 0 for none."""
    background: bool = True
    """Write and upload them while training goes on."""


class FaultSettings(Settings):
    """How long faults are borne, and what follows."""

    non_finite_steps: int = Field(8, ge=1)
    """So many steps in a row that are not finite lead back to the newest checkpoint."""
    setbacks: int = Field(3, ge=0)
    """So often; then the training stops with the reason."""
    setback_factor: float = Field(0.5, gt=0, lt=1)
    """Of the learning rate, after each setback."""
    hang_seconds: float = Field(600.0, gt=0)
    """A training that takes no step for so long is hung: the silent worker is named, and all start again."""
    slow_factor: float = Field(2.0, gt=1)
    """A worker whose own part of a step takes so many times the median of all is named."""
    patience_seconds: float = Field(600.0, gt=0)
    """How long a remote root or tracker may be away during training."""
    grace_seconds: float = Field(25.0, ge=0)
    """After SIGTERM or Ctrl-C, how long workers may take to write a last checkpoint."""


class ComputeSettings(Settings):
    """The machines."""

    workers: Workers = 1
    """Training processes, one a GPU where there are GPUs; or {min: 2, max: 8} for as many as there are machines. The
    global batch stays the same."""
    threads_per_worker: int = Field(1, ge=1)
    """CPU threads of a training process."""
    gpus_per_worker: int = Field(0, ge=0, le=1)
    """1 trains on GPUs with NCCL, 0 on CPUs with gloo."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile for the models' blocks while they are trained; auto is on where a GPU has Triton, below ZeRO-3."""
    address: str | None = None
    """An existing Ray cluster (`auto`, host:port, ray://…); without it a local one is started and stopped."""
    max_failures: int = Field(3, ge=-1)
    """Restarts after a lost worker before the job gives up; -1 never gives up."""
    keep: KeepSettings = KeepSettings()
    """Which checkpoints stay."""
    faults: FaultSettings = FaultSettings()
    """What is borne."""

    @property
    def most_workers(self) -> int:
        """The largest number of workers."""
        return self.workers if isinstance(self.workers, int) else self.workers.max

    @property
    def least_workers(self) -> int:
        """The smallest number of workers."""
        return self.workers if isinstance(self.workers, int) else self.workers.min


REFINED = "refine_rounds"
"""How the codes' manifest and a bundle call `encode.refine_rounds`; both leave it out where it is 0."""


class EncodeSettings(Settings):
    """How the dataset becomes codes."""

    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    """Arithmetic of the tokenizer (codebooks are fp32 always). fp32 gives the same codes on every machine of a cluster;
    auto takes bf16 where the processor is made for it, which is faster and moves a few codes."""
    refine_rounds: int = Field(0, ge=0)
    """Passes over all codes of a picture that look for better ones with the decoder: some tenths of a decibel at the
    same bits, for a hundred times the work. Holds wherever pictures are encoded: reconstruct, edit, evaluate; but a
    registered version is judged by as many as its own codes had."""


class SamplingSettings(Settings):
    """How pictures are drawn unless a command says otherwise."""

    sampler: Literal["confidence", "ancestral", "purity"] = "confidence"
    """The reverse process."""
    steps: int = Field(16, ge=1)
    """Network evaluations (twice with guidance)."""
    guidance: OneOrByCondition = 3.0
    """Classifier-free guidance; 1 is none. One number for all conditions together, or one for each, as
    {class: 3, style: 1.5}."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """[from, to] of the times, 1 pure noise and 0 clean, at which guidance acts; elsewhere a step costs half."""
    fine_guidance: float | None = Field(None, ge=0)
    """The most that the finest level is guided; the levels lie evenly between guidance at the coarsest and this. Null
    guides all alike."""
    temperature: float = Field(1.0, gt=0)
    """Of the drawn codes."""
    top_k: int | None = Field(None, ge=1)
    """Draw only among so many of the likeliest codes; null draws among all."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Draw only among the fewest codes that together have this probability; null draws among all."""
    gumbel_scale: float = Field(1.0, ge=0)
    """Noise on the order in which codes are settled (confidence, purity): more variety, less caution."""
    gaussian_sampler: Literal["ddpm", "ddim", "dpm-solver++", "heun"] = "dpm-solver++"
    """The reverse process of a prior with Gaussian noise; heun asks the network twice a step."""
    eta: float = Field(0.0, ge=0, le=1)
    """Share of fresh noise a step of ddim adds, of what ddpm would."""
    batch: int = Field(100, ge=1)
    """Pictures the network draws at once; padded, so results do not depend on how many are asked for."""

    def of_noise(self, noise: str) -> dict[str, Any]:
        """The JSON value of the settings that a prior of this noise heeds.

        Without fine_guidance where it is not asked for, as before there was such a setting: how something was judged
        or drawn then has not become another way.
        """
        others = {"gaussian_sampler", "eta"}
        if noise == "gaussian":
            others = {"sampler", "temperature", "top_k", "top_p", "gumbel_scale"}
        if self.fine_guidance is None:
            others.add("fine_guidance")
        return self.model_dump(mode="json", exclude=others)

    @model_validator(mode="after")
    def _check(self) -> Self:
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"guidance_interval must rise within 0 and 1: [{low}, {high}]\nhint: [0, 1] guides at all times"
            )
        return self


class EvaluationSettings(Settings):
    """How a pipeline is judged; part of the protocol that travels with its figures."""

    samples: int = Field(2_000, ge=2)
    """Pictures drawn from the prior."""
    baseline_samples: int = Field(500, ge=2)
    """Pictures drawn from the untrained prior."""
    feature_size: int = Field(64, ge=32)
    """Side in pixels that pictures are resized to for the feature network."""
    resamples: int = Field(500, ge=10)
    """Bootstrap resamples (over concepts) of the intervals."""
    seed: int = 1234
    """Seed of samples and resamples."""


class GateSettings(Settings):
    """What a version must show before it becomes champion; null (false for a check) leaves a gate out."""

    file: str | None = None
    """YAML file with limits that count instead of those below, and with gates of its own over any figure."""
    min_psnr: float | None = 20.0
    """Test PSNR in dB."""
    min_codebook_usage: float | None = 0.5
    """Smallest usage of a level's codebook."""
    max_kid_to_untrained: float | None = 0.6
    """KID of the samples over KID of an untrained prior's."""
    max_kid_to_marginals: float | None = 0.8
    """KID of the samples over KID of codes drawn from their positions' marginals."""
    min_class_accuracy_to_chance: float | None = 2.0
    """Accuracy of the asked class over chance; not judged for an unconditional model."""
    min_coverage_to_reconstructions: float | None = 0.08
    """Mode collapse: share of the test pictures that samples come near to, over the same share for reconstructions."""
    min_memorisation_ratio: float | None = 0.93
    """Median distance of samples to the nearest training picture, over that of held-out reconstructions: 1 for samples
    as new as those, and for copies what the figure memorisation_ratio_copies says."""
    max_memorised_share: float | None = None
    """Samples that are nearer to a training picture than 1 % of held-out reconstructions are; needs that figure."""
    min_class_coverage: float | None = None
    """Overlap of the classes drawn without being asked for with those of held-out pictures; needs that figure."""
    max_kid_regression: float | None = 0.1
    """How much larger, relatively, the KID may be than the champion's."""
    max_kid_regression_error: float | None = 0.06
    """Standard error of that growth, over concepts and samples: with .06 a version as good as the champion is refused
    once in twenty times, and one that is 20 % worse gets through as seldom. More evaluation.samples lower it."""
    bundle_integrity: bool = True
    """Every byte is as it was registered, and the tokenizer is the one that the prior was trained on."""
    lineage_complete: bool = True
    """Dataset, models, codes and evaluation are known, and the bundle and its card name the same."""
    licences: tuple[str, ...] | None = None
    """Licences that the training pictures may have; pictures without a stated one are refused. Null asks nothing."""
    smoke_test: bool = True
    """The version loads in a process of its own, without the training packages and without pickle, and draws."""
    max_latency_seconds: float | None = 120.0
    """Seconds that one picture takes in that process, after a first one; on the machine that promotes."""
    max_memory_gib: float | None = 16.0
    """Largest memory of that process."""


class TrackingSettings(Settings):
    """Where runs and versions are recorded."""

    uri: str | None = None
    """MLflow tracking server; null: an sqlite store under a local root, or in a local `.hvqd/` for a remote one."""
    experiment: str = Field("hvqd", min_length=1)
    """MLflow experiment."""
    model_name: str = Field("hvqd", min_length=1)
    """Registered model."""
    audit: str | None = None
    """Folder or URL of the promotions' journal, shared by all who promote; null: `audit/` under the root for an sqlite
    store, beside the server's artifacts for a server."""


class ServeSettings(Settings):
    """The picture server."""

    host: str = Field("127.0.0.1", min_length=1)
    """Address to listen on; 0.0.0.0 is every one. The server asks nobody who they are: put something before it that
    does."""
    port: int = Field(8000, ge=1, le=65_535)
    """Port to listen on."""
    replicas: int = Field(1, ge=1)
    """Processes that hold the model and draw."""
    threads: int = Field(1, ge=1)
    """CPU threads of each."""
    batch_wait_seconds: float = Field(0.01, ge=0, le=10)
    """How long a picture waits for others to be drawn with."""
    max_pictures: int = Field(64, ge=1)
    """Of one request."""
    max_steps: int = Field(100, ge=1)
    """Of one request."""
    max_body_bytes: int = Field(65_536, ge=64)
    """Longer requests are refused unread."""
    max_waiting: int = Field(256, ge=1)
    """Pictures that wait in a replica; with more, requests are sent away (503)."""
    follow_seconds: float = Field(5.0, gt=0)
    """How often to look whether another version has become champion."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_pictures > self.max_waiting:
            raise ValueError(
                f"serve.max_pictures must be at most max_waiting ({self.max_waiting}): {self.max_pictures}\n"
                "hint: a request of more pictures than may wait would always be sent away"
            )
        return self


class RunConfig(Settings):
    """Everything one pipeline needs."""

    root: str = "runs/hvqd"
    """Folder or fsspec URL (s3://bucket/prefix) that holds the run's artifacts."""
    seed: int = 0
    """Seed of initial weights, data order and every draw in training."""
    data: DataSettings = DataSettings()
    """The pictures."""
    vq: VQStage = VQStage()
    """Stage 1."""
    prior: PriorStage = PriorStage()
    """Stage 2."""
    compute: ComputeSettings = ComputeSettings()
    """The machines."""
    encode: EncodeSettings = EncodeSettings()
    """How the dataset becomes codes."""
    sampling: SamplingSettings = SamplingSettings()
    """How pictures are drawn."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """How the result is judged."""
    gates: GateSettings = GateSettings()
    """What a champion must show."""
    tracking: TrackingSettings = TrackingSettings()
    """Where it is recorded."""
    serve: ServeSettings = ServeSettings()
    """How the champion is served."""

    def workers_for(self, train: TrainSettings) -> list[int]:
        """The numbers of workers, rising, that divide a stage's global batch into whole micro-batches."""
        allowed = range(self.compute.least_workers, self.compute.most_workers + 1)
        return [workers for workers in allowed if train.global_batch % (train.micro_batch * workers) == 0]

    @property
    def fewest_workers(self) -> int:
        """The smallest number of workers that both stages can start with."""
        return max(self.workers_for(train)[0] for train in (self.vq.train, self.prior.train))

    @property
    def vq_config(self) -> VQConfig:
        """The tokenizer's complete configuration."""
        return VQConfig(**self.vq.model.model_dump(), image_size=self.data.image_size)

    @model_validator(mode="after")
    def _check(self) -> Self:
        _ = self.vq_config  # levels must divide the image size
        for name, train in (("vq", self.vq.train), ("prior", self.prior.train)):
            if self.workers_for(train):
                continue
            unit = train.micro_batch * self.compute.least_workers
            nearest = max(unit, round(train.global_batch / unit) * unit)
            raise ValueError(
                f"{name}.train.global_batch must be a multiple of micro_batch x workers "
                f"({train.micro_batch} x {self.compute.least_workers}): {train.global_batch}\n"
                f"hint: the nearest is {name}.train.global_batch={nearest}"
            )
        if self.data.validation_share + self.data.test_share >= 1:
            raise ValueError(
                "data.validation_share + data.test_share must leave something to train on: "
                f"{self.data.validation_share} + {self.data.test_share}\nhint: 0.06 and 0.05 are the defaults"
            )
        return self
