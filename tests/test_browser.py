"""The HTML reports show the pictures of a failure in a real browser."""

import re
import shutil
import subprocess

import pytest
from pages import ROOT
from PIL import Image

from pytest_attnheat import read_heatmaps

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic",
    "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync",
)  # fmt: skip
PICTURE = """
    import numpy as np, pytest
    from pytest_attnheat import show_heatmaps

    @pytest.mark.heatmap_compare
    def test_picture():
        return show_heatmaps(np.eye(5), "Keys", "Queries")
"""
# Appended to a report: writes the natural sizes of its images where --dump-dom shows them.
PROBE = """
<script>
window.addEventListener("load", () => setTimeout(() => {
  const images = [...document.images];
  const sizes = images.map(i => i.naturalWidth + "x" + i.naturalHeight);
  const visible = sizes.filter((_, number) => images[number].checkVisibility());
  document.body.setAttribute("data-sizes", sizes.join(" "));
  document.body.setAttribute("data-visible", visible.join(" "));
}, 1000));
document.querySelectorAll("img").forEach(image => { image.loading = "eager"; });
</script>
"""

pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")


@pytest.fixture
def failing(pytester):
    """A project whose one picture differs from its baseline."""
    path = pytester.makepyfile(test_a=PICTURE)
    pytester.runpytest("--attn-update=missing")
    path.write_text(path.read_text().replace("np.eye(5)", "np.eye(5) / 2"))


def sizes_in(report, tmp_path, which):
    """Open a report, and return the sizes of its images: all that load, or the visible ones."""
    report.write_text(report.read_text() + PROBE)
    command = [
        BROWSER, *OPTIONS, f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000",
        "--allow-file-access-from-files", "--dump-dom", report.as_uri(),
    ]  # fmt: skip
    page = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    return re.search(rf'data-{which}="([^"]*)"', page)[1].split()


def test_pytest_html_shows_expected_actual_and_difference(failing, pytester, tmp_path):
    pytest.importorskip("pytest_html")
    pytester.runpytest("--html=report.html", "--self-contained-html").assert_outcomes(failed=1)
    # All three stand side by side in one picture, the first that the report shows.
    triptych = pytester.path / "attn-artifacts" / "test_a.test_picture" / "difference.png"
    assert read_heatmaps(triptych).labels["titles"] == ["expected", "actual", "difference"]
    with Image.open(triptych) as image:
        size = f"{image.width}x{image.height}"
    assert size in sizes_in(pytester.path / "report.html", tmp_path, "visible")


def test_pytest_mpls_summary_has_expected_actual_and_difference(failing, pytester, tmp_path):
    options = ["--mpl", "--mpl-generate-summary=html", "--mpl-results-path=results"]
    pytester.runpytest(*options).assert_outcomes(failed=1)
    report = pytester.path / "results" / "fig_comparison.html"
    assert sizes_in(report, tmp_path, "sizes").count("250x250") >= 3


def test_the_report_of_the_demo_shows_pictures_that_are_equal_without_a_network(
    failing, pytester, tmp_path
):
    recipe = re.search(
        r"^demo:.*?\n\n", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M | re.S
    )
    (kind,) = re.findall(r"--mpl-generate-summary=(\S+)", recipe[0])
    (name,) = re.findall(r"(\w+\.html)", recipe[0])
    pytester.runpytest("--attn-update=all").assert_outcomes(passed=1)
    options = ["--mpl", f"--mpl-generate-summary={kind}", "--mpl-results-path=results"]
    pytester.runpytest(*options).assert_outcomes(passed=1)
    report = pytester.path / "results" / name
    assert not re.search(r"https?://", report.read_text())
    assert sizes_in(report, tmp_path, "visible") == ["250x250"] * 2
