"""Pictures in the form that lies inside the page: SVG elements and data URIs."""

from __future__ import annotations

import base64
import io
import xml.etree.ElementTree as ElementTree
from typing import Any

import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from numpy.typing import NDArray

from normdrop.report.plots import BLUE, GRID, INK, MUTED, ORANGE, style

__all__ = ["histogram", "picture_uri", "to_svg"]

Array = NDArray[Any]

_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", BLUE: "blue", ORANGE: "orange"}


def to_svg(figure: Figure, name: str, alt: str) -> str:
    """Give a figure as an SVG element for a page: no fonts, no addresses, colours as variables.

    Args:
        figure: one that :func:`figures` drew.
        name: a prefix for the identifiers inside, so that several figures fit on one page.
        alt: what a reader who cannot see the figure is told.
    """
    with style():
        buffer = io.BytesIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    used = {
        value[1:] if key.endswith("href") else value[5:-1]
        for element in root.iter()
        for key, value in element.attrib.items()
        if value.startswith(("#", "url(#"))
    }
    _simplify(root, name, used)
    width, height = figure.get_size_inches() * 72
    root.attrib = {
        "viewBox": f"0 0 {width:g} {height:g}",
        "role": "img",
        "aria-label": alt,
    }
    return ElementTree.tostring(root, encoding="unicode")


def _simplify(element: ElementTree.Element, name: str, used: set[str]) -> None:
    """Drop what the page does not need, and make the identifiers used unique to this figure."""
    element.tag = element.tag.rpartition("}")[2]
    for child in list(element):
        if child.tag.rpartition("}")[2] in {"metadata", "style"}:
            element.remove(child)
        else:
            _simplify(child, name, used)
    element.text = (element.text or "").strip() or None
    element.tail = None
    attributes: dict[str, str] = {}
    for key, value in element.attrib.items():
        key = key.rpartition("}")[2]
        if key == "id":
            if value not in used:
                continue
            value = f"{name}-{value}"
        elif key == "href" and value.startswith("#"):
            value = f"#{name}-{value[1:]}"
        elif key == "clip-path":
            value = value.replace("url(#", f"url(#{name}-")
        elif key == "style":
            value = _page_style(value)
        elif key == "d":
            value = " ".join(value.split())
        elif key == "transform" and value.startswith("rotate(-0 "):
            continue
        if key == "href":
            value = "".join(value.split())
        attributes[key] = value
    element.attrib = attributes


def _page_style(style: str) -> str:
    kept = [part.strip() for part in style.split(";") if part.strip()]
    kept = [part for part in kept if not part.startswith(("font-family", "stroke-linejoin"))]
    text = ";".join(kept)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    return text


def histogram(values: Array | None) -> str:
    """The outline of a histogram as the path of a 96 by 24 SVG; empty below two finite values."""
    if values is None:
        return ""
    finite = values[np.isfinite(values)].astype(np.float64)
    if len(finite) < 2:
        return ""
    low, high = float(finite.min()), float(finite.max())
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-30):
        low, high = low - 0.5, high + 0.5
    bins = int(np.clip(2 * np.sqrt(len(finite)), 4, 24))
    counts, _ = np.histogram(finite, bins=bins, range=(low, high))
    heights = 24 - 22 * counts / counts.max()
    step = 96 / bins
    path = "M0 24"
    for place, height in enumerate(heights):
        path += f"V{height:.3g}H{(place + 1) * step:.3g}"
    return path + "V24Z"


def picture_uri(picture: Array, most: int = 192) -> str:
    """An (H, W, C) uint8 picture as a data URI: PNG where small, else made smaller and JPEG."""
    from PIL import Image

    array = np.ascontiguousarray(picture)
    if array.ndim == 3 and array.shape[-1] in (1, 2):
        array = array[..., 0]
    image = Image.fromarray(array)
    small = max(image.size) <= 64
    if max(image.size) > most:
        image.thumbnail((most, most))
    buffer = io.BytesIO()
    if small or image.mode == "RGBA":
        image.save(buffer, format="PNG", optimize=True)
    else:
        image.save(buffer, format="JPEG", quality=85)
    kind = "png" if small or image.mode == "RGBA" else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
