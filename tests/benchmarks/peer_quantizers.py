"""vector-quantize-pytorch in the project's encoder and decoder: what a user of that library trains.

Its quantizers move their codebooks inside `forward`, once a micro-batch; the decay is set so that the micro-batches of
a step together decay as one update of ours. Everything else is as in the project's flat tokenizer: k-means from the
same vectors at the same time, commitment, restarts below the same share of the expected use, the same gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hvqd_model.codec.hierarchy import HierarchicalVQ
from hvqd_model.codec.quantizer import Quantized, Quantizer
from hvqd_model.config import VQConfig


class PeerQuantizer(Quantizer):
    """`VectorQuantize`, or `ResidualVQ` for a depth above one, behind the project's interface.

    The codes of a residual quantizer are one whole number a vector: its codes are the digits, the first one lowest.
    """

    def __init__(self, config: VQConfig, depth: int, tokens_a_batch: int, batches_a_step: int) -> None:
        from vector_quantize_pytorch import ResidualVQ, VectorQuantize

        codes, dim = config.codebook_sizes[0], config.code_dims[0]
        super().__init__(codes, dim, config.commitment, config.estimator, config.l2_normalize)
        settings: dict[str, Any] = {
            "dim": dim,
            "codebook_size": codes,
            "decay": config.codebook_decay ** (1 / batches_a_step),
            "commitment_weight": config.commitment,
            "kmeans_init": True,
            "threshold_ema_dead_code": config.restart_threshold * tokens_a_batch / codes,
            "use_cosine_sim": config.l2_normalize,
            "rotation_trick": config.estimator == "rotation",
        }
        self.depth = depth
        self.peer: nn.Module = (
            VectorQuantize(**settings) if depth == 1 else ResidualVQ(num_quantizers=depth, **settings)
        )

    @property
    def codebook(self) -> Tensor:
        """(K, D) of the first quantizer."""
        return self.codebooks[0]

    @property
    def codebooks(self) -> list[Tensor]:
        """(K, D) of each quantizer."""
        layers: Any = self.peer.layers if self.depth > 1 else [self.peer]
        return [layer.codebook for layer in layers]

    @torch.no_grad()
    def start(self, vectors: Tensor, key: int) -> None:
        """The library's own k-means, on the first vectors that it sees."""
        self.peer.train()
        self.peer(self.prepare(vectors)[None])
        self.started.fill_(True)

    def update(self, statistics: object, key: int) -> Tensor:
        """Nothing to do: `forward` did it."""
        return torch.zeros(())

    def forward(self, vectors: Tensor, keys: Tensor, counted: Tensor | None = None) -> Quantized:
        """Quantize (N, D) vectors, and move the codebooks in training."""
        z = vectors.float()
        if not bool(self.started):
            indices = torch.zeros(len(z), dtype=torch.int64)
            return Quantized(z, indices, z.detach(), z.new_zeros(()), self._no_statistics(z))
        values, found, loss = self.peer(z[None])
        digits = found[0].reshape(len(z), self.depth)
        indices = (digits * self.codes ** torch.arange(self.depth)).sum(1)
        return Quantized(values[0], indices, z.detach(), loss.sum(), self._no_statistics(z))

    def lookup(self, indices: Tensor) -> Tensor:
        """(N, D) vectors of whole numbers of codes."""
        digits = indices[..., None] // self.codes ** torch.arange(self.depth) % self.codes
        return torch.stack([codebook[digits[..., place]] for place, codebook in enumerate(self.codebooks)]).sum(0)


class PeerVQ(HierarchicalVQ):
    """The project's tokenizer of one level with a peer's quantizer."""

    def __init__(self, config: VQConfig, depth: int, micro_batch: int, batches_a_step: int) -> None:
        super().__init__(config)
        rows, columns = config.grids[0]
        self.quantizers[0] = PeerQuantizer(config, depth, micro_batch * rows * columns, batches_a_step)

    def _check_codes(self, codes: Sequence[Tensor]) -> None:
        """Codes of several quantizers in one number have their own range."""
