"""The model card: what a version is, what it was made from and what it shows, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workflows.artifacts import Manifest
from workflows.config import RunConfig

_SHOWN = {
    "psnr": "PSNR of reconstructions, dB",
    "psnr_prefix_1": "PSNR of the coarse level alone, dB",
    "ssim": "SSIM of reconstructions",
    "rate_bits": "rate, bits a picture",
    "bits_total": "bound of the prior, bits a picture",
    "kid_real": "KID, real against real (floor)",
    "kid_reconstructions": "KID of reconstructions",
    "kid_samples": "KID of samples",
    "kid_marginals": "KID of independent codes",
    "kid_untrained": "KID of an untrained prior",
    "recall_samples": "recall of samples",
    "class_accuracy_samples": "accuracy of the asked class",
    "class_accuracy_reconstructions": "the same judge on reconstructions",
    "class_shuffled_samples": "chance: the same with the asked classes shuffled",
}


def model_card(
    config: RunConfig,
    parents: Mapping[str, Manifest],
    protocol: Mapping[str, Any],
    commit: str,
    runs: Mapping[str, str],
) -> str:
    """The card of a pipeline's models, from its artifacts' manifests.

    Args:
        protocol: how the figures were made.
        commit: of the source that registers it.
        runs: in MLflow, by the kind of artifact that they made.
    """
    facts, figures = parents["dataset"].facts, parents["evaluation"].facts["figures"]
    rows = facts["rows"]
    table = [f"| {text} | {figures[name]:.4g} |" for name, text in _SHOWN.items() if name in figures]
    lines = [
        f"# {config.tracking.model_name}",
        "",
        "A hierarchical VQ-Diffusion image model: a tokenizer and a diffusion prior over its codes.",
        "",
        f"- Pictures: {config.data.image_size[0]} x {config.data.image_size[1]} RGB, {rows['train']:,} for training, "
        f"{rows['val']:,} for validation, {rows['test']:,} for the figures below.",
        f"- Preparation: {config.data.resize} to that size by Lanczos, transparency on RGB {config.data.background}.",
        f"- Classes: {', '.join(facts['classes']) or 'none'}.",
        f"- Licences of the training pictures: {', '.join(facts['licences']) or 'not stated by the source'}.",
        f"- Codes: levels of stride {list(config.vq.model.strides)}, "
        f"codebooks of {list(config.vq.model.codebook_sizes)}.",
        f"- Budgets: {config.vq.train.images:,} images for the tokenizer, {config.prior.train.images:,} for the prior.",
        "",
        "## Figures on held-out pictures",
        "",
        "| figure | value |",
        "|---|---|",
        *table,
        "",
        f"Protocol: `{parents['evaluation'].facts['protocol_digest']}`, {config.evaluation.samples:,} samples, seed "
        f"{config.evaluation.seed}, {_sampling(protocol)}; {protocol['extractor']['name']}.",
        "The whole protocol, intervals and every other figure: evaluation.json.",
        "",
        "## Limits",
        "",
        "Pictures resemble the training set and nothing else; a class is as good as its share of the data.",
        "Judge samples against the reconstructions' figures, not against real ones: the tokenizer is their ceiling.",
        "",
        "## Lineage",
        "",
        *[
            f"- {kind}: `{manifest.digest}`" + (f", run `{runs[kind]}`" if kind in runs else "")
            for kind, manifest in parents.items()
        ],
        f"- commit: `{commit}`",
        "",
        "Licences and attribution of the training pictures: DATA_LICENCES.md. Settings: config.yaml.",
        "",
    ]
    return "\n".join(lines)


def _sampling(protocol: Mapping[str, Any]) -> str:
    drawn = protocol["sampling"]
    sampler = drawn.get("gaussian_sampler") or drawn.get("sampler")
    fine = f", at the finest level at most {drawn['fine_guidance']}" if "fine_guidance" in drawn else ""
    return f"{sampler}, {drawn['steps']} steps, guidance {drawn['guidance']}{fine}"
