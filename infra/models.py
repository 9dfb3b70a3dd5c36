"""The model registry in MLflow: versions with lineage tags, aliases, and the pyfunc that a version serves."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.errors import InputError
from infra.secrets import mask
from infra.tracking import client, explained

_MOST_VERSIONS = 10_000
_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


@dataclass(frozen=True)
class Version:
    """One version of a registered model."""

    number: str
    created: float
    """Seconds since 1970."""
    aliases: tuple[str, ...]
    tags: dict[str, str]


@dataclass(frozen=True)
class Registry:
    """The registered models of a tracking store."""

    uri: str

    @property
    def client(self) -> Any:
        """MLflow's client."""
        return client(self.uri, os.getpid())

    def alias(self, model: str, alias: str) -> str | None:
        """The version that an alias points to, or None when there is no such model or alias."""
        from mlflow.exceptions import MlflowException

        with explained(self.uri):
            try:
                return str(self.client.get_model_version_by_alias(model, alias).version)
            except MlflowException as error:
                if error.error_code in _ABSENT:
                    return None
                raise

    def set_alias(self, model: str, alias: str, version: str) -> None:
        """Point an alias to a version, and read it back: MLflow's last writer wins without a word."""
        with explained(self.uri):
            self.client.set_registered_model_alias(model, alias, version)
        found = self.alias(model, alias)
        if found != version:
            raise InputError(
                f"the alias {alias} of {model} points to version {found}, not {version}: somebody else moved it\n"
                "hint: look at who promotes, then run the same command again"
            )

    def drop_alias(self, model: str, alias: str) -> None:
        """Take an alias away; nothing happens when there is none."""
        if self.alias(model, alias) is not None:
            with explained(self.uri):
                self.client.delete_registered_model_alias(model, alias)

    def version_tagged(self, model: str, tag: str, value: str) -> str | None:
        """The newest version that carries a tag's value."""
        with explained(self.uri):
            found = self.client.search_model_versions(f"name = '{model}'")
        versions = [int(entry.version) for entry in found if entry.tags.get(tag) == value]
        return str(max(versions)) if versions else None

    def versions(self, model: str) -> list[Version]:
        """All versions of a model, oldest first; empty when there is no such model."""
        with explained(self.uri):
            found = self.client.search_model_versions(f"name = '{model}'")
        # The search does not fill in aliases.
        full = [self._version(model, str(entry.version)) for entry in found]
        return sorted(
            (
                Version(
                    str(entry.version), entry.creation_timestamp / 1000, tuple(sorted(entry.aliases)), dict(entry.tags)
                )
                for entry in full
            ),
            key=lambda version: int(version.number),
        )

    def card(self, model: str, version: str) -> str:
        """A version's description."""
        return str(self._version(model, version).description or "")

    def create(self, model: str, source: str, run_id: str, tags: Mapping[str, str], description: str) -> str:
        """A new version whose files lie at `source`."""
        from mlflow.exceptions import MlflowException

        with explained(self.uri):
            try:
                self.client.create_registered_model(model)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            made = self.client.create_model_version(
                model,
                source=source,
                run_id=run_id,
                tags={name: mask(value) for name, value in tags.items()},
                description=description,
            )
        return str(made.version)

    def tags(self, model: str, version: str) -> dict[str, str]:
        """A version's tags.

        Raises:
            InputError: there is no such version.
        """
        return dict(self._version(model, version).tags)

    def set_tag(self, model: str, version: str, name: str, value: str) -> None:
        """Set one tag of a version."""
        with explained(self.uri):
            self.client.set_model_version_tag(model, version, name, mask(value))

    def source(self, model: str, version: str) -> str:
        """URL of the folder that holds a version's files.

        Raises:
            InputError: there is no such version.
        """
        return str(self._version(model, version).source)

    def has(self, model: str) -> bool:
        """Whether the registry knows the model."""
        return self._model_tags(model) is not None

    def model_tag(self, model: str, name: str) -> str | None:
        """A tag of the model itself; None when there is no such model or tag."""
        return (self._model_tags(model) or {}).get(name)

    def _model_tags(self, model: str) -> dict[str, str] | None:
        from mlflow.exceptions import MlflowException

        with explained(self.uri):
            try:
                return dict(self.client.get_registered_model(model).tags)
            except MlflowException as error:
                if error.error_code in _ABSENT:
                    return None
                raise

    def set_model_tag(self, model: str, name: str, value: str) -> None:
        """Set one tag of the model itself."""
        with explained(self.uri):
            self.client.set_registered_model_tag(model, name, value)

    def sources(self) -> list[tuple[tuple[str, str], str]]:
        """((model, version), URL of its files) of every version of every model."""
        with explained(self.uri):
            found = self.client.search_model_versions(max_results=_MOST_VERSIONS)
        return [((str(entry.name), str(entry.version)), str(entry.source)) for entry in found]

    def delete(self, model: str, version: str) -> None:
        """Remove a version; its files are left alone."""
        with explained(self.uri):
            self.client.delete_model_version(model, version)

    def download(self, model: str, version: str, target: Path) -> Path:
        """A version's files in a local folder."""
        return self.download_from(self.source(model, version), target)

    def download_from(self, source: str, target: Path) -> Path:
        """The files of a folder of this registry's artifacts in a local folder, which is made.

        Compiled code is left out: nobody registered it, a store on this machine collects it when a version is loaded.
        """
        import mlflow.artifacts

        target.mkdir(parents=True, exist_ok=True)
        with explained(self.uri):
            found = mlflow.artifacts.download_artifacts(
                artifact_uri=source, dst_path=str(target), tracking_uri=self.uri
            )
        for compiled in list(target.rglob("__pycache__")):
            shutil.rmtree(compiled)
        return Path(found)

    def check_files(self, model: str, version: str) -> None:
        """Raises InputError when the folder that a version points to is gone."""
        source = self.source(model, version)
        from mlflow.artifacts import list_artifacts
        from mlflow.exceptions import MlflowException

        with explained(self.uri):
            try:
                found = list_artifacts(artifact_uri=source, tracking_uri=self.uri)
            except (MlflowException, OSError):
                found = []
        if not any(entry.path.endswith("MLmodel") for entry in found):
            raise InputError(
                f"the files of {model} version {version} are gone: {source}\n"
                "hint: restore them, or name another version (`hvqd models ls` shows them); "
                "`hvqd rollback` goes back to an earlier champion"
            )

    def _version(self, model: str, version: str) -> Any:
        from mlflow.exceptions import MlflowException

        with explained(self.uri):
            try:
                return self.client.get_model_version(model, version)
            except MlflowException as error:
                if error.error_code not in _ABSENT:
                    raise
                raise InputError(
                    f"the registry at {mask(self.uri)} has no version {version} of the model {model}\n"
                    "hint: `hvqd register` makes one; --set tracking.model_name=NAME names another model"
                ) from error


def write_pyfunc(
    folder: Path, code_file: Path, artifacts: Mapping[str, Path], packages: list[Path], requirements: list[str]
) -> None:
    """Write an MLflow pyfunc to a local folder: a model from code, with no pickle in it.

    Args:
        folder: must not exist.
        code_file: the Python file that calls `mlflow.models.set_model`, and declares its signature.
        artifacts: folders that the model reads, by name.
        packages: source folders that travel with the model.
        requirements: pip requirements of whoever serves it.
    """
    import mlflow.pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    signature = ModelSignature(
        inputs=Schema(
            [
                *(ColSpec(DataType.string, name, required=False) for name in ("class", "style", "text", "map")),
                ColSpec(DataType.long, "seed", required=False),
            ]
        ),
        outputs=Schema([ColSpec(DataType.string, "image")]),
    )
    mlflow.pyfunc.save_model(
        path=str(folder),
        python_model=str(code_file),
        artifacts={name: str(path) for name, path in artifacts.items()},
        signature=signature,
        code_paths=[str(package) for package in packages],
        pip_requirements=requirements,
    )
