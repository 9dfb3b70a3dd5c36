"""A real registry whose versions have figures but no models, and promoters that are killed at random moments."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import signal
import time
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

from mlflow.exceptions import MlflowException

from infra.errors import EnvironmentFailure, GateRefusal, InputError
from infra.models import Registry
from infra.storage import Store, open_store
from infra.tracking import Tracker
from workflows.config import RunConfig
from workflows.context import Context, Silent
from workflows.drawing.bundle import DESCRIPTION, bundle_digest, write_digests
from workflows.pipeline import tracker_for
from workflows.release.promotion import champions, promote, promoter_for, rollback
from workflows.release.registry import BUNDLE_TAG, FILES_TAG, parts_tag
from workflows.release.versions import history

GOOD = {
    "psnr": 25.0, "usage_0": 1.0, "kid_samples": 1.0, "kid_untrained": 9.0, "kid_marginals": 8.0,
    "class_accuracy_samples": 0.5, "class_shuffled_samples": 0.1,
    "coverage_samples": 0.5, "coverage_reconstructions": 0.8,
    "nearest_train_samples": 40.0, "nearest_train_reconstructions": 41.0,
}  # fmt: skip
WITHOUT_FILES = {
    "bundle_integrity": False, "lineage_complete": False, "smoke_test": False,
    "max_latency_seconds": None, "max_memory_gib": None,
}  # fmt: skip
"""Gates for versions that have no models."""


class Place:
    """A root with a registry, and versions in it that have figures but no models."""

    def __init__(self, root: Path, **settings: object) -> None:
        self.config = RunConfig.model_validate({"root": str(root), "gates": WITHOUT_FILES, **settings})
        self.context = Context(self.config, open_store(str(root)), Silent(), None)
        self.tracker: Tracker = tracker_for(self.config, self.context.root)
        self.registry = Registry(self.tracker.uri)

    def version(self, **figures: float) -> str:
        """A new version with good figures but for these."""
        run = self.tracker.run(f"register {time.monotonic_ns()}", "register")
        folder = self.context.root.path / f"files-{time.monotonic_ns()}"
        folder.mkdir(parents=True)
        (folder / "MLmodel").write_text("flavors: {}\n")
        bundle = folder / "artifacts" / "bundle"
        bundle.mkdir(parents=True)
        for name in ("vq", "prior"):
            (bundle / name).mkdir()
            (bundle / name / "config.json").write_text("{}")
        (bundle / DESCRIPTION).write_text('{"sampling": {}}')
        weights = f"weights {time.monotonic_ns()}".encode()
        (bundle / "weights").write_bytes(weights)
        write_digests(bundle)
        write_digests(folder)
        source = run.log_folder(folder, "model")
        tags = {
            "hvqd.figures": json.dumps(GOOD | figures),
            "hvqd.protocol": "p",
            "hvqd.conditional": "true",
            BUNDLE_TAG: bundle_digest(bundle),
            FILES_TAG: bundle_digest(folder),
            parts_tag("p"): json.dumps({"within": 1.0, "across": [3.0, 5.0], "counts": [3, 4], "set_error": 0.001}),
        }
        return self.registry.create("hvqd", source, run.run_id, tags, "a card")

    @property
    def journal_folder(self) -> Store:
        """Where the journal's entries lie."""
        return promoter_for(self.context, self.tracker).folder

    def lose_files(self, version: str) -> None:
        """Somebody deletes what a version's folder is known by."""
        open_store(self.registry.source("hvqd", version)).delete("MLmodel")

    def clear(self) -> None:
        """Forget the model and its journal, which tests on one server share."""
        with suppress(MlflowException):
            self.registry.client.delete_registered_model("hvqd")
        self.journal_folder.delete()

    @property
    def champion(self) -> str | None:
        return self.registry.alias("hvqd", "champion")

    @property
    def previous(self) -> str | None:
        return self.registry.alias("hvqd", "previous")

    def promote(self, version: str, **options: object) -> None:
        promote(self.context, self.tracker, version, **options)  # type: ignore[arg-type]

    def check_consistent(self) -> None:
        """One champion that exists, passes its gates, and is what the journal says."""
        promoter = promoter_for(self.context, self.tracker)
        entries = promoter.journal.entries()
        assert self.champion == (champions(entries) or [None])[-1]
        assert self.previous == (champions(entries)[-2] if len(champions(entries)) > 1 else None)
        for entry in entries:
            assert entry.action in ("override", "refuse") or all(gate["passed"] for gate in entry.gates)
        assert history(self.context, self.tracker, verify=True).value["verified"] is True

    def actions(self) -> list[tuple[str, str]]:
        """What the journal says, in order."""
        return [(entry.action, entry.version) for entry in promoter_for(self.context, self.tracker).journal.entries()]


KIDS = (1.0, 2.0, 1.05, 0.9, 1.5, 1.0)
"""KID of each version that racing promoters choose from: some are too much worse than others."""


_DECISION_SECONDS = 300.0


def _promote_at_random(root: str, uri: str | None, environment: dict[str, str], seed: int) -> None:
    """Promote and roll back until killed."""
    os.environ.update(environment)  # a fork server has that of its own start
    place, draw = Place(Path(root), tracking={"uri": uri}), random.Random(seed)
    while True:
        try:
            if draw.random() < 0.3:
                rollback(place.context, place.tracker, None, "at random")
            else:
                place.promote(str(draw.randint(1, len(KIDS))))
        except (GateRefusal, InputError):
            pass
        except EnvironmentFailure as error:  # on a busy machine a turn may not come, or not in time: both are said
            if not re.search("is under way by|the lock .* was taken over", str(error)):
                raise


def race(place: Place, promoters: int, seed: int) -> int:
    """Let promoters run at once and kill each at a random moment; check what they leave, before and after repair.

    Returns:
        How many decisions they recorded.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    draw, before = random.Random(seed), len(place.actions())
    outside = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    told = (str(place.context.root.path), place.config.tracking.uri, outside)
    running: list[BaseProcess] = [
        context.Process(target=_promote_at_random, args=(*told, 100 * seed + one), daemon=True)
        for one in range(promoters)
    ]
    try:
        for process in running:
            process.start()
        deadline = time.monotonic() + _DECISION_SECONDS
        while len(place.actions()) == before:
            assert time.monotonic() < deadline, f"no promoter came to a decision within {_DECISION_SECONDS:.0f} s"
            time.sleep(0.02)  # what looks on must not keep the promoters from working
        for process in running:
            time.sleep(draw.random() * 0.2)  # the moment is what is being varied
            assert process.is_alive() and process.pid is not None, "a promoter ended by itself"
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL
    finally:
        for process in running:  # whatever is found wrong, nobody goes on in the next round
            if process.is_alive():
                process.kill()
                process.join()
    entries = promoter_for(place.context, place.tracker).journal.entries()
    allowed = {(champions(part) or [None])[-1] for part in (entries, entries[:-1])}
    assert place.champion in allowed, f"champion {place.champion} is neither the old nor the new one: {allowed}"
    with promoter_for(place.context, place.tracker).turn("the one after"):
        pass
    place.check_consistent()
    return len(entries) - before
