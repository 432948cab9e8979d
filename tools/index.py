"""Write PEP 503 index pages for wheels that are kept elsewhere: one index per local version, so that pip finds +cu130.

    python tools/index.py RELEASES OUT --url URL

RELEASES holds a folder per release with its wheels; a wheel is then found at URL/<release>/<file>. OUT gets
``cpu/fastgru/index.html``, ``cu130/fastgru/index.html`` and so on, with the hash of every file, which pip checks, and
above each the page of its projects.
"""

from __future__ import annotations

import argparse
import hashlib
import html
from pathlib import Path
from urllib.parse import quote

from packaging.utils import parse_wheel_filename


def write_index(releases: Path, out: Path, url: str) -> None:
    """Write the pages for every wheel below ``releases``."""
    links: dict[tuple[str, str], list[str]] = {}
    for wheel in sorted(releases.glob("*/*.whl")):
        name, version, _, _ = parse_wheel_filename(wheel.name)
        address = f"{url}/{quote(wheel.parent.name)}/{quote(wheel.name)}"
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        link = f'<a href="{html.escape(address)}#sha256={digest}" data-requires-python="&gt;=3.10">{wheel.name}</a><br>'
        links.setdefault((version.local or "cpu", name), []).append(link)
    for (label, name), found in links.items():
        _write(out / label / name / "index.html", found)
        _write(out / label / "index.html", [f'<a href="{name}/">{name}</a>'])


def _write(page: Path, links: list[str]) -> None:
    page.parent.mkdir(parents=True, exist_ok=True)
    head = '<!doctype html>\n<html>\n<head><meta name="pypi:repository-version" content="1.0"></head>\n<body>\n'
    page.write_text(head + "\n".join(links) + "\n</body>\n</html>\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("releases", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--url", required=True, help="where the releases are kept")
    options = parser.parse_args()
    write_index(options.releases, options.out, options.url)


if __name__ == "__main__":
    main()
