"""The registered model as MLflow serves it: rows of what is asked for (class, style, text, map, seed) to PNG pictures.

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
        from workflows.drawing.bundle import load_bundle, served_sampling

        self.bundle = load_bundle(Path(context.artifacts["bundle"]))
        self.sampling = served_sampling(self.bundle)

    def predict(self, context: Any, model_input: Any, params: dict[str, Any] | None = None) -> Any:
        """A frame with the column `image`: base64 of a PNG.

        Args:
            model_input: a frame with the optional columns `class` and `style` (names), `text` (a caption), `map`
                (base64 of a PNG with a label a pixel) and `seed` (default: the row's number). What is empty is left
                open; where nothing says what to show, a class is drawn as often as the data has it.
        """
        import pandas as pd
        from PIL import Image

        from workflows.drawing.asking import Asked, resolve
        from workflows.drawing.generate import draw_images

        rows = len(model_input)
        seeds = [int(seed) for seed in model_input["seed"]] if "seed" in model_input else list(range(rows))

        def column(name: str) -> list[str | None]:
            found = list(model_input[name]) if name in model_input else [None] * rows
            return [value if isinstance(value, str) and value else None for value in found]

        maps = [None if text is None else base64.b64decode(text, validate=True) for text in column("map")]
        asked = [Asked(*row) for row in zip(column("class"), column("style"), column("text"), maps, strict=True)]
        conditions = resolve(self.bundle, seeds, asked)
        images = draw_images(self.bundle.vq, self.bundle.prior, seeds, conditions, self.sampling)
        encoded = []
        for image in images:
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG")
            encoded.append(base64.b64encode(buffer.getvalue()).decode())
        return pd.DataFrame({"image": encoded})


mlflow.models.set_model(PictureModel())
