"""The docs as a site: built strictly, whole, and looked at in a real browser."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from functools import partial
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
from pages import ROOT, public_names
from test_browser import BROWSER, OPTIONS

pytestmark = pytest.mark.skipif(
    not all(map(find_spec, ("mkdocs", "material", "mkdocstrings"))),
    reason="needs mkdocs, mkdocs-material and mkdocstrings: the extra docs",
)
in_a_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")


class Read(HTMLParser):
    """What a page has: the places that links may lead to, links, what it loads, and its texts."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loaded, self.paragraphs = set(), [], [], []
        self.within = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in ("script", "img", "iframe", "source") and given.get("src"):
            self.loaded.append(given["src"])
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preconnect", "preload"):
            self.loaded.append(given["href"])
        if tag in ("p", "td", "li"):
            self.paragraphs.append("")
        self.within.append(tag)

    def handle_endtag(self, tag):
        while self.within and self.within.pop() != tag:
            pass

    def handle_data(self, data):
        if self.paragraphs and not {"code", "pre", "script", "style"} & set(self.within):
            self.paragraphs[-1] += data


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    if built.returncode:
        raise AssertionError(f"the site is not built:\n{built.stderr}")
    return folder


@pytest.fixture(scope="module")
def read(site):
    """Each page of the site by its path."""
    return {path.relative_to(site).as_posix(): Read(path) for path in site.rglob("*.html")}


def test_every_page_of_the_docs_is_there_and_leads_home(read):
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert pages <= {Path(page).stem for page in read}
    from_home = {urldefrag(link)[0] for link in read["index.html"].links}
    for page, found in read.items():
        up = "/" if page == "404.html" else "../" * page.count("/")
        assert page == "404.html" or page in from_home or page == "index.html"
        assert f"{up}index.html" in found.links or f"{up}." in found.links or page == "404.html"


def test_every_link_leads_somewhere(site, read):
    dead = []
    for page, found in read.items():
        for link in found.links:
            target, anchor = urldefrag(unquote(link))
            if re.match(r"\w+:", target) or page == "404.html":
                continue
            path = ((site / page).parent / target).resolve() if target else site / page
            path = path / "index.html" if path.is_dir() else path
            name = path.relative_to(site).as_posix() if path.is_relative_to(site) else ""
            places = read[name].ids if name in read else {anchor}
            if not path.is_file() or not name or (anchor and anchor not in places):
                dead.append((page, link))
    assert dead == []


def test_nothing_is_loaded_from_elsewhere(site, read):
    for page, found in read.items():
        for source in found.loaded:
            assert not re.match(r"(\w+:)?//", source), (page, source)
            if page != "404.html":
                assert ((site / page).parent / urldefrag(source)[0]).resolve().is_file()
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", style.read_text(encoding="utf-8"))


def test_every_public_name_has_its_place_in_the_reference(read):
    places = {place for page, found in read.items() if "reference/" in page for place in found.ids}
    names = {f"pytest_attnheat.{name}" for names in public_names().values() for name in names}
    assert names <= places


def test_no_mark_of_markdown_is_left_in_a_text(read):
    left = re.compile(r"```|\]\(|\]\[|^\s*\|.*\||^\s*- |:::|<!--")
    found = [
        (page, text)
        for page, one in read.items()
        for text in one.paragraphs
        if left.search(text) and page != "404.html"
    ]
    assert found == []


# Opens each page in a frame of the width of a desk and of a phone, and says what looks wrong there;
# then searches. The picture at its end arrives when all is said, and then the page has loaded.
LOOK = """
<body><script>
const pages = PAGES, wrong = [];
const frame = document.body.appendChild(document.createElement("iframe"));
const opened = page => new Promise(done => { frame.onload = done; frame.src = page; });
// Code at the end of a line may reach a few pixels into the margin.
const wide = one => one.clientWidth && one.scrollWidth > one.clientWidth + 8;
async function look(width) {
  frame.style = `width: ${width}px; height: 900px; border: 0`;
  for (const page of pages) {
    await opened(page);
    const inside = frame.contentDocument, say = what => wrong.push([page, width, what]);
    const way = ["[for=__drawer]", ".md-tabs"].map(each => inside.querySelector(each));
    if (inside.documentElement.scrollWidth > width) say("wider than the screen");
    for (const one of inside.querySelectorAll("article :is(p, li, h1, h2, h3, h4)"))
      if (wide(one) && !one.closest("table, pre")) say(one.textContent.slice(0, 60));
    if (!way.some(each => each?.checkVisibility())) say("no way back");
  }
}
async function search(word) {
  await opened(`index.html?q=${word}`);
  for (let tries = 0; tries < 100; tries++) {
    const found = frame.contentDocument.querySelectorAll(".md-search-result__link");
    if (found.length) return [...found].map(link => link.href);
    await new Promise(done => setTimeout(done, 200));
  }
  return [];
}
(async () => {
  await look(1280);
  await look(390);
  const body = JSON.stringify({ wrong, found: await search("leakage") });
  await fetch("said", { method: "POST", body });
})();
</script><img src="end.png"></body>
"""


@pytest.fixture(scope="module")
def looked(site, read, tmp_path_factory):
    """What a browser says of the pages, the texts of its console, and what it found missing."""
    pages = sorted(page for page in read if page != "404.html")
    (site / "look.html").write_text(LOOK.replace("PAGES", json.dumps(pages)), encoding="utf-8")
    said, ended, missing = {}, threading.Event(), []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/end.png":
                ended.wait(200)
                self.send_response(204)
                self.end_headers()
            else:
                super().do_GET()

        def do_POST(self):
            said.update(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()
            ended.set()

        def send_error(self, code, *args, **kwargs):
            missing.append((int(code), self.path))
            super().send_error(code, *args, **kwargs)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Handler, directory=str(site))
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/look.html"
        _, console = opened(address, tmp_path_factory.mktemp("browser"), "--timeout=200000")
        server.shutdown()
    return said | {"console": console, "missing": missing}


def opened(address, tmp_path, *options):
    """Open an address; return the page as it is then, and what the console said."""
    command = [
        BROWSER, *OPTIONS, f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", *options, "--dump-dom", address,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return done.stdout, re.findall(r".*CONSOLE.*", done.stderr)


@in_a_browser
def test_every_page_fits_a_desk_and_a_phone_and_has_a_way_back(looked):
    assert looked["wrong"] == [], looked["wrong"]


@in_a_browser
def test_no_page_makes_the_browser_complain_or_ask_for_what_is_not_there(looked):
    assert looked["console"] == []
    assert [path for path in looked["missing"] if path != (404, "/favicon.ico")] == []


@in_a_browser
def test_the_search_finds_parts_of_names_and_texts(looked):
    assert {"behaviour.html", "assertions-on-code.html"} <= set(
        re.findall(r"[\w-]+\.html", " ".join(looked["found"]))
    )


@in_a_browser
def test_the_search_works_where_pages_are_opened_as_files(site, tmp_path):
    address = f"{(site / 'index.html').as_uri()}?q=leakage"
    page, console = opened(address, tmp_path, "--virtual-time-budget=20000")
    assert "behaviour.html" in page.partition("md-search-result__list")[2]
    assert console == []
