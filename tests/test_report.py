"""The page: it needs no network, shows every run and every label, escapes what it shows, and groups seeds alone."""

import base64
import json
from html.parser import HTMLParser

import PIL.Image
import pytest
from helpers import default_config

from fedkrso_app.config import ConfigError
from fedkrso_app.runs import pictures as drawing
from fedkrso_app.runs import report, results
from fedkrso_app.runs.folder import Run


def make(folder, status="completed", rounds=5, **changes) -> Run:
    """A run's folder with figures a hand can check: metric 0.5 + seed/10 + round/100, 1 MB up and 3 down a client."""
    config = (
        default_config()
        | {"task": "glue/sst2", "local-steps": 20}
        | {key.replace("_", "-"): v for key, v in changes.items()}
    )
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps({"config": config, "libraries": {"flwr": "1.42"}, "model_digest": ""})
    )
    (folder / "status").write_text(status)
    lines = []
    for number in range(rounds + 1):
        sent = bool(number) * 4  # clients
        figures = {"round": number, "version": number, "metric": 0.5 + config["seed"] / 10 + number / 100}
        figures |= {"uplink_bytes": sent * 10**6, "downlink_bytes": sent * 3 * 10**6, "paper_bytes": sent * 5 * 10**6}
        figures |= {"clients": 3 * bool(number), "refused": int(number == 2), "failed": bool(number) - int(number == 2)}
        figures |= {
            "seconds": number + 1.0,
            "client_seconds": 0.4,
            "client_peak_bytes": 10**8 + number,
            "partitions": [],
        }
        lines.append(json.dumps(figures | {"train_loss": None, "eval_loss": 1.0}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return Run(folder)


class Page(HTMLParser):
    """What a browser would see: texts, pictures, references, and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts, self.references, self.open, self.tags = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [value for key, value in attrs if key in ("src", "href", "xlink:href", "action", "srcset")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def page(runs, tmp_path) -> Page:
    file = tmp_path / "page.html"
    report.write(runs, file)
    return Page(file.read_text())


def pictures(seen: Page) -> list[str]:
    return [base64.b64decode(source.split(",")[1]).decode() for source in seen.references]


@pytest.fixture
def many(tmp_path):
    """Two methods, two partitions, two seeds."""
    return [
        make(tmp_path / f"{strategy}-{partition}-{seed}", strategy=strategy, partition=partition, seed=seed)
        for strategy in ("fedkrso", "fedfft")
        for partition in ("iid", "dirichlet")
        for seed in (0, 1)
    ]


def test_the_page_needs_nothing_from_anywhere(many, tmp_path):
    seen = page(many, tmp_path)
    assert len(seen.references) == 10  # five pictures for each partition
    assert all(reference.startswith("data:image/svg+xml;base64,") for reference in seen.references)
    assert not {"script", "link", "iframe", "object"} & set(seen.tags) and not seen.open
    style = (tmp_path / "page.html").read_text()
    assert "url(" not in style and "@import" not in style and "width=device-width" in style


def test_every_method_setting_and_run_is_named(many, tmp_path):
    text = " ".join(page(many, tmp_path).texts)
    for wanted in [
        "fedkrso",
        "fedfft",
        "glue/sst2, IID",
        "glue/sst2, Dirichlet, α = 0.5",
        *(r.path.name for r in many),
    ]:
        assert wanted in text
    assert text.count("0.6000 ± 0.0707") == 4  # 0.55 and 0.65, of two methods in two settings


def test_what_is_shown_is_escaped(many, tmp_path):
    evil = make(tmp_path / "<script>alert(1)<", status="failed: <b>&", data_dir="<i>$x^2$</i>")
    seen = page([*many, evil], tmp_path)
    text = " ".join(seen.texts)
    assert "script" not in seen.tags and "i" not in seen.tags
    assert "<script>alert(1)<" in text and "failed: <b>&" in text and "<i>$x^2$</i>" in text


def test_one_run_is_enough(tmp_path):
    seen = page([make(tmp_path / "alone")], tmp_path)
    assert len(seen.references) == 5 and "0.5500" in seen.texts


def test_a_run_without_a_round_or_a_metric_is_told_without_a_picture(tmp_path):
    young = make(tmp_path / "young", status="running", rounds=0)
    unjudged = make(tmp_path / "unjudged", strategy="fedfft", seed=1)
    lines = [json.loads(line) for line in (unjudged.path / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in line.items() if key != "metric"} for line in lines]
    (unjudged.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    seen = page([young, unjudged], tmp_path)
    assert len(seen.references) == 3 and "–" in seen.texts and "young (interrupted)" in " ".join(seen.texts)


def test_seeds_are_repeats_and_rates_are_lines_of_their_own(tmp_path):
    runs = [
        make(tmp_path / f"{rate}-{seed}", seed=seed, **{"fedkrso.learning-rate": rate})
        for rate in (1e-3, 2e-3)
        for seed in (0, 1)
    ]
    runs.append(make(tmp_path / "fedfft", strategy="fedfft", **{"fedkrso.learning-rate": 7.0}))
    runs.append(make(tmp_path / "fedfft1", strategy="fedfft", seed=1))  # the rate of another method is no difference
    found = results.lines(runs)
    assert [(line.label, len(line.runs)) for line in found] == [
        ("fedkrso, rate 0.001", 2),
        ("fedkrso, rate 0.002", 2),
        ("fedfft", 2),
    ]
    assert len({line.style for line in found}) == 3


def test_repeats_that_differ_in_more_than_the_seed_are_not_averaged(tmp_path):
    runs = [make(tmp_path / "a", local_steps=10), make(tmp_path / "b", local_steps=20, seed=1)]
    assert [line.label for line in results.lines(runs)] == ["fedkrso, local-steps 10", "fedkrso, local-steps 20"]


def test_what_is_told_of_a_run_makes_no_line_of_its_own(tmp_path):
    told = {"tracker": "tensorboard", "client_metrics": True}
    runs = [make(tmp_path / "a", seed=0), make(tmp_path / "b", seed=1, **told)]
    (line,) = results.lines(runs)
    assert len(line.runs) == 2


def test_a_cut_run_does_not_bend_the_mean(tmp_path):
    runs = [make(tmp_path / "whole"), make(tmp_path / "cut", status="failed: x", rounds=2, seed=1)]
    (line,) = results.lines(runs)
    assert line.curves()[0] == [0, 1, 2, 3, 4, 5] and line.of("metric") == pytest.approx([0.55])
    assert "Not complete: cut (failed: x)." in page(runs, tmp_path).texts


def test_runs_with_other_clients_or_rounds_are_no_repeats(tmp_path):
    runs = [make(tmp_path / "a"), make(tmp_path / "longer", seed=1, rounds=60), make(tmp_path / "many", seed=2)]
    text = (runs[2].path / "metrics.jsonl").read_text().replace('"clients": 3', '"clients": 7')
    (runs[2].path / "metrics.jsonl").write_text(text)
    assert sorted(line.label for line in results.lines(runs)) == [
        f"fedkrso, num-server-rounds {rounds}, clients {clients}" for rounds, clients in [(10, 4), (10, 8), (60, 4)]
    ]


def test_what_all_methods_share_is_told_where_it_differs(tmp_path):
    runs = [make(tmp_path / "a"), make(tmp_path / "b", strategy="fedit", batch_size=3)]
    assert {line.label for line in results.lines(runs)} == {"fedkrso, batch-size 16", "fedit, batch-size 3"}


def test_curves_and_measures_equal_a_hand_computation(tmp_path):
    run, other = make(tmp_path / "a"), make(tmp_path / "b", seed=1)
    (line,) = results.lines([run, other])
    rounds, spent, metrics = line.curves()
    assert rounds == [0, 1, 2, 3, 4, 5] and spent == pytest.approx([0, 13 / 3, 25 / 3, 38 / 3, 17, 64 / 3])
    assert metrics[3] == pytest.approx([0.53, 0.63])
    measured = results.measures(run)
    assert (measured["uplink_mb"], measured["downlink_mb"], measured["paper_mb"]) == (1.25, 3, 5)  # 16 replied
    assert measured["seconds_per_round"] == 4 and measured["step_ms"] == pytest.approx(20)
    assert (measured["clients"], measured["refused"], measured["failed"]) == (15, 1, 4)
    assert results.mean_sd([1.0, 2.0, 4.0]) == pytest.approx((7 / 3, 1.5275252))
    assert results.mean_sd([1.0]) == (1.0, None) and results.mean_sd([]) == (None, None)


def test_folders_of_runs_are_opened_and_anything_else_is_refused(many, tmp_path):
    assert {run.path for run in results.find_runs([tmp_path, many[0].path])} == {run.path for run in many}
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty is neither a run's folder nor holds any"):
        results.find_runs([tmp_path / "empty"])


def test_pictures_have_no_formulas_and_no_dates(tmp_path):
    run = make(tmp_path / "a", strategy="fedkrso", data_dir="$\\frac$")
    other = make(tmp_path / "b", strategy="fedkrso", data_dir="plain")
    drawn = pictures(page([run, other], tmp_path))
    assert len(drawn) == 5 and not any("dc:date" in picture for picture in drawn)


@pytest.mark.parametrize("settings", [1, 2, 3])
def test_the_picture_is_a_small_png_with_a_panel_for_each_setting(many, tmp_path, settings):
    runs = [*many, make(tmp_path / "longer", task="glue/cola")]
    wanted = list(dict.fromkeys(line.setting for line in results.lines(runs)))[:settings]
    file = tmp_path / "picture.png"
    drawing.save([line for line in results.lines(runs) if line.setting in wanted], file)
    with PIL.Image.open(file) as picture:
        assert picture.format == "PNG" and picture.width == 1350
        assert (picture.height > 1000) == (settings == 3)  # a second row
    assert file.stat().st_size < 100_000


def test_a_picture_of_nothing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="nothing to draw: no run has a metric for two rounds"):
        drawing.save(results.lines([make(tmp_path / "young", rounds=0)]), tmp_path / "picture.png")
