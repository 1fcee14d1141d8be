"""A real episode, re-encoded into the official layout of each format, survives the round trip.

It is GR1's first episode, stored next to the checkout: its video is decoded by PyAV alone, its numbers are from its own
table. Raw DROID, raw BridgeData, ROS, replay buffers and WebDataset have such tests in their own files.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import NamedTuple

import av
import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers.formats import REAL, jpeg, write_tfds
from helpers.readers import frames_of
from PIL import Image

from preprocessing.sources import find, load, scan
from uwm_model.metrics import psnr

pytestmark = pytest.mark.skipif(not REAL.exists(), reason=f"no real data at {REAL}")

GR1 = REAL / "gr1_lerobot_v2"
EVERY = 10  # frames, so that each differs from its neighbours
SENTENCE = "pick the pear from the counter and place it in the plate"


LOSSLESS, AS_JPEG = np.inf, 28.0  # decibels, at least


class Original(NamedTuple):
    images: np.ndarray  # uint8 [T, 256, 256, 3]
    state: np.ndarray  # float32 [T, 44]
    action: np.ndarray  # float32 [T, 44]


class ExpectedEpisode(NamedTuple):
    cameras: dict[str, tuple[np.ndarray, float]]  # images and decibels
    proprio: dict[str, np.ndarray]
    action: np.ndarray


@pytest.fixture(scope="module")
def recorded() -> Original:
    table = pq.read_table(GR1 / "data/chunk-000/episode_000000.parquet")
    state, action = (np.stack(table[name].to_numpy()).astype(np.float32) for name in ("observation.state", "action"))
    with av.open(str(GR1 / "videos/chunk-000/observation.images.ego_view/episode_000000.mp4")) as container:
        images = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert len(images) == len(state) == len(action)
    return Original(*(values[::EVERY] for values in (images, state, action)))


def compare(frames: np.ndarray, images: np.ndarray, decibels: float) -> None:
    """Each frame is closest to the original of its number: upright, not mirrored, colours not swapped."""
    quality = psnr(frames, images)
    assert frames.shape == images.shape and quality.min() >= decibels
    for number, frame in enumerate(frames):
        assert psnr(frame, np.delete(images, number, axis=0)).max() < quality[number]
    for wrong in (images[:, ::-1], images[:, :, ::-1], images[..., ::-1]):
        assert psnr(frames, wrong).max() < min(decibels, 30) - 5


def write_robomimic(folder: Path, recorded: Original) -> ExpectedEpisode:
    """robomimic's layout: images bottom-up, as OpenGL renders them."""
    with h5py.File(folder / "a.hdf5", "w") as file:
        data = file.create_group("data")
        data.attrs["macros_image_convention"] = "opengl"
        data.attrs["problem_info"] = json.dumps({"language_instruction": SENTENCE})
        data.attrs["env_args"] = json.dumps({"env_name": "Lift", "env_kwargs": {"robots": ["Panda"]}})
        demo = data.create_group("demo_0")
        demo["actions"], demo["states"] = recorded.action[:, :7].astype(np.float64), recorded.state.astype(np.float64)
        demo["dones"] = np.arange(len(recorded.action)) == len(recorded.action) - 1
        demo["obs/agentview_image"] = recorded.images[:, ::-1]
        demo["obs/robot0_joint_pos"] = recorded.state[:, :7].astype(np.float64)
    cameras = {"agentview": (recorded.images, LOSSLESS)}
    return ExpectedEpisode(cameras, {"robot0_joint_pos": recorded.state[:, :7]}, recorded.action[:, :7])


def write_aloha(folder: Path, recorded: Original) -> ExpectedEpisode:
    """OpenCV takes the first channel as blue; JPEG files are padded to one length."""
    files = [jpeg(picture[..., ::-1]) for picture in recorded.images]
    longest = max(map(len, files))
    with h5py.File(folder / "episode_0.hdf5", "w") as file:
        file.attrs["sim"], file.attrs["compress"] = False, True
        file["action"], file["observations/qpos"] = recorded.action[:, :14], recorded.state[:, :14]
        file["observations/qvel"] = np.zeros_like(recorded.state[:, :14])
        padded = [np.frombuffer(data.ljust(longest, b"\0"), np.uint8) for data in files]
        file["observations/images/cam_high"] = np.stack(padded)
    proprio = {"qpos": recorded.state[:, :14], "qvel": np.zeros_like(recorded.state[:, :14])}
    return ExpectedEpisode({"cam_high": (recorded.images, AS_JPEG)}, proprio, recorded.action[:, :14])


def write_calvin(folder: Path, recorded: Original) -> ExpectedEpisode:
    first = 358482
    for step, (picture, state, action) in enumerate(zip(*recorded, strict=True), first):
        np.savez(
            folder / f"episode_{step:07d}.npz",
            rgb_static=picture,
            rgb_gripper=picture[:, ::-1],
            rel_actions=action[:7].astype(np.float64),
            actions=action[7:14].astype(np.float64),
            robot_obs=state[:15].astype(np.float64),
            scene_obs=np.zeros(24),
        )
    last = first + len(recorded.state) - 1
    np.save(folder / "ep_start_end_ids.npy", np.array([[first, last]]))
    (folder / "lang_annotations").mkdir()
    table = {"language": {"ann": [SENTENCE], "task": ["pick"]}, "info": {"episodes": [], "indx": [(first, last)]}}
    np.save(folder / "lang_annotations" / "auto_lang_ann.npy", table)  # type: ignore[arg-type]
    cameras = {"static": (recorded.images, LOSSLESS), "gripper": (recorded.images[:, :, ::-1], LOSSLESS)}
    return ExpectedEpisode(cameras, {"robot_obs": recorded.state[:, :15]}, recorded.action[:, :7])


def write_rlds(folder: Path, recorded: Original) -> ExpectedEpisode:
    """One camera as JPEG, one as PNG; TFDS does not distinguish them in the record."""
    steps = len(recorded.state)
    fields = {
        "steps/observation/image": "jpeg",
        "steps/observation/wrist": "jpeg",
        "steps/observation/state": "float32 44",
    }
    fields |= {
        "steps/action": "float32 7",
        "steps/language_instruction": "text",
        "steps/language_embedding": "float32 512",
    }
    episode = {
        "steps/observation/image": [jpeg(picture) for picture in recorded.images],
        "steps/observation/wrist": [png(picture[:, ::-1]) for picture in recorded.images],
        "steps/observation/state": recorded.state,
        "steps/action": recorded.action[:, :7],
        "steps/language_instruction": [SENTENCE] * steps,
        "steps/language_embedding": np.ones((steps, 512)),
    }
    write_tfds(folder, "gr1_as_rlds", fields, [episode])
    cameras = {"image": (recorded.images, AS_JPEG), "wrist": (recorded.images[:, :, ::-1], LOSSLESS)}
    return ExpectedEpisode(cameras, {"state": recorded.state}, recorded.action[:, :7])


def png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(file, "PNG")
    return file.getvalue()


WRITERS = {"hdf5": write_robomimic, "aloha": write_aloha, "calvin": write_calvin, "rlds": write_rlds}


@pytest.mark.parametrize("format", WRITERS)
def test_a_real_episode_in_another_layout(tmp_path: Path, recorded: Original, format: str) -> None:
    expected = WRITERS[format](tmp_path, recorded)
    [(kind, path)] = find(tmp_path)
    [episode] = [load(ref) for ref in scan(kind, path)]
    assert (kind, episode.instruction) == (format, None if format == "aloha" else SENTENCE)
    assert episode.action is not None and np.array_equal(episode.action, expected.action)
    assert episode.proprio.keys() == expected.proprio.keys() and episode.cameras.keys() == expected.cameras.keys()
    for name, values in expected.proprio.items():
        assert np.array_equal(episode.proprio[name], values)
    for camera, (images, decibels) in expected.cameras.items():
        compare(frames_of(episode, camera), images, decibels)


def test_a_real_episode_in_its_own_layout(recorded: Original) -> None:
    [(kind, path)] = find(GR1)
    episode = load(next(iter(scan(kind, path))))
    assert (kind, episode.instruction) == ("lerobot", SENTENCE)
    assert episode.action is not None and np.array_equal(episode.action[::EVERY], recorded.action)
    assert np.array_equal(episode.proprio["state"][::EVERY], recorded.state)
    compare(frames_of(episode, "ego_view")[::EVERY], recorded.images, 40)  # chroma is upsampled better than by PyAV
