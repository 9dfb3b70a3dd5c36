"""The registered model as MLflow serves it: rows of (class, seed) to PNG pictures in base64.

This file travels with the model ("models from code"), beside the packages it imports; nothing in it is a pickle.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import mlflow.models
import mlflow.pyfunc


class PictureModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Draws one picture a row."""

    def load_context(self, context: Any) -> None:
        """Load both models; the argument's name is MLflow's."""
        from workflows.bundle import load_bundle, served_sampling

        self.bundle = load_bundle(Path(context.artifacts["bundle"]))
        self.sampling = served_sampling(self.bundle)

    def predict(self, context: Any, model_input: Any, params: dict[str, Any] | None = None) -> Any:
        """A frame with the column `image`: base64 of a PNG.

        Args:
            model_input: a frame with the optional columns `class` (a name; empty draws one) and `seed` (default: the
                row's number).
        """
        import pandas as pd
        from PIL import Image

        from workflows.bundle import class_index
        from workflows.generate import draw_images

        rows = len(model_input)
        seeds = [int(seed) for seed in model_input["seed"]] if "seed" in model_input else list(range(rows))
        names = list(model_input["class"]) if "class" in model_input else [None] * rows
        drawn = self.bundle.draw_labels(seeds)
        labels = [
            class_index(name, self.bundle.classes) if isinstance(name, str) and name else label
            for name, label in zip(names, drawn, strict=True)
        ]
        images = draw_images(self.bundle.vq, self.bundle.prior, seeds, labels, self.sampling)
        encoded = []
        for image in images:
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG")
            encoded.append(base64.b64encode(buffer.getvalue()).decode())
        return pd.DataFrame({"image": encoded})


mlflow.models.set_model(PictureModel())
