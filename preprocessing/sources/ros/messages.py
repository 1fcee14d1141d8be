"""Decode ROS messages: images, numbers, text and their times.

Messages are decoded with ROS's own definitions of the types in the tables below, which are the same in all its releases
(ROS 2 dropped only the header's counter), not with those in the recording: older bags have none, and libraries compile
them to code. Types: https://github.com/ros2/common_interfaces; ``foxglove.CompressedImage``:
https://docs.foxglove.dev/docs/sdk/schemas/compressed-image.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Sequence
from functools import cache
from operator import attrgetter
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
from rosbags.typesys import Stores, get_typestore
from rosbags.typesys.store import Typestore

from preprocessing.errors import BadEpisode
from preprocessing.limits import limits
from preprocessing.sources.ros.bags import Message
from preprocessing.video.frames import decode_image

IMAGE, COMPRESSED, JOINTS, TEXT = (
    "sensor_msgs/msg/Image",
    "sensor_msgs/msg/CompressedImage",
    "sensor_msgs/msg/JointState",
    "std_msgs/msg/String",
)
FOXGLOVE = "foxglove.CompressedImage"

CHANNELS = {  # by an Image's encoding: bytes per pixel, and the places of red, green and blue among them
    "rgb8": (3, [0, 1, 2]),
    "bgr8": (3, [2, 1, 0]),
    "rgba8": (4, [0, 1, 2]),
    "bgra8": (4, [2, 1, 0]),
    "mono8": (1, [0, 0, 0]),
    "8UC1": (1, [0, 0, 0]),
    "8UC3": (3, [2, 1, 0]),
    "8UC4": (4, [2, 1, 0]),
}
NO_CHANNEL_ORDER = ("8UC3", "8UC4")  # no channel order; cv_bridge's default for OpenCV arrays
YUV = {  # the places of both Y, U and V among the four bytes of two pixels; older names first
    "yuv422": ([1, 3], 0, 2),
    "uyvy": ([1, 3], 0, 2),
    "yuv422_yuy2": ([0, 2], 1, 3),
    "yuyv": ([0, 2], 1, 3),
}

_POINT, _QUATERNION = ("x", "y", "z"), ("x", "y", "z", "w")
_POSE = (*(f"position.{axis}" for axis in _POINT), *(f"orientation.{axis}" for axis in _QUATERNION))
_TRANSFORM = (*(f"translation.{axis}" for axis in _POINT), *(f"rotation.{axis}" for axis in _QUATERNION))
_TWIST = tuple(f"{part}.{axis}" for part in ("linear", "angular") for axis in _POINT)
_WRENCH = tuple(f"{part}.{axis}" for part in ("force", "torque") for axis in _POINT)


def _below(member: str, paths: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{member}.{path}" for path in paths)


NUMBERS: dict[str, tuple[str, ...]] = {  # each type's vector is made of these members
    "geometry_msgs/msg/Point": _POINT,
    "geometry_msgs/msg/PointStamped": _below("point", _POINT),
    "geometry_msgs/msg/Vector3": _POINT,
    "geometry_msgs/msg/Vector3Stamped": _below("vector", _POINT),
    "geometry_msgs/msg/Pose": _POSE,
    "geometry_msgs/msg/PoseStamped": _below("pose", _POSE),
    "geometry_msgs/msg/PoseWithCovarianceStamped": _below("pose.pose", _POSE),
    "geometry_msgs/msg/TransformStamped": _below("transform", _TRANSFORM),
    "geometry_msgs/msg/Twist": _TWIST,
    "geometry_msgs/msg/TwistStamped": _below("twist", _TWIST),
    "geometry_msgs/msg/Wrench": _WRENCH,
    "geometry_msgs/msg/WrenchStamped": _below("wrench", _WRENCH),
    "nav_msgs/msg/Odometry": (*_below("pose.pose", _POSE), *_below("twist.twist", _TWIST)),
    "sensor_msgs/msg/Imu": (
        *_below("orientation", _QUATERNION),
        *_below("angular_velocity", _POINT),
        *_below("linear_acceleration", _POINT),
    ),
    **{
        f"std_msgs/msg/{kind}": ("data",)
        for kind in (
            *("Bool", "Float32", "Float64", "Int8", "Int16", "Int32", "Int64", "UInt8", "UInt16", "UInt32"),
            *("Float32MultiArray", "Float64MultiArray", "Int32MultiArray"),
        )
    },
}


def role_of(message: Message) -> Literal["image", "numbers", "text"] | None:
    """What a message is read as; None if it is not read."""
    if message.type == FOXGLOVE:
        return "image" if message.encoding == "json" else None
    if message.encoding not in ("cdr", "ros1"):
        return None
    if message.type in (IMAGE, COMPRESSED):
        return "image"
    if message.type == TEXT:
        return "text"
    return "numbers" if message.type == JOINTS or message.type in NUMBERS else None


def decode(message: Message) -> Any:
    """The message's members, with ROS's names. Raises BadEpisode if the bytes are no message of its type."""
    try:
        if message.encoding == "json":
            return _from_json(json.loads(message.data))
        if message.encoding == "ros1":
            return _store(Stores.ROS1_NOETIC).deserialize_ros1(message.data, message.type)
        return _store(Stores.ROS2_HUMBLE).deserialize_cdr(message.data, message.type)
    except Exception as error:  # on broken bytes the library raises errors of every kind
        raise BadEpisode(f"a message of {message.topic} is not a {message.type}: {error}") from error


def stamp_of(decoded: Any) -> int:
    """The header's time in nanoseconds, 0 if there is none."""
    header = getattr(decoded, "header", None)
    stamp = header.stamp.sec * 10**9 + header.stamp.nanosec if header else 0
    return stamp if 0 < stamp < 2**63 else 0


def unfit(decoded: Any) -> str | None:
    """Why a topic whose first image is this one is not read as a camera; None if it is."""
    encoding = decoded.format if hasattr(decoded, "format") else decoded.encoding
    if re.search(r"16|32|compressedDepth", encoding):
        return f"{encoding!r} is depth or has more than 8 bits per channel"
    if hasattr(decoded, "format"):
        head = bytes(decoded.data[:26])
        if head.startswith(b"\x89PNG") and head[24:] == b"\x10\x00":  # 16-bit greyscale (PNG, 11.2.2)
            return f"{encoding!r} is a 16-bit PNG: depth"
        return None if head.startswith((b"\xff\xd8", b"\x89PNG")) else f"{encoding!r} is neither JPEG nor PNG"
    if encoding.startswith("bayer"):
        return f"{encoding!r} is a Bayer mosaic; record its colour image instead"
    return None if encoding in CHANNELS or encoding in YUV else f"encoding {encoding!r} is unknown"


def image_of(decoded: Any) -> np.ndarray:
    """Return the message's image, uint8 ``[H, W, 3]``."""
    if hasattr(decoded, "format"):
        return decode_image(bytes(decoded.data))
    if decoded.encoding not in CHANNELS and decoded.encoding not in YUV:
        raise BadEpisode(f"an image's encoding is {decoded.encoding!r}")
    channels, order = CHANNELS.get(decoded.encoding, (2, []))
    height, width, step, data = decoded.height, decoded.width, decoded.step, decoded.data
    if not 0 < height * width <= limits().picture_pixels:
        raise BadEpisode(f"an image of {width}x{height} pixels is empty or exceeds limits.picture_pixels")
    if step < width * channels or len(data) < step * height:
        raise BadEpisode(f"an image of {width}x{height} pixels has {len(data)} bytes, {step} per row")
    rows = data[: step * height].reshape(height, step)  # rows may be padded
    if decoded.encoding in YUV:
        if width % 2:
            raise BadEpisode(f"a YUV 4:2:2 image of {width}x{height} pixels has an odd width")
        return _rgb(rows[:, : width * channels].reshape(height, width // 2, 4), *YUV[decoded.encoding])
    return rows[:, : width * channels].reshape(height, width, channels)[..., order]


def _rgb(pairs: np.ndarray, luma: list[int], blue: int, red: int) -> np.ndarray:
    """uint8 ``[H, W / 2, 4]`` in limited range to ``[H, W, 3]``, by BT.601 like OpenCV and cameras."""
    y = (pairs[..., luma].astype(np.float32) - 16) * (255 / 219)
    u, v = ((pairs[..., [place]].astype(np.float32) - 128) * (255 / 224) for place in (blue, red))
    colours = np.stack([y + 1.402 * v, y - 0.344136 * u - 0.714136 * v, y + 1.772 * u], axis=-1)
    return np.rint(colours).clip(0, 255).astype(np.uint8).reshape(len(pairs), -1, 3)


def numbers_of(decoded: Any, kind: str) -> Iterator[tuple[str, Sequence[str], Sequence[float]]]:
    """Yield a message's vectors: the suffix to the topic's name, the elements' names if any, and the values.

    A JointState omits quantities that its robot does not measure.
    """
    if kind != JOINTS:
        values = [attrgetter(path)(decoded) for path in NUMBERS[kind]]
        yield "", (), values[0].tolist() if isinstance(values[0], np.ndarray) else values
        return
    for name in ("position", "velocity", "effort"):
        if len(values := getattr(decoded, name).tolist()):
            named = len(set(decoded.name)) == len(decoded.name) == len(values)
            yield f"/{name}", decoded.name if named else (), values


def _from_json(decoded: dict[str, Any]) -> SimpleNamespace:
    """foxglove.CompressedImage with the members of ROS's CompressedImage."""
    stamp = SimpleNamespace(sec=int(decoded["timestamp"]["sec"]), nanosec=int(decoded["timestamp"]["nsec"]))
    data = base64.b64decode(decoded["data"], validate=True)
    return SimpleNamespace(header=SimpleNamespace(stamp=stamp), format=str(decoded["format"]), data=data)


@cache
def _store(release: Stores) -> Typestore:
    return get_typestore(release)
