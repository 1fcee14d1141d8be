"""Use a published UWM checkpoint as a MODEL, with a store for what its file does not record.

The file records no embodiment, camera names or rate. They come from an embodiment of the store, whose cameras fill the
model's slots in their order there; the numbers of actions and cameras must agree.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipelines.models import checkpoint
from pipelines.models.checkpoint import SPARE_EMBODIMENTS
from pipelines.models.data import fit_of, stride_of
from pipelines.recipe import load_recipe
from preprocessing.cache import cache_folder
from preprocessing.dataset.embodiment import FARTHEST, Embodiment, describe
from preprocessing.dataset.normalizer import MINIMUM_RANGE, Normalizer
from preprocessing.dataset.selection import by_embodiment, choose_encoder
from preprocessing.encoders.vae import PIXELS
from preprocessing.errors import UserError
from preprocessing.store.rows import TrainingRow
from preprocessing.store.store import LatentStore
from uwm_model.published import load_published, read_published

ENCODER = "sdxl-vae"  # of the published models; as a folder it has the folder's name
OTHERS = ("tiny", "taesdxl", PIXELS)  # encoders that published models do not use
ALL = 0.9999  # share of episodes to hold out: it is unknown which ones the model was trained on
BEYOND = 1.5  # maximum magnitude of the store's normalised actions
SQUARE = 0.02  # maximum relative difference of the sides of frames that are square, or 4 : 3
EXACT = 0.02  # maximum distance of the normalised extremes from -1 and 1 if the normaliser was fitted to this store


def adopt(
    file: Path,
    store_uri: str,
    embodiment: str | None = None,
    snapshot_id: str | None = None,
    extend: bool = False,
    cache: Path | None = None,
) -> Path:
    """Convert the published file to a checkpoint folder in ``cache`` (default: this machine's) and return it.

    Raises UserError if the store's embodiment does not match the model. With ``extend``, for finetuning, its cameras
    may differ, and so may its actions: then the checkpoint has no embodiment.
    """
    snapshot = LatentStore.open(store_uri).snapshot(snapshot_id)
    named = {row["encoder"] for row in snapshot.episodes(["encoder"]).to_pylist()}
    own = [name for name in sorted(named) if name not in OTHERS]
    encoder = choose_encoder(snapshot, own[0] if len(own) == 1 else ENCODER)
    if not snapshot.rows(PIXELS):
        raise UserError(f"{store_uri}: holds no pixels, which {file} observes; ingest again with --encoder {PIXELS}")
    rows = by_embodiment([row for row in snapshot.rows(encoder) if row["action_dim"]])
    name = embodiment or (next(iter(rows)) if len(rows) == 1 else None)
    if name is None or name not in rows:
        raise UserError(f"{file}: choose an embodiment with --embodiment; the store knows {', '.join(rows) or 'none'}")
    found = describe(name, rows[name], 0, max(len(row["cameras"]) for row in rows[name]))
    try:
        held = read_published(file)
        model = load_published(held.weights, proprio_dim=max(1, found.proprio_dim), embodiments=1 + SPARE_EMBODIMENTS)
    except ValueError as error:
        raise UserError(f"{file}: {str(error).removeprefix(f'{file}: ')}") from None
    config = model.model_config
    shape = snapshot.shape(rows[name][0]["cameras"][0]["segments"][0])
    stride = stride_of(rows[name][0], shape)
    for what, ours, theirs in (
        ("action dimensions", config.action_dim, found.action_dim),
        ("cameras", config.cameras, len(found.cameras)),
        ("latent channels", config.latent_channels, shape[1]),
    ):
        if ours != theirs and not (extend and what != "latent channels"):
            raise UserError(f"{file}: {ours} {what}; {name} in {store_uri} has {theirs}")
    if min(shape[2:]) < max(config.latent_size):
        sizes = (config.latent_size[0] * stride, shape[2] * stride)
        raise UserError(
            f"{file}: sees {sizes[0]} pixels; {store_uri} holds {sizes[1]}; ingest with --image-size {sizes[0]} or more"
        )
    _same_view(file, store_uri, rows[name], extend)
    known = {}
    if found.action_dim == config.action_dim:
        normalizer = _normalizer(held.action_normalizer, found, file)
        seen, reach = found.cameras[: config.cameras], (1.0,) * config.action_dim  # published samplers clip at 1
        known = {name: dataclasses.replace(found, cameras=seen, action_normalizer=normalizer, action_reach=reach)}
    settings = checkpoint.Settings(
        model=config,
        diffusion=model.diffusion_config,
        encoder=rows[name][0]["encoder"],
        encoder_digest=encoder,
        image_size=shape[2] * stride,
        fit=fit_of(rows[name], store_uri),
        stride=stride,
        embodiments=known,
        store=snapshot.uri,
        snapshot=snapshot.id,
        recipe=load_recipe("paper_libero", [f"validation_share={ALL}"]).model_dump(),
        parent=str(file.resolve()),
        step=held.step or 0,
    )
    key = hashlib.sha256(settings.model_dump_json().encode())
    with file.open("rb") as content:
        key.update(hashlib.file_digest(content, "sha256").digest())
    folder = (cache or cache_folder()) / f"published-{key.hexdigest()[:24]}"
    if not folder.exists():
        checkpoint.save(folder, model.state_dict(), settings)
    return folder


def _same_view(file: Path, store_uri: str, rows: Sequence[TrainingRow], extend: bool) -> None:
    """Raise UserError if the model saw its frames in other proportions than the store has them.

    The published code scales whole frames, to 240 x 320 for DROID's 180 x 320, and crops 224 x 224. The file does not
    tell which: its models' frames were square (LIBERO's) or DROID's. So square frames are right, as is the centre of
    4 : 3; squashed frames are wrong, and any other shape has no square like the model's. A model that is finetuned
    (``extend``) may get used to another section of the frame, but is not given squashed ones.
    """
    fit = fit_of(rows, store_uri)
    for row in rows:
        for picture in row["pictures"] or ():
            height, width = picture["height"], picture["width"]
            square, tv = (abs(width * b - height * a) <= SQUARE * b * width for a, b in ((1, 1), (4, 3)))
            if square or (tv and fit == "crop") or (extend and fit != "stretch"):
                continue
            way = "ingest with --set fit=crop" if extend or tv else "no square has the model's proportions"
            raise UserError(
                f"{file}: its model saw whole frames of 240 x 320, cropped to 224 x 224; {store_uri} holds frames of "
                f"{picture['camera']}, {width} x {height}, as squares (fit: {fit}); {way}"
            )
        if row["pictures"] is None and "droid" in f"{row['format']} {row['source']} {row['contract']}".lower():
            raise UserError(
                f"{file}: its model saw DROID's frames as 240 x 320, cropped to 224 x 224; {store_uri} holds them "
                "squashed to squares; no square has the model's proportions"
            )


def _normalizer(numbers: dict[str, np.ndarray], embodiment: Embodiment, file: Path) -> Normalizer:
    """Return the published normaliser.

    Its scale and offset do not say whether they multiply or divide; the store's action range decides. The reading that
    maps it near [-1, 1] holds; if both do, the one that maps it exactly. Raises UserError if neither fits, or both do.
    """
    found = {name.rpartition(".")[2].strip("_"): np.ravel(values).astype(float) for name, values in numbers.items()}
    if not {"scale", "offset"} <= set(found) or {found[key].size for key in ("scale", "offset")} != {
        embodiment.action_dim
    }:
        held = ", ".join(f"{name} {values.shape}" for name, values in numbers.items()) or "nothing"
        raise UserError(
            f"{file}: its normaliser needs scale and offset of {embodiment.action_dim} actions; it has {held}"
        )
    scale, offset = found["scale"], found["offset"]
    if not (np.isfinite([scale, offset]).all() and scale.all()):
        raise UserError(f"{file}: its normaliser has a scale of 0, or values that are not finite")
    seen = embodiment.action_normalizer
    moving = np.asarray(seen.scale) > MINIMUM_RANGE  # constant columns say nothing
    extremes = np.asarray(seen.offset) + np.outer([-1, 1], seen.scale)
    near: list[tuple[float, Normalizer]] = []
    for reading in (Normalizer(tuple(offset), tuple(scale)), Normalizer(tuple(-offset / scale), tuple(1 / scale))):
        ends = reading.apply(extremes)[:, moving]
        reach = np.abs(ends).max(0).clip(MINIMUM_RANGE)
        if reach.max(initial=0) <= BEYOND and np.median(np.abs(np.log(reach))) <= np.log(FARTHEST):
            near.append((float(np.abs(ends - [[-1], [1]]).max(initial=0)), reading))
    what = f"{file}: its normaliser (scale {scale.tolist()}, offset {offset.tolist()})"
    actions = f"the store's actions, from {extremes[0].tolist()} to {extremes[1].tolist()}"
    if not near:
        raise UserError(f"{what} does not fit {actions}")
    miss, reading = min(near, key=lambda pair: pair[0])
    if len(near) == 2 and miss > EXACT:
        raise UserError(
            f"{what} may multiply or divide: {actions}, fit both; give a store with all of the model's training data"
        )
    return reading
