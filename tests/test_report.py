"""Tests of the report, also in a browser, and of TensorBoard's files with TensorBoard's own readers."""

import base64
import contextlib
import html
import io
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from playwright.sync_api import Browser, sync_playwright
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import test as judge_program
import train as train_program
from analysis import svg
from analysis.report import Comparison, Confusions, comparisons, draw_curves, draw_learning, heat_map
from config.schema import KNN, Config
from datasets.images import StoredImages
from datasets.sources import load_digits
from evaluation import protocols
from evaluation.measures.recording import recorded_measures
from experiment.trained import open_trained, read_trained
from tests.conftest import digits_args, undocumented_tags
from training import evaluating, projector
from training.reports import record_steps
from training.state import Summary
from utils.run_folder.run_log import RunLog, read_reports

CHROMIUM = shutil.which("chromium")


CLASSES = [
    '<img src=x onerror="alert(1)">',
    r"$x_1^2$ $\\frac$",
    "_hidden",
    'id="loss" href="#tsne" é 数',
    "a_name_so_long_that_nobody_would_give_it_to_a_class_" * 3,
    *"56789",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of one epoch on digits, resumed for another, with a decoder at half the size.

    Names of classes contain HTML, TeX and other markup.
    """
    place = tmp_path_factory.mktemp("report")
    for split, images in zip(("train", "test"), load_digits(8), strict=True):
        assert images.labels is not None
        for index, (pixels, label) in enumerate(zip(images.pixels, images.labels.tolist(), strict=True)):
            folder = place / "images" / split / CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{index}.png", compress_level=0)
    settings = [f"data.root={place / 'images'}", f"data.cache_dir={place / 'cache'}", "data.name=folder"]
    for epochs in (1, 2):
        decoder = ("decoder.modulation=sectioned", "decoder.image_size=4")
        kept = ("training.keep_every=2", f"training.epochs={epochs}")
        arguments = digits_args(place / "run", *settings, *decoder, *kept)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluating, "EARLY_LOOKS", (10, 30))
            assert train_program.main(arguments) == 0
    return place / "run"


@pytest.fixture(scope="module")
def table(run: Path) -> dict[str, list[str]]:
    """Accuracies and measures that test.py printed when it wrote the report: {protocol or row: cells}."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        checkpoint = str(run / "checkpoints" / "last.pt")
        options = ["--protocols", "config", "--report", "--measures", "uniformity"]
        assert judge_program.main(["--checkpoint", checkpoint, "device=cpu", *options]) == 0
    accuracies, measures, path = printed.getvalue().rstrip().split("\n\n")
    assert path == f"report       {run / 'report.html'}"
    lines = [*accuracies.splitlines()[2:], *measures.splitlines()[3:]]
    cells = [re.split(r"  +", line.strip()) for line in lines]
    return {protocol: rest for protocol, *rest in cells}


CLASSES_IN_ORDER = sorted(CLASSES)


class Page(HTMLParser):
    """References, attributes and number of images of an HTML page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.images = 0
        self.attributes: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Records the references and attributes of a start tag."""
        self.images += tag == "img"
        self.attributes |= {name for name, _ in attributes}
        self.references += [
            value or "" for name, value in attributes if name in ("src", "href", "xlink:href", "srcset")
        ]


def test_the_report_is_one_file_that_holds_what_was_found(run: Path, table: dict[str, list[str]]) -> None:
    text = (run / "report.html").read_text()
    page = Page(text)
    outside = [reference for reference in page.references if not reference.startswith(("data:", "#"))]
    assert outside == [] and "<script" not in text and "@import" not in text and page.images > 80
    assert all(f'id="{reference[1:]}"' in text for reference in page.references if reference.startswith("#"))
    identities = re.findall(r'\bid="([^"]+)"', text)
    assert len(identities) == len(set(identities))
    for protocol, cells in table.items():
        for cell in [protocol.replace("'", "&#39;"), *cells]:
            assert cell in text, cell
    config = (run / "config.yaml").read_text()
    assert html.escape(config, quote=True).replace("&#x27;", "&#39;").replace("&quot;", "&#34;") in text
    for title in (
        "What the latent z encodes",
        "Interpolation between two images",
        "Along the principal",
        "Nearest",
        "Mixing sections of",
    ):
        assert f"<h2>{title}" in text
    assert "8 px (4 px for the decoder)" in text
    # A later report without --measures shows those that results.json has.
    earlier = recorded_measures(read_trained(None, run / "checkpoints" / "last.pt", ["device=cpu"]))["uniformity"]
    assert all(cell in text for line in earlier.lines for cell in line)
    # Names of classes are shown as text. They add no element, attribute or formula, and no name is missing.
    assert "onerror" not in page.attributes and "x" not in page.references and "<img src=x" not in text
    section = text[text.index('<section id="tsne">') :]
    legend = [
        html.unescape(name) for name in re.findall(r"<text[^>]*>([^<]*)</text>", section[: section.index("</svg>")])
    ]
    assert legend == [name if len(name) <= 24 else f"{name[:23]}..." for name in CLASSES_IN_ORDER]


def test_the_confusion_matrix_is_that_of_a_line_of_the_table(run: Path, table: dict[str, list[str]]) -> None:
    text = (run / "report.html").read_text()
    section = text[text.index('<section id="confusions">') : text.index('<section id="tsne">')]
    counts = np.array([int(cell or 0) for cell in re.findall(r"<td[^>]*background[^>]*>(\d*)</td>", section)])
    counts = counts.reshape(10, 10)
    assert counts.sum() == 360 and counts.sum(axis=1).min() >= 35 and counts.sum(axis=1).max() <= 37
    protocol = re.search(r"<p>(k-NN [^.]+)\.", section)
    assert protocol is not None
    assert float(table[protocol[1]][0].split(" / ")[0]) == pytest.approx(100 * counts.trace() / 360, abs=0.051)


def test_curves_are_the_reports_that_the_run_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(svg, "curves", lambda name, ylabel, lines, **_: drawn.update({name: lines}) or name)
    reports: list[dict[str, Any]] = [
        {"kind": "train", "epoch": e, "loss": loss, "grad_norm": 2 * e, "lr/encoder": 3 * e, "lr/decoder": 4 * e}
        for e, loss in ((1, 0.5), (2, None), (3, 0.1))
    ]
    assert draw_curves(reports, "z") == ["loss", "norm", "rates"] and draw_curves([], "z") == []
    assert draw_curves([*reports, {"kind": "evaluation", "epoch": 3, "effective_rank": 7.0}], "z")[-1] == "rank"
    assert drawn["loss"] == {"loss": ([1, 2, 3], [0.5, None, 0.1])}
    assert drawn["rates"] == {"encoder": ([1, 2, 3], [3, 6, 9]), "decoder": ([1, 2, 3], [4, 8, 12])}
    assert drawn["rank"] == {"rank": ([3], [7.0])}

    # The learning curve begins with the untrained encoder and ends with the checkpoint, if the protocol is the same.
    knn = protocols.KNNProtocol(settings=KNN(k=20))
    compared = [Comparison(knn, {"trained": 80.0, "raw pixels": 60.0, "untrained": 20.0})]
    close = Comparison(knn, {"trained": 97.24, "raw pixels": 96.66})
    assert close.gains["raw pixels"] == pytest.approx(97.2 - 96.7), "the difference of the printed values"
    entries = [{"kind": "evaluation", "epoch": 3, "knn_top1": 70.0, "knn": str(knn)}]
    draw_learning(compared, entries, 5)
    assert drawn["accuracy"] == {"k-NN": ([0, 3, 5], [20.0, 70.0, 80.0])}
    draw_learning(compared, [{**entries[0], "knn": "k-NN k=5"}], 5)
    assert drawn["accuracy"] == {"k-NN": ([3], [70.0])}
    assert compared[0].gains == {"raw pixels": 20.0, "untrained": 60.0}


def test_the_trained_encoder_is_compared_with_the_baselines_under_the_protocols_of_the_config() -> None:
    """Notes in names do not matter, and raw pixels, which no timestep changes, are found at another timestep."""
    settings = {"evaluation": {"features": "z", "timesteps": [300, 700]}, "encoder": {"time_dependent": True}}
    for config, timestep in ((Config(), None), (Config.model_validate(settings), 700)):
        judged = protocols.all_protocols(config, 100)
        table: dict[str, dict[str, dict[str, float]]] = {
            str(each): {name: {"top1": value, "top3": 99.0} for name, value in (("trained", 9.0), ("untrained", 2.0))}
            for each in judged
        }
        for each in judged:
            if each.timestep in (None, 300):
                table[str(each)]["raw pixels"] = {"top1": 5.0, "top3": 99.0}
        found = comparisons(config, judged, table, timestep)
        assert [each.label for each in found] == ["k-NN", "linear probe"]
        assert all(each.top1 == {"trained": 9.0, "raw pixels": 5.0, "untrained": 2.0} for each in found)
        assert all(each.protocol.timestep == timestep for each in found)


def test_a_curve_goes_through_its_values() -> None:
    """Points read back from the drawing are proportional to the values, with a gap at a missing value.

    On the page, y decreases as a value increases.
    """
    drawn = svg.curves("c", "value", {"v": ([0.0, 1.0, 2.0, 3.0, 4.0], [1.0, 3.0, None, 7.0, 5.0])})  # type: ignore[list-item]
    path = next(d for d in re.findall(r'<path d="([^"]*)"', drawn) if len(re.findall(r"[ML]", d)) == 4)
    points = np.array([[float(n) for n in xy] for xy in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path)])
    assert re.findall(r"[ML]", path) == ["M", "L", "M", "L"]
    np.testing.assert_allclose(np.diff(points[:, 0]) / (points[1, 0] - points[0, 0]), [1, 2, 1], atol=1e-3)
    np.testing.assert_allclose(np.diff(points[:, 1]) / (points[1, 1] - points[0, 1]), [1, 2, -1], atol=1e-3)


def test_of_many_classes_the_confusions_are_a_picture_and_a_list() -> None:
    counts = np.diag(np.full(100, 50))
    counts[3, 7], counts[20, 1] = 50, 4
    found = Confusions(counts, "k-NN", [f"c{i}" for i in range(100)])
    assert found.most_frequent(5) == [("c3", "c7", 50), ("c20", "c1", 4)]
    kind, _, data = heat_map(counts).partition(",")
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("L"))
    assert kind == "data:image/png;base64" and shown.shape == (100, 100)
    assert shown[0, 0] == 0 and shown[0, 1] == 255 and shown[3, 3] == shown[3, 7] == round(255 * (1 - 0.5**0.5))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Headless Chromium. Tests that use it are skipped if Chromium is not installed."""
    if CHROMIUM is None:
        pytest.skip("needs chromium in PATH (on Debian: apt install chromium)")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.parametrize(
    ("width", "height", "scheme"),
    [
        (1280, 900, "light"),
        (390, 844, "dark"),
        pytest.param(1280, 900, "dark", marks=pytest.mark.long),
        pytest.param(390, 844, "light", marks=pytest.mark.long),
    ],
)
def test_the_report_in_a_browser(
    browser: Browser, run: Path, table: dict[str, list[str]], tmp_path: Path, width: int, height: int, scheme: Any
) -> None:
    alone = shutil.copy(run / "report.html", tmp_path / "sent.html")
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    said: list[str] = []
    page.on("dialog", lambda dialog: said.append("a dialog"))
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"file://{alone}")
    assert said == [] and [url for url in asked if not url.startswith("data:")] == [f"file://{alone}"]
    assert page.evaluate("document.documentElement.scrollWidth") == width, "only tables may scroll sideways"
    broken = page.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).length")
    assert broken == 0 and page.locator("svg").count() == 6
    if width > height:
        bottom = page.evaluate("document.querySelector('#good').getBoundingClientRect().bottom")
        assert bottom <= height, "the first screen shows accuracies, the learning curve and neighbours"
    shares = """[...document.querySelectorAll('.track')].map(
        track => [track.firstElementChild.getBoundingClientRect().width / track.getBoundingClientRect().width,
                  Number(track.nextElementSibling.textContent) / 100])"""
    bars = np.array(page.evaluate(shares))
    assert bars.shape == (6, 2)
    np.testing.assert_allclose(bars[:, 0], bars[:, 1], atol=0.005)
    # Text must contrast with the page, in paragraphs and in figures: light on light, or dark on dark, is unreadable.
    brightness = """selector => {
        const style = getComputedStyle(document.querySelector(selector));
        const rgb = (style.fill && selector.includes("text") ? style.fill : style.color).match(/[0-9.]+/g).map(Number);
        return (rgb[0] + rgb[1] + rgb[2]) / 3;
    }"""
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9.]+/g).slice(0, 3).map(Number)")
    is_dark = sum(ground) / 3 < 64
    assert is_dark == (scheme == "dark")
    for selector in ("p", "td", "h2", "th", "#curves svg text", "#tsne svg text", ".picture td"):
        assert abs(page.evaluate(brightness, selector) - sum(ground) / 3) > 90, selector
    texts = page.locator("svg text").all()
    colours = {text.evaluate("node => getComputedStyle(node).fill") for text in texts}
    assert len(colours) == 1, "all text in the figures, including legends, must have the same colour"
    shot = np.asarray(Image.open(page.screenshot(path=str(tmp_path / "shot.png")) and tmp_path / "shot.png"))
    assert (shot.mean() < 96) == is_dark
    page.locator("summary").first.click()
    assert page.locator("pre").first.is_visible() and "latent_dim: 8" in page.locator("pre").first.inner_text()
    context.close()


def test_tensorboard_has_latents_and_hyperparameters_in_the_same_run(run: Path) -> None:
    folder = run / "tensorboard"
    assert {path.parent for path in folder.rglob("events.*")} == {folder}, (
        "all event files must be in one folder, else TensorBoard shows two runs"
    )
    events = EventAccumulator(str(folder)).Reload()
    data = events.PluginTagToContent("hparams")
    start = HParamsPluginData.FromString(data["_hparams_/session_start_info"]).session_start_info.hparams
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (
        start["encoder.latent_dim"].number_value == 8 and start["diffusion.schedule"].string_value == "inverted_cosine"
    )
    assert start["optimizer.encoder_lr"].number_value == config["optimizer"]["encoder_lr"]
    metrics = HParamsPluginData.FromString(data["_hparams_/experiment"]).experiment.metric_infos
    tags = {metric.name.tag for metric in metrics}
    assert {"evaluation/knn_top1", "evaluation/probe_top1", "train/epoch"} <= tags <= set(events.Tags()["scalars"])
    assert events.Scalars("train/epoch")[-1].value == 2

    # A page of charts and a table describe what there is. The first group of charts is that of the most important.
    layout = Layout.FromString(data_of_layout(events))
    assert [category.title for category in layout.category] == ["Progress", "Stability", "Cost"]
    patterns = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    scalars = events.Tags()["scalars"]
    for title, tags_of_chart in patterns.items():
        assert any(re.fullmatch(pattern, tag) for pattern in tags_of_chart for tag in scalars), title
    assert undocumented_tags(run) == [] and min(scalars).startswith("at_a_glance/")


def data_of_layout(events: EventAccumulator) -> bytes:
    """Returns the layout of TensorBoard's page "Custom Scalars", as it is stored."""
    return bytes(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])


def test_latents_and_samples_are_shown_before_the_first_evaluation(run: Path) -> None:
    reports = [entry for entry in read_reports(run, 44) if entry["kind"] == "evaluation"]
    assert [(entry["step"], "knn_top1" in entry) for entry in reports] == [
        *((10, False), (22, True)),  # the first start of the run ends at step 22
        *((30, False), (44, True)),
    ]
    assert reports[0]["effective_rank"] > 1 and reports[0]["epoch"] == pytest.approx(10 / 22)
    assert sorted(path.name for path in (run / "samples").iterdir()) == [
        "epoch_0001.png",
        "epoch_0002.png",
        "step_000010.png",
        "step_000030.png",
    ]
    opened = SimpleNamespace(config=Config(), steps_per_epoch=3, total_steps=1000)  # evaluated every 100 epochs
    assert [step for step in range(1000) if evaluating.look_due(opened, step)] == [100]
    assert [step for step in range(1001) if evaluating.evaluation_due(opened, step)] == [300, 600, 900, 1000]
    assert [path.name for path in (run / "checkpoints").glob("epoch_*")] == ["epoch_0002.pt"], "keep_every is 2"


def test_speed_and_time_left_are_those_of_training_alone() -> None:
    """60 steps are left of 100. The last 5 steps of 32 images took 20 seconds without evaluation and checkpoint."""
    logged: dict[str, float] = {}
    phases = {"evaluation": 6.0, "checkpoint": 3.0, "pseudo-labels": 1.0, "forward": 9.0}
    log: Any = SimpleNamespace(report=lambda kind, step, values: logged.update(values))
    config = SimpleNamespace(training=SimpleNamespace(batch_size=32))
    run: Any = SimpleNamespace(config=config, steps_per_epoch=10, total_steps=100, device=torch.device("cpu"))
    state: Any = SimpleNamespace(step=40, ema=SimpleNamespace(get_current_decay=lambda: 0.5))
    timer: Any = SimpleNamespace(take=lambda: (30.0, phases))
    record_steps(log, run, state, {"encoder": 2.0}, Summary({"loss": 1.5}, 3, 2), 0.25, timer, num_steps=5)
    expected = {"epoch": 4, "loss": 1.5, "grad_norm": 0.25, "skipped_steps": 3, "lr/encoder": 2, "ema_decay": 0.5}
    expected |= {"images_per_s": 5 * 32 / 20, "hours_left": 60 * (20 / 5) / 3600, "seconds/evaluation": 6}
    assert {name: logged[name] for name in expected} == pytest.approx(expected)


def test_the_projector_has_the_points_of_the_last_evaluation(run: Path) -> None:
    """Each point has its class and its image."""
    folder = run / "tensorboard"
    listed = (folder / "projector_config.pbtxt").read_text()
    assert listed.count("tensor_path") == 1 and "00044/latents" in listed
    assert [path.parent.name for path in folder.glob("*/latents")] == ["00044"]
    points = np.loadtxt(folder / "00044" / "latents" / "tensors.tsv")
    rows = (folder / "00044" / "latents" / "metadata.tsv").read_text().splitlines()
    assert points.shape == (360, 8) and rows[0] == "class\timage" and len(rows) == 361
    sprite = Image.open(folder / "00044" / "latents" / "sprite.png")
    assert sprite.size == (19 * 8, 19 * 8)
    test = open_trained(read_trained(None, run / "checkpoints" / "last.pt", ["device=cpu"]))[0].test
    assert isinstance(test, StoredImages) and test.labels is not None
    shown = np.asarray(sprite)[8:16, 16:24, :3]  # the third image in the second row of 19
    np.testing.assert_allclose(shown, test.pixels[21].permute(1, 2, 0).numpy(), atol=1)
    assert rows[1 + 21] == f"{test.classes[int(test.labels[21])]}\ttest:21"


def test_the_sprite_stays_within_what_the_projector_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Large:
        labels, classes, shape = torch.zeros(20_000, dtype=torch.int64), ["a\tb"], (20_000, 3, 100, 100)

        def __len__(self) -> int:
            return len(self.labels)

        def batches(self, wanted: Any) -> Iterator[torch.Tensor]:
            return (torch.full((len(indices), 3, 100, 100), 200, dtype=torch.uint8) for indices in wanted)

    monkeypatch.setattr(projector, "THUMBNAIL", 90)
    monkeypatch.setattr(projector, "SPRITE_PIXELS", 1000)
    points = projector.projector_points(Large(), torch.arange(900), torch.zeros(900, 2))  # type: ignore[arg-type]
    vectors, header, rows, thumbnails = points
    assert len(vectors) == len(rows) == len(thumbnails) == 900
    assert 30 * thumbnails.shape[-1] <= 1000 < 30 * (thumbnails.shape[-1] + 1)
    with RunLog(tmp_path, 0) as log:
        log.embedding("latents", 7, lambda: (vectors[:10], header, rows[:10], thumbnails[:10]))
    lines = (tmp_path / "tensorboard" / "00007" / "latents" / "metadata.tsv").read_text().splitlines()
    assert all(re.fullmatch(r"a b\ttest:\d+", line) for line in lines[1:])
