"""The README as a package index shows it: what leads to a file of the repository is an address.

All else, the address of the repository too, stands in `pyproject.toml`.
"""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def readme() -> str:
    """Return the README with addresses in place of the paths of pages and pictures."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (address,) = re.findall(r'^Source = "(.+)"$', project, re.M)
    package = (ROOT / "pytest_attnheat" / "__init__.py").read_text(encoding="utf-8")
    (version,) = re.findall(r'^__version__ = "(.+)"$', package, re.M)

    def absolute(found: re.Match[str]) -> str:
        kind = "raw" if found[1] else "blob"
        return f"{found[1]}[{found[2]}]({address}/{kind}/v{version}/{found[3]})"

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.sub(r"(!?)\[([^\[\]]*)\]\((?!https?:|#)([^()\s]+)\)", absolute, text)


setup(long_description=readme(), long_description_content_type="text/markdown")
