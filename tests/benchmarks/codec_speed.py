"""Pictures a second of encode and decode against diffusers' `VQModel` of equal parameters and finest stride."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from runner import Benchmark, Figures, Target, main
from torch import Tensor, nn
from trials import closest_below, configured, start_somewhere, weights

from hvqd_model.codec.hierarchy import HierarchicalVQ

PRESETS = {32: "tiny", 64: "cpu"}
BATCH = 64
ROUNDS = {"quick": 3, "full": 15}
GROUPS = 2
"""Of the peer's normalisation, which its widths must be multiples of."""


@dataclass(frozen=True)
class Codec:
    """Pictures to codes and back."""

    encode: Callable[[Tensor], Any]
    """Codes of (B, 3, H, W) pictures."""
    decode: Callable[[Any], Tensor]
    """Pictures of what `encode` gave."""


def our_codec(side: int) -> tuple[Codec, int]:
    """The preset's tokenizer with random weights, and its weights without codebooks."""
    model = HierarchicalVQ(configured(PRESETS[side]).vq_config).eval()
    start_somewhere(model)
    return Codec(model.encode, model.decode), weights(model) - weights(model.quantizers)


def peer_model(side: int, width: int) -> nn.Module:
    """A `VQModel` with the preset's finest stride, codebook size and code dimension, of some width."""
    from diffusers import VQModel

    config = configured(PRESETS[side]).vq_config
    stages = config.cells[-1][0].bit_length()
    model: nn.Module = VQModel(
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        block_out_channels=tuple(width * min(4, 1 << stage) for stage in range(stages)),
        layers_per_block=config.blocks,
        latent_channels=config.code_dims[-1],
        vq_embed_dim=config.code_dims[-1],
        num_vq_embeddings=config.codebook_sizes[-1],
        norm_num_groups=GROUPS,
    )
    return model.eval()


def peer_codec(model: Any, layout: torch.memory_format) -> Codec:
    """A `VQModel` behind the same two functions, in a memory layout."""
    model = model.to(memory_format=layout)

    def encode(pictures: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        latents = model.encode(pictures.contiguous(memory_format=layout)).latents
        codes: Tensor = model.quantize(latents)[2][2]
        batch, channels, rows, columns = latents.shape
        return codes, (batch, rows, columns, channels)

    def decode(codes: tuple[Tensor, tuple[int, ...]]) -> Tensor:
        values = model.quantize.get_codebook_entry(*codes).contiguous(memory_format=layout)
        pictures: Tensor = model.decode(values, force_not_quantize=True).sample
        return pictures.clamp(-1, 1)

    return Codec(encode, decode)


def measure(side: int, quick: bool, seed: int) -> Figures:
    """Pictures a second, in turns; the ratios are to the faster of the peer's memory layouts, round by round."""
    torch.manual_seed(seed)
    ours, parameters = our_codec(side)

    def peer_weights(width: int) -> int:
        model: Any = peer_model(side, width)
        return weights(model.encoder, model.decoder, model.quant_conv, model.post_quant_conv)

    width = closest_below(peer_weights, range(GROUPS, 129, GROUPS), parameters)
    codecs = {"ours": ours}
    for name, layout in (("peer", torch.contiguous_format), ("peer_channels_last", torch.channels_last)):
        torch.manual_seed(seed)
        codecs[name] = peer_codec(peer_model(side, width), layout)
    pictures = torch.rand(BATCH, 3, side, side) * 2 - 1
    rounds = ROUNDS["quick" if quick else "full"]
    speeds: dict[str, list[dict[str, float]]] = {"encode": [], "decode": []}
    with torch.no_grad():
        for number in range(rounds + 1):
            found: dict[str, dict[str, float]] = {"encode": {}, "decode": {}}
            for name in codecs if number % 2 else reversed(codecs):
                started = time.perf_counter()
                codes = codecs[name].encode(pictures)
                middle = time.perf_counter()
                codecs[name].decode(codes)
                found["encode"][name] = BATCH / (middle - started)
                found["decode"][name] = BATCH / (time.perf_counter() - middle)
            if number:  # the round before warms the caches
                for way, values in found.items():
                    speeds[way].append(values)
    figures: Figures = {}
    for way, values in speeds.items():
        ratios = [each["ours"] / max(each["peer"], each["peer_channels_last"]) for each in values]
        figures[f"{way}_ratio_{side}"] = statistics.median(ratios)
        for name in codecs:
            figures[f"{way}_per_second_{name}_{side}"] = statistics.median(each[name] for each in values)
    return {**figures, f"weights_{side}": float(parameters), f"weights_ratio_{side}": peer_weights(width) / parameters}


BENCHMARK = Benchmark(
    name="codec_speed",
    what=(
        "Pictures a second from pixels to codes and back, batches of 64 in fp32, by the tokenizers of the presets "
        "`tiny` (32 x 32) and `cpu` (64 x 64) and by diffusers' `VQModel` with the same finest stride, codebook size "
        "and code dimension, in the widest form that has no more weights (codebooks left out; `weights_ratio` is "
        "theirs over ours). They take turns; a ratio is ours over the faster of the peer's two memory layouts, and "
        "the median over the rounds."
    ),
    parts={str(side): partial(measure, side) for side in PRESETS},
    targets=tuple(Target(f"{way}_ratio_{side}", ">=", 1.5) for side in PRESETS for way in ("encode", "decode")),
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
