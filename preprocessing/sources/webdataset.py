"""WebDataset: shards of clips with captions, in tar files as ``video2dataset`` and others write them.

The members of a tar file that follow one another and are named alike up to the first dot are one sample, what is behind
that dot says which is what (https://github.com/webdataset/webdataset). Of a sample are read:

- films (``mp4``, ``webm``, ...), one a camera: ``top.mp4`` is camera ``top``, ``mp4`` alone is ``video``;
- or pictures with numbers, ``0000.jpg`` or ``frame_12.png``, which are a clip's frames. A folder of samples that are
  one picture with a number for a name each is a clip, too;
- captions: ``txt``, and the sentences of a ``json`` under the names in ``CAPTIONS``; a number ``fps`` in it is the rate
  of pictures, which tell none themselves.

Films are read where they lie, nothing is unpacked. A tar file has no index, so its headers (POSIX.1-2017, pax) are read
once a process. An episode's digest covers what is read of it, and the names behind the dot, but not those before.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, islice, pairwise
from pathlib import Path
from typing import NamedTuple

from preprocessing.episode import Episode, EpisodeRef, Video
from preprocessing.errors import BadEpisode
from preprocessing.limits import limits
from preprocessing.sources.scan_cache import Finding, file_digest, findings
from preprocessing.video.decode import open_film
from preprocessing.video.frames import pictures_video

FPS = 10.0
FILMS = ("mp4", "m4v", "mov", "mkv", "webm", "avi", "mpg", "mpeg", "wmv", "flv", "gif")
PICTURES = ("jpg", "jpeg", "png")
WORDS = ("txt", "caption", "json")
CAPTIONS = ("caption", "captions", "text", "description", "prompt", "instruction", "title")  # as instruction: the first
A_FEW = 64  # members, by which a shard is known; folders are members
MAX_MEMBERS = 2**20  # of a shard; usual are 30,000
MAX_HEADER = 2**20  # bytes
MAX_WORDS = 2**20  # bytes of one caption, or one JSON
BREAKS = (tarfile.TarError, OSError, RuntimeError, ValueError)


class Member(NamedTuple):
    """One file in a tar file: from byte ``start`` to before byte ``stop`` of it."""

    name: str  # behind the first dot
    start: int
    stop: int

    @property
    def kind(self) -> str:
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class Sample:
    key: str
    members: tuple[Member, ...]

    def of(self, *kinds: str) -> list[Member]:
        return [member for member in self.members if member.kind in kinds]

    @property
    def picture(self) -> int | None:
        """Its number, where the sample is a single picture with one."""
        folder, _, name = self.key.rpartition("/")
        alone = folder and not self.of(*FILMS) and [member.name in PICTURES for member in self.of(*PICTURES)] == [True]
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
    if _is_torn(sample, samples):
        raise BadEpisode(f"members of sample {sample.key} lie apart; sort the shard (`tar --sort=name`)")
    words, rates, repairs = _words(path, sample)
    if films := sample.of(*FILMS):
        places = {film.name.rpartition(".")[0] or "video": _place(path, film) for film in films}
        opened = {camera: open_film(place) for camera, place in places.items()}
        cameras = {camera: video for camera, (video, _, _) in opened.items()}
        repairs += [f"{camera}: {said}" for camera, (_, _, mended) in opened.items() for said in mended]
        [fps, *others] = {rate for _, rate, _ in opened.values()}
        if others:
            raise BadEpisode(f"sample {sample.key} holds films of {len(others) + 1} different rates")
    elif pictures := sample.of(*PICTURES):
        cameras = {"video": _pictures(path, pictures)}
        fps = next(iter(rates), FPS)
        repairs += [] if rates else [f"the rate of pictures is not recorded; {FPS:g} Hz assumed"]
    else:
        raise BadEpisode(f"sample {sample.key} holds neither a film nor pictures with numbers")
    return Episode(
        ref=ref,
        fps=fps,
        cameras=cameras,
        proprio={},
        action=None,
        action_layout=(),
        instruction=next(iter(words.values()), None),
        success=None,
        embodiment="video",
        repairs=tuple(repairs),
        texts=words,
    )


def _read(file: Path) -> list[Finding]:
    """Each sample; and what is lost where a shard breaks, as one more."""
    samples, problem = _listed(file)
    found = [Finding(_digest(file, sample)) for sample in samples]
    return [*found, Finding(file_digest(file), problem)] if problem else found


def _listed(file: Path) -> tuple[list[Sample], str | None]:
    """The samples before the first break, and what breaks."""
    size, members, end = file.stat().st_size, list[tuple[str, Member]](), 0
    try:
        with _Headers(file) as headers, tarfile.open(fileobj=headers, mode="r:") as tar:
            for info in tar:
                start, end = info.offset_data, info.offset_data + (info.size if info.isreg() else 0)
                if len(members) == MAX_MEMBERS:
                    raise tarfile.ReadError(f"it has more than {MAX_MEMBERS} members")
                if info.issparse() or not start <= end <= size:
                    raise tarfile.ReadError(f"{info.name} is not there as a whole")
                folder, slash, name = info.name.rpartition("/")
                stem, dot, kind = name.partition(".")
                if info.isreg() and dot and stem:
                    members.append((f"{folder}{slash}{stem}", Member(kind.lower(), start, end)))
            # At the end are blocks of zeros, or nothing; tarfile takes any block that is no header for the end.
            headers.seek(end + -end % tarfile.BLOCKSIZE)
            if headers.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"no header where the next should be, at byte {end}")
    except BREAKS as error:
        whole = list(_samples(members))[:-1]  # the last one may lack members
        return whole, f"the shard breaks after {len(whole)} samples: {error}"
    return list(_samples(members)), None


def _samples(members: list[tuple[str, Member]]) -> Iterator[Sample]:
    """What holds nothing that is read is left out."""
    known = (sample for sample in _alike(members) if sample.of(*FILMS, *PICTURES, *WORDS))
    for (is_picture, folder), group in groupby(known, key=lambda s: (s.picture is not None, s.key.rpartition("/")[0])):
        pictures = list(group)
        if is_picture and not any(sample.of(*WORDS) for sample in pictures[1:]):  # else each stands for itself
            frames = (m._replace(name=f"{s.picture}.{m.kind}") for s in pictures for m in s.of(*PICTURES))
            yield Sample(folder, (*frames, *pictures[0].of(*WORDS)))
        else:
            yield from pictures


def _alike(members: list[tuple[str, Member]]) -> Iterator[Sample]:
    """Neighbours of one name. What comes again is another sample's: where shards were joined, names repeat."""
    for key, group in groupby(members, key=lambda pair: pair[0]):
        sample: dict[str, Member] = {}
        for _, member in group:
            if member.name in sample:
                yield Sample(key, tuple(sample.values()))
                sample = {}
            sample[member.name] = member
        yield Sample(key, tuple(sample.values()))


def _is_torn(sample: Sample, others: list[Sample]) -> bool:
    """Whether what makes it whole is elsewhere in the shard, as `tar` leaves files that it was not told to sort."""
    names = {member.name for member in sample.members}
    return not sample.of(*PICTURES) and any(
        other.key == sample.key and names.isdisjoint(member.name for member in other.members) for other in others
    )


def _sample(ref: EpisodeRef) -> tuple[Sample, list[Sample]]:
    """It, and all of its shard."""
    samples, _ = _remembered(ref.uri, Path(ref.uri).stat().st_mtime_ns)
    if ref.index >= len(samples):
        raise BadEpisode(f"the shard has only {len(samples)} samples now")
    return samples[ref.index], samples


@lru_cache(maxsize=2)  # episodes of a shard come one after the other
def _remembered(uri: str, _changed: int) -> tuple[list[Sample], str | None]:
    return _listed(Path(uri))


def _digest(file: Path, sample: Sample) -> str:
    whole = hashlib.sha256()
    with file.open("rb") as opened:
        for member in sample.of(*FILMS, *PICTURES, *WORDS):
            whole.update(f"{member.name} {member.stop - member.start}\n".encode())
            opened.seek(member.start)
            left = member.stop - member.start
            while left and (piece := opened.read(min(left, 2**20))):
                whole.update(piece)
                left -= len(piece)
    return whole.hexdigest()


def _pictures(path: Path, pictures: list[Member]) -> Video:
    """In the order of their numbers."""
    if len(pictures) == 1:
        raise BadEpisode("holds a single picture, which is no clip")
    numbers = [_number(picture.name.rpartition(".")[0]) for picture in pictures]
    known = {number: picture for number, picture in zip(numbers, pictures, strict=True) if number is not None}
    if len(known) < len(pictures):
        raise BadEpisode("holds pictures that are not numbered one by one")
    order = sorted(known)
    if gap := next((one + 1 for one, after in pairwise(order) if after != one + 1), None):
        raise BadEpisode(f"holds no picture {gap}, but some before and after it")
    return pictures_video(len(order), lambda index: _bytes(path, known[order[index]]))


def _words(path: Path, sample: Sample) -> tuple[dict[str, str], list[float], list[str]]:
    """Captions by where they stand, rates, and what could not be read."""
    texts, rates, repairs = dict[str, str](), list[float](), list[str]()
    for member in sorted(sample.of(*WORDS), key=lambda member: member.kind == "json"):
        try:
            if member.stop - member.start > MAX_WORDS:
                raise ValueError(f"{member.stop - member.start} bytes")
            text = _bytes(path, member).decode("utf-8-sig")  # Windows writes a mark first
            if member.kind != "json":
                texts[member.name] = text.strip()
                continue
            table = json.loads(text)
            if not isinstance(table, dict):
                raise ValueError("no JSON object")
        except (ValueError, RecursionError) as error:
            repairs.append(f"{member.name} cannot be read ({error}); left out")
            continue
        for name in CAPTIONS:
            found = table.get(name)
            for number, text in enumerate(found if isinstance(found, list) else [found]):
                if isinstance(text, str):
                    texts[name if number == 0 else f"{name}_{number}"] = text.strip()
        rate = table.get("fps")
        rates += [float(rate)] if isinstance(rate, int | float) and 0 < rate < 1000 else []
    return {name: text for name, text in texts.items() if text}, rates, repairs


def _bytes(path: Path, member: Member) -> bytes:
    if (size := member.stop - member.start) > limits().array_bytes:
        raise BadEpisode(f"{member.name} has {size} bytes, more than limits.array_bytes")
    with path.open("rb") as file:
        file.seek(member.start)
        return file.read(size)


def _place(path: Path, film: Member) -> str:
    """A part of a file, as FFmpeg's protocol ``subfile`` names it."""
    return f"subfile,,start,{film.start},end,{film.stop},,:file:{path}"


def _number(name: str) -> int | None:
    """12 of ``frame_0012``."""
    digits = re.search(r"[0-9]{1,9}$", name)
    return int(digits[0]) if digits else None


class _Headers(io.FileIO):
    """A tar file whose headers neither ask for all memory, nor for what is behind its end without end."""

    ends = 0

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        data = super().read(size) or b""
        self.ends += not data and size > 0
        if self.ends > A_FEW:
            raise tarfile.ReadError("a header that goes on behind the end")
        return data


def _files(path: Path) -> Iterator[Path]:
    for file in [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file()):
        if file.name.endswith(".tar") and not file.name.startswith(".") and _is_shard(file):
            yield file


def _is_shard(file: Path) -> bool:
    """Whether clips are among the first members. One that cannot be read is told of, lest it be missed."""
    clips = tuple(f".{kind}" for kind in (*FILMS, *PICTURES))
    try:
        with _Headers(file) as headers, tarfile.open(fileobj=headers, mode="r:") as tar:
            return any(info.name.lower().endswith(clips) for info in islice(tar, A_FEW) if info.isreg())
    except BREAKS:
        return True
