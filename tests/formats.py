"""Writers of small raw files, one a format. They share no code with the readers, so that both cannot err alike."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path

import av
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

REAL = Path(__file__).parents[2] / "shared" / "real"


def quadrants(size: int = 64) -> np.ndarray:
    """A picture that no flip or turn leaves as it is: red, green over blue, grey."""
    picture = np.zeros((size, size, 3), np.uint8)
    half = size // 2
    picture[:half, :half] = 220, 30, 30
    picture[:half, half:] = 30, 200, 40
    picture[half:, :half] = 20, 40, 210
    picture[half:, half:] = 128, 128, 128
    return picture


def write_video(
    path: Path, frames: np.ndarray, fps: int = 20, codec: str = "libx264", pix_fmt: str = "yuv420p", **options: str
) -> Path:
    with av.open(str(path), "w", options={"movflags": "faststart"} if path.suffix == ".mp4" else {}) as container:
        stream = container.add_stream(codec, rate=fps, options={"crf": "12", **options} if codec == "libx264" else {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def numbered(count: int, size: int = 64) -> np.ndarray:
    """Frame i is grey of level 2 i + 20: a lost, repeated or swapped frame shows."""
    levels = np.arange(count, dtype=np.uint8) * 2 + 20
    return np.broadcast_to(levels[:, None, None, None], (count, size, size, 3)).copy()


def jpeg(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=95)
    return file.getvalue()


# ------------------------------------------------------------------------------------------------ TFRecord, RLDS


def crc32c(data: bytes) -> int:
    """Bit by bit from the polynomial, as RFC 3720 B.4 defines it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def framed(record: bytes) -> bytes:
    def masked(data: bytes) -> bytes:
        crc = crc32c(data)
        return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)

    length = struct.pack("<Q", len(record))
    return length + masked(length) + record + masked(record)


def varint(value: int) -> bytes:
    value &= 2**64 - 1
    out = b""
    while value >= 128:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def encode_example(features: dict[str, list], packed: bool = True) -> bytes:
    entries = b""
    for key, values in features.items():
        if values and isinstance(values[0], bytes):
            body = field(1, b"".join(field(1, value) for value in values))
        elif values and isinstance(values[0], float):
            numbers = [struct.pack("<f", value) for value in values]
            body = field(
                2, field(1, b"".join(numbers)) if packed else b"".join(varint(1 << 3 | 5) + n for n in numbers)
            )
        else:
            numbers = [varint(value) for value in values]
            body = field(3, field(1, b"".join(numbers)) if packed else b"".join(varint(1 << 3) + n for n in numbers))
        entries += field(1, field(1, key.encode()) + field(2, body))
    return field(1, entries)


def write_rlds(folder: Path, episodes: list[bytes], action: dict | None = None, name: str = "toy") -> Path:
    """One shard of these Examples, and the features.json of: image, state[3], action[2], language_instruction."""
    folder.mkdir(parents=True, exist_ok=True)

    def tensor(*shape: int) -> dict:
        dimensions = [str(size) for size in shape]
        return {"pythonClassName": "t.Tensor", "tensor": {"shape": {"dimensions": dimensions}, "dtype": "float32"}}

    def table(**features: dict) -> dict:
        return {"pythonClassName": "f.FeaturesDict", "featuresDict": {"features": features}}

    image = {"shape": {"dimensions": ["32", "32", "3"]}, "dtype": "uint8", "encodingFormat": "jpeg"}
    step = table(
        observation=table(image={"pythonClassName": "i.Image", "image": image}, state=tensor(3)),
        action=action or tensor(2),
        language_instruction={"pythonClassName": "t.Text", "text": {}},
    )
    root = table(steps={"pythonClassName": "d.Dataset", "sequence": {"feature": step}})
    (folder / "features.json").write_text(json.dumps(root))
    (folder / f"{name}-train.tfrecord-00000-of-00001").write_bytes(b"".join(map(framed, episodes)))
    return folder


def rlds_episode(steps: int = 4, seed: int = 0) -> bytes:
    rng = np.random.default_rng(seed)
    return encode_example(
        {
            "steps/observation/image": [jpeg(quadrants(32))] * steps,
            "steps/observation/state": rng.normal(size=steps * 3).tolist(),
            "steps/action": rng.normal(size=steps * 2).tolist(),
            "steps/language_instruction": ["lift the blöck".encode()] * steps,
        }
    )


# ----------------------------------------------------------------------------------------------------- LeRobot


def write_lerobot(folder: Path, rows: int = 12, frames: int | None = None, episodes: int = 2, **info: object) -> Path:
    (folder / "meta").mkdir(parents=True)
    features = {
        "observation.images.top": {"dtype": "video", "shape": [64, 64, 3]},
        "observation.state": {"dtype": "float32", "shape": [2]},
        "action": {"dtype": "float32", "shape": [7], "names": ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]},
    }
    table = {
        "codebase_version": "v2.1",
        "robot_type": "so100_follower",
        "fps": 20,
        "chunks_size": 1000,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": features,
        **info,
    }
    (folder / "meta" / "info.json").write_text(json.dumps(table))
    (folder / "meta" / "tasks.jsonl").write_text('{"task_index": 0, "task": "push the cube"}\n')
    listed = [json.dumps({"episode_index": i, "tasks": ["push the cube"], "length": rows}) for i in range(episodes)]
    (folder / "meta" / "episodes.jsonl").write_text("\n".join(listed))
    data, videos = folder / "data" / "chunk-000", folder / "videos" / "chunk-000" / "observation.images.top"
    data.mkdir(parents=True)
    videos.mkdir(parents=True)
    for index in range(episodes):
        rng = np.random.default_rng(index)
        columns = {
            "observation.state": list(rng.normal(size=(rows, 2)).astype(np.float32)),
            "action": list(rng.normal(size=(rows, 7)).astype(np.float32)),
            "timestamp": np.arange(rows) / 20,
            "frame_index": np.arange(rows),
            "task_index": np.zeros(rows, np.int64),
        }
        pq.write_table(pa.table(columns), data / f"episode_{index:06d}.parquet")
        write_video(videos / f"episode_{index:06d}.mp4", numbered(rows if frames is None else frames) + index)
    return folder


# -------------------------------------------------------------------------------------------------------- HDF5


def write_demos(path: Path, demos: int = 2, steps: int = 5, frames: int | None = None, opengl: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = steps if frames is None else frames
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        if opengl:
            data.attrs["macros_image_convention"] = "opengl"
        data.attrs["problem_info"] = json.dumps({"language_instruction": "open the drawer"})
        data.attrs["env_args"] = json.dumps({"env_name": "Libero", "env_kwargs": {"robots": ["Panda"]}})
        for index in range(demos):
            rng = np.random.default_rng(index)
            demo = data.create_group(f"demo_{index}")
            demo["actions"] = rng.normal(size=(steps, 7))
            demo["dones"] = np.arange(steps) == steps - 1
            picture = quadrants()[::-1] if opengl else quadrants()
            demo["obs/agentview_rgb"] = np.broadcast_to(picture, (frames, 64, 64, 3))
            demo["obs/joint_states"] = rng.normal(size=(frames, 7))
            demo["obs/height"] = rng.normal(size=frames)
    return path
