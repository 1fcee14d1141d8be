"""ROS recordings: an MCAP file, a ROS 2 bag or a ROS 1 bag is one episode.

Cameras and vectors have their topics' names; a joint state's vectors are ``TOPIC/position``, ``TOPIC/velocity`` and
``TOPIC/effort``. Nothing in a recording says which topic commands the robot, so a contract names those that make up the
action; without one there is none. What is named like a command is a signal, so that no policy is shown it by mistake.

The frames are a camera's, everything else is as it was then (:mod:`preprocessing.sources.ros.align`). ``load`` goes
through the recording once for the times and the numbers; each camera goes through it again when it is iterated, one
message at a time. An episode's digest covers its storage files.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from preprocessing.episode import Episode, EpisodeRef, Video
from preprocessing.errors import BadEpisode
from preprocessing.sources.ros.align import Track, align
from preprocessing.sources.ros.bags import METADATA, Message, messages, problem_of, recordings, storage_files
from preprocessing.sources.ros.messages import UNNAMED, decode, numbers_of, picture_of, role_of, stamp_of, unfit
from preprocessing.sources.scan_cache import Finding, file_digest, findings
from preprocessing.video.frames import chunks, resize

COMMANDS = (  # in a topic's name; and whom the robot follows
    *("command", "action", "target", "goal", "setpoint", "cmd", "desired"),
    *("leader", "master", "teleop", "gello"),
)
INSTRUCTIONS = ("instruction", "language", "task")
PLUMBING = {  # types that nobody misses
    "rcl_interfaces/msg/Log",
    "rcl_interfaces/msg/ParameterEvent",
    "rosgraph_msgs/msg/Log",
    "rosgraph_msgs/msg/Clock",
    "tf2_msgs/msg/TFMessage",
    "tf/msg/tfMessage",
    "sensor_msgs/msg/CameraInfo",
    "diagnostic_msgs/msg/DiagnosticArray",
}
MAX_WIDTH = 1024  # numbers of one message that are a robot's state and not a map
MAX_NUMBERS = 2**27  # of one recording
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
    heard = _Heard()
    for message in messages(path):
        heard.listen(message)
    unread = _named(f"{topic} ({why})" for topic, why in heard.unread.items() if why)
    if not heard.cameras:
        others = _named(topic for topic in heard.types if topic not in heard.unread)
        raise BadEpisode(f"holds no camera: topics are {', '.join(filter(None, [unread, others])) or 'none'}")
    aligned = align(heard.cameras, heard.vectors)
    commands = {name for name in aligned.vectors if any(word in heard.topics[name].lower() for word in COMMANDS)}
    spoken = {topic: text for topic, text in heard.texts.items() if any(word in topic.lower() for word in INSTRUCTIONS)}
    repairs = [*aligned.repairs, "robot unknown"]
    repairs += [f"{topic} names no order of its colours; blue first taken, as OpenCV has it" for topic in heard.unnamed]
    repairs += [f"{topic} says other things later; its first sentence is taken" for topic in sorted(heard.changing)]
    if unread:
        repairs.append(f"not read: {unread}")
    return Episode(
        ref=ref,
        fps=aligned.fps,
        cameras={topic: Video(partial(_frames, path, topic, held)) for topic, held in aligned.cameras.items()},
        proprio={name: rows for name, rows in aligned.vectors.items() if name not in commands},
        action=None,
        action_layout=(),
        instruction=next((spoken[topic] for topic in sorted(spoken) if spoken[topic]), None),
        success=None,
        embodiment="unknown",
        repairs=tuple(repairs),
        signals={name: rows for name, rows in aligned.vectors.items() if name in commands},
        texts=heard.texts,
    )


@dataclass
class _Heard:
    """What one pass through a recording keeps: times, numbers, sentences."""

    cameras: dict[str, Track] = field(default_factory=lambda: defaultdict(Track))
    vectors: dict[str, Track] = field(default_factory=lambda: defaultdict(Track))
    texts: dict[str, str] = field(default_factory=dict)
    changing: set[str] = field(default_factory=set)  # texts of which there are several
    unnamed: list[str] = field(default_factory=list)  # cameras that do not say which colour comes first
    types: dict[str, str] = field(default_factory=dict)
    topics: dict[str, str] = field(default_factory=dict)  # of the vectors
    unread: dict[str, str | None] = field(default_factory=dict)  # topics and why; None where nobody asks
    numbers: int = 0

    def listen(self, message: Message) -> None:
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
            self._measure(message, role)

    def _measure(self, message: Message, role: str) -> None:
        topic, said = message.topic, decode(message)
        when = message.received, stamp_of(said)
        if role == "picture":
            if topic not in self.cameras and (why := unfit(said)):
                self.unread[topic] = why
                return
            if topic not in self.cameras and getattr(said, "encoding", None) in UNNAMED:
                self.unnamed.append(topic)
            self.cameras[topic].add(*when)
            return
        for part, names, values in numbers_of(said, message.type):
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
                raise BadEpisode(f"{topic} holds more numbers than a robot's state")


def _frames(path: Path, topic: str, held: np.ndarray, size: int | None) -> Iterator[np.ndarray]:
    """``held`` says of each frame which of the topic's messages it is; the numbers do not decrease."""

    def pictures() -> Iterator[np.ndarray]:
        done = 0
        for number, message in enumerate(messages(path, topic)):
            if number == held[done]:
                picture = resize(picture_of(decode(message))[None], size)[0]
                while done < len(held) and held[done] == number:
                    yield picture
                    done += 1
            if done == len(held):
                return
        raise BadEpisode(f"{topic} has fewer pictures than when it was listed")

    return chunks(pictures())


def _read(file: Path) -> list[Finding]:
    return [Finding(file_digest(file), problem_of(file))]


def _named(topics: Iterable[str]) -> str:
    """A list that stays short."""
    every = list(topics)
    return ", ".join(every[:8]) + (f" and {len(every) - 8} more" if len(every) > 8 else "")


def _joined(digests: Iterable[str]) -> str:
    every = list(digests)
    return every[0] if len(every) == 1 else hashlib.sha256("".join(every).encode()).hexdigest()
