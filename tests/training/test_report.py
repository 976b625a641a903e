"""The page of a run: what it says, that it asks for nothing from elsewhere, and what it does about damaged files."""

import html
import json
import math
import os
import re
import sys
import tomllib
import warnings
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from training_cases import adam, few_shot

import funcmeta as fm
from funcmeta.training import Evaluation, Folder, Mean, Record, _curves, fit, report
from funcmeta.training._folder import _line

HOSTILE = "<script>alert('x')</script>"


def records(steps: int = 60) -> list[Record]:
    """A run with validations every 10 steps, the best at step 30, and three alarms."""
    found = [Record(0, None, None, 0.1, 0.0, None, Mean(2.0, 0.2), best=True)]
    for step in range(1, steps + 1):
        validation = Mean(0.5 + abs(step - 30) / 100, 0.125) if step % 10 == 0 else None
        alarm = f"The norm is {step}. {HOSTILE}" if step in (7, 8, 41) else None
        loss = None if alarm else math.exp(-step / 20) + 0.1 * math.sin(step)
        best, alarms = step in (10, 20, 30), sum(step >= each for each in (7, 8, 41))
        found.append(Record(step, loss, 1.0 + step % 3, 0.1 / step, 0.25, alarm, validation, best, alarms))
    return found


def written(folder: Path, found: list[Record] | None = None, ended: str | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    end = "" if ended is None else json.dumps({"ended": ended}) + "\n"
    (folder / "log.jsonl").write_text("".join(map(_line, records() if found is None else found)) + end)
    return folder


def evaluation(number: int = 50, **others: Any) -> dict[str, Any]:
    return {
        "split": "test",
        "score": "query accuracy",
        "higher_is_better": False,
        "step": 60,
        "mean": 0.75,
        "margin": 0.0125,
        "at_first": {"value": 0.25, "margin": 0.05},
        "difference": {"value": 0.5, "margin": 0.0625},
        "scores": [((7 * index) % number) / number for index in range(number)],
        "scores_at_first": [0.25] * number,
        "seed": 0,
        "number": number,
    } | others


SHOWN = tuple(key for key in evaluation() if key not in ("seed", "number", "scores_at_first"))
"""Of an evaluation, what the page shows."""


def full(folder: Path) -> Path:
    """A folder with all that a page can have."""
    written(folder)
    (folder / "config.toml").write_text('algorithm = "maml"\ntasks = "omniglot:/a/path"\nsteps = 60\n')
    (folder / "evaluation.json").write_text(json.dumps(evaluation()))
    return folder


def rows(text: str) -> list[list[str]]:
    """The cells of all rows of the page's tables."""
    found = re.findall(r"<tr>(.*?)</tr>", text, re.DOTALL)
    return [[html.unescape(cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)] for row in found]


def pictures(text: str) -> dict[str, ElementTree.Element]:
    found = [ElementTree.fromstring(each) for each in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    return {each.attrib["aria-label"]: each for each in found}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a run whose losses are to be low."""
    folder = full(tmp_path_factory.mktemp("run"))
    path = report(folder)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


def test_it_says_what_was_trained_and_met(text: str) -> None:
    assert "<title>maml on omniglot</title>" in text
    assert "<dt>tasks</dt><dd>omniglot:/a/path</dd>" in text
    assert "<span>outer steps</span><b>60</b>" in text
    assert "<span>time in outer steps</span><b>15 s</b>" in text
    assert "<span>best validation, step 30</span><b>0.500 ± 0.125</b>" in text
    assert "<span>steps left out</span><b>3</b>" in text
    assert "<span>query accuracy, test tasks</span><b>0.750 ± 0.013</b>" in text
    assert f"<dt>torch</dt><dd>{torch.__version__}</dd>" in text
    assert f"<dt>processors</dt><dd>{os.cpu_count()}</dd>" in text
    assert ["7", f"The norm is 7. {HOSTILE}"] in rows(text)
    assert set(pictures(text)) == {
        *("Loss over the outer steps", "Validation over the outer steps", "Norm of the meta-gradient"),
        *("Learning rate", "Seconds a step", "Scores of the tasks"),
    }


@pytest.mark.parametrize(
    ("ended", "steps", "told", "tile"),
    [
        ("steps", 60, "Ended at step 60, the last one.", "60"),
        ("steps", 40, "Ended at step 60, the last one.", "60"),
        ("patience", 200, "Ended at step 60 of 200, as validation got no better.", "60 of 200"),
        ("SIGTERM", 200, "Stopped at step 60 of 200 by SIGTERM.", "60 of 200"),
        ("alarm", 200, "Stopped at step 60 of 200 by an alarm.", "60 of 200"),
        (None, 200, "At step 60 of 200, without an end in its log: the run goes on, failed, or was", "60 of 200"),
        ("steps", 200, "At step 60 of 200, without an end in its log", "60 of 200"),  # killed before its next step
        (None, 60, "At step 60, without an end in its log", "60"),
        ("SIGINT", None, "Stopped at step 60 by SIGINT.", "60"),
        ("SIGINT", '"many"', "Stopped at step 60 by SIGINT.", "60"),
    ],
)
def test_it_says_how_the_run_ended(ended: str | None, steps: Any, told: str, tile: str, tmp_path: Path) -> None:
    written(tmp_path, ended=ended)
    (tmp_path / "meta.safetensors").write_bytes(b"")  # of before, if the run was extended
    if steps is not None:
        (tmp_path / "config.toml").write_text(f"steps = {steps}\n")
    text = report(tmp_path).read_text(encoding="utf-8")
    assert f'<p class="faint">{told}' in text
    assert f"<span>outer steps</span><b>{tile}</b>" in text


def test_a_high_score_can_be_the_best_one(tmp_path: Path) -> None:
    highest = [each._replace(best=each.step == 0) for each in records()]
    (written(tmp_path, highest) / "evaluation.json").write_text(json.dumps(evaluation(higher_is_better=True)))
    text = report(tmp_path).read_text(encoding="utf-8")
    assert "<span>best validation, step 0</span><b>2.000 ± 0.200</b>" in text
    assert rows(text)[-22][2] == "query accuracy"
    assert rows(text)[-21][2] == "0.98"
    assert rows(text)[-1][2] == "0"


def test_each_table_has_a_caption_and_heads(text: str, tmp_path: Path) -> None:
    names = [
        "All alarms",
        "Means with their 95 % intervals, medians with their quartiles",
        "The best tasks",
        "The worst tasks",
    ]
    assert re.findall(r"<table>\n<caption>(.*?)</caption>", text) == names
    assert text.count("<table>") == len(names)
    assert len(re.findall(r"<th\b", text)) == text.count('<th scope="col"') == 10
    found = [each._replace(alarm="exploded") for each in records()]
    (written(tmp_path, found) / "evaluation.json").write_text(json.dumps(evaluation(3)))
    captions = re.findall(r"<caption>(.*?)</caption>", report(tmp_path).read_text(encoding="utf-8"))
    assert captions == [
        "The first alarms",
        "The last alarms",
        "Means with their 95 % intervals, medians with their quartiles",
        "All tasks",
    ]


def test_the_tasks_are_sorted_and_the_middle_is_left_out(text: str) -> None:
    assert "The first and the last 10 are shown, 30 are not." in text
    table = [row for row in rows(text) if len(row) == 3]
    assert table[0] == table[11] == ["place", "task", "query accuracy"]
    assert [row[0] for row in table[1:11] + table[12:]] == [str(each) for each in (*range(1, 11), *range(41, 51))]
    scores = evaluation()["scores"]
    assert all(float(row[2]) == pytest.approx(scores[int(row[1])]) for row in table[1:11] + table[12:])
    assert [float(row[2]) for row in table[1:11]] == sorted(scores)[:10]
    assert ["difference, task by task", "+0.500 ± 0.062"] in rows(text)
    assert ["learned, median", "0.48 (0.24 to 0.72)"] in rows(text)
    assert ["at first, median", "0.25 (0.25 to 0.25)"] in rows(text)
    assert "Worse than at first: 37 of 50." in text


@pytest.mark.parametrize(
    ("higher", "difference", "kind"),
    [(True, 0.5, "good"), (False, 0.5, "bad"), (False, -0.5, "good"), (True, 0.01, "")],
)
def test_the_result_is_marked_by_what_it_is(higher: bool, difference: float, kind: str, tmp_path: Path) -> None:
    found = evaluation(higher_is_better=higher, difference={"value": difference, "margin": 0.0625})
    (written(tmp_path) / "evaluation.json").write_text(json.dumps(found))
    text = report(tmp_path).read_text(encoding="utf-8")
    assert f'<div class="tile {kind}"><span>query accuracy, test tasks</span>' in text


@pytest.mark.parametrize(
    ("scores", "mean", "at_first", "told", "lines"),
    [
        (
            [1.0, 2.0, 3.0, 4.0] * 9 + [1e4],
            272.7,
            4.0,
            " 1 far out is in an outermost bar. The mean, 272.7, lies outside.",
            1,
        ),
        ([1.0, 2.0, 3.0, 4.0] * 9, 2.5, 1e6, " The mean at first, 1e+06, lies outside.", 1),
        (
            [1.0] * 180 + [0.0] * 20 + [1e9, 2e9, math.inf],
            1e7,
            0.5,
            " 2 far out are in an outermost bar. 1 not finite, not shown. The mean, 1e+07, lies outside.",
            1,
        ),
        ([1.0, 2.0, 3.0, 4.0] * 9, 2.5, 9.0, "", 2),
        ([1.0] * 95 + [0.0] * 5, 0.95, 0.5, "", 2),
        ([0.75 + 1e-15, 0.75] * 45 + [0.5] * 5 + [0.9] * 5, 0.75, 0.75, "", 2),
        ([1.0] * 30, 1.0, 1.0, "", 2),
    ],
)
def test_what_lies_far_out_does_not_spoil_the_picture(
    scores: list[float], mean: float, at_first: float, told: str, lines: int
) -> None:
    found = Evaluation(torch.tensor(scores, dtype=torch.float64), Mean(mean, 0.1))
    panel, outside = _curves.histogram("a", "b", found, Mean(at_first, 0.1))
    assert outside == told
    left, right = panel.axes.get_xlim()
    assert right - left < 100
    drawn = [line.get_xdata()[0] for line in panel.axes.get_lines()]  # type: ignore[index]
    assert len(drawn) == lines
    assert all(left < each < right for each in drawn)


def test_an_evaluation_without_the_scores_at_first_is_shown(tmp_path: Path) -> None:
    older = {key: value for key, value in evaluation().items() if key != "scores_at_first"}
    (written(tmp_path) / "evaluation.json").write_text(json.dumps(older))
    text = report(tmp_path).read_text(encoding="utf-8")
    assert ["at first, median", "?"] in rows(text)
    assert "Worse than at first: ? of 50." in text


def test_few_tasks_are_all_shown_and_those_without_a_score_last(tmp_path: Path) -> None:
    found = evaluation(20, scores=[math.nan, *range(19)])
    (written(tmp_path, records()[:2]) / "evaluation.json").write_text(json.dumps(found))
    text = report(tmp_path).read_text(encoding="utf-8")
    assert "are not." not in text
    assert [row for row in rows(text) if len(row) == 3][-1] == ["20", "0", "nan"]


def test_many_alarms_are_cut_short(tmp_path: Path) -> None:
    found = [each._replace(alarm="exploded") for each in records()]
    text = report(written(tmp_path, found)).read_text(encoding="utf-8")
    assert "61 steps were left out. The first and the last 10 are shown, 41 are not." in text
    assert sum(row[-1] == "exploded" for row in rows(text)) == 20
    text = report(written(tmp_path, [records()[1]._replace(alarm="exploded")])).read_text(encoding="utf-8")
    assert "1 step was left out." in text


def test_the_page_asks_for_nothing_and_runs_nothing(text: str) -> None:
    assert "<script" not in text
    assert re.findall(r"<(?:link|img|iframe|object|embed|base)\b", text) == []
    assert set(re.findall(r'(?:src|href)="([^#"][^"]*)"', text)) == set()
    assert [each for each in re.findall(r"url\(([^)]*)\)", text) if not each.startswith("#")] == []
    assert "@import" not in text
    assert set(re.findall(r'(\S+)="https?://', text)) <= {"xmlns", "xmlns:xlink"}
    assert "prefers-color-scheme: dark" in text


def test_what_files_say_is_escaped(tmp_path: Path) -> None:
    folder = written(tmp_path / "<b>run")
    config = {"algorithm": f"{HOSTILE}", "tasks": '"&amp;', f"<i>{HOSTILE}": 1}
    (folder / "config.toml").write_text("".join(f"{json.dumps(k)} = {json.dumps(v)}\n" for k, v in config.items()))
    assert tomllib.loads((folder / "config.toml").read_text()) == config
    hostile = evaluation(score=f"$\\frac {HOSTILE}", split=HOSTILE)
    (folder / "evaluation.json").write_text(json.dumps(hostile))
    text = report(folder).read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<b>run" not in text
    assert "<i>" not in text
    assert text.count(html.escape(HOSTILE)) >= 8
    assert f"<title>{html.escape(HOSTILE)} on &quot;&amp;amp;</title>" in text


def test_a_run_that_just_began_or_knows_little(tmp_path: Path) -> None:
    for found in (
        records()[:1],
        records()[:2],
        records()[1:2],
        [Record(1, None, None, 0.1, 0.1, "exploded", Mean(1.0, math.nan), alarms=1)],
        [Record(1, 0.0, 0.0, 0.1, 0.1)],
    ):
        text = report(written(tmp_path / "run", found)).read_text(encoding="utf-8")
        assert "<title>run</title>" in text
        assert "<span>outer steps</span>" in text
        assert pictures(text)
    assert "<span>steps left out</span><b>none</b>" in text


def test_it_reports_on_what_fit_leaves(tmp_path: Path) -> None:
    case = few_shot()
    fitted = fit(case.algorithm, case.tasks, adam, steps=5, folder=Folder(tmp_path), **case.options)
    text = report(tmp_path).read_text(encoding="utf-8")
    best = min(record.validation for record in fitted.records if record.validation)
    assert f"<b>{best}</b>" in text
    assert "Ended at step 5, the last one." in text


def test_scores_of_before_the_run_went_on_are_told(tmp_path: Path) -> None:
    full(tmp_path)
    for step, told in ((60, False), (59, True)):
        (tmp_path / "evaluation.json").write_text(json.dumps(evaluation() | {"step": step}))
        note = "The run went on after this was written: run funcmeta evaluate again when it is at its end."
        assert (note in report(tmp_path).read_text(encoding="utf-8")) is told


def test_half_of_the_last_line_is_dropped(tmp_path: Path) -> None:
    written(tmp_path)
    log = tmp_path / "log.jsonl"
    content = log.read_text()
    log.write_text(content[:-20])
    assert "<span>outer steps</span><b>59</b>" in report(tmp_path).read_text(encoding="utf-8")
    assert log.read_text() == content[:-20]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (".*", "", "Expecting value"),
        (".*", "{}", "missing 5 required positional arguments"),
        (".*", "[1]", "it is a list"),
        (".*", "[" * 100_000, "maximum recursion depth"),
        (".*", '{"step": 2, "loss": ', "Expecting value"),
        (".*", '{"ended": 3}', "unexpected keyword argument 'ended'"),
        ('"best"', '"better"', "unexpected keyword argument 'better'"),
        ('"step": 2', '"step": "2"', "its step is '2'"),
        ('"step": 2', '"step": 2.5', "its step is 2.5"),
        ('"step": 2', '"step": true', "its step is True"),
        ('"step": 2', '"step": 1', "its step is 1 after 1"),
        ('"step": 2', f'"step": {10**400}', "its step is 10+ after 1"),
        ('"loss": [^,]*', '"loss": NaN', "its loss is nan"),
        ('"loss": [^,]*', f'"loss": {10**400}', "its loss is 10+"),
        ('"loss": [^,]*', f'"loss": {"9" * 5000}', "Exceeds the limit"),
        ('"norm": [^,]*', '"norm": -Infinity', "its norm is -inf"),
        ('"rate": 0.05', '"rate": [1]', r"its rate is \[1\]"),
        ('"seconds": [^,]*', '"seconds": 1e308', r"its seconds is 1e\+308"),
        ('"seconds": [^,]*', '"seconds": -1.0', "its seconds is -1.0"),
        ('"alarm": null', '"alarm": 3', "its alarm is 3"),
        ('"validation": null', '"validation": 0', "argument after .* must be a mapping"),
        ('"validation": null', '"validation": {"value": "x", "margin": 1.0}', "its validation is Mean"),
        ('"validation": null', '"validation": {"value": NaN, "margin": 1.0}', "its validation is Mean"),
        ('"best": false', '"best": 1', "its best is 1"),
        ('"alarms": 0', '"alarms": -1', "its alarms is -1"),
    ],
)
def test_a_damaged_log_is_an_error_in_the_report_and_in_a_resumption(
    old: str, new: str, message: str, tmp_path: Path
) -> None:
    lines = [_line(each).strip() for each in records()]
    lines[2] = re.sub(old, new, lines[2], count=1)
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
    says = rf"^Line 3 of .*log\.jsonl is no record of a step: .*{message}.* restore it, or remove the line\.$"
    with pytest.raises(fm.DataError, match=says):
        report(tmp_path)
    case = few_shot()
    with pytest.raises(fm.DataError, match=says):
        fit(case.algorithm, case.tasks, adam, steps=1, folder=Folder(tmp_path, resume=True))


def test_nothing_comes_after_the_end(tmp_path: Path) -> None:
    log = written(tmp_path, records()[:2], ended="steps") / "log.jsonl"
    log.write_text(log.read_text() + _line(records()[2]))
    with pytest.raises(fm.DataError, match=r"Line 4 of .*: the run ended before"):
        report(tmp_path)


def test_odd_values_that_a_run_can_write_are_shown(tmp_path: Path) -> None:
    found = [
        Record(0, None, None, math.inf, 0.0, None, Mean(-1.7e308, math.inf), best=True),
        Record(1, 1.7e308, 1.7e308, math.nan, 0.1, None, Mean(1.7e308, math.nan)),
        Record(2, -1.7e308, 5e-324, 1e308, 0.1),
        Record(3, None, None, -1e308, 0.1, "exploded", alarms=1),
        Record(4, 1.0, 0.0, 0.0, 0.1, None, Mean(0.5, 1e308)),
    ]
    other = evaluation(
        6,
        scores=[1.7e308, -1.7e308, math.nan, math.inf, 0.5, 0.0],
        mean=math.nan,
        margin=math.inf,
        at_first={"value": -math.inf, "margin": math.nan},
        difference={"value": 1.7e308, "margin": math.inf},
    )
    (written(tmp_path, found) / "evaluation.json").write_text(json.dumps(other))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = report(tmp_path).read_text(encoding="utf-8")
    assert "<b>-1.7e+308 ± inf</b>" in text
    assert ["difference, task by task", "+1.7e+308 ± inf"] in rows(text)
    assert len(pictures(text)) == 6


def test_a_log_that_is_no_text_missing_or_empty_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(fm.DataError, match=r"has no log\.jsonl\. Pass the folder of a run"):
        report(tmp_path)
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(fm.DataError, match=r"log\.jsonl has no step yet"):
        report(tmp_path)
    (tmp_path / "log.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(fm.DataError, match=r"log\.jsonl cannot be read: .*with a whole log\.jsonl"):
        report(tmp_path)
    case = few_shot()
    with pytest.raises(fm.DataError, match=r"log\.jsonl cannot be read"):
        fit(case.algorithm, case.tasks, adam, steps=1, folder=Folder(tmp_path, resume=True))


@pytest.mark.parametrize("content", ["steps = ", "\xff", "[" * 5], ids=["half", "bytes", "brackets"])
def test_damaged_settings_are_an_error(content: str, tmp_path: Path) -> None:
    (written(tmp_path) / "config.toml").write_bytes(content.encode("latin-1"))
    with pytest.raises(fm.DataError, match=r"config\.toml cannot be read as TOML: .*Restore it, or remove it"):
        report(tmp_path)


@pytest.mark.parametrize(
    "found",
    [
        "{",
        "[]",
        json.dumps({**evaluation(), "mean": None}),
        json.dumps({**evaluation(), "at_first": {"value": 1}}),
        json.dumps({**evaluation(), "difference": 3}),
        json.dumps({**evaluation(), "mean": 10**400}),
        json.dumps({**evaluation(), "higher_is_better": "no"}),
        json.dumps({**evaluation(), "scores": ["good"]}),
        json.dumps({**evaluation(), "scores": 3}),
        json.dumps({**evaluation(), "scores_at_first": [0.5]}),
        *(json.dumps({key: value for key, value in evaluation().items() if key != left}) for left in SHOWN),
    ],
)
def test_a_damaged_evaluation_is_an_error(found: str, tmp_path: Path) -> None:
    (written(tmp_path) / "evaluation.json").write_text(found)
    with pytest.raises(
        fm.DataError, match=r"evaluation\.json is not what funcmeta evaluate writes: \w+: .*Run it again"
    ):
        report(tmp_path)


def test_what_the_system_does_not_take_and_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (written(tmp_path) / "report.html").mkdir()
    with pytest.raises(fm.SaveError, match=r"report\.html could not be written"):
        report(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(fm.MissingExtraError, match="needs matplotlib, which the extra demo brings"):
        report(tmp_path)


# --- the curves


def line(panel: _curves.Panel, place: int) -> Any:
    return panel.axes.lines[place].get_xydata()


def test_the_running_median_is_the_median_around_each_step() -> None:
    x, y = np.arange(500.0), np.random.default_rng(0).normal(size=500)
    places, found = _curves._median(x, y)
    assert _curves.median_over(500) == 11
    inside = [index for index, place in enumerate(places) if 5 <= place < 495]
    assert len(inside) > 250
    for index in inside:
        place = int(places[index])
        assert found[index] == np.median(y[place - 5 : place + 6])
    assert (places[0], places[-1]) == (0, 499)


def test_many_steps_keep_their_extremes() -> None:
    y = np.random.default_rng(0).normal(size=50_000)
    y[31_234], y[44_444] = 40.0, -40.0
    found = line(_curves.curve("loss", "Loss", range(50_000), y.tolist()), 0)
    assert len(found) <= 2 * _curves.POINTS
    assert [31_234, 40.0] in found.tolist()
    assert [44_444, -40.0] in found.tolist()
    assert (np.diff(found[:, 0]) > 0).all()


def test_few_steps_are_drawn_as_they_are_without_those_that_are_not_finite() -> None:
    panel = _curves.curve("norm", "Norm", range(1, 7), [1.0, None, 100.0, math.inf, 0.0, 10.0], log=True)
    assert line(panel, 0).tolist() == [[1, 1], [3, 100], [6, 10]]
    assert panel.axes.get_yscale() == "log"
    assert _curves.curve("norm", "Norm", [1, 2], [0.0, 0.0], log=True).axes.get_yscale() == "linear"


def test_the_learning_rate_is_seen_from_zero() -> None:
    assert _curves.plain("rate", "Rate", [1, 2], [0.1, 0.1]).axes.get_ylim()[0] == 0


def test_the_band_is_the_interval_and_the_ring_is_around_the_best() -> None:
    panel = _curves.means("validation", "Validation", [0, 5], [Mean(1.0, 0.25), Mean(0.5, 0.125)], 1)
    band = panel.axes.collections[0].get_paths()[0].vertices
    assert {(0, 0.75), (0, 1.25), (5, 0.375), (5, 0.625)} <= {tuple(each) for each in band}
    assert line(panel, 1).tolist() == [[5, 0.5]]


def test_pictures_of_long_runs_are_small_and_the_same_each_time(tmp_path: Path) -> None:
    written(tmp_path, [Record(step, math.sin(step * step), 1.0, 0.1, 0.1, "x") for step in range(1, 20_000)])
    first, second = (report(tmp_path).read_text(encoding="utf-8") for _ in range(2))
    assert len(first) < 400_000
    assert re.findall(r"<svg.*?</svg>", first, re.DOTALL) == re.findall(r"<svg.*?</svg>", second, re.DOTALL)


def test_what_is_too_large_to_be_drawn_is_drawn_at_the_edge() -> None:
    panel = _curves.curve("loss", "Loss", [1, 2, 3], [1.7e308, -1.7e308, 2.0])
    assert line(panel, 0).tolist() == [[1, 1e100], [2, -1e100], [3, 2]]


@pytest.mark.parametrize("scores", [[0.75] * 9, [1e16, 1e16 + 2, 1e16 + 4], [1.0, 1.0 + 2e-16], [0.0], [1e308] * 2])
def test_scores_that_are_nearly_the_same_have_a_histogram(scores: list[float]) -> None:
    found = Evaluation(torch.tensor(scores, dtype=torch.float64), Mean(scores[0], 0.0))
    panel, _ = _curves.histogram("scores", "Scores", found, found.mean)
    assert sum(bar.get_height() for bar in panel.axes.patches) == len(scores)
    panel.svg()
