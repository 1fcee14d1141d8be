"""The report is one file that opens offline, shows what was recorded, and escapes text from the data."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.command import Uwm
from helpers.rows import write_episode
from PIL import Image

from infra import tracking
from pipelines.evaluate.intervals import wilson_interval
from pipelines.models import checkpoint
from pipelines.recipe import load_recipe
from pipelines.registry.promote import Promotion
from pipelines.report import page as report
from pipelines.report.page import Stage, write_report
from pipelines.train.pretrain import plan
from preprocessing.store.store import LatentStore
from preprocessing.video.write import write_video

SMALL = ["model.width=16", "model.depth=1", "model.heads=1", "model.registers=1", "validation_share=0"]
HOSTILE = "<script>alert(1)</script>"
IMAGE = np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)
PLAYS = ("autoplay", "muted", "loop", "playsinline")
VOID = {"meta", "img", "br", "line", "path", "polyline"}


class Page(HTMLParser):
    """Collects what a browser would load, and checks that every tag is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.unclosed: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.unclosed.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.unclosed.pop() == tag

    def sources(self, tag: str) -> list[str]:
        return [attrs["src"] or "" for name, attrs in self.tags if name == tag]

    @property
    def sections(self) -> list[str]:
        return [attrs["id"] or "" for name, attrs in self.tags if name == "section"]


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Arguments of write_report: a store, two runs and two evaluations, all made up."""
    root = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
        store, snapshot = _store(root / "store")
        pretrain = _run("pretrain", snapshot, "")
        finetune = _run("finetune", snapshot, pretrain)
        client = tracking.MlflowClient()
        client.create_registered_model("toy")
        client.create_model_version("toy", (root / "checkpoint").as_uri(), finetune)
        yield {
            "title": "A road",
            "stages": [Stage("ingest", 4.2, "3 new episodes"), Stage("pretrain", 75, HOSTILE)],
            "snapshot": LatentStore.open(store).snapshot(snapshot),
            "runs": {"pretrain": pretrain, "finetune": finetune},
            "evaluations": {
                "untrained": _evaluation(root / "untrained", successes=0, frames=False),
                "finetuned": _evaluation(root / "finetuned", successes=2, frames=True),
            },
            "promotion": Promotion("toy", "champion", "1", None, "67% success on task; the floor is 50%"),
        }


def _store(folder: Path) -> tuple[str, str]:
    store = LatentStore.create(str(folder))
    fork = store.fork()
    latents = {"front": np.zeros((10, 4, 8, 8), np.float16), "wrist": np.zeros((10, 4, 8, 8), np.float16)}
    written = [
        write_episode(fork, "one", latents, np.zeros((10, 7), np.float32), 4, instruction=HOSTILE),
        write_episode(fork, "two", latents, np.zeros((10, 7), np.float32), 4, repairs=["flipped"]),
        write_episode(fork, "clip", latents, np.zeros((10, 0), np.float32), 0, embodiment="video", instruction=None),
    ]
    refused = {"key": "k", "id": "bad", "uri": f"/raw/{HOSTILE}.mp4", "index": 0, "reason": "ends early", "reader": "1"}
    rows, statistics = [row for row, _ in written], [one for _, found in written for one in found]
    return store.uri, store.commit("test", [fork], rows, statistics, [refused]).snapshot


def _run(kind: str, snapshot: str, parent: str) -> str:
    tags = {"snapshot": snapshot, "store": "/store", "parent": parent, "kind": kind, "hardware": "3 cores, no GPU"}
    run_id = tracking.start_run("test", kind, tags | {"version": "0.2.0", "mlflow.source.git.commit": "c0ffee"})
    for step, loss in ((2, 1.0), (4, float("nan")), (6, 0.25)):
        metrics = {"loss_action": loss, "loss_video": 2 * loss, "samples_per_second": 1234.0, "data_wait_share": 0.01}
        tracking.log_metrics(run_id, metrics, step)
    tracking.log_metrics(run_id, {"validation_loss_action": 0.5, "validation_loss_video": 0.5}, 6)
    tracking.end_run(run_id)
    return run_id


def _evaluation(folder: Path, successes: int, frames: bool) -> Path:
    folder.mkdir()
    low, high = wilson_interval(successes, 3)
    rate = {"success_rate": successes / 3, "low": low, "high": high}
    numbers: dict[str, Any] = {"model": "m", "run_id": "r", "embodiment": "arm"}
    numbers["closed_loop"] = {"task": "toy:push", "episodes": 3, "successes": successes, **rate}
    numbers["videos"] = []
    for number in range(3):
        outcome = "success" if number < successes else "failure"
        file = f"push_{number:02d}_{outcome}.mp4"
        write_video(folder / file, [np.concatenate([IMAGE, IMAGE], axis=1)] * 3, 10, quality=26)
        numbers["videos"].append({"file": file, "episode": number, "success": number < successes})
    if frames:
        errors = {"action_error_policy": 0.1, "action_error_inverse": 0.05, "action_error_mean": 0.4}
        quality = {"psnr_forward": 24.0, "psnr_floor": 21.0, "psnr_ceiling": 30.0}
        numbers["open_loop"] = {"windows": 64, **errors, **quality}
        numbers["pictures"] = [{"file": "forward_0.png", "columns": ["now", "predicted", "true"]}]
        Image.fromarray(np.concatenate([IMAGE] * 3, axis=1)).save(folder / "forward_0.png")
    (folder / "evaluation.json").write_text(json.dumps(numbers))
    return folder


def _write(folder: Path, **arguments: Any) -> tuple[str, Page]:
    write_report(folder / "report.html", **arguments)
    assert [file.name for file in folder.iterdir()] == ["report.html"]
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert not page.unclosed
    return text, page


def test_the_page_is_one_file_that_loads_nothing(road: dict[str, Any], tmp_path: Path) -> None:
    text, page = _write(tmp_path, **road)
    loads = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href", "poster")]
    assert loads and all(value and value.startswith("data:") for value in loads)
    assert not re.search(r"url\(|@import|https?://", text)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert any("default-src 'none'" in (attrs.get("content") or "") for tag, attrs in page.tags if tag == "meta")


def test_images_and_videos_are_embedded_byte_for_byte(road: dict[str, Any], tmp_path: Path) -> None:
    _, page = _write(tmp_path, **road)
    [image], videos = page.sources("img"), page.sources("video")
    folder = road["evaluations"]["finetuned"]
    assert base64.b64decode(image.split(",")[1]) == (folder / "forward_0.png").read_bytes()
    assert len(videos) == 6
    assert base64.b64decode(videos[1].split(",")[1]) == (folder / "push_02_failure.mp4").read_bytes()
    assert all(set(a) == {"src", *PLAYS, "aria-label"} for tag, a in page.tags if tag == "video")  # no controls over it


def test_text_from_the_data_is_escaped(road: dict[str, Any], tmp_path: Path) -> None:
    text, _ = _write(tmp_path, **road)
    assert HOSTILE not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 3  # an instruction, a uri, a stage's summary


def test_the_page_shows_verdict_data_and_lineage(road: dict[str, Any], tmp_path: Path) -> None:
    text, page = _write(tmp_path, **road)
    words = " ".join(re.sub(r"<style>.*</style>|<[^>]+>", " ", text, flags=re.DOTALL).split())
    assert page.sections == [
        "verdict", "rollouts", "frames", "actions", "data", "curves", "stages", "lineage"
    ]  # fmt: skip
    for expected in (
        "toy version 1 is now the champion",
        "67 % (21 % to 94 %)",
        "3.0 dB better than copying the current frame",
        "finetuned 0.1000 0.0500 0.4000 25 %",
        "3 episodes with 30 frames, from 3 source files",
        "1 flipped",
        "Quarantined: 1",
        "1,234 samples/s",
        "Not drawn: 1 logged values that are zero or not finite",
        "1 min 19 s in total",
        f"from run {road['runs']['finetune']}",
        f"started from pretrain, {road['runs']['pretrain']}",
        "failures first",
        "3 cores, no GPU; version 0.2.0; commit c0ffee",
        "67% success on task; the floor is 50%",
        "in the store store",
        f"read snapshot {road['snapshot'].id}",
    ):
        assert expected in words, expected


def test_no_path_of_this_machine_is_on_the_page(road: dict[str, Any], tmp_path: Path) -> None:
    text, _ = _write(tmp_path, **road)
    assert str(Path(road["snapshot"].uri).parent) not in text and "/raw/" not in text.replace(">raw/", "")


def test_empty_sections_are_left_out(road: dict[str, Any], tmp_path: Path) -> None:
    bare = road | {"evaluations": {}, "promotion": None, "runs": {}, "stages": []}
    text, page = _write(tmp_path, **bare)
    assert page.sections == ["data", "lineage"]
    assert "champion" not in text and "<video" not in text


def test_a_policy_without_frame_prediction_says_so(road: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    folder.mkdir()
    nothing = dict.fromkeys(("action_error_inverse", "psnr_forward", "psnr_floor", "psnr_ceiling"))
    numbers = {"windows": 64, "action_error_policy": 0.1, "action_error_mean": 0.4, **nothing}
    (folder / "evaluation.json").write_text(json.dumps({"embodiment": "arm", "open_loop": numbers}))
    (tmp_path / "page").mkdir()
    text, _ = _write(tmp_path / "page", **road | {"evaluations": {"dp": folder}})
    words = " ".join(re.sub(r"<style>.*</style>|<[^>]+>", " ", text, flags=re.DOTALL).split())
    assert "dp 0.1000 – 0.4000 25 %" in words
    assert "This kind of model does not predict frames from actions." in words


def test_only_the_first_videos_are_shown_and_the_page_says_so(
    road: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "CLIPS", 2)
    text, page = _write(tmp_path, **road)
    assert len(page.sources("video")) == 4
    assert "finetuned: 2 of 3 episodes; all videos" in text
    monkeypatch.setattr(report, "MEDIA_BYTES", 10)
    assert _write(tmp_path, **road)[1].sources("video") == []


def test_the_report_of_a_run_is_collected_from_what_was_recorded(
    road: dict[str, Any], tmp_path: Path, uwm: Uwm
) -> None:
    run_id, snapshot = road["runs"]["finetune"], road["snapshot"]
    settings = plan(snapshot.uri, load_recipe("small", SMALL), snapshot.id)
    settings.run_id, settings.parent = run_id, road["runs"]["pretrain"]
    checkpoint.save(tmp_path / "model", settings.build().state_dict(), settings)
    code, answer, text = uwm("report", tmp_path / "model", "--output", tmp_path / "bare.html", "--json")
    assert code == 0 and [line[:26] for line in answer["missing"]] == ["No evaluation was recorded"], text
    assert Page((tmp_path / "bare.html").read_text()).sections == ["missing", "data", "curves", "lineage"]

    folder = road["evaluations"]["finetuned"]
    tracking.log_folder(run_id, folder, "evaluation")
    numbers = json.loads((folder / "evaluation.json").read_text())
    for part, files in (("open_loop", "pictures"), ("closed_loop", "videos")):
        told = {key: numbers[key] for key in ("embodiment", part, files)}
        tracking.log_text(run_id, json.dumps(told), f"evaluation/{part}.json")
    code, answer, text = uwm("report", tmp_path / "model", "--output", tmp_path / "full.html", "--json")
    assert code == 0 and answer["missing"] == [], text
    page = Page((tmp_path / "full.html").read_text())
    assert page.sections == ["verdict", "rollouts", "frames", "actions", "data", "curves", "lineage"]
    assert len(page.sources("video")) == 3
    logged = tracking.download(run_id, "report")
    assert logged and (logged / "full.html").read_bytes() == (tmp_path / "full.html").read_bytes()

    moved = settings.model_copy(update={"store": "/gone", "run_id": "0" * 32})
    checkpoint.save(tmp_path / "moved", settings.build().state_dict(), moved)
    code, answer, _ = uwm("report", tmp_path / "moved", "--output", tmp_path / "moved.html", "--json")
    assert code == 0 and len(answer["missing"]) == 3 and "--store URI" in " ".join(answer["missing"])
    assert uwm("report", tmp_path / "model", "--output", "/proc/none/report.html")[0] == 2
