"""Step 6: an evaluated pipeline becomes a model version, which anybody can load by number or alias.

A version carries its lineage and its figures as tags, so that a promotion can be explained from
the registry alone.
"""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hvqd_model.metrics import KidParts
from infra.errors import InputError
from infra.models import Registry, write_pyfunc
from infra.secrets import mask
from infra.storage import Store
from infra.tracking import Tracker
from infra.versions import source_commit
from workflows.artifacts import Manifest, check_files, find_manifest, read_manifest, write_manifest
from workflows.config import REFINED, RunConfig
from workflows.context import Context
from workflows.drawing.bundle import (
    LoadedBundle,
    bundle_digest,
    bundle_problems,
    load_bundle,
    write_bundle,
    write_digests,
)
from workflows.loading import masked, to_yaml
from workflows.release.card import model_card
from workflows.release.environment_lock import SERVED, locked
from workflows.requests import PARENTS, request_of

_COMMANDS = {
    "dataset": "hvqd data build",
    "vq": "hvqd train vq",
    "codes": "hvqd encode",
    "prior": "hvqd train prior",
    "evaluation": "hvqd evaluate",
}
_REQUEST_TAG = "hvqd.request"
BUNDLE_TAG = "hvqd.bundle"
"""On a version: the digest of its bundle's list of digests."""
FILES_TAG = "hvqd.files"
"""On a version: the digest of the list of digests of its whole folder: the bundle, the code and MLflow's own files."""
BUNDLE_PATH = "artifacts/bundle"
"""Of the bundle within a version's folder."""
LICENCES_TAG = "hvqd.licences"
"""On a version: JSON list of the licences of its training pictures."""
PROTOCOL_TAG = "hvqd.protocol"
FIGURES_TAG = "hvqd.figures"
_ATTRIBUTION = Path(__file__).parents[1] / "data" / "bundled" / "ATTRIBUTION.md"
_PACKAGES = ("hvqd_model", "infra", "workflows")


def register(context: Context, tracker: Tracker) -> Manifest:
    """The artifact `registration/`: which version this pipeline is; made once, alias `candidate`.

    Raises:
        InputError: an artifact of the pipeline is missing.
    """
    root, config = context.root, context.config
    parents = {kind: read_manifest(root.child(kind), _COMMANDS[kind]) for kind in PARENTS["registration"]}
    request = request_of("registration", config, parents)
    registry, model = Registry(tracker.uri), config.tracking.model_name
    store = root.child("registration")
    present = find_manifest(store)
    if present is not None and present.request == request:
        check_files(store, present)
        version = str(present.facts["version"])
        if registry.version_tagged(model, _REQUEST_TAG, request) == version:
            return present
    # A version made just before a crash is found by its tag, so that there is never a second one.
    version = registry.version_tagged(model, _REQUEST_TAG, request) or _create(
        context, tracker, registry, request, parents
    )
    registry.set_alias(model, "candidate", version)
    lineage = {kind: manifest.digest for kind, manifest in parents.items()}
    if context.run is not None:
        context.run.set_tags({"hvqd.model": model, "hvqd.version": version})
    return write_manifest(
        store,
        "registration",
        request,
        lineage,
        facts={"model_name": model, "version": version},
        provenance={"registry": "sqlite" if tracker.uri.startswith("sqlite") else "server"},
    )


def _create(context: Context, tracker: Tracker, registry: Registry, request: str, parents: dict[str, Manifest]) -> str:
    config, root = context.config, context.root
    lineage = {kind: manifest.digest for kind, manifest in parents.items()}
    figures = dict(parents["evaluation"].facts["figures"])
    protocol = str(parents["evaluation"].facts["protocol_digest"])
    evaluation = root.child("evaluation")
    measured = evaluation.read_bytes("metrics.json")
    lock = locked((*SERVED, "tokenizers") if "text" in config.prior.model.conditions else SERVED)
    run = context.run or tracker.run(f"register-{request}", "register", tags={"hvqd.step": "register"})
    commit, runs = source_commit(), _runs(tracker, lineage)
    card = model_card(config, parents, json.loads(measured)["protocol"], commit, runs)
    with tempfile.TemporaryDirectory(prefix="hvqd-version-") as scratch:
        folder = Path(scratch)
        facts = parents["dataset"].facts
        write_bundle(
            folder / "bundle",
            root.child("vq", "model").download_folder(folder / "vq"),
            root.child("prior", "model").download_folder(folder / "prior"),
            facts["classes"],
            facts["class_rows"]["train"],
            config.sampling,
            lineage,
            card,
            {
                "evaluation.json": measured,
                "samples.png": evaluation.read_bytes("samples.png"),
                "requirements.lock": ("\n".join(lock) + "\n").encode(),
                "DATA_LICENCES.md": _data_licences(config.data.source, facts["licences"]).encode(),
                "config.yaml": to_yaml(masked(config)).encode(),
                **_learned_text(root),
            },
            {
                "preprocessing": preprocessing(config),
                "commit": commit,
                "runs": runs,
                **{name: value for name, value in parents["codes"].facts.items() if name == REFINED},
            },
        )
        code = folder / "code"
        packages = [_copy_sources(name, code) for name in _PACKAGES]
        served = Path(__file__).with_name("served_model.py")
        write_pyfunc(folder / "model", served, {"bundle": folder / "bundle"}, packages, lock)
        write_digests(folder / "model")
        source = run.log_folder(folder / "model", "model")
        digest, files = bundle_digest(folder / "bundle"), bundle_digest(folder / "model")
    tags = {
        _REQUEST_TAG: request,
        BUNDLE_TAG: digest,
        FILES_TAG: files,
        **{f"hvqd.digest.{kind}": digest for kind, digest in lineage.items()},
        FIGURES_TAG: json.dumps(figures, sort_keys=True),
        PROTOCOL_TAG: protocol,
        parts_tag(protocol): json.dumps(parents["evaluation"].facts["kid_parts"]),
        intervals_tag(protocol): json.dumps(intervals_of(json.loads(measured)["figures"]), sort_keys=True),
        LICENCES_TAG: json.dumps(facts["licences"]),
        "hvqd.conditional": str(bool(facts["classes"])).lower(),
        "hvqd.root": root.url,
        "hvqd.commit": commit,
    }
    return registry.create(config.tracking.model_name, source, run.run_id, tags, card)


def preprocessing(config: RunConfig) -> dict[str, Any]:
    """What was made of the pictures before the tokenizer saw them: what `hvqd reconstruct` does to others, too."""
    data = config.data
    return {
        "image_size": list(data.image_size),
        "resize": data.resize,
        "background": list(data.background),
        "channels": "RGB, 8 bits",
        "range": "-1 to 1 for 0 to 255",
    }


def _runs(tracker: Tracker, lineage: Mapping[str, str]) -> dict[str, str]:
    """By kind of artifact: the run in this store that made it; what was made elsewhere is left out."""
    return {
        kind: run.run_id
        for kind, digest in lineage.items()
        for run in itertools.islice(tracker.runs(f"tags.`hvqd.digest` = '{digest}'"), 1)
    }


def version_problems(folder: Path, tags: Mapping[str, str]) -> list[str]:
    """What in a version's folder is not as it was registered, a line each; names in the bundle come without its path.

    Args:
        tags: the version's, with the digests that the registry keeps.
    """
    found = bundle_problems(folder / BUNDLE_PATH, tags.get(BUNDLE_TAG))
    if FILES_TAG in tags:
        around = bundle_problems(folder, tags[FILES_TAG])
        found += [problem for problem in around if not problem.startswith(f"{BUNDLE_PATH}/")]
    return found


def _learned_text(root: Store) -> dict[str, bytes]:
    """The files of a prior that is told captions: their encoder, and those it has learned."""
    store = root.child("prior", "text")
    return {f"text/{name}": store.read_bytes(name) for name in store.files()}


def _copy_sources(package: str, target: Path) -> Path:
    """A package's Python files and presets, without the bundled pictures."""
    source = Path(__file__).parents[2] / package
    return Path(
        shutil.copytree(source, target / package, ignore=shutil.ignore_patterns("bundled", "__pycache__", "*.pyc"))
    )


def _data_licences(source: str, licences: list[str]) -> str:
    """What the training pictures ask of those who pass the model on."""
    stated = ", ".join(licences) or "not stated by the source"
    attribution = _ATTRIBUTION.read_text() if source == "emoji" and _ATTRIBUTION.is_file() else ""
    return f"# Licences of the training pictures\n\n{stated}\n" + (f"\n{attribution}" if attribution else "")


def judged_tag(protocol: str) -> str:
    """The tag that holds a version's figures under a protocol that it was judged by later."""
    return f"hvqd.judged.{protocol[:16]}"


def parts_tag(protocol: str) -> str:
    """The tag that holds the parts of a version's KID under a protocol (hvqd_model.metrics.KidParts)."""
    return f"hvqd.kid.{protocol[:16]}"


def intervals_tag(protocol: str) -> str:
    """The tag that holds the 95 % intervals of a version's figures under a protocol."""
    return f"hvqd.intervals.{protocol[:16]}"


def intervals_of(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, list[float]]:
    """[low, high] of each figure of metrics.json that has an interval."""
    return {
        name: [figure["low"], figure["high"]]
        for name, figure in figures.items()
        if figure["low"] is not None and figure["high"] is not None
    }


def intervals_under(tags: Mapping[str, str], protocol: str) -> dict[str, tuple[float, float]]:
    """The intervals of a version's figures under a protocol; empty when they were not kept."""
    found = json.loads(tags.get(intervals_tag(protocol), "{}"))
    return {name: (low, high) for name, (low, high) in found.items()}


def protocols_of(tags: Mapping[str, str]) -> list[str]:
    """The protocols that a version was judged by, its own first; later ones are known by their first 16 digits."""
    own = [tags[PROTOCOL_TAG]] if tags.get(PROTOCOL_TAG) else []
    later = sorted(tag.removeprefix(judged_tag("")) for tag in tags if tag.startswith(judged_tag("")))
    return own + [name for name in later if not own or name != own[0][:16]]


def shared_protocol(tags: Mapping[str, str], other: Mapping[str, str]) -> str | None:
    """A protocol that both were judged by, the first one's own if possible; None when there is none."""
    theirs = {name[:16] for name in protocols_of(other)}
    return next((name for name in protocols_of(tags) if name[:16] in theirs), None)


def figures_under(tags: Mapping[str, str], protocol: str | None) -> dict[str, float] | None:
    """A version's figures under a protocol; None when it was never judged by that."""
    if protocol is None:
        return None
    own = tags.get(PROTOCOL_TAG)
    is_own = own is not None and own[:16] == protocol[:16]
    text = tags.get(FIGURES_TAG) if is_own else tags.get(judged_tag(protocol))
    figures: dict[str, float] | None = None if text is None else json.loads(text)
    return figures


def kid_parts_under(tags: Mapping[str, str], protocol: str) -> KidParts | None:
    """The parts of a version's KID under a protocol; None when they were not kept."""
    text = tags.get(parts_tag(protocol))
    if text is None:
        return None
    value = json.loads(text)
    return KidParts(value["within"], tuple(value["across"]), tuple(value["counts"]), value["set_error"])


def no_versions(model: str) -> InputError:
    """What a question about a model says that was never registered."""
    return InputError(f"the model {model} has no versions yet\nhint: `hvqd register` makes one")


def find_version(tracker: Tracker, model: str, name: str) -> str:
    """The number of a version that is named by number or alias.

    Raises:
        InputError: there is no registry, or no such version.
    """
    if not tracker.is_there:
        raise no_versions(model)
    registry = Registry(tracker.uri)
    found = name if name.isdigit() else registry.alias(model, name)
    if found is None:
        raise InputError(
            f"no version of the model {model} has the alias {name}\nhint: `hvqd models ls` shows versions and aliases"
        )
    registry.tags(model, found)
    return found


def load_version(tracker: Tracker, model: str, uri: str | None = None) -> LoadedBundle:
    """The champion, or the version that `models:/name@alias` or `models:/name/version` names.

    Raises:
        InputError: there is no such version.
    """
    registry = Registry(tracker.uri)
    if not tracker.is_there:
        raise InputError(
            f"there is no registry at {mask(tracker.uri)}\n"
            "hint: name a run's root with --root, or a model's folder with --model"
        )
    name, version = _parse(uri, model, registry)
    with tempfile.TemporaryDirectory(prefix="hvqd-version-") as scratch:
        registry.check_files(name, version)
        folder = registry.download(name, version, Path(scratch))
        tags = registry.tags(name, version)
        if BUNDLE_TAG in tags and (problems := version_problems(folder, tags)):
            raise InputError(
                f"version {version} of {name} is not what was registered: {'; '.join(problems)}\n"
                f"hint: restore {registry.source(name, version)} from a copy, or `hvqd rollback` to another version"
            )
        return load_bundle(folder / BUNDLE_PATH)


def _parse(uri: str | None, model: str, registry: Registry) -> tuple[str, str]:
    text = (uri or f"models:/{model}@champion").removeprefix("models:/")
    name, at, alias = text.partition("@")
    if at:
        version = registry.alias(name, alias)
        if version is None:
            raise InputError(
                f"no version of the model {name} has the alias {alias}\n"
                "hint: name the run's folder (--root FOLDER or --model FOLDER), or promote a version first"
            )
        return name, version
    name, slash, number = text.partition("/")
    if not slash or not number:
        raise InputError(
            f"a model is named models:/NAME@ALIAS or models:/NAME/VERSION: {uri}\nhint: models:/hvqd@champion"
        )
    return name, number
