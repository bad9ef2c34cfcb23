"""The words every floor of the house shares: spans, batches, recipes, protocols and errors.

Nothing here imports torch or any heavy package, so `import moviola` stays cheap. Time is seconds,
sizes are (height, width), pixels are uint8 RGB until the model's door.

Axis letters used across the house: B batch, T frames, C channels, H height, W width, D embedding
width, L text length, N texts, M videos.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from torch import Tensor, nn

__all__ = [
    "Adaptation",
    "Batch",
    "CheckpointError",
    "Claim",
    "Clip",
    "ClipBatch",
    "Dtype",
    "Encoder",
    "Episode",
    "Example",
    "Field",
    "FrameSpec",
    "Hit",
    "LabelField",
    "MediaError",
    "MediaKind",
    "MissingExtra",
    "Moment",
    "MoviolaError",
    "Needs",
    "Objective",
    "Pair",
    "PairObjective",
    "PictureField",
    "Recipe",
    "Refusal",
    "RegionField",
    "ReinforcedField",
    "ScriptField",
    "StoreError",
    "System",
    "TextField",
    "TimeSpan",
    "Training",
    "UsageError",
    "VectorField",
    "VideoField",
    "ViewField",
]

# --------------------------------------------------------------------------------------------------
# Errors: each says what was expected, what came and what to do next
# --------------------------------------------------------------------------------------------------


class MoviolaError(Exception):
    """An error a user can act on. `hint` is the next thing to type or do; the CLI prints both."""

    def __init__(self, problem: str, *, hint: str | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.problem} {self.hint}" if self.hint else self.problem


class UsageError(MoviolaError):
    """Arguments that cannot be meant: k of 0, an empty query, a column that is not there."""


class MediaError(MoviolaError):
    """A picture, video, sound or subtitle that cannot be read; `path` says which."""

    def __init__(self, path: str | Path, problem: str, *, hint: str | None = None) -> None:
        super().__init__(f"{printable(path)}: {problem}", hint=hint)
        self.path = path
        self.reason = problem


class CheckpointError(MoviolaError):
    """Weights, configuration or tokenizer files that do not fit together, or may not be trusted."""


class StoreError(MoviolaError):
    """An index that cannot be opened, written or mixed with this model."""


class Refusal(MoviolaError):
    """A verb needs something the model does not have (text, one vector per video, ...)."""


class MissingExtra(MoviolaError):
    """An optional package is not installed; the hint names the extra that brings it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"This needs the package '{package}', which is not installed.",
            hint=f"Install it with: pip install 'moviola[{extra}]'",
        )


def printable(path: object) -> str:
    """A path for messages: undecodable bytes and control characters are escaped, never raw."""
    text = str(path).encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


# --------------------------------------------------------------------------------------------------
# Time and media
# --------------------------------------------------------------------------------------------------

MediaKind = Literal["picture", "video"]
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True, order=True)
class TimeSpan:
    """A range of time in seconds, `0 <= start <= end`; a picture or one instant has `start == end`.

    >>> TimeSpan(0, 10).iou(TimeSpan(5, 15))
    0.3333333333333333
    """

    start: float
    end: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.start) and math.isfinite(self.end) and 0 <= self.start <= self.end):
            raise UsageError(
                f"A time span needs finite seconds with 0 <= start <= end, got ({self.start}, {self.end})."
            )

    @property
    def duration(self) -> float:
        return self.end - self.start

    @property
    def centre(self) -> float:
        return (self.start + self.end) / 2

    def overlap(self, other: TimeSpan) -> float:
        """Seconds the two have in common."""
        return max(0.0, min(self.end, other.end) - max(self.start, other.start))

    def iou(self, other: TimeSpan) -> float:
        """Temporal intersection over union (tIoU); two equal instants give 1, an instant else 0."""
        if self == other:
            return 1.0
        union = self.duration + other.duration - self.overlap(other)
        return self.overlap(other) / union if union > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Clip:
    """A file, or the part of it that `span` names (`span=None`: all of it)."""

    path: Path
    span: TimeSpan | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """One picture or clip with its texts: a row of a training or evaluation table."""

    id: str
    media: Clip | bytes
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Hit:
    """One stored unit (a frame, a clip or a picture) and its score for a query."""

    file: str
    kind: MediaKind
    span: TimeSpan
    score: float


@dataclass(frozen=True, slots=True)
class Moment:
    """A time range that answers a query. `(0, 0)` for a picture; `thumbnail` is JPEG bytes."""

    file: str
    kind: MediaKind
    span: TimeSpan
    score: float
    thumbnail: bytes | None = None
    text: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "start": round(self.span.start, 3),
            "end": round(self.span.end, 3),
            "score": round(float(self.score), 6),
        }


@dataclass(frozen=True, slots=True)
class FrameSpec:
    """Which frames an encoder wants from a clip.

    `count=None` takes any number. Samplers: `middle` (the middle frame of `count` equal intervals),
    `uniform` (`count` instants from first to last frame), `rate` (`rate` frames per second),
    `consecutive` (`count` frames `stride` apart). `padding` says what happens when the clip has
    fewer frames: `repeat-last`, `loop`, `mask` (zeros with `mask=False`) or `refuse`.
    """

    count: int | None = None
    sampler: Literal["middle", "uniform", "rate", "consecutive"] = "middle"
    padding: Literal["repeat-last", "loop", "mask", "refuse"] = "repeat-last"
    rate: float | None = None
    stride: int = 1


@dataclass(slots=True)
class ClipBatch:
    """A batch of clips at the model's door: float pixels already normalised by the recipe.

    frames_BTCHW; times_BT in seconds; mask_BT True where a frame is real (always the convention
    True = valid); sound_BS mono samples; text the raw strings that go with the clips.
    """

    frames_BTCHW: Tensor
    times_BT: Tensor
    mask_BT: Tensor
    sound_BS: Tensor | None = None
    text: Sequence[str] | None = None

    def to(self, device: Any, dtype: Any = None) -> ClipBatch:
        return replace(
            self,
            frames_BTCHW=self.frames_BTCHW.to(device, dtype),
            times_BT=self.times_BT.to(device),
            mask_BT=self.mask_BT.to(device),
            sound_BS=None if self.sound_BS is None else self.sound_BS.to(device),
        )


# --------------------------------------------------------------------------------------------------
# Models
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How pixels and words must be prepared for a checkpoint. It belongs to the weights.

    `size` is (height, width) after the crop. `resize`: `shortest` scales the short side to `size`,
    `squash` scales both sides. `resize_size` is what to scale to where that is larger than `size`, so
    that the crop takes a margin off (None: `size`). `features` names the order and kind of stored
    vectors, so that two indexes made differently never mix.
    """

    size: tuple[int, int] = (224, 224)
    resize: Literal["shortest", "squash"] = "shortest"
    crop: Literal["center", "none"] = "center"
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    sampler: FrameSpec = field(default_factory=FrameSpec)
    features: str = "image_embedding"
    tokenizer: str | None = None  # hash of the tokenizer's files; None where none is known
    context_length: int = 77
    resize_size: tuple[int, int] | None = None

    def to_json(self) -> dict[str, Any]:
        """Every field; without `resize_size` where it is None, as recipes were before there was one."""
        data = asdict(self)
        if self.resize_size is None:
            del data["resize_size"]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Recipe:
        unknown = sorted(set(data) - {f.name for f in fields(cls)})
        if unknown:
            raise CheckpointError(
                f"The recipe has fields this version does not know: {', '.join(unknown)}.",
                hint="Upgrade with: pip install -U moviola",
            )
        made: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        if "sampler" in made:
            made["sampler"] = FrameSpec(**made["sampler"])
        return cls(**made)

    @property
    def hash(self) -> str:
        """16 hex digits over every field: equal recipes prepare inputs equally."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]


@runtime_checkable
class Encoder(Protocol):
    """What every image or video model of the house offers to the verbs (an `nn.Module`).

    encode_text   tokens_NL (int64)             -> text_ND, not normalised
    encode_image  pixels_BCHW                   -> image_BD, not normalised
    encode_video  ClipBatch                     -> video_BD if `separable`, else video_BTD
    pool          video_BTD, mask_BT            -> video_BD, a query-free vector for shortlists
                                                   (for a separable encoder: the identity on video_BD)
    score         text_ND, video (as encoded)   -> scores_NM, higher is better

    `separable`: one vector per video whatever the query, so `score` is cosine times the logit
    scale. `has_text` False: `encode_text` raises `Refusal`. `adaptation`: `none` for a base model,
    `embedding` when it changes embeddings (index and search may use it), `classifier` when it only
    adds a classifier (only classify and evaluate may).
    """

    dim: int
    context_length: int
    frame_spec: FrameSpec
    has_text: bool
    separable: bool
    adaptation: Literal["none", "embedding", "classifier"]

    def encode_text(self, tokens_NL: Tensor) -> Tensor: ...
    def encode_image(self, pixels_BCHW: Tensor) -> Tensor: ...
    def encode_video(self, batch: ClipBatch) -> Tensor: ...
    def pool(self, video: Tensor, mask_BT: Tensor | None = None) -> Tensor: ...
    def score(self, text_ND: Tensor, video: Tensor, mask_MT: Tensor | None = None) -> Tensor: ...


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------

Batch = Mapping[str, Any]
"""Named fields: `id` (list of str), `row` (B,) row numbers, and what the objective's `needs` name: by
default `image` (B, C, H, W) and `text` (B, L) tokens."""


@dataclass(frozen=True, slots=True)
class PictureField:
    """Pictures ready for the tower: (B, C, H, W) under `name`, or (B, count, C, H, W) where count > 1.

    `size` (height, width) None: the recipe's. `area`: the least and largest share of the picture that
    a random crop keeps; None leaves it to the run (`--crop-area`), (1, 1) shows the whole picture.
    """

    name: str = "image"
    count: int = 1
    size: tuple[int, int] | None = None
    area: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class VideoField:
    """Clips by the model's `FrameSpec`, as a `ClipBatch` under `name`.

    `whole`: what the recipe's crop would cut off stays, for objectives that crop by themselves.
    """

    name: str = "clip"
    whole: bool = False


@dataclass(frozen=True, slots=True)
class ScriptField:
    """`count` segments of a video, one after the other, with the words that are spoken in each.

    A drawn span of the video is `count` segments of one length in seconds, drawn from `seconds`, with `gap`
    seconds between them; a video too short for that is taken whole. `clip`: a `ClipBatch` of the
    frames that the model's `FrameSpec` counts, one drawn from each of as many equal parts of the span.
    `name`: tokens (B, count, L) of each segment's words in order of time, `<name>_mask` (B, count) bool.

    Words have times from subtitles beside or inside the video, `NAME.words.json` beside it, or a column
    `words` (`data.rows.scripts`). Where `optional`, a row without them may have a caption instead: the clip
    is then of the whole video, the caption the first of the row's texts and the only one of its mask.
    """

    count: int = 4
    seconds: tuple[float, float] = (3.0, 5.0)
    gap: float = 1.0
    name: str = "script"
    clip: str = "clip"
    optional: bool = False


@dataclass(frozen=True, slots=True)
class TextField:
    """One text a row as tokens (B, L) under `name`, drawn anew in every epoch from those the row has.

    `columns` are the table's, in order of preference; empty: the captions, whatever they are called.
    A name that ends in `*` takes every column that begins so (one a language, say). `cut` keeps all
    of the text or its first sentence. Where `optional`, a row may lack it: its tokens are then those
    of an empty text, and `<name>_mask` (B,) says which rows have one. Fields with the same columns
    draw the same text of a row.
    """

    name: str = "text"
    columns: tuple[str, ...] = ()
    cut: Literal["whole", "first-sentence"] = "whole"
    optional: bool = False


@dataclass(frozen=True, slots=True)
class RegionField:
    """Up to `most` described boxes a picture, and where they lie after the picture's crop.

    `boxes` (B, most, 4) xyxy pixels of the picture as the tower sees it, `region_text` (B, most, L)
    tokens, `region_mask` (B, most) bool. The table has `boxes` (lists of xyxy pixels of the upright
    picture) and `regions` (as many texts), and may have `region_scores` (the best `most` are taken).
    """

    most: int = 5


@dataclass(frozen=True, slots=True)
class VectorField:
    """A vector a row, float32 (B, D) under `name`, from a column of equally long lists."""

    name: str
    column: str


@dataclass(frozen=True, slots=True)
class ReinforcedField:
    """What `moviola reinforce` stored with each pair, one augmentation and one synthetic caption drawn.

    `image` (B, C, H, W) by the stored augmentation, `text` and `synthetic` (B, L) tokens, and the
    teachers' vectors of exactly these: `teacher_image`, `teacher_text`, `teacher_synthetic` (B, D).
    """


@dataclass(frozen=True, slots=True)
class LabelField:
    """The number of each row's class, int64 (B,) under `name`. Pictures by class have one, pairs do not."""

    name: str = "label"


@dataclass(frozen=True, slots=True)
class ViewField:
    """The row's picture once more, (B, C, H, W) under `name`, through an augmentation of its own.

    `kind` is a name in `moviola.data.pixel_views.VIEWS`. Of pictures by class.
    """

    name: str
    kind: Literal["moco", "augmix"]


Field = (
    PictureField
    | VideoField
    | ScriptField
    | TextField
    | RegionField
    | VectorField
    | ReinforcedField
    | LabelField
    | ViewField
)


@dataclass(frozen=True, slots=True)
class Needs:
    """What an objective asks of the data, so that nothing else is read."""

    fields: tuple[Field, ...] = (PictureField(), TextField())


class Episode(Protocol):
    """What the loop hands to `on_episode`: the rows to come and a way to run the model over them."""

    index: int
    count: int
    row_ids: Sequence[int]

    def extract(self, function: Callable[[Batch], Mapping[str, Tensor]]) -> Mapping[str, np.ndarray]:
        """Run `function` without gradients, model in eval mode, over the episode's rows.

        Stacked results in the order of `row_ids`, from all processes.
        """
        ...

    def once(self, function: Callable[[], Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
        """What `function` gives in the first process, handed to all: clusterings must not differ."""
        ...


@runtime_checkable
class Objective(Protocol):
    """A training objective (an `nn.Module`; its buffers, parameters and extra state are in the checkpoint).

    forward returns named losses; the loop sums them (an objective weighs its own parts).
    `scope`: a `pair` objective is a `PairObjective`; `token` and `local` ones are not cut in two.
    param_groups   for AdamW; a group may have `lr_scale`, a factor of the run's learning rate
    lr_factors     the schedule, one factor per group at a step; None: the run's own schedule
    on_episode     before each episode, where the run has episodes
    before_step    after the gradients of a step are there and before they are clipped and used
    """

    needs: Needs
    scope: Literal["pair", "token", "local"]

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]: ...
    def param_groups(self, model: nn.Module) -> Iterable[dict[str, Any]]: ...
    def lr_factors(self, step: int, steps: int) -> Sequence[float] | None: ...
    def on_episode(self, model: nn.Module, episode: Episode) -> None: ...
    def before_step(self, model: nn.Module) -> None: ...
    def after_step(self, model: nn.Module) -> None: ...


@runtime_checkable
class PairObjective(Objective, Protocol):
    """An objective in two halves, so that the batch depends neither on memory nor on the processes.

    outputs   each row's outputs by themselves: tensors whose first axis is the batch (labels and masks
              too), all with gradients or constants. Parameters that the loss needs (the logit scale)
              may be returned too: those without axes are taken as they are.
    loss      named losses of the whole batch from the whole batch's outputs and nothing else.

    The loop may call `outputs` on parts of the batch, twice each (gradient caching), gathers them over
    the processes, and calls `loss` once a step, everywhere with the same global outputs. Running
    state (moving averages, centres) therefore belongs in `loss`, under `self.training`.
    """

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]: ...
    def loss(self, model: nn.Module, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Training:
    """How `moviola train --objective SLUG` trains a system: the `TRAINING` of its file.

    objective   objective(model, **options); every option has a default, `weight_decay` among them
    start       the system's model from the module that `--init` names; None: that module itself
    presets     names for `--model`: configurations of new models
    recipe      the authors' values for fields of `TrainConfig` (lr, betas, warmup, ...)

    A system's `RECOGNITION` says so how it learns to name classes of clips: its objective is called
    objective(model, tokens_CL, **options), and its recipe may also hold epochs, frames,
    template, crop_area and flip.
    """

    objective: Callable[..., Objective]
    start: Callable[[nn.Module], nn.Module] | None = None
    presets: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Adaptation:
    """How `moviola adapt --method SLUG` uses a system: the `ADAPTATION` of its file. One of three kinds.

    fit        fit(vectors_ND, labels_N, text_CD, *, logit_scale, seed, **options) -> a `LinearHead`: a
               classifier from unit vectors of a frozen model and the unit vectors of the class names
    unlabelled the same without labels_N
    extend     extend(head, vectors_ND, text_KD) -> the head with K classes more, known by words alone
    start      start(model, classes, **options) -> the module that is trained, with the model frozen in it
    objective  objective(module, **options) for batches of labelled pictures
    sequence   methods that learn one task after the other, by name (`training.continual`)
    recipe     the authors' values for fields of `TrainConfig`, and `epochs`
    """

    fit: Callable[..., Any] | None = None
    unlabelled: Callable[..., Any] | None = None
    extend: Callable[..., Any] | None = None
    start: Callable[..., nn.Module] | None = None
    objective: Callable[..., Objective] | None = None
    sequence: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)


# --------------------------------------------------------------------------------------------------
# The registry
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class System:
    """One published system: the line in its room's list is its registration.

    `call` is the user's one line, shown in the docs; `entry` is `module:Class`, imported on use.
    `marks` are parameter names that together tell the authors' checkpoints from others: `load` then
    calls the class's `from_official(state)`. Where they publish files of several kinds, `more_marks` has
    those of the others.
    """

    number: int
    slug: str
    title: str
    url: str
    call: str
    entry: str
    marks: tuple[str, ...] = ()
    more_marks: tuple[tuple[str, ...], ...] = ()

    @property
    def room(self) -> str:
        return self.entry.split(".")[-2]


@dataclass(frozen=True)
class Example:
    """A tiny instance for the contract test, from a system's `example(seed)`.

    `run(**inputs)` gives named outputs whose shapes must equal `shapes`; `batched` names the inputs
    and outputs whose first axis is the batch (checked for order independence); `loss` names the
    scalar output to differentiate, None where nothing trains. `module` is saved and loaded again.
    """

    run: Callable[..., Mapping[str, Any]]
    inputs: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    module: nn.Module | None = None
    batched: tuple[str, ...] = ()
    loss: str | None = None


@dataclass(frozen=True)
class Claim:
    """A paper's claim in miniature, run by the one driver behind `moviola reproduce`.

    `run(arm, seed)` trains or evaluates one arm and returns named metrics. Equal data and steps for
    every arm; all arms and seeds together within about three minutes on two cores. An arm named in
    `cached` (arm -> key of (data, tower, steps)) is a baseline the driver may share across systems.
    """

    statement: str
    data: str
    metric: str
    arms: tuple[str, ...]
    ours: str
    baseline: str
    run: Callable[[str, int], Mapping[str, float]]
    seeds: tuple[int, ...] = (0, 1, 2)
    higher_is_better: bool = True
    cached: Mapping[str, str] = field(default_factory=dict)
