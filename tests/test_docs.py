"""The figures and numbers in docs/ agree with the code."""

import json
import re
import shutil
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ablations import curves
from ablations.result_rows import read_rows
from config.reading import load_config
from config.schema import Diffusion
from docs import cifar10_tables, draw_model, draw_schedules, fill_tables, list_keys, record
from docs import rows as docs_rows
from experiment.models import build_on_meta
from model.diffusion import SCHEDULES, GaussianDiffusion
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("config", "overrides"),
    [
        ("cifar10_paper", []),
        ("cifar10", []),
        ("digits", ["decoder.modulation=sectioned", "decoder.num_res_blocks=3", "decoder.channel_mult=[1,1,2,2]"]),
    ],
)
def test_the_model_is_drawn_with_every_layer_and_its_section(config: str, overrides: list[str]) -> None:
    resolved = load_config(ROOT / "config" / f"{config}.yaml", overrides)
    decoder = build_on_meta(resolved).decoder
    (axes,) = draw_model.draw(resolved).axes
    words = [" ".join(text.get_text().replace("+ attention", "").split()) for text in axes.texts]
    blocks = [word for word in words if re.match(r"(down|middle|up)\.\d+ \$", word)]
    assert sorted(blocks) == sorted(f"{layer.name} $z_{{{layer.section}}}$" for layer in decoder.layers())
    for section, width in enumerate(decoder.section_dims):
        assert any(word.startswith(f"$z_{{{section}}}$ ({width})") for word in words)


def written(svg: str) -> list[str]:
    """Returns the texts of a figure. Matplotlib writes each text as a comment next to its outlines."""
    return re.findall(r"<!-- (.+?) -->", svg, re.DOTALL)


def schedules_table(lines: list[str]) -> list[str]:
    """Returns the last table of schedules in `lines`: header, separator, and one line per schedule."""
    header = max(i for i, line in enumerate(lines) if line.startswith("| (t + 1/2) / T |"))
    return list(takewhile(lambda line: line.startswith("|"), lines[header:]))


def test_the_mean_inverse_signal_to_noise_ratio_is_that_in_the_docs() -> None:
    cumulative = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    mean = (1 / cumulative - 1).mean()
    assert f"this factor is {mean:,.0f} on average" in (ROOT / "docs" / "model.md").read_text()


def test_the_figures_are_those_of_the_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The committed figures and numbers are those that the scripts produce, and the scripts are deterministic."""
    for script in (draw_model, draw_schedules):
        contents = []
        for name in ("one.svg", "two.svg"):
            script.main(["--out", str(tmp_path / name)])
            contents.append((tmp_path / name).read_bytes())
        assert contents[0] == contents[1]
        # Only the texts are compared, because the outlines depend on the version of matplotlib.
        committed = (ROOT / "docs" / script.__name__.replace("docs.draw_", "")).with_suffix(".svg").read_text()
        assert written(committed) == written(contents[0].decode()) and len(written(committed)) > 10
    printed = capsys.readouterr().out.splitlines()
    table, brightness = schedules_table(printed), [line for line in printed if line.startswith("inverted cosine, ")]
    page = (ROOT / "docs" / "schedules.md").read_text()
    assert [line.split("`")[1] for line in table[2:]] == list(SCHEDULES)
    assert schedules_table(page.splitlines()) == table
    brightness_8, brightness_32, brightness_64 = brightness[-3:]  # the script has run twice
    exact = GaussianDiffusion(**Diffusion(schedule="inverted_cosine").model_dump())
    signal, noise = exact.sqrt_alphas_cumprod[-1].item(), exact.sqrt_one_minus_alphas_cumprod[-1].item()
    for line, size in ((brightness_8, 8), (brightness_32, 32), (brightness_64, 64)):
        uniform = torch.full((3, size, size), 0.5)
        assert f" by {signal * uniform.norm().item() / noise:.1f} standard deviations" in line
    said = " ".join(page.split())
    numbers = [line.split()[-3] for line in (brightness_32, brightness_8, brightness_64)]
    assert "by {} standard deviations, at 8 px by {}, at 64 px by {}.".format(*numbers) in said
    assert f"the last timestep is {signal:.3f}" in said and f"standard deviation {noise:.3f}" in said


def test_links_between_the_pages_lead_somewhere() -> None:
    """Files exist, and sections have the heading that a link names, as GitHub forms its anchors."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())]
    assert len(links) > 30
    for page, link in links:
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name) if name else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, f"{page.name}: {link}"


def test_the_list_of_keys_is_that_of_the_schemas() -> None:
    page = (ROOT / "docs" / "config.md").read_text()
    assert page == list_keys.page(), "run python -m docs.list_keys"
    for line in (
        "| `training.min_snr_gamma` | number or null | > 0 | `null` | weight the denoising loss by min-SNR",
        "| `data.num_workers` * | integer or null | >= 1, <= 1024 | `null` | number of threads",
        "| `method` | `probe`, `finetune`, `laplacenet` |  | `finetune` | training of the classifier",
    ):
        assert line in page


def test_the_tables_are_those_of_the_recorded_results(tmp_path: Path) -> None:
    texts = [page.read_text() for page in fill_tables.PAGES]
    assert texts == [fill_tables.filled(text) for text in texts], "run python -m docs.fill_tables"
    names = [name for text in texts for name in re.findall(r"<!--table:([\w/]+)-->", text)]
    assert sorted(name for name in names if "/" not in name) == sorted(fill_tables.TABLES)
    curves.save(cifar10_tables.named_curves(), tmp_path / "curve.svg", cifar10_tables.floors())
    assert written((tmp_path / "curve.svg").read_text()) == written(fill_tables.CURVE.read_text())
    for path in docs_rows.RESULTS.iterdir():
        assert "/" not in re.sub("images/s|top-1 / top-3", "", path.read_text()), f"{path} names a file"
    assert len((ROOT / "README.md").read_text().split()) <= 900


def test_results_of_all_programs_are_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training time is that between reports, the last row has the baselines, and a second record replaces the first."""
    out = tmp_path / "results"
    out.mkdir()

    def rows(folder: Path) -> list[dict[str, Any]]:
        assert record.main([str(folder), "--name", "found", "--out", str(out)]) == 0
        return read_rows(out / "found.jsonl")

    def write(folder: Path, config: dict[str, Any], results: dict[str, Any] | None, *reports: dict[str, Any]) -> Path:
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text(json.dumps(config))
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(report)}\n" for report in reports))
        if results:
            (folder / "results.json").write_text(json.dumps(results))
        return folder

    # An ablation without accuracies.
    (tmp_path / "sections").mkdir()
    (tmp_path / "sections" / "results.jsonl").write_text('{"run": "a", "loss": 1.0}\n')
    with pytest.raises(SystemExit, match="2"):
        record.main([str(tmp_path / "sections"), "--out", str(out)])
    assert "results.jsonl has no accuracies: name" in capsys.readouterr().err

    # A run of train.py, before and after its end.
    settings = {"seed": 3, "training": {"batch_size": 10, "epochs": 2}}
    reports = [
        {"kind": kind, "step": step, "epoch": step / 10, **values}
        for step in (10, 20)
        for kind, values in (
            ("train", {"images_per_s": 50.0}),
            ("evaluation", {"knn": "k-NN k=20", "knn_top1": 70.0, "knn_top3": 90.0, "effective_rank": 3.0}),
        )
    ]
    (first,) = rows(write(tmp_path / "run", settings, None, *reports[:2]))
    assert first["table"] == {"k-NN k=20": {"trained": {"top1": 70.0, "top3": 90.0}}}
    assert (first["run"], first["images"], first["seconds"], first["complete"]) == ("found-3", 100, 2.0, False)
    table = {"k-NN k=20": {name: {"top1": 70.0, "top3": 90.0} for name in ("trained", "untrained")}}
    found = rows(write(tmp_path / "run", settings, {"step": 20, "table": table}, *reports))
    assert [row["images"] for row in found] == [100, 200] and found[1]["table"] == table and found[1]["complete"]

    # A run that has ended is continued to more epochs.
    longer = settings | {"training": {"batch_size": 10, "epochs": 4}}
    found = rows(write(tmp_path / "run", longer, {"step": 20, "table": table}, *reports))
    assert found[1]["table"] == table and not found[1]["complete"]

    # README has the runs that are complete, and a new variant is called by its own name.
    with monkeypatch.context() as patched:
        patched.setattr(docs_rows, "RESULTS", out)
        both = {kind: {"trained": {"top1": top1, "top3": 90.0}} for kind, top1 in (("k-NN", 70.0), ("linear", 71.0))}
        complete = {"run": "a", "digest": "d", "complete": True, "seconds": 60.0, "table": both, "images": 200}
        complete |= {"epochs": 4, "of_epochs": 4, "stage": "new", "variant": "soda"}
        hour = complete | {"run": "hour", "stage": "hour"}
        half = complete | {"run": "b", "complete": False, "table": {"k-NN": {"trained": {"top1": 1.0}}}}
        for name, of_name in (("digits", [complete, half]), ("cifar10_cpu_runs", [hour, complete])):
            (out / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in of_name))
        assert "| digits | 70.0 / 71.0 | one seed, 1 minutes on a CPU core" in fill_tables.readme()
        assert "| new, soda, after 4 | 1 seed | 200 | 70.0 / 71.0 |" in cifar10_tables.runs()
        (out / "digits.jsonl").write_text(json.dumps(half))
        assert "| digits | not measured |" in fill_tables.readme()

    # A run that was measured, on images without labels.
    measures = {"novel_views": {"protocol": "p", "rows": {"SSIM": {"model": {"value": 0.5}}}, "decimals": 3}}
    settings["seed"] = 4
    contents = {"step": 20, "table": {}, "measures": measures, "config_digest": "c"}
    unlabelled = [{"kind": "evaluation", "step": step, "epoch": step / 10, "effective_rank": 3.0} for step in (10, 20)]
    steps: list[dict[str, Any]] = [reports[0], unlabelled[0], reports[2], unlabelled[1]]
    last = rows(write(tmp_path / "measured", settings, contents, *steps))[-1]
    assert (last["images"], last["measures"], last["table"], last["digest"]) == (200, measures, {}, "c")
    assert last["complete"] and (last["epochs"], last["seconds"]) == (2.0, 4.0)
    continued = {**settings, "training": {"batch_size": 10, "epochs": 4}}
    more = [{**reports[2], "step": 30}]
    first = rows(write(tmp_path / "measured", continued, contents, *steps, *more))[-1]
    assert not first["complete"] and (first["epochs"], first["seconds"], first["of_epochs"]) == (2.0, 4.0, 4)
    last = rows(write(tmp_path / "measured", settings, contents, *steps))[-1]
    page = "<!--table:found/novel_views-->\n<!--/table-->\n<!--table:found/identity-->\n<!--/table-->"
    table_lines = ["", "| | model |", "|---|---|", "| SSIM | 0.500 |", "", "Protocol: p.", "<!--/table-->"]
    with monkeypatch.context() as patched:
        patched.setattr(docs_rows, "RESULTS", out)
        page = fill_tables.filled(page)
    assert "\n".join(table_lines) in page and "-->\nnot measured.\n<" in page

    # A run of finetune.py, beside them.
    settings |= {"method": "probe", "num_labels": 50, "label_split": 1, "encoder": {"weights": ""}}
    table = {"probe, 50 labels": {"EMA": {"top1": 60.0, "top3": 80.0}}}
    assert len(rows(write(tmp_path / "probe", settings, {"step": 7, "table": table}))) == 4
    last = rows(tmp_path / "probe")[-1]
    assert (last["run"], last["start"], last["table"]) == ("found-probe-scratch-50-1-4", "scratch", table)

    # An ablation: paths in its config are not kept, and failed runs are left out.
    ablation = tmp_path / "ablation"
    ablation.mkdir()
    row = {
        "run": "a-b-0",
        "digest": "d",
        "table": table,
        "images": 5,
        "config": "training: {epochs: 4}\ndata: {root: /x}",
    }
    earlier = [{**row, "digest": "another config", "images": 3}, {**row, "table": {}}]
    lines = [*earlier, row, {"run": "a-c-0", "digest": "d", "failed": "no memory"}]
    (ablation / "results.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in lines))
    last = rows(ablation)[-1]
    assert last["of_epochs"] == 4 and "config" not in last and len(rows(ablation)) == 5
    assert last["table"] == table, "of several rows of a run and a number of images, the last one"
    with pytest.raises(SystemExit, match="2"):
        rows(tmp_path)

    # A file of test.py --results has accuracies and measures, and neither a config nor a number of images.
    file = tmp_path / "judged.json"
    file.write_text(json.dumps({"checkpoint": "c", "step": 7, "data": ["d", None], "measures": {"m": {}}}))
    judged = {"run": "found-judged", "stage": "judged", "variant": "judged", "digest": "", "complete": False}
    assert rows(file)[-1] == judged | {
        "table": {},
        "checkpoint": "c",
        "step": 7,
        "data": ["d", None],
        "measures": {"m": {}},
    }
    for wrong in ("[1]", '{"name": "package"}'):
        file.write_text(wrong)
        with pytest.raises(SystemExit, match="2"):
            rows(file)
        assert "judged.json is not a file of test.py --results" in capsys.readouterr().err


def test_recording_again_keeps_measures_and_refuses_what_the_tables_cannot_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, run = tmp_path / "results", tmp_path / "run"
    shutil.copytree(docs_rows.RESULTS, out)
    run.mkdir()
    monkeypatch.setattr(record, "RESULTS", out)
    monkeypatch.setattr(docs_rows, "RESULTS", out)
    monkeypatch.setattr(fill_tables, "PAGES", [shutil.copy(page, tmp_path / page.name) for page in fill_tables.PAGES])
    monkeypatch.setattr(fill_tables, "CURVE", tmp_path / "curve.svg")
    command = ["--name", "digits", "--out", str(out)]
    old = next(row for row in read_rows(out / "digits.jsonl") if row.get("measures"))
    (run / "config.yaml").write_text(json.dumps({"seed": old["seed"], "training": {"batch_size": 1, "epochs": 100}}))
    report = {"kind": "evaluation", "epoch": 100, "step": old["images"], "knn": "k-NN", "knn_top1": 1, "knn_top3": 2}
    (run / "metrics.jsonl").write_text(json.dumps(report) + "\n")

    # The same run, without measures.
    results = {"config_digest": old["digest"], "step": old["images"], "table": old["table"]}
    (run / "results.json").write_text(json.dumps(results))
    assert record.main([str(run), *command]) == 0
    kept = [row.get("measures") for row in read_rows(out / "digits.jsonl") if row["run"] == old["run"]]
    assert kept[-1] == old["measures"]

    # Measures that the new row lacks are kept beside those that it has.
    new = {"uniformity": {"protocol": "new", "rows": {}}}
    (run / "results.json").write_text(json.dumps(results | {"measures": new}))
    assert record.main([str(run), *command]) == 0
    kept = [row.get("measures") for row in read_rows(out / "digits.jsonl") if row["run"] == old["run"]]
    assert kept[-1] == old["measures"] | new

    # A run of another config.
    (run / "results.json").write_text(json.dumps(results | {"config_digest": "another"}))
    capsys.readouterr()
    assert record.main([str(run), *command]) == 0
    lost = ", ".join(old["measures"])
    assert f"earlier results of {old['run']} are removed: {lost}" in capsys.readouterr().out

    # Accuracies of test.py are added to those of the same checkpoint, and replace cells of the same name.
    path = out / "cifar10_published.jsonl"
    (old,) = read_rows(path)
    file, name = tmp_path / "cifar10_published.json", next(iter(old["table"]))
    cells = {"trained": {"top1": 1.0, "top3": 2.0}}
    contents = {key: old[key] for key in ("checkpoint", "step", "data")} | {"table": {"new": cells, name: cells}}
    file.write_text(json.dumps(contents))
    assert record.main([str(file), "--out", str(out)]) == 0
    (found,) = read_rows(path)
    assert found["table"] == {**old["table"], "new": cells, name: old["table"][name] | cells}

    # Two runs of one name, and results that the tables of this name cannot show.
    def all_files() -> list[bytes]:
        return [path.read_bytes() for path in sorted((*out.iterdir(), *tmp_path.glob("*.md"), tmp_path / "curve.svg"))]

    before = all_files()
    file = tmp_path / "file.json"
    file.write_text(json.dumps({"checkpoint": "c", "step": 1, "data": [], "measures": {}}))
    for words, expected in (
        ([str(run), str(run), *command], "two of these runs have the same name"),
        ([str(file), "--name", "digits_few_labels", "--out", str(out)], "the tables of digits_few_labels need other"),
    ):
        with pytest.raises(SystemExit, match="2"):
            record.main(words)
        assert expected in capsys.readouterr().err
        assert all_files() == before
