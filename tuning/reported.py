"""Which figures each job reports to the search, so that a space that asks for another one is refused at once.

The figures of stages 1 and 2 are those of their evaluations on the validation split; where a space asks for pictures,
the prior's newest checkpoint draws some at each rung, and the finished prior in the end.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Literal

from infra.errors import InputError

Job = Literal["vq", "prior", "joint"]
StageName = Literal["vq", "prior"]

_VQ = {
    "val_psnr": "PSNR of validation pictures, all levels, in dB",
    "val_psnr_mean_picture": "PSNR of the mean picture, in dB",
    "val_psnr_prefix_N": "PSNR of the first N levels alone, in dB",
    "val_perplexity_N": "perplexity of level N's codes",
    "val_perceptual": "distance in feature maps, where its weight is not 0",
}
_PRIOR = {
    "val_bits_total": "bits of an image's codes under the prior (upper bound)",
    "val_bits_N": "bits a code of level N",
}
PICTURE_FIGURES = {
    "val_kid_samples": "KID of drawn pictures against validation pictures",
    "val_kid_reconstructions": "KID of reconstructions, the tokenizer's ceiling",
    "val_recall_samples": "recall of drawn pictures",
}
REPORTED: Mapping[Job, Mapping[str, str]] = {
    "vq": _VQ,
    "prior": {**_PRIOR, **PICTURE_FIGURES},
    "joint": {**_VQ, **_PRIOR, **PICTURE_FIGURES},
}
"""Job -> figure -> meaning; N is a number."""


def check_reported(job: Job, name: str, where: str) -> None:
    """Whether the job reports the figure.

    Raises:
        InputError: it does not; the nearest is named.
    """
    known = REPORTED[job]
    if any(re.fullmatch(re.sub(r"N$", r"\\d+", pattern), name) for pattern in known):
        return
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    hint = f"did you mean {close[0]}?" if close else f"it reports {', '.join(known)}"
    raise InputError(f"{where}: job {job} does not report {name}\nhint: {hint}")
