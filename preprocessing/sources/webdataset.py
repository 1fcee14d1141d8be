"""WebDataset: shards of clips with captions, in tar files as ``video2dataset`` and others write them.

Consecutive members of a tar file whose names agree up to the first dot are one sample; the part after that dot says
what each member is (https://github.com/webdataset/webdataset). Of a sample are read:

- videos (``mp4``, ``webm``, ...), one per camera: ``top.mp4`` is camera ``top``, ``mp4`` alone is ``video``;
- or numbered images, ``0000.jpg`` or ``frame_12.png``: the frames of a clip. A folder of samples that each are one
  image with a number for a name is a clip, too;
- captions: ``txt``, and the strings of a ``json`` under the names in ``CAPTIONS``; a number ``fps`` in it is the rate
  of numbered images.

Videos are decoded in url, nothing is extracted. A tar file has no index, so its headers (POSIX.1-2017, pax) are read
once per process. An episode's digest covers the members that are read and their names after the dot, not before it.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, pairwise
from pathlib import Path
from typing import NamedTuple

from preprocessing.episode import Episode, EpisodeRef, Repair, Video
from preprocessing.errors import BadEpisode
from preprocessing.limits import limits
from preprocessing.sources.scan_cache import Finding, file_digest, findings, findings_of
from preprocessing.sources.untrusted.archives import TarStream
from preprocessing.sources.untrusted.files import files_in
from preprocessing.sources.untrusted.metadata import json_of, text_of
from preprocessing.video.decode import open_video_file
from preprocessing.video.frames import indexed_images_video

FPS = 10.0
VIDEOS = ("mp4", "m4v", "mov", "mkv", "webm", "avi", "mpg", "mpeg", "wmv", "flv", "gif")
IMAGES = ("jpg", "jpeg", "png")
TEXTS = ("txt", "caption", "json")
CAPTIONS = ("caption", "captions", "text", "description", "prompt", "instruction", "title")  # by priority
A_FEW = 64  # members, one of which is a clip; folders are members, too
# Names that identify data sets of other formats, of which a tar file may be an archive.
OTHERS = re.compile(
    r"(^|/)(meta/info\.json|features\.json|obs_dict\.pkl|ep_start_end_ids\.npy|\.zarray)$"
    r"|\.(hdf5|h5|mcap|bag|db3|parquet)$|\.tfrecord"
)
MAX_MEMBERS = 2**20  # of a shard; 30,000 are usual
MAX_TEXT = 2**20  # bytes of one caption, or one JSON
BREAKS = (tarfile.TarError, OSError, RuntimeError, ValueError)


class Member(NamedTuple):
    """One file in a tar file: bytes ``[start, stop)`` of it."""

    name: str  # after the first dot
    start: int
    stop: int

    @property
    def kind(self) -> str:
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class Sample:
    """Members of one name, which is ``key`` up to the first dot."""

    key: str
    members: tuple[Member, ...]

    def of(self, *kinds: str) -> list[Member]:
        return [member for member in self.members if member.kind in kinds]

    @property
    def frame_number(self) -> int | None:
        """The number in its name if the sample is a single numbered image."""
        folder, _, name = self.key.rpartition("/")
        alone = folder and not self.of(*VIDEOS) and [member.name in IMAGES for member in self.of(*IMAGES)] == [True]
        return _number(name) if alone else None


def detect(path: Path) -> bool:
    return any(True for _ in _files(path))


def scan(path: Path) -> Iterator[EpisodeRef]:
    for file, found in findings("webdataset", _files(path), _read):
        for index, finding in enumerate(found):
            yield EpisodeRef(str(file.absolute()), "webdataset", index, finding.digest, finding.problem)


def digest(ref: EpisodeRef) -> str:
    return _digest(Path(ref.uri), _sample(ref)[0])


def load(ref: EpisodeRef) -> Episode:
    path, (sample, samples) = Path(ref.uri), _sample(ref)
    if _is_scattered(sample, samples):
        raise BadEpisode(f"members of sample {sample.key} are not consecutive; sort the shard (`tar --sort=name`)")
    texts, rates, repairs = _texts(path, sample)
    if besides := [member.name for member in sample.members if member.kind not in (*VIDEOS, *IMAGES, *TEXTS)]:
        listed = ", ".join(besides[:8]) + (" ..." if len(besides) > 8 else "")
        repairs.append(Repair("streams", f"not read, as clips have no actions here: {listed}"))
    if videos := sample.of(*VIDEOS):
        urls = {member.name.rpartition(".")[0] or "video": _url(path, member) for member in videos}
        opened, broken = dict[str, tuple[Video, float, list[Repair]]](), dict[str, BadEpisode]()
        for camera, url in urls.items():
            try:
                opened[camera] = open_video_file(url)
            except BadEpisode as error:
                broken[camera] = error
        if not opened:
            raise next(iter(broken.values()))
        repairs += [Repair("streams", f"camera {camera}: {why}; left out") for camera, why in broken.items()]
        cameras = {camera: video for camera, (video, _, _) in opened.items()}
        repairs += [
            repair._replace(text=f"{camera}: {repair.text}")
            for camera, (_, _, repairs_of_video) in opened.items()
            for repair in repairs_of_video
        ]
        [fps, *others] = {rate for _, rate, _ in opened.values()}
        if others:
            raise BadEpisode(f"sample {sample.key} holds videos of {len(others) + 1} different rates")
    elif images := sample.of(*IMAGES):
        cameras = {"video": _images_video(path, images)}
        fps = next(iter(rates), FPS)
        if not rates:
            repairs.append(Repair("fps", f"the rate of the images is not recorded; {FPS:g} Hz assumed"))
    else:
        raise BadEpisode(f"sample {sample.key} holds neither a video nor numbered images")
    return Episode(
        ref=ref,
        fps=fps,
        cameras=cameras,
        proprio={},
        action=None,
        action_layout=(),
        instruction=next(iter(texts.values()), None),
        success=None,
        embodiment="video",
        repairs=tuple(repairs),
        texts=texts,
    )


def _read(file: Path) -> list[Finding]:
    """One finding per sample, and one more for the lost rest if the shard breaks."""
    samples, problem = _listed(file)
    found = [Finding(_digest(file, sample)) for sample in samples]
    return [*found, Finding(file_digest(file), problem)] if problem else found


def _listed(file: Path) -> tuple[list[Sample], str | None]:
    """The samples before the first break, and what broke."""
    size, members, end = file.stat().st_size, list[tuple[str, Member]](), 0
    try:
        with TarStream(file.open("rb")) as headers, tarfile.open(fileobj=headers, mode="r:") as tar:
            for info in tar:
                start, end = info.offset_data, info.offset_data + (info.size if info.isreg() else 0)
                if len(members) == MAX_MEMBERS:
                    raise tarfile.ReadError(f"more than {MAX_MEMBERS} members")
                if info.issparse() or not start <= end <= size:
                    raise tarfile.ReadError(f"{info.name} is incomplete")
                folder, slash, name = info.name.rpartition("/")
                stem, dot, kind = name.partition(".")
                if info.isreg() and dot and stem:
                    members.append((f"{folder}{slash}{stem}", Member(kind.lower(), start, end)))
            # A tar file ends with blocks of zeros or with nothing; tarfile takes any block that is no header for the
            # end.
            headers.seek(end + -end % tarfile.BLOCKSIZE)
            if headers.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"no valid header at byte {end}")
    except BREAKS as error:
        whole = list(_samples(members))[:-1]  # the last one may be incomplete
        return whole, f"the shard breaks after {len(whole)} samples: {error}"
    return list(_samples(members)), None


def _samples(members: list[tuple[str, Member]]) -> Iterator[Sample]:
    """Samples with at least one member that is read; folders of single numbered images are joined into clips."""
    known = (sample for sample in _alike(members) if sample.of(*VIDEOS, *IMAGES, *TEXTS))
    numbered = groupby(known, key=lambda s: (s.frame_number is not None, s.key.rpartition("/")[0]))
    for (is_frame, folder), group in numbered:
        samples = list(group)
        if is_frame and not any(sample.of(*TEXTS) for sample in samples[1:]):  # else each has its own caption
            frames = (m._replace(name=f"{s.frame_number}.{m.kind}") for s in samples for m in s.of(*IMAGES))
            yield Sample(folder, (*frames, *samples[0].of(*TEXTS)))
        else:
            yield from samples


def _alike(members: list[tuple[str, Member]]) -> Iterator[Sample]:
    """Neighbours of one name. A repeated member starts another sample: names repeat where shards were joined."""
    for key, group in groupby(members, key=lambda pair: pair[0]):
        sample: dict[str, Member] = {}
        for _, member in group:
            if member.name in sample:
                yield Sample(key, tuple(sample.values()))
                sample = {}
            sample[member.name] = member
        yield Sample(key, tuple(sample.values()))


def _is_scattered(sample: Sample, others: list[Sample]) -> bool:
    """Whether other members of the sample are elsewhere in the shard, as `tar` without sorting leaves them."""
    names = {member.name for member in sample.members}
    return not sample.of(*IMAGES) and any(
        other.key == sample.key and names.isdisjoint(member.name for member in other.members) for other in others
    )


def _sample(ref: EpisodeRef) -> tuple[Sample, list[Sample]]:
    """The sample, and all samples of its shard."""
    samples, _ = _remembered(ref.uri, Path(ref.uri).stat().st_mtime_ns)
    if ref.index >= len(samples):
        raise BadEpisode(f"the shard now has only {len(samples)} samples")
    return samples[ref.index], samples


@lru_cache(maxsize=2)  # the episodes of a shard are read one after the other
def _remembered(uri: str, _changed: int) -> tuple[list[Sample], str | None]:
    return _listed(Path(uri))


def _digest(file: Path, sample: Sample) -> str:
    whole = hashlib.sha256()
    with file.open("rb") as opened:
        for member in sample.of(*VIDEOS, *IMAGES, *TEXTS):
            whole.update(f"{member.name} {member.stop - member.start}\n".encode())
            opened.seek(member.start)
            left = member.stop - member.start
            while left and (piece := opened.read(min(left, 2**20))):
                whole.update(piece)
                left -= len(piece)
    return whole.hexdigest()


def _images_video(path: Path, images: list[Member]) -> Video:
    """The images in the order of their numbers."""
    if len(images) == 1:
        raise BadEpisode("holds a single image, not a clip")
    numbers = [_number(image.name.rpartition(".")[0]) for image in images]
    known = {number: image for number, image in zip(numbers, images, strict=True) if number is not None}
    if len(known) < len(images):
        raise BadEpisode("holds images without a number or with a repeated one")
    order = sorted(known)
    if gap := next((one + 1 for one, after in pairwise(order) if after != one + 1), None):
        raise BadEpisode(f"image {gap} is missing between others")
    return indexed_images_video(len(order), lambda index: _bytes(path, known[order[index]]))


def _texts(path: Path, sample: Sample) -> tuple[dict[str, str], list[float], list[Repair]]:
    """Captions by the name of their member or JSON key, rates, and repairs for unreadable members."""
    texts, rates, repairs = dict[str, str](), list[float](), list[Repair]()
    for member in sorted(sample.of(*TEXTS), key=lambda member: member.kind == "json"):
        try:
            if member.stop - member.start > MAX_TEXT:
                raise ValueError(f"{member.stop - member.start} bytes")
            data = _bytes(path, member)
            if member.kind != "json":
                texts[member.name] = text_of(data, "strict").strip()
                continue
            table = json_of(data)
            if not isinstance(table, dict):
                raise ValueError("not a JSON object")
        except ValueError as error:
            repairs.append(Repair("streams", f"{member.name} cannot be read ({error}); left out"))
            continue
        for name in CAPTIONS:
            found = table.get(name)
            for number, text in enumerate(found if isinstance(found, list) else [found]):
                if isinstance(text, str):
                    texts[name if number == 0 else f"{name}_{number}"] = text.strip()
        if numbers := [
            name for name, value in table.items() if isinstance(value, list) and value and not isinstance(value[0], str)
        ]:
            repairs.append(
                Repair("streams", f"not read, as clips have no actions here: {member.name}: {', '.join(numbers[:8])}")
            )
        rate = table.get("fps")
        rates += [float(rate)] if isinstance(rate, int | float) and 0 < rate < 1000 else []
    return {name: text for name, text in texts.items() if text}, rates, repairs


def _bytes(path: Path, member: Member) -> bytes:
    if (size := member.stop - member.start) > limits().array_bytes:
        raise BadEpisode(f"{member.name} has {size} bytes, more than limits.array_bytes")
    with path.open("rb") as file:
        file.seek(member.start)
        return file.read(size)


def _url(path: Path, member: Member) -> str:
    """The URL of a part of a file, in FFmpeg's ``subfile`` protocol."""
    return f"subfile,,start,{member.start},end,{member.stop},,:file:{path}"


def _number(name: str) -> int | None:
    """12 of ``frame_0012``."""
    digits = re.search(r"[0-9]{1,9}$", name)
    return int(digits[0]) if digits else None


def _files(path: Path) -> Iterator[Path]:
    return (file for file in files_in(path) if file.name.endswith(".tar") and _is_remembered_as_shard(file))


def _is_remembered_as_shard(file: Path) -> bool:
    try:
        return bool(findings_of("webdataset shard", file, lambda _: [Finding("yes")] if _is_shard(file) else []))
    except BadEpisode:
        return True  # so that it gets reported


def _is_shard(file: Path) -> bool:
    """Whether clips are among the first members, and no member is of another format: else it is an archive of that.

    An unreadable file counts as a shard, so that it gets reported.
    """
    clips, found = tuple(f".{kind}" for kind in (*VIDEOS, *IMAGES)), False
    try:
        with TarStream(file.open("rb")) as headers, tarfile.open(fileobj=headers, mode="r:") as tar:
            for number, info in enumerate(tar):
                if info.isreg() and OTHERS.search(info.name):
                    return False
                found = found or (info.isreg() and info.name.lower().endswith(clips))
                if number >= A_FEW and not found:
                    return False
    except BREAKS:
        return True
    return found
