"""What each step's result depends on: the settings and parents that make a finished artifact current or stale.

Workers, threads, the root and tracking never enter: they change how a step is done, not what it is asked for.
"""

from __future__ import annotations

from typing import Any

from workflows.artifacts import Manifest, request_digest
from workflows.config import RunConfig

PARENTS: dict[str, tuple[str, ...]] = {
    "dataset": (),
    "vq": ("dataset",),
    "codes": ("dataset", "vq"),
    "prior": ("codes",),
    "evaluation": ("dataset", "vq", "codes", "prior"),
    "registration": ("dataset", "vq", "codes", "prior", "evaluation"),
}
"""The artifacts each artifact is made from, in the order of the path."""


def _settings(kind: str, config: RunConfig) -> dict[str, Any]:
    match kind:
        case "dataset":
            return {"data": config.data.model_dump(mode="json"), "seed": config.seed}
        case "vq":
            return {"vq": _tokenizer(config), "seed": config.seed}
        case "codes":
            precision, latents = config.encode.precision, config.prior.model.noise == "gaussian"
            rounds = config.encode.refine_rounds
            return {
                **({} if precision == "fp32" else {"precision": precision}),
                **({"refine_rounds": rounds} if rounds else {}),
                **({"latents": True} if latents else {}),
            }
        case "prior":
            return {"prior": _prior(config), "seed": config.seed}
        case "evaluation":
            return {
                "evaluation": config.evaluation.model_dump(mode="json"),
                "sampling": config.sampling.of_noise(config.prior.model.noise),
            }
        case "registration":
            return {"model_name": config.tracking.model_name}
    raise ValueError(f"no such artifact: {kind}")


def _tokenizer(config: RunConfig) -> dict[str, Any]:
    """Stage 1's settings, without those of losses that are off, and with the content of a named file."""
    asked = config.vq.model_dump(mode="json")
    train, settings = asked["train"], config.vq.train
    if settings.adversarial.weight == 0:
        del train["adversarial"]
    named = train.pop("perceptual_network")
    if settings.perceptual_weight == 0:
        del train["perceptual_weight"]
    elif named is not None:
        from workflows.evaluation.feature_network import weights_digest  # torch, which a plan alone can do without

        train["perceptual_network"] = weights_digest(named)
    return asked


def _prior(config: RunConfig) -> dict[str, Any]:
    """Stage 2's settings, without what is as it was before it could be set, and with the content of a named file."""
    asked = config.prior.model_dump(mode="json")
    model = config.prior.model
    if model.noise != "gaussian":
        del asked["model"]["gaussian"]
    if model.noise == "gaussian" or model.code_scale == "codebook":
        del asked["model"]["code_scale"]
    conditions, named = model.conditions, asked.pop("text_encoder")
    if conditions == ("class",):
        del asked["model"]["conditions"]
    if "text" in conditions and named is not None:
        from workflows.data.text_encoder import encoder_digest, encoder_folder

        asked["text_encoder"] = encoder_digest(encoder_folder(named))
    return asked


def request_of(kind: str, config: RunConfig, parents: dict[str, Manifest]) -> str:
    """The digest a manifest of this kind must carry to be current.

    Args:
        kind: a key of PARENTS.
        parents: the manifests of its parents, by kind.

    Raises:
        InputError: a file that the settings name is not there.
    """
    return request_digest(kind, _settings(kind, config), {name: parents[name].digest for name in PARENTS[kind]})
