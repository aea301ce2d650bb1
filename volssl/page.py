"""Templates -> one self-contained HTML page that opens offline and runs no script. The only door to Jinja2."""

from __future__ import annotations

import base64
import re
from typing import Any

import volssl

# A path of the user's machine that found its way into a recipe or a message: two or more folders, a drive, or a home.
PATH = re.compile(r"(?<![\w:/.])(?:~|[A-Za-z]:)?(?:[/\\]+[^\s/\\\"'<>:,;]+){2,}[/\\]?")


def render(template: str, **values: Any) -> str:
    """Fill `templates/<template>`.

    Its filters: `number` (digits, or a dash for None), `count` (12,345), `clean` (without paths), `p_value` (three digits, or "< 0.001").
    """
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("volssl"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": _number, "count": "{:,}".format, "clean": without_paths, "p_value": _p_value}
    return environment.get_template(template).render(version=volssl.__version__, **values)


def embedded(image: bytes, kind: str) -> str:
    """An image as a data address, or "" for none. Args: kind: such as png or svg+xml."""
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}" if image else ""


def without_paths(text: object) -> str:
    """`text` with every path of a machine replaced."""
    return PATH.sub("[path]", str(text))


def _number(value: float | None, digits: int = 3) -> str:
    # Adding 0.0 takes the sign of a number that rounds to zero.
    return "–" if value is None else f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def _p_value(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"
