"""Writers of small raw files, one per format. They share no code with the readers, so errors cannot cancel out."""

from __future__ import annotations

import io
import json
import shutil
import struct
from pathlib import Path

import av
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

REAL = Path(__file__).parents[3] / "shared" / "real"


def quadrants(size: int = 64) -> np.ndarray:
    """A frame that every flip or rotation changes: red and green above blue and grey."""
    picture = np.zeros((size, size, 3), np.uint8)
    half = size // 2
    picture[:half, :half] = 220, 30, 30
    picture[:half, half:] = 30, 200, 40
    picture[half:, :half] = 20, 40, 210
    picture[half:, half:] = 128, 128, 128
    return picture


def moving(count: int) -> np.ndarray:
    """Frames of ``quadrants``, from the second on with a white square that moves: a camera that is not frozen."""
    frames = np.stack([quadrants()] * count)
    for i in range(1, count):
        y, x = 8 * (i // 7 % 7), 8 * (i % 7)
        frames[i, y : y + 16, x : x + 16] = 255
    return frames


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
    """Grey frames: frame i has level 2 i + 20, so lost, repeated or swapped frames are detected."""
    levels = np.arange(count, dtype=np.uint8) * 2 + 20
    return np.broadcast_to(levels[:, None, None, None], (count, size, size, 3)).copy()


def jpeg(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=95)
    return file.getvalue()


# ------------------------------------------------------------------------------------------------ TFRecord, RLDS


def crc32c(data: bytes) -> int:
    """Bit by bit from the polynomial, as defined in RFC 3720 B.4."""
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
    """Write one shard of these Examples, with a features.json of image, state[3], action[2], language_instruction."""
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


def write_tfds(
    folder: Path, name: str, fields: dict[str, str], episodes: list[dict], split: str = "train", version: str = "1.0.0"
) -> Path:
    """Write one shard, features.json and dataset_info.json of a data set whose fields are named as in the Examples.

    A field is ``jpeg``, ``text``, ``string`` (as older TFDS wrote texts), or a dtype and a width: ``float64 7``.
    An episode maps fields to arrays, images and texts.
    """

    def feature(kind: str) -> dict:
        dtype, *width = kind.split()
        if dtype == "jpeg":
            image = {"shape": {"dimensions": ["-1", "-1", "3"]}, "dtype": "uint8", "encodingFormat": "jpeg"}
            return {"pythonClassName": "tensorflow_datasets.core.features.image_feature.Image", "image": image}
        if dtype == "text":
            return {"pythonClassName": "tensorflow_datasets.core.features.text_feature.Text", "text": {}}
        shape = {"dimensions": width} if width else {}
        name = "tensor_feature.Tensor" if width or dtype == "string" else "scalar.Scalar"
        tensor = {"shape": shape, "dtype": dtype, "encoding": "none"}
        return {"pythonClassName": f"tensorflow_datasets.core.features.{name}", "tensor": tensor}

    root: dict = {}
    for field_name, kind in fields.items():
        *above, leaf = field_name.split("/")
        node = root
        for part in above:
            node = node.setdefault(part, {})
        node[leaf] = feature(kind)

    def table(node: dict) -> dict:
        if "pythonClassName" in node:
            return node
        return {
            "pythonClassName": "f.FeaturesDict",
            "featuresDict": {"features": {k: table(v) for k, v in node.items()}},
        }

    whole = table(root)
    steps = whole["featuresDict"]["features"]["steps"]
    whole["featuresDict"]["features"]["steps"] = {"pythonClassName": "d.Dataset", "sequence": {"feature": steps}}

    def flat(values: object) -> list:
        if isinstance(values, str):
            return [values.encode()]
        if isinstance(values, list):
            return [value.encode() if isinstance(value, str) else value for value in values]
        array = np.asarray(values)
        return array.astype(np.float32 if array.dtype.kind == "f" else np.int64).ravel().tolist()

    records = [encode_example({key: flat(values) for key, values in episode.items()}) for episode in episodes]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "features.json").write_text(json.dumps(whole))
    (folder / "dataset_info.json").write_text(json.dumps({"name": name, "version": version, "fileFormat": "tfrecord"}))
    (folder / f"{name}-{split}.tfrecord-00000-of-00001").write_bytes(b"".join(map(framed, records)))
    return folder


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


def png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


PICTURES = [png(np.full((16, 16, 3), 20 * i, np.uint8)) for i in range(6)]


def write_pictures(folder: Path, *names: str, rows: int = 6) -> Path:
    """A v2.1 data set of one episode with pictures in its table, and no films."""
    for part in ("meta", "data/chunk-000"):
        (folder / part).mkdir(parents=True)
    embedded = [{"bytes": data, "path": "x.png"} for data in PICTURES[:rows]]
    columns = dict.fromkeys(names or ("observation.images.top",), embedded)
    columns |= {"action": [[i, 0.5] for i in range(rows)], "observation.state": [[i, 0.0] for i in range(rows)]}
    columns |= {"frame_index": list(range(rows)), "task_index": [0] * rows, "timestamp": [i / 10 for i in range(rows)]}
    pq.write_table(pa.table(columns), folder / "data/chunk-000/episode_000000.parquet")
    features = {name: {"dtype": "image", "shape": [16, 16, 3]} for name in names or ("observation.images.top",)}
    features |= {name: {"dtype": "float32", "shape": [2]} for name in ("action", "observation.state")}
    info = {"codebase_version": "v2.1", "robot_type": "panda", "fps": 10, "features": features}
    info |= {"data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"}
    (folder / "meta/info.json").write_text(json.dumps(info))
    (folder / "meta/tasks.jsonl").write_text('{"task_index": 0, "task": "lift"}\n')
    (folder / "meta/episodes.jsonl").write_text('{"episode_index": 0, "tasks": ["lift"], "length": 6}\n')
    return folder


def renamed(folder: Path, names: dict[str, str]) -> Path:
    """Rename columns of a LeRobot data set, in its tables and in info.json."""
    info = json.loads((folder / "meta" / "info.json").read_text())
    info["features"] = {names.get(key, key): feature for key, feature in info["features"].items()}
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    for file in (folder / "data").rglob("*.parquet"):
        table = pq.read_table(file)
        pq.write_table(table.rename_columns([names.get(name, name) for name in table.column_names]), file)
    return folder


def as_lerobot_v3(source: Path, folder: Path, per_file: int = 3, shift: int = 0) -> Path:
    """Rewrite a v2 data set in the layout of v3.0: ``per_file`` episodes per file, videos without re-encoding.

    ``shift`` is added to the task indices, as joining data sets does.
    """
    info = json.loads((source / "meta" / "info.json").read_text())
    lines = [json.loads(line) for line in (source / "meta" / "tasks.jsonl").read_text().splitlines()]
    tasks = {line["task_index"]: line["task"] for line in lines}
    tables = sorted(source.glob("data/*/*.parquet"), key=lambda path: path.name)
    episodes: list[dict] = []
    for number in range(0, len(tables), per_file):
        place = f"chunk-000/file-{number // per_file:03d}"
        joined = []
        for index, path in enumerate(tables[number : number + per_file], number):
            table = pq.read_table(path)
            before = episodes[-1]["dataset_to_index"] if episodes else 0
            row = {"episode_index": index, "length": table.num_rows, "data/chunk_index": 0}
            row |= {"data/file_index": number // per_file, "stats/action/mean": [0.0]}
            row |= {"dataset_from_index": before, "dataset_to_index": before + table.num_rows}
            if "task_index" in table.column_names:
                row["tasks"] = [tasks[task] for task in dict.fromkeys(table["task_index"].to_pylist())]
                at = table.column_names.index("task_index")
                table = table.set_column(at, "task_index", pc.add(table["task_index"], shift))
            kept = [name for name in table.column_names if name not in ("episode_index", "index")]
            table = table.select(kept).append_column("episode_index", pa.array([index] * table.num_rows))
            joined.append(table.append_column("index", pa.array(range(before, before + table.num_rows))))
            episodes.append(row)
        (folder / "data" / place).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.concat_tables(joined), folder / "data" / f"{place}.parquet")
        for key in [key for key, feature in info["features"].items() if feature["dtype"] == "video"]:
            videos = [next(iter(source.glob(f"videos/*/{key}/{path.stem}.mp4")), None) for path in tables]
            if not any(videos):
                continue
            (folder / "videos" / key / place).parent.mkdir(parents=True, exist_ok=True)
            ends = join_videos(videos[number : number + per_file], folder / "videos" / key / f"{place}.mp4")
            for index, (begin, end) in enumerate(zip([0.0, *ends], ends, strict=False), number):
                episodes[index] |= {f"videos/{key}/chunk_index": 0, f"videos/{key}/file_index": number // per_file}
                episodes[index] |= {f"videos/{key}/from_timestamp": begin, f"videos/{key}/to_timestamp": end}
    (folder / "meta" / "episodes" / "chunk-000").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(episodes), folder / "meta" / "episodes" / "chunk-000" / "file-000.parquet")
    sentences = {"task_index": [task + shift for task in tasks], "__index_level_0__": list(tasks.values())}
    pq.write_table(pa.table(sentences), folder / "meta" / "tasks.parquet")
    info |= {
        "codebase_version": "v3.0",
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    if (source / "meta" / "modality.json").exists():
        shutil.copy(source / "meta" / "modality.json", folder / "meta")
    return folder


def join_videos(videos: list[Path], path: Path) -> list[float]:
    """Concatenate videos without re-encoding. Returns the end of each, in seconds."""
    ends = [0.0]
    with av.open(str(path), "w") as joined:
        stream = None
        for video in videos:
            with av.open(str(video)) as container:
                source = container.streams.video[0]
                stream = stream or joined.add_stream_from_template(source)
                offset = round(ends[-1] / source.time_base)
                for packet in container.demux(source):
                    if packet.size:
                        packet.pts, packet.dts = packet.pts + offset, packet.dts + offset
                        packet.stream = stream
                        joined.mux(packet)
                ends.append(ends[-1] + float(source.frames / source.average_rate))
    return ends[1:]


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
            pictures = moving(frames)
            demo["obs/agentview_rgb"] = pictures[:, ::-1] if opengl else pictures
            demo["obs/joint_states"] = rng.normal(size=(frames, 7))
            demo["obs/height"] = rng.normal(size=frames)
    return path


def write_aloha(path: Path, pictures: np.ndarray, compress: bool = False, **more: np.ndarray) -> Path:
    """As written by ALOHA's ``record_episodes.py``: JPEG files whose channels OpenCV takes for B, G, R."""
    path.parent.mkdir(parents=True, exist_ok=True)
    steps, rng = len(pictures), np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file.attrs["sim"], file.attrs["compress"] = False, compress
        for key in ("action", "observations/qpos", "observations/qvel"):
            file[key] = rng.normal(size=(steps, 14)).astype(np.float32)
        for key, values in more.items():
            file[key] = values
        if compress:
            files = [jpeg(picture[..., ::-1]) for picture in pictures]
            longest = max(map(len, files))
            rows = [np.frombuffer(data.ljust(longest, b"\0"), np.uint8) for data in files]
            file["observations/images/cam_high"] = np.stack(rows)
            file["compress_len"] = np.array([[len(data) for data in files]], np.float64)
        else:
            file["observations/images/cam_high"] = pictures
    return path


def write_maniskill(path: Path, pictures: np.ndarray, trajectories: int = 1, mode: str = "pd_ee_delta_pose") -> Path:
    """As ManiSkill's RecordEpisode writes: observations and states have a row more than actions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    steps, rng = len(pictures) - 1, np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for index in range(trajectories):
            group = file.create_group(f"traj_{index}", track_order=True)
            group["actions"] = rng.normal(size=(steps, 7)).astype(np.float32)
            group["terminated"], group["truncated"] = np.arange(steps) == steps - 1, np.zeros(steps, bool)
            group["success"] = np.arange(steps) == steps - 1 - index  # the second one fails again
            group["obs/agent/qpos"] = np.arange((steps + 1) * 9, dtype=np.float32).reshape(-1, 9) + index
            group["obs/agent/qvel"] = rng.normal(size=(steps + 1, 9)).astype(np.float32)
            group["obs/extra/goal_pos"] = rng.normal(size=(steps + 1, 3)).astype(np.float32)
            group["obs/sensor_param/base_camera/intrinsic_cv"] = np.ones((steps + 1, 3, 3), np.float32)
            group.create_dataset("obs/sensor_data/base_camera/rgb", data=pictures, compression="gzip")
            group["obs/sensor_data/base_camera/depth"] = pictures[..., :1].astype(np.uint16)
            group["env_states/articulations/panda"] = rng.normal(size=(steps + 1, 31)).astype(np.float32)
            group["env_states/actors/cube"] = rng.normal(size=(steps + 1, 13)).astype(np.float32)
    episodes = [{"episode_id": index, "control_mode": mode, "success": True} for index in range(trajectories)]
    env = {"env_id": "PickCube-v1", "env_kwargs": {"obs_mode": "rgb"}, "max_episode_steps": 50}
    path.with_suffix(".json").write_text(json.dumps({"env_info": env, "episodes": episodes}))
    return path


def write_minari(folder: Path, pictures: np.ndarray, episodes: int = 1) -> Path:
    """As Minari's HDF5Storage writes for a space that is a dictionary."""
    (folder / "data").mkdir(parents=True)
    steps, rng = len(pictures) - 1, np.random.default_rng(0)
    with h5py.File(folder / "data" / "main_data.hdf5", "w", track_order=True) as file:
        for index in range(episodes):
            group = file.create_group(f"episode_{index}")
            group.attrs["id"], group.attrs["seed"], group.attrs["total_steps"] = index, 123, steps
            group["actions"] = rng.normal(size=(steps, 4)).astype(np.float32)
            group["rewards"] = np.zeros(steps)
            group["terminations"], group["truncations"] = np.zeros(steps, bool), np.arange(steps) == steps - 1
            group["observations/pixels"] = pictures
            group["observations/robot/joints"] = np.arange((steps + 1) * 6.0).reshape(-1, 6)
            group.create_dataset(
                "observations/mission", data=["go to the ball"] * (steps + 1), dtype=h5py.string_dtype()
            )
            group["infos/success"] = np.arange(steps + 1) == steps
    metadata = {"dataset_id": "toy/reach/expert-v0", "total_episodes": episodes, "data_format": "hdf5"}
    (folder / "data" / "metadata.json").write_text(json.dumps(metadata))
    return folder


def write_robotwin(folder: Path, pictures: np.ndarray, index: int = 0) -> Path:
    """As RoboTwin's ``pkl2hdf5.py`` writes: JPEG files whose channels OpenCV takes for B, G, R, padded with zeros."""
    for part in ("data", "instructions"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    files, steps = [jpeg(picture[..., ::-1]) for picture in pictures], len(pictures)
    targets = np.arange(steps * 14.0).reshape(steps, 14)
    with h5py.File(folder / "data" / f"episode{index}.hdf5", "w") as file:
        for camera in ("head_camera", "left_camera"):
            file[f"observation/{camera}/rgb"] = np.array(files, f"S{max(map(len, files))}")
            file[f"observation/{camera}/intrinsic_cv"] = np.ones((steps, 3, 3))
        file["observation/head_camera/mesh_segmentation"] = np.zeros_like(pictures)
        parts = {"left_arm": slice(0, 6), "left_gripper": 6, "right_arm": slice(7, 13), "right_gripper": 13}
        for name, columns in parts.items():
            file[f"joint_action/{name}"] = targets[:, columns]
        file["joint_action/vector"] = targets
        file["endpose/left_endpose"], file["pointcloud"] = np.ones((steps, 7)), np.zeros((steps, 1024, 6))
    sentences = {"seen": ["Grab the hammer.", "Take the hammer."], "unseen": ["Lift the tool."]}
    (folder / "instructions" / f"episode{index}.json").write_text(json.dumps(sentences))
    return folder


def write_calvin(folder: Path, pictures: np.ndarray, first: int = 358482, sentences: dict | None = None) -> Path:
    """A split as in CALVIN: one file per step, and a pickled table of instructions by (first, last) step."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for step, picture in enumerate(pictures, first):
        np.savez(
            folder / f"episode_{step:07d}.npz",
            rgb_static=picture,
            rgb_gripper=picture[::2, ::2],
            depth_static=np.zeros(picture.shape[:2], np.float32),
            actions=rng.normal(size=7),
            rel_actions=rng.normal(size=7),
            robot_obs=rng.normal(size=15),
            scene_obs=rng.normal(size=24),
        )
    np.save(folder / "ep_start_end_ids.npy", np.array([[first, first + len(pictures) - 1]]))
    if sentences:
        (folder / "lang_annotations").mkdir()
        language = {"ann": list(sentences.values()), "task": ["x"] * len(sentences), "emb": np.zeros((1, 1, 384))}
        table = {"language": language, "info": {"episodes": [], "indx": list(sentences)}}
        np.save(folder / "lang_annotations" / "auto_lang_ann.npy", table)  # type: ignore[arg-type]
    return folder
