"""report.html in a real browser: what it shows is what the runs measured."""
import html as entities
import json
import re
import shutil
import statistics
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from support import EXAMPLE, engine

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if BROWSER is None:
    pytest.skip("no Chromium is installed", allow_module_level=True)

# What a user's mouse would do, and what the page then says, left in the document to be read.
GESTURES = """
<script>
{
const figure = document.querySelector('figure[data-metric="sae.fvu"]');
const svg = figure.querySelector("svg"), box = svg.getBoundingClientRect();
const at = (kind, share) => svg.dispatchEvent(new PointerEvent(kind, { clientX: box.left + share * box.width, clientY: box.top + 20 }));
const ticks = () => [...svg.querySelectorAll('text[text-anchor="middle"]')].map(t => t.textContent);
const found = { points: svg.querySelector("path.curve").getAttribute("d").split(/[ML]/).length - 1 };
at("pointermove", 1);
found.hover = figure.querySelector(".readout").textContent;
at("pointerdown", 0.6); at("pointermove", 0.9); at("pointerup", 0.9);
found.zoomed = ticks();
svg.dispatchEvent(new MouseEvent("dblclick"));
found.whole = ticks();
document.getElementById("axis").value = "tokens";
document.getElementById("axis").dispatchEvent(new Event("change"));
found.tokens = ticks();
const out = document.createElement("pre");
out.id = "found";
out.textContent = JSON.stringify(found);
document.body.append(out);
}
</script>
"""

# The page in a frame as wide as a phone.
PHONE = """<iframe style="width:360px;height:2000px" srcdoc="PAGE"></iframe>
<script>onload = () => { const page = document.querySelector("iframe").contentDocument.documentElement;
document.body.dataset.width = page.scrollWidth; };</script>"""


def browse(*arguments) -> str:
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.fixture(scope="module")
def report(example_run, tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("report")
    run = folder / "run"
    shutil.copytree(example_run, run)
    engine(
        "features", "--model", EXAMPLE / "source", "--sae", run / "sae", "--data", EXAMPLE / "eval.jsonl",
        "--template", EXAMPLE / "template.jinja", "--limit", 10, "--out", run / "features",
    )
    graded = [{"problem": f"p{i}", "answer": "1", "completion": "</script>", "extracted": "1", "correct": i < 3} for i in range(4)]
    (run / "eval.jsonl").write_text("\n".join(map(json.dumps, graded)) + "\n")
    page = folder / "report.html"
    engine("report", run, example_run, "--out", page)
    return page, run


def dom(page: Path) -> str:
    return browse("--dump-dom", page.as_uri())


def test_tables_show_what_was_measured(report):
    page, run = report
    shown = dom(page)
    assert 'data-ready="true"' in shown
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    fvu = [s["fvu"] for s in steps if "fvu" in s]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", shown)]
    row = next(row for row in rows if len(row) == 7 and row[2].startswith("FVU"))
    assert int(row[3]) == len(fvu)
    tenth = min(10, len(fvu))
    want = [statistics.mean(fvu[:tenth]), statistics.mean(fvu[-tenth:]), sorted(fvu)[len(fvu) // 2]]
    for got, value in zip(row[4:], want):
        assert float(got) == pytest.approx(value, rel=1e-3)
    assert any(row[1:5] == ["eval.jsonl", "4", "4", "75.0 %"] for row in rows)
    features = json.loads((run / "features" / "features.json").read_text())
    hookpoint = features["hookpoints"][0]
    assert any(row[:2] == [str(hookpoint["layer"]), str(hookpoint["reasoning_features"])] for row in rows)


def test_curves_answer_to_the_mouse(report, tmp_path):
    page, run = report
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    fvu = [s["fvu"] for s in steps if "fvu" in s]
    copy = tmp_path / "gestures.html"
    copy.write_text(page.read_text().replace("</body>", GESTURES + "</body>"))
    found = json.loads(entities.unescape(re.search(r'<pre id="found">(.*?)</pre>', dom(copy)).group(1)))
    assert found["points"] == len(fvu)
    value, step = re.search(r": ([\d.e+-]+) at (\d+)", found["hover"]).groups()
    assert int(step) == len(fvu) and float(value) == pytest.approx(fvu[-1], rel=1e-3)
    numbers = {name: [float(t) for t in found[name]] for name in ("zoomed", "whole", "tokens")}
    assert min(numbers["zoomed"]) > min(numbers["whole"]) and max(numbers["zoomed"]) < len(fvu)
    assert max(numbers["tokens"]) > 100 * max(numbers["whole"])


def test_the_page_needs_no_network(report):
    text = report[0].read_text()
    assert not re.findall(r'(?:src|href)\s*=|@import|url\(|fetch\(|XMLHttpRequest', text)


def test_light_dark_and_a_phone_are_served(report, tmp_path):
    page = report[0]
    corners = []
    for scheme in (1, 0):
        picture = tmp_path / f"{scheme}.png"
        browse(f"--blink-settings=preferredColorScheme={scheme}", "--window-size=900,1600", f"--screenshot={picture}", page.as_uri())
        image = Image.open(picture).convert("RGB")
        corners.append(sum(image.getpixel((2, 2))))
        assert len(image.resize((90, 160)).getcolors(maxcolors=90 * 160)) > 20, "an empty page"
    assert corners[0] > 700 and corners[1] < 120
    frame = tmp_path / "phone.html"
    frame.write_text(PHONE.replace("PAGE", entities.escape(page.read_text(), quote=True)))
    width = int(re.search(r'data-width="(\d+)"', dom(frame)).group(1))
    assert width <= 360
