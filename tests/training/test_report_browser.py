"""The page of a run as a browser shows it: its content, its pictures, and no overflow on a phone.

Skipped where no Chromium is installed.
"""

import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_report import full, rows

from funcmeta.training import report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
)
PHONE = 390

MEASURE = """<script>addEventListener("load", () => {
  const [root, style, told] = [document.documentElement, getComputedStyle(document.body), parent.document.body.dataset];
  const box = each => each.getBoundingClientRect();
  const wide = [...document.querySelectorAll("main *")].filter(each => box(each).right > innerWidth);
  told.measured = [innerWidth, root.scrollWidth, wide.length].join(" ");
  told.pictures = [...document.querySelectorAll("svg")].map(each => `${box(each).width}x${box(each).height}`).join(" ");
  told.colors = style.color + style.backgroundColor;
})</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run whose words are long."""
    folder = full(tmp_path_factory.mktemp("run"))
    path = "/data" + "/a_folder_with_a_long_name" * 6
    (folder / "config.toml").write_text(f'algorithm = "maml"\ntasks = "omniglot:{path}"\nsteps = 60\n')
    return report(folder)


def browse(page: Path, folder: Path, *options: str) -> str:
    """What a browser prints about a page."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser on the PATH: none of {', '.join(BROWSERS)}")
    command = [found, *FLAGS, f"--user-data-dir={folder / 'profile'}", *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def measured(page: Path, folder: Path, width: int, *options: str) -> dict[str, str]:
    """What a script in a copy of the page finds, in a frame of a width: windows have a least width."""
    content = page.read_text(encoding="utf-8").replace("</body>", f"{MEASURE}</body>")
    frame = f'<iframe style="border: 0; width: {width}px; height: 900px" srcdoc="{html.escape(content)}"></iframe>'
    copy = folder / "copy.html"
    copy.write_text(f"<!doctype html><body>{frame}</body>", encoding="utf-8")
    dom = browse(copy, folder, "--window-size=1400,1000", "--dump-dom", *options)
    return dict(re.findall(r'data-(\w+)="([^"]*)"', dom))


def test_the_browser_shows_what_is_there(page: Path, tmp_path: Path) -> None:
    dom = browse(page, tmp_path, "--dump-dom")
    assert "<title>maml on omniglot</title>" in dom
    assert re.findall(r"<h2>(.*?)</h2>", dom) == ["Alarms", "Training", "Held-out tasks, test", "Settings", "Machine"]
    assert dom.count("<table>") == 4
    assert rows(dom) == rows(page.read_text(encoding="utf-8"))
    assert dom.count("<svg") == 6
    assert "<b>0.500 ± 0.125</b>" in dom


@pytest.mark.parametrize(("width", "columns"), [(PHONE, 1), (1280, 2)])
def test_nothing_overflows_and_pictures_have_their_room(page: Path, tmp_path: Path, width: int, columns: int) -> None:
    found = measured(page, tmp_path, width)
    assert found["measured"] == f"{width} {width} 0"
    sizes = [tuple(map(float, each.split("x"))) for each in found["pictures"].split()]
    assert len(sizes) == 6
    room = min(width, 1120) / columns
    assert all(0.8 * room < wide < room and 0.5 < high / wide < 0.65 for wide, high in sizes)


def test_a_dark_screen_has_a_dark_page(page: Path, tmp_path: Path) -> None:
    light = measured(page, tmp_path, 1280)["colors"]
    dark = measured(page, tmp_path, 1280, "--force-dark-mode")["colors"]
    for colors, text_is_lighter in ((light, False), (dark, True)):
        numbers = list(map(int, re.findall(r"\d+", colors)))
        assert (sum(numbers[:3]) > sum(numbers[3:6])) is text_is_lighter


def test_a_picture_of_the_page_can_be_taken(page: Path, tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    browse(page, tmp_path, "--window-size=1280,2400", f"--screenshot={picture}")
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    from PIL import Image

    with Image.open(picture) as image:
        colors = image.convert("RGB").getcolors(1 << 24)
    assert image.size == (1280, 2400)
    drawn = {color for _, color in colors}
    assert {(0, 114, 178), (196, 66, 11), (246, 247, 249)} <= drawn  # curves, marks, paper
