"""A published UWM checkpoint as a MODEL: its weights, and from a store what its file does not tell.

The file knows neither cameras nor robot by name, nor the rate. Those are taken from an embodiment of the store, whose
cameras fill the model's slots in their order there; numbers of actions and cameras have to agree.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np

from pipelines.models import checkpoint
from pipelines.models.checkpoint import SPARE_EMBODIMENTS
from pipelines.models.data import stride_of
from pipelines.recipe import load_recipe
from preprocessing.cache import cache_folder
from preprocessing.dataset.embodiment import FARTHEST, Embodiment, describe
from preprocessing.dataset.normalizer import MINIMUM_RANGE, Normalizer
from preprocessing.dataset.selection import by_embodiment, choose_encoder
from preprocessing.encoders.vae import PIXELS
from preprocessing.errors import UserError
from preprocessing.store.store import LatentStore
from uwm_model.published import load_published, read_published

ENCODER = "sdxl-vae"  # the published models'; a folder of it has a name of its own
OTHERS = ("tiny", "taesdxl", PIXELS)  # which are not
ALL = 0.9999  # of the episodes count as held out: what such a model was trained on is not known here
BEYOND = 1.5  # how far from 0 the store's actions may lie, once the published normaliser is through with them
EXACT = 0.02  # how far from -1 and 1 its extremes are where they are those that the normaliser was made of


def adopt(
    file: Path,
    store_uri: str,
    embodiment: str | None = None,
    snapshot_id: str | None = None,
    extend: bool = False,
    cache: Path | None = None,
) -> Path:
    """A checkpoint folder in ``cache`` (this machine's, if left out).

    UserError where the store's embodiment is not the model's. With ``extend``, for whoever extends the model to it, it
    may have other cameras; and other actions, of which the model then knows no embodiment.
    """
    snapshot = LatentStore.open(store_uri).snapshot(snapshot_id)
    named = {row["encoder"] for row in snapshot.episodes(["encoder"]).to_pylist()}
    own = [name for name in sorted(named) if name not in OTHERS]
    encoder = choose_encoder(snapshot, own[0] if len(own) == 1 else ENCODER)
    if not snapshot.rows(PIXELS):
        raise UserError(f"{store_uri}: holds no pixels, which {file} observes; ingest with --encoder {PIXELS}, too")
    rows = by_embodiment([row for row in snapshot.rows(encoder) if row["action_dim"]])
    name = embodiment or (next(iter(rows)) if len(rows) == 1 else None)
    if name is None or name not in rows:
        raise UserError(f"{file}: choose an embodiment with --embodiment; the store knows {', '.join(rows) or 'none'}")
    robot = describe(name, rows[name], 0, max(len(row["cameras"]) for row in rows[name]))
    try:
        held = read_published(file)
        model = load_published(held.weights, proprio_dim=max(1, robot.proprio_dim), embodiments=1 + SPARE_EMBODIMENTS)
    except ValueError as error:
        raise UserError(f"{file}: {str(error).removeprefix(f'{file}: ')}") from None
    config = model.model_config
    shape = snapshot.shape(rows[name][0]["cameras"][0]["segments"][0])
    stride = stride_of(rows[name][0], shape)
    for what, ours, theirs in (
        ("values an action", config.action_dim, robot.action_dim),
        ("cameras", config.cameras, len(robot.cameras)),
        ("latent channels", config.latent_channels, shape[1]),
    ):
        if ours != theirs and not (extend and what != "latent channels"):
            raise UserError(f"{file}: {ours} {what}; {name} in {store_uri} has {theirs}")
    if min(shape[2:]) < max(config.latent_size):
        sizes = (config.latent_size[0] * stride, shape[2] * stride)
        raise UserError(f"{file}: sees {sizes[0]} pixels; {store_uri} holds {sizes[1]}; ingest with more --image-size")
    known = {}
    if robot.action_dim == config.action_dim:
        normalizer = _normalizer(held.action_normalizer, robot, file)
        seen = robot.cameras[: config.cameras]
        known = {name: dataclasses.replace(robot, cameras=seen, action_normalizer=normalizer)}
    settings = checkpoint.Settings(
        model=config,
        diffusion=model.diffusion_config,
        encoder=rows[name][0]["encoder"],
        encoder_digest=encoder,
        image_size=shape[2] * stride,
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


def _normalizer(numbers: dict[str, np.ndarray], robot: Embodiment, file: Path) -> Normalizer:
    """The published one's. Its scale and offset do not say which way they are meant; the store's actions do, where
    under one of both readings alone they are near [-1, 1], or fill it. UserError where neither is so, or both are near.
    """
    found = {name.rpartition(".")[2].strip("_"): np.ravel(values).astype(float) for name, values in numbers.items()}
    if not {"scale", "offset"} <= set(found) or {found[key].size for key in ("scale", "offset")} != {robot.action_dim}:
        held = ", ".join(f"{name} {values.shape}" for name, values in numbers.items()) or "nothing"
        raise UserError(f"{file}: its normaliser has no scale and offset of {robot.action_dim} actions, but {held}")
    scale, offset = found["scale"], found["offset"]
    if not (np.isfinite([scale, offset]).all() and scale.all()):
        raise UserError(f"{file}: its normaliser has scales that are 0, or numbers that are not finite")
    seen = robot.action_normalizer
    moving = np.asarray(seen.scale) > MINIMUM_RANGE  # a column that does not tells nothing
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
        raise UserError(f"{what} may multiply or divide: {actions}, fit both; give a store of all that it was made of")
    return reading
