"""Nothing here may reach the hub, or leave anything in the user's cache of data sets."""

import io

import datasets
import huggingface_hub.constants
import pytest
from PIL import Image

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


@pytest.fixture(scope="session")
def datasets_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("datasets-cache")


@pytest.fixture(autouse=True)
def offline(monkeypatch, datasets_cache):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(datasets_cache))
    # both libraries read their environment when they are imported, which has happened above
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", datasets_cache)


@pytest.fixture
def paint():
    """A small image of one colour, so that a test can tell images apart."""
    return lambda colour: Image.new("RGB", (8, 6), COLOURS[colour])


@pytest.fixture
def png(paint):
    """The same, encoded."""

    def encode(colour):
        buffer = io.BytesIO()
        paint(colour).save(buffer, "PNG")
        return buffer.getvalue()

    return encode


@pytest.fixture
def seen():
    """The colours of a record's images, in order; every image must load."""
    names = {rgb: name for name, rgb in COLOURS.items()}
    return lambda record: [names[image.load().getpixel((0, 0))] for image in record.images]


@pytest.fixture
def folder(tmp_path, png):
    """A folder with one picture of each colour."""
    (tmp_path / "pictures").mkdir()
    for colour in COLOURS:
        (tmp_path / "pictures" / f"{colour}.png").write_bytes(png(colour))
    return tmp_path
