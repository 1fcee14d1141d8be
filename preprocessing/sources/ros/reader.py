"""ROS recordings: an MCAP file, a ROS 2 bag or a ROS 1 bag is one episode.

Cameras and vectors are named after their topics; a joint state's vectors are ``TOPIC/position``, ``TOPIC/velocity`` and
``TOPIC/effort``. Nothing in a recording says which topic commands the robot, so a contract has to name those that make
up the action; without one there is no action. Topics named like commands become signals, so that no policy sees them as
proprio by mistake.

All topics are aligned to one camera's frames (:mod:`preprocessing.sources.ros.align`). ``load`` reads the recording
once for times and numbers; each camera reads it again when iterated, one message at a time. An episode's digest covers
its storage files.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from preprocessing.episode import Episode, EpisodeRef, Repair, Video
from preprocessing.errors import BadEpisode
from preprocessing.sources.ros.align import Track, align
from preprocessing.sources.ros.bags import (
    METADATA,
    Message,
    differences,
    messages,
    problem_of,
    recordings,
    storage_files,
)
from preprocessing.sources.ros.messages import NO_CHANNEL_ORDER, decode, image_of, numbers_of, role_of, stamp_of, unfit
from preprocessing.sources.scan_cache import Finding, file_digest, findings
from preprocessing.video.frames import chunks, resize

COMMANDS = (  # in a topic's name; the second line names the leader arm in teleoperation
    *("command", "action", "target", "goal", "setpoint", "cmd", "desired"),
    *("leader", "master", "teleop", "gello"),
)
INSTRUCTIONS = ("instruction", "language", "task")
PLUMBING = {  # types that are skipped without a repair
    "rcl_interfaces/msg/Log",
    "rcl_interfaces/msg/ParameterEvent",
    "rosgraph_msgs/msg/Log",
    "rosgraph_msgs/msg/Clock",
    "tf2_msgs/msg/TFMessage",
    "tf/msg/tfMessage",
    "sensor_msgs/msg/CameraInfo",
    "diagnostic_msgs/msg/DiagnosticArray",
}
MAX_WIDTH = 1024  # numbers per message; more is a map, not a robot's state
MAX_NUMBERS = 2**26  # of one recording, eight bytes each
MAX_TEXT = 10_000  # characters


def detect(path: Path) -> bool:
    return any(True for _ in recordings(path))


def scan(path: Path) -> Iterator[EpisodeRef]:
    for recording in recordings(path):
        try:
            files = storage_files(recording)
        except BadEpisode as error:
            broken = file_digest(recording / METADATA)
            yield EpisodeRef(str(recording.absolute()), "ros", 0, broken, str(error))
            continue
        found = [(file, finding) for file, [finding] in findings("ros", files, _read)]
        problem = next((f"{file.name} {finding.problem}" for file, finding in found if finding.problem), None)
        joined = _joined(finding.digest for _, finding in found)
        yield EpisodeRef(str(recording.absolute()), "ros", 0, joined, problem)


def digest(ref: EpisodeRef) -> str:
    return _joined(map(file_digest, storage_files(Path(ref.uri))))


def load(ref: EpisodeRef) -> Episode:
    path = Path(ref.uri)
    contents = _Contents()
    for message in messages(path):
        contents.add(message)
    unread = _named(f"{topic} ({why})" for topic, why in contents.unread.items() if why)
    if not contents.cameras:
        others = _named(topic for topic in contents.types if topic not in contents.unread)
        raise BadEpisode(f"holds no camera: topics are {', '.join(filter(None, [unread, others])) or 'none'}")
    aligned = align(contents.cameras, contents.vectors)
    commands = {name for name in aligned.vectors if any(word in contents.topics[name].lower() for word in COMMANDS)}
    texts = contents.texts.items()
    instructions = {topic: text for topic, text in texts if any(word in topic.lower() for word in INSTRUCTIONS)}
    repairs = [*aligned.repairs, *(Repair("frames", text) for text in differences(path))]
    repairs.append(Repair("embodiment", "robot unknown"))
    for topic in contents.unnamed:
        repairs.append(Repair("bgr", f"{topic} does not declare its channel order; BGR assumed, OpenCV's default"))
    for topic in sorted(contents.changing):
        text = f"the text of {topic} changes; its first one is kept"
        repairs.append(Repair("instruction" if topic in instructions else "streams", text))
    if unread:
        repairs.append(Repair("streams", f"not read: {unread}"))
    return Episode(
        ref=ref,
        fps=aligned.fps,
        cameras={topic: Video(partial(_frames, path, topic, held)) for topic, held in aligned.cameras.items()},
        proprio={name: rows for name, rows in aligned.vectors.items() if name not in commands},
        action=None,
        action_layout=(),
        instruction=next((instructions[topic] for topic in sorted(instructions) if instructions[topic]), None),
        success=None,
        embodiment="unknown",
        repairs=tuple(repairs),
        signals={name: rows for name, rows in aligned.vectors.items() if name in commands},
        texts=contents.texts,
    )


@dataclass
class _Contents:
    """What one pass through a recording collects: times, numbers, texts."""

    cameras: dict[str, Track] = field(default_factory=lambda: defaultdict(Track))
    vectors: dict[str, Track] = field(default_factory=lambda: defaultdict(Track))
    texts: dict[str, str] = field(default_factory=dict)
    changing: set[str] = field(default_factory=set)  # text topics with different texts
    unnamed: list[str] = field(default_factory=list)  # cameras that do not declare their channel order
    types: dict[str, str] = field(default_factory=dict)
    topics: dict[str, str] = field(default_factory=dict)  # of the vectors
    unread: dict[str, str | None] = field(default_factory=dict)  # topics and the reason; None if it is not reported
    numbers: int = 0

    def add(self, message: Message) -> None:
        topic, role = message.topic, role_of(message)
        if topic in self.unread:
            return
        if self.types.setdefault(topic, message.type) != message.type:
            raise BadEpisode(f"{topic} has messages of type {self.types[topic]} and of type {message.type}")
        if message.type in PLUMBING or topic.endswith("/robot_description"):
            self.unread[topic] = None
        elif role is None:
            self.unread[topic] = f"{message.type or 'no type'} in {message.encoding or 'no encoding'}"
        elif role == "text":
            text = decode(message).data.strip()
            if len(text) > MAX_TEXT:
                self.unread[topic] = f"a text of {len(text)} characters"
            elif self.texts.setdefault(topic, text) != text:
                self.changing.add(topic)
        else:
            self._add_values(message, role)

    def _add_values(self, message: Message, role: str) -> None:
        topic, decoded = message.topic, decode(message)
        when = message.received, stamp_of(decoded)
        if role == "image":
            if topic not in self.cameras and (why := unfit(decoded)):
                self.unread[topic] = why
                return
            if topic not in self.cameras and getattr(decoded, "encoding", None) in NO_CHANNEL_ORDER:
                self.unnamed.append(topic)
            self.cameras[topic].add(*when)
            return
        for part, names, values in numbers_of(decoded, message.type):
            if len(values) > MAX_WIDTH:
                self.unread[topic] = f"{len(values)} numbers in a message"
                self.vectors.pop(topic + part, None)
                return
            if not len(values):
                continue
            self.topics[topic + part] = topic
            track = self.vectors[topic + part]
            track.add(*when, names, values)
            self.numbers += len(track.latest)
            if self.numbers > MAX_NUMBERS or len(track.latest) > MAX_WIDTH:
                raise BadEpisode(f"{topic} holds too many numbers for a robot's state")


def _frames(path: Path, topic: str, held: np.ndarray, size: int | None) -> Iterator[np.ndarray]:
    """``held`` is each frame's number among the topic's messages, in ascending order."""

    def images() -> Iterator[np.ndarray]:
        done = 0
        for number, message in enumerate(messages(path, topic)):
            if number == held[done]:
                image = resize(image_of(decode(message))[None], size)[0]
                while done < len(held) and held[done] == number:
                    yield image
                    done += 1
            if done == len(held):
                return
        raise BadEpisode(f"{topic} has fewer images than when it was listed")

    return chunks(images())


def _read(file: Path) -> list[Finding]:
    return [Finding(file_digest(file), problem_of(file))]


def _named(topics: Iterable[str]) -> str:
    """Join the names, at most eight of them."""
    every = list(topics)
    return ", ".join(every[:8]) + (f" and {len(every) - 8} more" if len(every) > 8 else "")


def _joined(digests: Iterable[str]) -> str:
    every = list(digests)
    return every[0] if len(every) == 1 else hashlib.sha256("".join(every).encode()).hexdigest()
