"""What the pages share: each is one HTML file that needs no other file and no network."""

from pathlib import Path

from jinja2 import Environment, PackageLoader, select_autoescape

from nacre.applications.files import replacing


def templates() -> Environment:
    """The pages' templates, which escape every value."""
    return Environment(
        loader=PackageLoader("nacre.tools"), autoescape=select_autoescape(), trim_blocks=True, lstrip_blocks=True
    )


def write(path: Path, text: str) -> None:
    """Writes a file under a temporary name, then renames it, so that no half-written one is ever seen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
