"""Whether a prior follows what it is told: class, style, caption and label map, each alone, in one model of emoji.

The product's tokenizer and one prior with all four conditions train on the bundled set's training concepts. For
pictures of held-out concepts the prior is then asked for one condition at a time. The maps are a palette quantization
(13 named colours and background), no semantics.
"""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image
from runner import Benchmark, Figures, Target, main
from trials import PriorTrial, configured, encoded, run, tokenizer_trial

from hvqd_model import HierarchicalPrior, HierarchicalVQ, PriorConfig, metrics
from hvqd_model.config import CONDITIONS, ConditionName
from hvqd_model.randomness import derive_key
from workflows.config import DataSettings, RunConfig, SamplingSettings
from workflows.data.batches import ImageTable
from workflows.data.columns import ConditionColumns
from workflows.data.label_maps import fitted_map
from workflows.data.pictures import prepare
from workflows.data.sources import BUNDLED
from workflows.data.text_encoder import TextEncoder, encoder_folder
from workflows.drawing.generate import Pictures, decode_codes, draw_images
from workflows.evaluation.condition_figures import CaptionJudge, MapJudge, Scores, against_shuffled
from workflows.evaluation.features import FeatureExtractor
from workflows.evaluation.figures import Resampling
from workflows.evaluation.judge import ClassJudge

SIDE, LABELS, FEATURE_SIZE, RIDGE = 32, 14, 64, 0.01
GUIDANCE: dict[ConditionName, float] = {"class": 4.0, "style": 3.0, "text": 4.0, "map": 2.0}
DROPOUT = 0.5
"""So that each condition is often met alone: otherwise the map says nearly all, and the rest is barely learned."""
HELD_OUT, QUICK_HELD_OUT = 900, 48
QUICK_PICTURES, QUICK_IMAGES = 800, 960


@dataclass(frozen=True)
class Told:
    """Some pictures, and all that is known of them."""

    table: ImageTable
    more: ConditionColumns
    classes: tuple[str, ...]
    styles: tuple[str, ...]

    @property
    def style_numbers(self) -> NDArray[np.int64]:
        """(n,)"""
        assert self.more.styles is not None
        return self.more.styles

    @property
    def captions(self) -> NDArray[np.int64]:
        """(n,) rows of `vectors`."""
        assert self.more.captions is not None
        return self.more.captions

    @property
    def vectors(self) -> NDArray[np.float32]:
        """(U, E) of all distinct captions."""
        assert self.more.embeddings is not None
        return np.asarray(self.more.embeddings)

    @property
    def maps(self) -> NDArray[np.int16]:
        """(n, H, W)"""
        assert self.more.maps is not None
        return self.more.maps

    def some(self, rows: NDArray[np.int64]) -> Told:
        """Some rows of it."""
        table = ImageTable(*(getattr(self.table, name)[rows] for name in self.table.__dataclass_fields__))
        more = ConditionColumns(self.style_numbers[rows], self.captions[rows], self.vectors, self.maps[rows])
        return replace(self, table=table, more=more)

    def spread(self, most: int) -> Told:
        """At most so many rows, evenly spread."""
        return self.some(np.unique(np.linspace(0, len(self.table) - 1, most).astype(np.int64)))


@cache
def emoji() -> tuple[Told, Told]:
    """The bundled emoji: training pictures, and those of the held-out concepts."""
    columns = ["id", "vendor", "group", "concept", "caption", "split", "image", "seg"]
    rows = pq.read_table(BUNDLED, columns=columns).to_pydict()
    settings = DataSettings(image_size=(SIDE, SIDE))
    prepared = [prepare(*pair, settings) for pair in zip(rows["image"], rows["seg"], strict=True)]
    images = np.stack([np.asarray(Image.open(io.BytesIO(found.png))) for found in prepared])
    maps = np.stack([fitted_map(found.seg_png, (SIDE, SIDE)) for found in prepared])
    text = {name: np.asarray(rows[name], dtype=str) for name in columns[:6]}
    styles, style_of = np.unique(text["vendor"], return_inverse=True)
    classes, class_of = np.unique(text["group"], return_inverse=True)
    captions, caption_of = np.unique(text["caption"], return_inverse=True)
    vectors = TextEncoder(encoder_folder(None))(captions.tolist())
    labels = class_of.astype(np.int64)
    table = ImageTable(text["id"], labels, text["vendor"], text["concept"], text["caption"], images)
    more = ConditionColumns(style_of.astype(np.int64), caption_of.astype(np.int64), vectors, maps)
    told = Told(table, more, tuple(classes.tolist()), tuple(styles.tolist()))
    trains = text["split"] == "train"
    return told.some(np.flatnonzero(trains)), told.some(np.flatnonzero(~trains))


def trained_prior(config: RunConfig, vq: HierarchicalVQ, train: Told) -> HierarchicalPrior:
    """A prior that is told everything, trained on the pictures' codes."""
    torch.manual_seed(derive_key(config.seed, "prior", "weights"))
    architecture = PriorConfig(
        **config.prior.model.model_dump() | {"conditions": CONDITIONS, "label_dropout": DROPOUT},
        grids=vq.config.grids,
        codebook_sizes=vq.config.codebook_sizes,
        code_dim=vq.config.code_dims,
        classes=train.classes,
        styles=train.styles,
        text_dim=train.vectors.shape[1],
        map_labels=LABELS,
        map_size=(SIDE, SIDE),
    )
    codes = replace(encoded(vq, train.table), labels=train.table.labels, more=train.more)
    prior = HierarchicalPrior(architecture, vq.codebooks)
    trial = PriorTrial(prior, config.prior.train, config.seed, "fp32", codes, codes)
    run(trial, config.prior.train.images)
    return trial.model


class Judges:
    """Say what pictures show; they learn from real training pictures."""

    def __init__(self, train: Told, asked: Told) -> None:
        """Learn.

        Args:
            asked: the pictures whose conditions are asked for.
        """
        self.features = FeatureExtractor(FEATURE_SIZE)
        known = self.features(train.table.images)
        self._class = ClassJudge(known, train.table.labels, len(train.classes), RIDGE)
        self._style = ClassJudge(known, train.style_numbers, len(train.styles), RIDGE)
        self._text = CaptionJudge(known, train.vectors[train.captions])
        self._map = MapJudge(train.table.images, train.maps, LABELS)
        self._asked = asked
        self._candidates, self._own = np.unique(asked.captions, return_inverse=True)

    def scores(self, name: ConditionName, pictures: Pictures, features: NDArray[np.float32]) -> Scores:
        """How well pictures show a condition of the asked rows, in any order of these."""
        asked = self._asked
        match name:
            case "class":
                classes = self._class.judge(features)
                return lambda order: (classes == asked.table.labels[order]).astype(np.float64)
            case "style":
                styles = self._style.judge(features)
                return lambda order: (styles == asked.style_numbers[order]).astype(np.float64)
            case "text":
                vectors = asked.vectors[self._candidates]
                return lambda order: self._text.rank_shares(features, vectors, self._own[order])
            case "map":
                return lambda order: self._map.agreement(pictures, asked.maps[order])


def judged(
    vq: HierarchicalVQ, prior: HierarchicalPrior, train: Told, asked: Told, sampling: SamplingSettings
) -> Figures:
    """How well the prior follows each condition alone, beside real pictures and their reconstructions.

    Args:
        train: what judges learn from.
        asked: whose conditions are asked for.
    """
    resampling, judges, groups = Resampling(500, 1234), Judges(train, asked), asked.table.groups
    real = asked.table.images
    shown = {"real": real, "reconstructed": decode_codes(vq, encoded(vq, asked.table).codes, sampling.batch)}
    seen = {source: judges.features(pictures) for source, pictures in shown.items()}
    seeds = [derive_key("conditions", index) for index in range(len(real))]
    given = asked.more.batch(torch.from_numpy(asked.table.labels), np.arange(len(real)))
    figures: Figures = {}
    for name in CONDITIONS:
        guided = sampling.model_copy(update={"guidance": GUIDANCE[name]})
        shown["asked"] = draw_images(vq, prior, seeds, given.only(name), guided)
        seen["asked"] = judges.features(shown["asked"])
        for source, pictures in shown.items():
            scores = judges.scores(name, pictures, seen[source])
            found = against_shuffled(f"{name}_{source}", scores, groups, resampling)
            figures |= {figure: value.value for figure, value in found.items()}
        interval = found[f"{name}_asked_gain"].interval
        assert interval is not None
        figures[f"{name}_asked_gain_low"] = interval[0]
        figures[f"{name}_to_reconstructed"] = figures[f"{name}_asked"] / figures[f"{name}_reconstructed"]
        near = metrics.neighbourhood(torch.from_numpy(seen["real"]), torch.from_numpy(seen["asked"]))
        figures[f"{name}_recall"] = float(np.mean(near.recall))
    return figures


def measure(quick: bool, seed: int) -> Figures:
    """Train both models, and judge."""
    train, held_out = emoji()
    changes = []
    if quick:
        train = train.spread(QUICK_PICTURES)
        changes = [f"{stage}.train.images={QUICK_IMAGES}" for stage in ("vq", "prior")]
        changes += ["sampling.steps=4", f"sampling.batch={QUICK_HELD_OUT}"]
    config = configured("tiny", changes, seed)
    tokenizer = tokenizer_trial(config, train.table)
    run(tokenizer, config.vq.train.images)
    prior = trained_prior(config, tokenizer.model, train)
    asked = held_out.spread(QUICK_HELD_OUT if quick else HELD_OUT)
    return judged(tokenizer.model, prior, train, asked, config.sampling)


BENCHMARK = Benchmark(
    name="conditions",
    what=(
        "One prior that is told class, style (vendor), caption and colour map, the budgets of `tiny`, asked for one "
        "condition at a time of emoji of held-out concepts. Judges learn from real training pictures: linear ones for "
        "class and style; for captions a linear map from features to caption vectors and the share of the other "
        "held-out captions that fit worse (chance .5); for maps the nearest mean colour, and the share of pixels that "
        "agree. `_shuffled` asks the same pictures for what belongs to other concepts, `_gain` is the difference and "
        "`_gain_low` the lower end of its 95 % interval over concepts; real pictures and reconstructions are judged "
        "likewise. Maps are a palette quantization, no semantics."
    ),
    parts={"emoji": measure},
    repeats=1,
    targets=(
        Target("class_to_reconstructed", ">=", 0.9),
        Target("class_recall", ">=", 0.1),
        *(Target(f"{name}_asked_gain_low", ">=", 0.02) for name in CONDITIONS),
    ),
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
