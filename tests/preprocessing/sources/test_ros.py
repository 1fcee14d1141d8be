"""ROS recordings, written by the formats' own writers from messages that are serialised here byte by byte."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import shutil
import sqlite3
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from av import VideoFrame
from helpers.formats import REAL, jpeg, quadrants
from helpers.readers import frames_of, said
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mcap.writer import CompressionType
from mcap.writer import Writer as McapWriter
from PIL import Image
from rosbags import rosbag1, rosbag2
from rosbags.typesys import Stores, get_typestore

from preprocessing.contracts.contract import DataContract
from preprocessing.episode import ActionBlock, Episode
from preprocessing.errors import BadEpisode, UserError
from preprocessing.sources import digest, find, load, scan
from preprocessing.sources.ros.messages import COMPRESSED, FOXGLOVE, IMAGE, JOINTS, NUMBERS, TEXT
from preprocessing.video.decode import open_video
from uwm_model.metrics import psnr

START = 1_700_000_000 * 10**9  # nanoseconds
TWIST, TWIST_STAMPED, FLOATS = (
    "geometry_msgs/msg/Twist",
    "geometry_msgs/msg/TwistStamped",
    "std_msgs/msg/Float64MultiArray",
)


# ------------------------------------------------------------------------------------------------------- messages


class Wire:
    """CDR (OMG, little-endian) and ROS 1's serialisation, which has no alignment and no string terminators."""

    def __init__(self, ros1: bool = False):
        self.ros1, self.data = ros1, b""

    def put(self, code: str, *values: float) -> Wire:
        for value in values:
            if not self.ros1:
                self.data += b"\0" * (-len(self.data) % struct.calcsize(code))
            self.data += struct.pack("<" + code, value)
        return self

    def text(self, text: str) -> Wire:
        data = text.encode() + (b"" if self.ros1 else b"\0")
        self.put("I", len(data))
        self.data += data
        return self

    def blob(self, data: bytes) -> Wire:
        self.put("I", len(data))
        self.data += data
        return self

    def header(self, at: float | None) -> Wire:
        stamp = 0 if at is None else START + round(at * 1e9)
        if self.ros1:
            self.put("I", 7)
        return self.put("I", stamp // 10**9, stamp % 10**9).text("base")

    @property
    def message(self) -> bytes:
        return self.data if self.ros1 else b"\0\1\0\0" + self.data


Write = Callable[[Wire, float | None], Wire]


@dataclass(frozen=True)
class Sent:
    """A message, with the times it was sent and received in seconds after START."""

    topic: str
    type: str
    sent: float | None
    received: float
    write: Write

    def data(self, ros1: bool = False) -> bytes:
        return self.write(Wire(ros1), self.sent).message

    @property
    def log_time(self) -> int:
        return START + round(self.received * 1e9)


def raw(image: np.ndarray, encoding: str = "rgb8", padding: int = 0) -> Write:
    red, green, blue = np.moveaxis(image, -1, 0)
    full = np.full_like(red, 9)
    order = {"rgb8": (red, green, blue), "bgr8": (blue, green, red), "rgba8": (red, green, blue, full)}
    order |= {"bgra8": (blue, green, red, full), "8UC3": order["bgr8"], "8UC4": (blue, green, red, full)}
    pixels = np.stack(order.get(encoding, (red,)), axis=-1)
    height, width, channels = pixels.shape
    rows = np.full((height, width * channels + padding), 255, np.uint8)
    rows[:, : width * channels] = pixels.reshape(height, -1)

    def write(wire: Wire, at: float | None) -> Wire:
        wire.header(at).put("I", height, width).text(encoding).put("B", 1).put("I", rows.shape[1])
        return wire.blob(rows.tobytes())

    return write


def packed(data: bytes, named: str = "rgb8; jpeg compressed bgr8") -> Write:
    return lambda wire, at: wire.header(at).text(named).blob(data)


def joints(names: list[str], *parts: list[float]) -> Write:
    def write(wire: Wire, at: float | None) -> Wire:
        wire.header(at).put("I", len(names))
        for name in names:
            wire.text(name)
        for part in (*parts, [], [])[:3]:
            wire.put("I", len(part)).put("d", *part)
        return wire

    return write


def twist(*values: float, stamped: bool = False) -> Write:
    return lambda wire, at: (wire.header(at) if stamped else wire).put("d", *values)


def floats(values: list[float]) -> Write:
    return lambda wire, at: wire.put("I", 0, 0, len(values)).put("d", *values)


def text(words: str) -> Write:
    return lambda wire, at: wire.text(words)


def every(hertz: float, since: float, until: float) -> list[float]:
    return [round(since + i / hertz, 6) for i in range(round((until - since) * hertz))]


def numbered(index: int, size: int = 24) -> np.ndarray:
    """An image that shows its orientation, its channel order and, in the lower right quarter, its number."""
    image = quadrants(size)
    image[size // 2 :, size // 2 :] = index * 4
    return image


def numbers_in(frames: np.ndarray) -> list[int]:
    half = frames.shape[1] // 2
    return np.round(frames[:, half + 3 : -3, half + 3 : -3].mean(axis=(1, 2, 3)) / 4).astype(int).tolist()


def images_at(topic: str, times: list[float], late: float = 0.004, **how: object) -> list[Sent]:
    return [Sent(topic, IMAGE, t, t + late, raw(numbered(i), **how)) for i, t in enumerate(times)]  # type: ignore[arg-type]


FRONT, WRIST, ARM = every(20, 0, 2), every(30, 0.013, 2.013), every(50, 0.203, 2)


def scene() -> list[Sent]:
    """A front camera at 20 Hz, a wrist camera at 30 Hz, and joints with header stamps."""
    sent = images_at("/front/image_raw", FRONT, padding=5)
    sent += [
        Sent("/wrist/image/compressed", COMPRESSED, t, t + 0.03, packed(jpeg(numbered(i)))) for i, t in enumerate(WRIST)
    ]
    sent += [Sent("/joint_states", JOINTS, t, t + 0.001, joints(["a", "b"], [t, -t], [2 * t, 0])) for t in ARM]
    sent.append(Sent("/instruction", TEXT, None, 0.5, text("lift the blöck")))
    return sorted(sent, key=lambda message: message.received)


# -------------------------------------------------------------------------------------------------------- writers


def write_mcap(path: Path, sent: list[Sent], ros: int = 2, **options: object) -> Path:
    """An MCAP file as ROS 2 records it, or as converted from a ROS 1 bag."""
    store = get_typestore(Stores.ROS2_HUMBLE if ros == 2 else Stores.ROS1_NOETIC)
    with path.open("wb") as file:
        writer = McapWriter(file, chunk_size=20_000, **options)  # type: ignore[arg-type]
        writer.start(profile=f"ros{ros}")
        channels: dict[tuple[str, str], int] = {}
        for message in sent:
            if (key := (message.topic, message.type)) not in channels:
                definition = store.generate_msgdef(message.type, ros_version=ros)[0]
                name = message.type if ros == 2 else message.type.replace("/msg/", "/")
                schema = writer.register_schema(name, f"ros{ros}msg", definition.encode())
                encoding = "cdr" if ros == 2 else "ros1"
                channels[key] = writer.register_channel(message.topic, encoding, schema)
            data = message.data(ros1=ros == 1)
            writer.add_message(channels[key], message.log_time, data, message.log_time)
        writer.finish()
    return path


def write_bag2(folder: Path, sent: list[Sent], storage: str = "SQLITE3", mode: str | None = None) -> Path:
    store = get_typestore(Stores.ROS2_HUMBLE)
    writer = rosbag2.Writer(folder, version=9, storage_plugin=rosbag2.StoragePlugin[storage])
    if mode:
        writer.set_compression(rosbag2.CompressionMode[mode], rosbag2.CompressionFormat.ZSTD)
    with writer:
        connections = {}
        for message in sent:
            if message.topic not in connections:
                connections[message.topic] = writer.add_connection(message.topic, message.type, typestore=store)
            writer.write(connections[message.topic], message.log_time, message.data())
    return folder


def write_bag1(path: Path, sent: list[Sent], packing: str | None = None) -> Path:
    store = get_typestore(Stores.ROS1_NOETIC)
    writer = rosbag1.Writer(path)
    if packing:
        writer.set_compression(rosbag1.Writer.CompressionFormat[packing])
    with writer:
        connections = {}
        for message in sent:
            if message.topic not in connections:
                connections[message.topic] = writer.add_connection(message.topic, message.type, typestore=store)
            writer.write(connections[message.topic], message.log_time, message.data(ros1=True))
    return path


def lone_db3(folder: Path, sent: list[Sent]) -> Path:
    return shutil.move(next(write_bag2(folder / "bag", sent).glob("*.db3")), folder / "lone.db3")


def old_metadata(folder: Path) -> Path:
    """Before version 4, file names included the folder."""
    (file,) = folder.glob("*.db3")
    metadata = folder / "metadata.yaml"
    metadata.write_text(metadata.read_text().replace(file.name, f"bag/{file.name}"))
    return folder


CONTAINERS: dict[str, Callable[[Path, list[Sent]], Path]] = {
    "mcap-zstd": lambda folder, sent: write_mcap(folder / "a.mcap", sent),
    "mcap-lz4": lambda folder, sent: write_mcap(folder / "a.mcap", sent, compression=CompressionType.LZ4),
    "mcap-plain": lambda folder, sent: write_mcap(folder / "a", sent, compression=CompressionType.NONE),
    "mcap-unchunked": lambda folder, sent: write_mcap(folder / "a.mcap", sent, use_chunking=False),
    "mcap-ros1": lambda folder, sent: write_mcap(folder / "a.mcap", sent, ros=1),
    "bag2-sqlite": lambda folder, sent: write_bag2(folder / "bag", sent),
    "bag2-sqlite-old": lambda folder, sent: old_metadata(write_bag2(folder / "bag", sent)),
    "bag2-sqlite-zstd": lambda folder, sent: write_bag2(folder / "bag", sent, mode="MESSAGE"),
    "bag2-mcap": lambda folder, sent: write_bag2(folder / "bag", sent, "MCAP"),
    "bag2-mcap-zstd": lambda folder, sent: write_bag2(folder / "bag", sent, "MCAP", "STORAGE"),
    "lone-db3": lone_db3,
    "bag1": lambda folder, sent: write_bag1(folder / "a.bag", sent),
    "bag1-bz2": lambda folder, sent: write_bag1(folder / "a.bag", sent, "BZ2"),
    "bag1-lz4": lambda folder, sent: write_bag1(folder / "a.bag", sent, "LZ4"),
}


def episode_of(path: Path, contract: DataContract | None = None) -> Episode:
    (ref,) = [ref for format, found in find(path) for ref in scan(format, found)]
    return load(ref, contract)


def before(times: list[float], at: float) -> int:
    """The index of the last one that is not later."""
    return max(i for i, t in enumerate(times) if t <= at)


def recorded(tmp_path: Path, sent: list[Sent], contract: DataContract | None = None) -> Episode:
    return episode_of(write_mcap(tmp_path / "a.mcap", sent), contract)


# ---------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_holds_the_same_episode(tmp_path, container):
    path = CONTAINERS[container](tmp_path, scene())
    episode = episode_of(path)
    frames = [t for t in FRONT if t >= 0.203]  # 5 are before the joints
    assert [sorted(episode.cameras), sorted(episode.proprio)] == [
        ["/front/image_raw", "/wrist/image/compressed"],
        ["/joint_states/position", "/joint_states/velocity"],
    ]
    front, wrist = frames_of(episode, "/front/image_raw"), frames_of(episode, "/wrist/image/compressed")
    assert numbers_in(front) == list(range(5, 40))
    assert np.array_equal(front[3], numbered(8))
    assert numbers_in(wrist) == [before(WRIST, t) for t in frames]
    assert min(psnr(image / 255, numbered(i) / 255) for image, i in zip(wrist, numbers_in(wrist), strict=True)) > 24
    measured = [ARM[before(ARM, t)] for t in frames]
    assert np.allclose(episode.proprio["/joint_states/position"], [[t, -t] for t in measured])
    assert np.allclose(episode.proprio["/joint_states/velocity"], [[2 * t, 0] for t in measured])
    assert (episode.action, episode.signals, episode.fps) == (None, {}, pytest.approx(20))
    assert episode.instruction == episode.texts["/instruction"] == "lift the blöck"
    assert "header stamps are used as times" in said(episode)
    assert "5 frames before the first message of some topic are dropped" in said(episode)
    assert frames_of(episode, "/wrist/image/compressed", 8).shape == (35, 8, 8, 3)
    assert digest(episode.ref) == episode.ref.digest


@pytest.mark.skipif(not REAL.exists(), reason=f"no real data at {REAL}")
def test_real_frames_round_trip(tmp_path):
    file = sorted((REAL / "gr1_lerobot_v2").rglob("*.mp4"))[0]
    images = next(open_video(file).frames(None))[:30].copy()
    images[:, -24:, -24:] = (np.arange(30) * 8)[:, None, None, None]
    png = io.BytesIO()
    Image.fromarray(images[0]).save(png, "PNG")
    times = every(20, 0, 1.5)
    writes = {
        "/bgr": [raw(image, "bgr8", padding=7) for image in images],
        "/rgb": [raw(image) for image in images],
        "/jpeg": [packed(jpeg(image)) for image in images],
        "/png": [packed(png.getvalue(), "png")] * 30,
    }
    sent = [
        Sent(topic, COMPRESSED if topic in ("/jpeg", "/png") else IMAGE, t, t, write)
        for topic, all_writes in writes.items()
        for t, write in zip(times, all_writes, strict=True)
    ]
    bag = write_bag2(tmp_path / "bag", sorted(sent, key=lambda message: message.received), "MCAP")
    episode = episode_of(bag)
    assert np.array_equal(frames_of(episode, "/bgr"), images)
    assert np.array_equal(frames_of(episode, "/rgb"), images)
    assert np.array_equal(frames_of(episode, "/png"), images[[0] * 30])
    packed_frames = frames_of(episode, "/jpeg")
    assert np.round(packed_frames[:, -16:-8, -16:-8].mean(axis=(1, 2, 3)) / 8).tolist() == list(range(30))
    for image, source in zip(packed_frames, images, strict=True):
        assert psnr(image / 255, source / 255) > 30


@pytest.mark.parametrize("encoding", ["rgb8", "bgr8", "rgba8", "bgra8", "mono8", "8UC1"])
@pytest.mark.parametrize("padding", [0, 3])
def test_encodings(tmp_path, encoding, padding):
    episode = recorded(tmp_path, images_at("/cam", every(10, 0, 1), encoding=encoding, padding=padding))
    expected = np.stack([numbered(i) for i in range(10)])
    if encoding in ("mono8", "8UC1"):
        expected = expected[..., [0, 0, 0]]
    assert np.array_equal(frames_of(episode, "/cam"), expected)


@pytest.mark.parametrize("encoding", ["8UC3", "8UC4"])
def test_an_encoding_without_channel_order_is_bgr_with_a_repair(tmp_path, encoding):
    cameras = images_at("/cam", every(10, 0, 1), encoding=encoding) + images_at("/side", every(10, 0, 1))
    episode = recorded(tmp_path, cameras)
    for camera in ("/cam", "/side"):
        assert np.array_equal(frames_of(episode, camera), np.stack([numbered(i) for i in range(10)]))
    sent = [repair for repair in said(episode) if "channel order" in repair]
    assert sent == ["/cam does not declare its channel order; BGR assumed, OpenCV's default"]


@pytest.mark.parametrize(
    "encoding, pix_fmt",
    [("yuv422", "uyvy422"), ("uyvy", "uyvy422"), ("yuv422_yuy2", "yuyv422"), ("yuyv", "yuyv422")],
)
@pytest.mark.parametrize("padding", [0, 6])
def test_yuv_422(tmp_path, encoding, pix_fmt, padding):
    """Encoded by FFmpeg: every colour, with edges between pixels that share their chroma."""
    images = [numbered(i) for i in range(10)]

    def yuv(image: np.ndarray) -> Write:
        frame = VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pix_fmt, interpolation="AREA")
        [plane] = frame.planes
        rows = np.full((24, 48 + padding), 99, np.uint8)
        rows[:, :48] = np.frombuffer(plane, np.uint8).reshape(24, -1)[:, :48]

        def write(wire: Wire, at: float | None) -> Wire:
            wire.header(at).put("I", 24, 24).text(encoding).put("B", 0).put("I", 48 + padding)
            return wire.blob(rows.tobytes())

        return write

    sent = [Sent("/cam", IMAGE, t, t, yuv(image)) for t, image in zip(every(10, 0, 1), images, strict=True)]
    frames = frames_of(recorded(tmp_path, sent), "/cam")
    assert frames.shape == (10, 24, 24, 3) and numbers_in(frames) == list(range(10))
    assert np.abs(frames.astype(int) - np.stack(images)).max() <= 4


@pytest.mark.parametrize("step, size", [(72, 71 * 24), (71, 72 * 24), (0, 0), (2**32 - 1, 72 * 24)])
def test_images_with_wrong_sizes_are_refused(tmp_path, step, size):
    def write(wire: Wire, at: float | None) -> Wire:
        return wire.header(at).put("I", 24, 24).text("rgb8").put("B", 0).put("I", step).blob(bytes(size))

    sent = [Sent("/cam", IMAGE, t, t, write) for t in (0, 1)]
    assert f"24x24 pixels has {size} bytes, {step} per row" in problem_of(write_mcap(tmp_path / "a.mcap", sent))


def test_yuv_422_of_odd_width_is_refused(tmp_path):
    def odd(wire: Wire, at: float | None) -> Wire:
        return wire.header(at).put("I", 2, 3).text("yuyv").put("B", 0).put("I", 6).blob(bytes(12))

    assert "has an odd width" in problem_of(
        write_mcap(tmp_path / "a.mcap", [Sent("/cam", IMAGE, t, t, odd) for t in (0, 1)])
    )


def deep_png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8), 1000, np.uint16)).save(file, "PNG")
    return file.getvalue()


UNFIT = {
    "'bayer_rggb8' is a Bayer mosaic": (IMAGE, raw(numbered(0), "bayer_rggb8")),
    "'16UC1' is depth": (IMAGE, raw(numbered(0), "16UC1")),
    "'32FC1' is depth": (IMAGE, raw(numbered(0), "32FC1")),
    "'nv21' is unknown": (IMAGE, raw(numbered(0), "nv21")),
    "'png' is a 16-bit PNG: depth": (COMPRESSED, packed(deep_png(), "png")),
    "'h264' is neither JPEG nor PNG": (COMPRESSED, packed(b"\0\0\0\1\x67" * 9, "h264")),
    "'16UC1; compressedDepth' is depth": (COMPRESSED, packed(b"\x89PNG\r\n\x1a\n" * 9, "16UC1; compressedDepth")),
    "trajectory_msgs/msg/JointTrajectory in cdr": ("trajectory_msgs/msg/JointTrajectory", text("?")),
}


@pytest.mark.parametrize("why", UNFIT)
def test_topics_that_are_no_camera_are_named(tmp_path, why):
    kind, write = UNFIT[why]
    odd = [Sent("/odd", kind, t, t, write) for t in every(5, 0, 1)]
    with pytest.raises(BadEpisode, match="holds no camera: topics are /odd") as refused:
        recorded(tmp_path, odd)
    assert why in str(refused.value)
    episode = recorded(tmp_path, [*odd, *images_at("/cam", every(10, 0, 1))])
    assert list(episode.cameras) == ["/cam"]
    assert any("not read: /odd" in repair and why in repair for repair in said(episode))


def test_a_recording_without_a_camera_is_refused(tmp_path):
    with pytest.raises(BadEpisode, match="holds no camera: topics are /joint_states"):
        recorded(tmp_path, [message for message in scene() if message.topic == "/joint_states"])
    with pytest.raises(BadEpisode, match="holds no camera: topics are none"):
        recorded(tmp_path, [])


def test_joints_are_mapped_by_name(tmp_path):
    times = every(10, 0, 2)
    sent = images_at("/cam", times, late=0)
    for i, t in enumerate(times):
        names = ["a", "b"] if i % 2 else ["b", "a"]
        sent.append(Sent("/joint_states", JOINTS, t, t, joints(names, [{"a": t, "b": -t}[name] for name in names])))
        if i >= 3:  # a second driver, for the gripper only
            sent.append(Sent("/joint_states", JOINTS, t, t, joints(["grip"], [10 + t])))
    episode = recorded(tmp_path, sent)
    assert numbers_in(frames_of(episode, "/cam")) == list(range(3, 20))
    assert np.allclose(episode.proprio["/joint_states/position"], [[-t, t, 10 + t] for t in times[3:]])
    assert any("/joint_states/position does not always list the same joints" in repair for repair in said(episode))


def test_commands_are_signals_and_the_action_by_contract(tmp_path):
    commanded = every(8, 0.3, 2)
    sent = scene() + [Sent("/cmd_vel", TWIST, None, t, twist(t, 0, 0, 0, 0, 1)) for t in commanded]
    sent += [Sent("/gripper/Target", FLOATS, None, t, floats([t])) for t in every(3, 0, 2)]
    sent.sort(key=lambda message: message.received)
    episode = recorded(tmp_path, sent)
    assert episode.action is None
    assert sorted(episode.proprio) == ["/joint_states/position", "/joint_states/velocity"]
    assert sorted(episode.signals) == ["/cmd_vel", "/gripper/Target"]

    received = [t + 0.004 for t in FRONT if t + 0.004 >= 0.3]  # one topic has no header, so none is used
    assert any(repair == "receive times are used: /gripper/Target has no header stamps" for repair in said(episode))
    assert numbers_in(frames_of(episode, "/front/image_raw")) == list(range(6, 40))
    assert numbers_in(frames_of(episode, "/wrist/image/compressed")) == [
        before([t + 0.03 for t in WRIST], t) for t in received
    ]
    assert np.allclose(episode.signals["/cmd_vel"][:, 0], [commanded[before(commanded, t)] for t in received])

    contract = DataContract(
        embodiment="husky",
        cameras={"/front/image_raw": "front"},
        proprio={"/joint_states/position": "joints"},
        action=("/cmd_vel", "/gripper/Target"),
        action_layout=(ActionBlock(name="base", size=6, mode="velocity"), ActionBlock(name="gripper", size=1)),
    )
    by_contract = episode_of(tmp_path / "a.mcap", contract)
    assert [list(by_contract.cameras), list(by_contract.proprio)] == [["front"], ["joints"]]
    assert np.array_equal(
        by_contract.action, np.hstack([episode.signals["/cmd_vel"], episode.signals["/gripper/Target"]])
    )
    assert sorted(by_contract.signals) == ["/joint_states/velocity"]
    with pytest.raises(UserError, match=r"'/cmd' is not in .* recorded are: /cmd_vel"):
        episode_of(tmp_path / "a.mcap", DataContract(action=("/cmd",)))


@pytest.mark.parametrize("topic", ["/joint_states_desired", "/master/joint_left", "/leader/arm", "/gello/state"])
def test_leader_arms_are_signals(tmp_path, topic):
    sent = [Sent(name, JOINTS, t, t, joints(["a"], [t])) for t in every(10, 0, 1) for name in (topic, "/puppet/joint")]
    episode = recorded(tmp_path, images_at("/cam", every(10, 0, 1), late=0) + sent)
    assert (list(episode.signals), list(episode.proprio)) == ([f"{topic}/position"], ["/puppet/joint/position"])


def test_types_of_numbers(tmp_path):
    times = every(10, 0, 1)

    def pose(wire: Wire, at: float | None) -> Wire:
        return wire.header(at).put("d", 1, 2, 3, 0, 0, 0.6, 0.8)

    def odometry(wire: Wire, at: float | None) -> Wire:
        return wire.header(at).text("link").put("d", *range(7), *[0] * 36, *range(7, 13), *[0] * 36)

    def number(wire: Wire, at: float | None) -> Wire:
        return wire.put("f", 2.5)

    topics = {
        "/pose": ("geometry_msgs/msg/PoseStamped", pose, [1, 2, 3, 0, 0, 0.6, 0.8]),
        "/odom": ("nav_msgs/msg/Odometry", odometry, list(range(13))),
        "/speed": (TWIST_STAMPED, twist(*range(6), stamped=True), list(range(6))),
        "/width": ("std_msgs/msg/Float32", number, [2.5]),
        "/flag": ("std_msgs/msg/Bool", lambda wire, at: wire.put("B", 1), [1]),
        "/unnamed/position": (JOINTS, joints([], [1.0, 2.0]), [1, 2]),
    }
    sent = images_at("/cam", times, late=0)
    sent += [Sent(topic, kind, t, t, write) for topic, (kind, write, _) in topics.items() for t in times]
    sent += [Sent("/ragged", FLOATS, t, t, floats([1.0] * (i + 1))) for i, t in enumerate(times)]
    sent += [Sent("/map", FLOATS, t, t, floats([1.0] * 2000)) for t in times]
    sent += [Sent("/torque", JOINTS, t, t, joints(["a"], [t], [], [float("nan")])) for t in times]
    sent += [Sent("/rosout", "rcl_interfaces/msg/Log", t, t, text("hello")) for t in times]
    sent += [Sent("/robot_description", TEXT, None, t, text("<robot/>")) for t in times]
    episode = recorded(tmp_path, sent)
    expected = {
        topic.replace("/unnamed/position", "/unnamed/position/position"): v for topic, (_, _, v) in topics.items()
    }
    assert sorted(episode.proprio) == sorted([*expected, "/torque/position"])
    for name, row in expected.items():
        assert np.allclose(episode.proprio[name], [row] * 10), name
    assert "/ragged changes its length; left out" in said(episode)
    assert "/torque/effort is not finite at every frame; left out" in said(episode)
    assert "not read: /map (2000 numbers in a message)" in said(episode)
    assert episode.texts == {} and not any("rosout" in repair for repair in said(episode))


def test_repairs(tmp_path):
    times = [*every(10, 0, 1), *every(10, 1.5, 2.5)]  # a gap of half a second
    sent = images_at("/cam", times) + images_at("/snapshot", [0.1]) + images_at("/frozen", every(20, 0, 1))
    sent += [Sent("/late", FLOATS, None, t, floats([t])) for t in every(10, 2, 2.5)]
    sent += [Sent("/task", TEXT, None, t, text(f"step {t}")) for t in (0.3, 1.3)]
    episode = recorded(tmp_path, sorted(sent, key=lambda message: message.received))
    assert sorted(episode.cameras) == ["/cam", "/frozen"]
    assert not episode.proprio and episode.instruction == "step 0.3"
    assert numbers_in(frames_of(episode, "/frozen"))[-8:] == [19] * 8
    for repair in (
        "/snapshot has only 1 images, another camera 20; left out",
        "/late is incomplete until past half of the frames; left out",
        "/frozen is up to 1.4 s old at a frame",
        "1 of 19 frame intervals differ by more than half from 0.1 s",
        "the text of /task changes; its first one is kept",
    ):
        assert repair in said(episode)


def test_clocks(tmp_path):
    front = images_at("/front", every(10, 0, 1))
    for odd, says in (
        (
            images_at("/side", every(10, -3600, -3599), late=3600),
            "/side has header stamps far from its receive times",
        ),
        (images_at("/side", every(10, 0, 1)[::-1], late=0), "/side has header stamps that run backwards"),
    ):
        received = every(10, 0.01, 1.01)
        odd = [Sent(m.topic, m.type, m.sent, t, m.write) for m, t in zip(odd, received, strict=True)]
        episode = recorded(tmp_path, sorted(front + odd, key=lambda message: message.received))
        assert f"receive times are used: {says}" in said(episode)
        assert len(frames_of(episode, "/side")) == len(frames_of(episode, "/front"))

    slow = [Sent("/side", IMAGE, t - 3, t, raw(numbered(i))) for i, t in enumerate(every(10, 0, 1))]
    episode = recorded(tmp_path, sorted(front + slow, key=lambda message: message.received))
    assert "receive times are used: /side has header stamps far from its receive times" in said(episode)
    assert len(frames_of(episode, "/side")) == 9  # one camera starts after the other
    stalled = [Sent(m.topic, m.type, m.sent, m.received + 4 * (i >= 7), m.write) for i, m in enumerate(front)]
    assert "header stamps are used as times" in said(recorded(tmp_path, stalled))

    arm = [Sent("/arm", FLOATS, None, t, floats([t])) for t in every(20, 0, 1)]
    episode = recorded(tmp_path, arm[::-1] + front)
    assert "messages of /arm are not sorted by time; sorted" in said(episode)
    assert np.allclose(episode.proprio["/arm"][:, 0], every(10, 0, 1))
    with pytest.raises(BadEpisode, match="the images of /front are not sorted by time; run `mcap sort`"):
        recorded(tmp_path, front[::-1])
    with pytest.raises(BadEpisode, match="1 frames are left"):
        recorded(tmp_path, front[:1])
    with pytest.raises(BadEpisode, match="have the same time as the one before"):
        recorded(tmp_path, images_at("/front", [0.1] * 5))


def test_chunks_are_of_bounded_size(tmp_path):
    episode = recorded(tmp_path, [Sent("/cam", IMAGE, t, t, raw(numbered(3, 8))) for t in every(50, 0, 2.6)])
    assert [len(chunk) for chunk in episode.cameras["/cam"].frames(None)] == [64, 64, 2]


def test_foxglove(tmp_path):
    def write(encoding: str) -> Path:
        with (tmp_path / "a.mcap").open("wb") as file:
            writer = McapWriter(file)
            writer.start()
            channel = writer.register_channel("/cam", encoding, writer.register_schema(FOXGLOVE, "jsonschema", b"{}"))
            for i in range(5):
                at = START + i * 10**8
                sent = {
                    "timestamp": {"sec": at // 10**9, "nsec": at % 10**9},
                    "frame_id": "cam",
                    "data": base64.b64encode(jpeg(numbered(i))).decode(),
                    "format": "jpeg",
                }
                writer.add_message(channel, at + 10**6, json.dumps(sent).encode(), at)
            writer.finish()
        return tmp_path / "a.mcap"

    episode = episode_of(write("json"))
    assert numbers_in(frames_of(episode, "/cam")) == [0, 1, 2, 3, 4]
    assert (episode.fps, said(episode)[0]) == (10, "header stamps are used as times")
    with pytest.raises(BadEpisode, match=r"holds no camera: topics are /cam \(foxglove.CompressedImage in protobuf\)"):
        episode_of(write("protobuf"))


def test_message_types_are_the_same_in_all_releases():
    humble = get_typestore(Stores.ROS2_HUMBLE).fielddefs
    for release in set(Stores) - {Stores.EMPTY}:
        other = get_typestore(release).fielddefs
        for kind in (IMAGE, COMPRESSED, JOINTS, TEXT, *NUMBERS):
            assert other[kind][1] == humble[kind][1], (release, kind)


def test_a_clock_among_the_topics_counts_from_the_first_step(tmp_path):
    sent = images_at("/cam", every(10, 0, 1)) + [
        Sent("/clock", FLOATS, None, t, floats([1.7e9 + t])) for t in every(10, 0, 1)
    ]
    episode = recorded(tmp_path, sent)
    rows = episode.proprio["/clock"][:, 0]
    assert np.allclose(rows, np.arange(len(rows)) / 10, atol=1e-5)
    assert any(text.startswith("/clock now counts from the first step") for text in said(episode))


# ------------------------------------------------------------------------------------------ digests, broken files


def split_bag(folder: Path, sent: list[Sent]) -> Path:
    """Two storage files, as `ros2 bag record --max-bag-size` writes them."""
    half = len(sent) // 2
    write_bag2(folder, sent[:half])
    rest = write_bag2(folder.with_name("rest"), sent[half:])
    (first,), (second,) = folder.glob("*.db3"), rest.glob("*.db3")
    shutil.move(second, folder / "part_1.db3")
    shutil.rmtree(rest)
    metadata = folder / "metadata.yaml"
    metadata.write_text(metadata.read_text().replace(f"- {first.name}", f"- {first.name}\n  - part_1.db3", 1))
    return folder


def test_a_split_bag_is_one_episode(tmp_path):
    whole = episode_of(write_bag2(tmp_path / "whole", scene()))
    split = episode_of(split_bag(tmp_path / "split", scene()))
    for camera in whole.cameras:
        assert np.array_equal(frames_of(whole, camera), frames_of(split, camera))
    for name, rows in whole.proprio.items():
        assert np.array_equal(split.proprio[name], rows)
    assert split.id != whole.id and digest(split.ref) == split.ref.digest
    before_move = split.id
    assert episode_of(shutil.move(tmp_path / "split", tmp_path / "elsewhere")).id == before_move


@pytest.mark.parametrize("storage", ["SQLITE3", "MCAP"])
def test_a_bag_whose_files_are_not_those_listed(tmp_path, storage):
    """What is there is read; what is lost, or not listed, is told."""
    suffix, sent = {"SQLITE3": "db3", "MCAP": "mcap"}[storage], scene()
    half = len(sent) // 2
    whole = episode_of(write_bag2(tmp_path / "whole", sent, storage))
    bag = write_bag2(tmp_path / "bag", sent[:half], storage)
    (part,) = write_bag2(tmp_path / "rest", sent[half:], storage).glob(f"*.{suffix}")
    shutil.move(part, bag / f"bag_1.{suffix}")
    shutil.copy(bag / f"bag.{suffix}", bag / f"copy.{suffix}")
    (bag / "notes.txt").write_text("a fine run")
    grown = episode_of(bag)
    for camera in whole.cameras:
        assert np.array_equal(frames_of(whole, camera), frames_of(grown, camera))
    unlisted = f"metadata.yaml does not list bag_1.{suffix}; read, as a part of the bag"
    assert {unlisted, f"metadata.yaml does not list copy.{suffix}; not read"} <= {*said(grown)}
    (bag / f"copy.{suffix}").unlink()
    metadata = bag / "metadata.yaml"
    metadata.write_text(metadata.read_text().replace(f"- bag.{suffix}", f"- bag_0.{suffix}\n  - bag.{suffix}"))
    lost = f"metadata.yaml lists bag_0.{suffix}, which is missing: its messages are lost"
    assert {lost, unlisted} <= {*said(episode_of(bag))}
    (bag / f"bag.{suffix}").rename(bag / f"other.{suffix}")  # none that is listed is there
    (bag / f"bag_1.{suffix}").unlink()
    assert f"metadata.yaml does not list other.{suffix}; read, as a part of the bag" in said(episode_of(bag))
    (bag / f"other.{suffix}").unlink()
    (ref,) = scan("ros", bag)
    assert ref.problem == f"metadata.yaml lists bag_0.{suffix}, which is missing"


def test_digests(tmp_path):
    first = write_mcap(tmp_path / "a.mcap", scene())
    other = write_mcap(tmp_path / "b.mcap", scene()[:-1])
    ids = [ref.id for ref in scan("ros", tmp_path)]
    assert len(set(ids)) == 2
    shutil.copy(first, tmp_path / "c")
    other.rename(tmp_path / "d.mcap")
    assert [ref.id for ref in scan("ros", tmp_path)] == [ids[0], ids[0], ids[1]]


def test_bags_are_found_among_other_files(tmp_path):
    write_bag2(tmp_path / "bags" / "one", scene())
    write_bag2(tmp_path / "bags" / "two", scene()[:-1], "MCAP")
    write_bag1(tmp_path / "bags" / "old.bag", scene())
    sqlite3.connect(tmp_path / "bags" / "settings.sqlite").execute("CREATE TABLE messages (a)").connection.close()
    (tmp_path / "bags" / "metadata.yaml").write_text("name: something else")
    assert [(name, path.name) for name, path in find(tmp_path)] == [("ros", "bags"), ("ros", "one"), ("ros", "two")]
    assert len([ref for format, path in find(tmp_path) for ref in scan(format, path)]) == 3


def problem_of(path: Path) -> str:
    """The problem of the last recording that cannot be read to its end."""
    problem = "none"
    for ref in (ref for format, found in find(path) for ref in scan(format, found)):
        try:
            for camera in load(ref).cameras.values():
                for _ in camera.frames(None):
                    pass
        except BadEpisode as error:
            problem = str(error)
    return problem


def test_truncated_recordings_are_named(tmp_path):
    file = write_mcap(tmp_path / "a.mcap", scene())
    whole = file.read_bytes()
    file.write_bytes(whole[:-2000])
    assert problem_of(file) == "a.mcap is truncated, its recorder may have been killed; run `mcap recover`"
    file.write_bytes(whole[:5000] + b"\x89MCAP0\r\n")
    assert "breaks after" in problem_of(file)
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    file.write_bytes(damaged)
    assert "breaks after" in problem_of(file)
    damaged = bytearray(whole)
    damaged[-60] ^= 1  # in the summary, which is redundant
    file.write_bytes(damaged)
    assert problem_of(file) == "none"
    bag = write_bag2(tmp_path / "bag", scene())
    (storage,) = bag.glob("*.db3")
    storage.with_name(f"{storage.name}-wal").write_bytes(b"more")
    assert f"{storage.name} was not closed: {storage.name}-wal holds messages" in problem_of(bag)
    old = write_bag1(tmp_path / "a.bag", scene())
    old.write_bytes(old.read_bytes()[:-3000])
    assert "breaks after 0 messages" in problem_of(old)


@pytest.mark.parametrize(
    "change, says",
    [
        (("- bag.db3", "- 7"), "metadata.yaml cannot be read: TypeError"),
        (("- bag.db3", "- ../../outside/bag_1.db3"), "none"),  # the bag's own file is read, none outside of it
        (("- bag.db3", '- "bag\\0.db3"'), "none"),
        (("- bag.db3", "- .."), "none"),
        (("- bag.db3", "- metadata.yaml"), "metadata.yaml is neither MCAP nor SQLite"),
        (("compression_mode: ''", "compression_mode: FILE"), "compressed as a whole"),
        (("compression_mode: ''", "compression_mode: message"), "breaks after 0 messages: ZstdError"),
        (("compression_mode: ''", "compression_mode: !!python/object/apply:os.getpid []"), "cannot be read"),
        (("relative_file_paths", "paths"), "cannot be read: KeyError"),
    ],
)
def test_lying_metadata(tmp_path, change, says):
    bag = write_bag2(tmp_path / "bag", scene()[:40])
    (tmp_path / "outside").mkdir()
    shutil.copy(bag / "bag.db3", tmp_path / "outside" / "bag_1.db3")
    metadata = bag / "metadata.yaml"
    assert change[0] in metadata.read_text()
    metadata.write_text(metadata.read_text().replace(*change))
    assert says in problem_of(bag)


def test_oversized_contents_are_refused_or_left_out(tmp_path, monkeypatch):
    sent = images_at("/cam", every(10, 0, 1)) + [
        Sent("/arm", FLOATS, None, t, floats([t] * 100)) for t in every(10, 0, 1)
    ]
    wordy = [Sent("/say", TEXT, None, t, text("x" * 10_001)) for t in every(10, 0, 1)]
    episode = recorded(tmp_path, sent + wordy)
    assert episode.texts == {} and "not read: /say (a text of 10001 characters)" in said(episode)
    other = [*sent, Sent("/arm", TWIST, None, 1, twist(*range(6)))]
    (tmp_path / "bag").mkdir()
    with sqlite3.connect(lone_db3(tmp_path / "bag", sent)) as database:
        database.execute("UPDATE messages SET timestamp = -1 WHERE rowid = 3")
    database.close()
    assert "the invalid time -1" in problem_of(tmp_path / "bag" / "lone.db3")
    with monkeypatch.context() as patch:
        patch.setattr("preprocessing.sources.ros.reader.MAX_NUMBERS", 999)
        with pytest.raises(BadEpisode, match="/arm holds too many numbers for a robot's state"):
            recorded(tmp_path, sent)
    with monkeypatch.context() as patch:
        patch.setattr("preprocessing.sources.ros.bags.MAX_MESSAGES", 19)
        with pytest.raises(BadEpisode, match="holds more than 19 messages"):
            recorded(tmp_path, sent)
    with pytest.raises(BadEpisode, match=r"/arm has messages of type .*MultiArray and of type .*Twist"):
        recorded(tmp_path, other)


def test_sqlite_views_and_tables_are_not_run(tmp_path):
    file = lone_db3(tmp_path, scene())
    with sqlite3.connect(file) as database:
        database.execute("ALTER TABLE messages RENAME TO kept")
        database.execute(
            "CREATE VIEW messages AS SELECT id, topic_id, timestamp, zeroblob(1000000000) AS data FROM kept"
        )
    database.close()
    assert problem_of(file) == "has no tables topics and messages"


def test_bombs_are_not_decompressed(tmp_path, monkeypatch):
    monkeypatch.setattr("preprocessing.sources.ros.bags.MAX_BYTES", 2**20)
    black = np.zeros((1000, 1000, 3), np.uint8)
    sent = [Sent("/cam", IMAGE, t, t, raw(black)) for t in every(10, 0, 0.3)]
    refused = {
        name: problem_of(CONTAINERS[name](tmp_path / name, sent))
        for name in CONTAINERS
        if (tmp_path / name).mkdir() is None
    }
    assert {name for name, problem in refused.items() if problem == "none"} == set()
    assert "a chunk decompresses to" in refused["mcap-zstd"] and "a chunk decompresses to" in refused["mcap-lz4"]
    for packed_one in ("bag2-sqlite-zstd", "bag1-bz2", "bag1-lz4"):
        assert "data decompresses to more than" in refused[packed_one], packed_one

    monkeypatch.setattr("preprocessing.sources.ros.bags.MAX_BYTES", 2**27)
    huge = Sent(
        "/cam",
        IMAGE,
        0,
        0,
        lambda wire, at: wire.header(at).put("I", 2**16, 2**16).text("rgb8").put("B", 0).put("I", 2**18).blob(b""),
    )
    assert "65536x65536 pixels is empty or exceeds limits" in problem_of(
        write_mcap(tmp_path / "a.mcap", [huge, Sent("/cam", IMAGE, 1, 1, huge.write)])
    )


def small(container: str, folder: Path) -> Path:
    times = every(10, 0, 0.4)
    sent = [Sent("/cam", IMAGE, t, t, raw(numbered(i, 6))) for i, t in enumerate(times)]
    sent += [Sent("/arm", JOINTS, t, t, joints(["a", "b"], [t, t], [t, t])) for t in times]
    sent += [Sent("/say", TEXT, t, t, text("go")) for t in times]
    sent += [Sent("/jpeg", COMPRESSED, t, t, packed(jpeg(numbered(i, 6)))) for i, t in enumerate(times)]
    return CONTAINERS[container](folder, sorted(sent, key=lambda message: message.received))


@pytest.mark.parametrize("container", ["mcap-zstd", "mcap-unchunked", "bag2-sqlite", "bag1"])
def test_damaged_bytes_are_read_or_refused(tmp_path, container):
    source = small(container, tmp_path)
    file = source if source.is_file() else next(source.glob("*.db3"))
    targets = [file] if source.is_file() else [file, source / "metadata.yaml"]
    originals = {target: target.read_bytes() for target in targets}
    assert problem_of(source) == "none"
    ends = st.lists(st.tuples(st.integers(0, 2**30), st.binary(max_size=9), st.booleans()), min_size=1, max_size=4)

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(targets), ends)
    def damage(target: Path, changes: list[tuple[int, bytes, bool]]) -> None:
        data = bytearray(originals[target])
        for at, noise, inserted in changes:
            at %= len(data)
            data[at : at if inserted else at + max(1, len(noise))] = noise
        target.write_bytes(data)
        with contextlib.suppress(UserError):  # no longer a recording
            problem_of(source)
        target.write_bytes(originals[target])

    damage()
