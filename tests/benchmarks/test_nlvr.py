"""NLVR and NLVR2 as their authors' own files have them (lil-lab/nlvr): JSON lines, pictures apart.
"""

import json

import pytest
from benchmarks.test_rows import png

from taid_vlm.benchmarks.reading import read_questions
from taid_vlm.benchmarks.tasks import nlvr
from taid_vlm.config.data import DataSource
from taid_vlm.errors import RecordError

DRAWN = {"sentence": "There is a box with 2 blue items.", "identifier": "72-0", "directory": "5",
         "label": "true", "structured_rep": [[], [], []], "evals": {"r0": "true"}}
SEEN = {"sentence": "Both show dogs.", "identifier": "dev-850-0-1", "label": "False",
        "left_url": "https://x/1.jpg", "right_url": "https://x/2.jpg", "writer": 144,
        "validation": {"144": "False"}, "synset": "dog", "query": "dogs12"}


def questions(folder, row, files=(), name="dev.json"):
    for number, file in enumerate(files):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(png(number))
    (folder / name).write_text(json.dumps(row) + "\n" + json.dumps(row | {
        "identifier": row["identifier"].replace("-0", "-1", 1)}) + "\n")
    return read_questions(nlvr.BENCHMARK, DataSource(str(folder / name)))


def six(split, name):
    return [f"images/5/{split}-{name}-{order}.png" for order in range(6)]


def test_six_pictures_are_six_questions(tmp_path):
    found = questions(tmp_path, DRAWN, [*six("dev", "72-0"), *six("dev", "72-1")])
    assert [q.id for q in found[:6]] == [f"72-0-{order}" for order in range(6)]
    assert len(found) == 12 and {q.group for q in found} == {"72"}
    assert [q.images[0].stored().name for q in found[6:8]] == ["dev-72-1-0.png", "dev-72-1-1.png"]
    assert found[0].answers == ("yes",)
    assert found[0].prompt == (None, f"{DRAWN['sentence']}\nIs this statement true of the image? "
                                     "Please answer yes or no.")


@pytest.mark.parametrize("folder", ["", "images/", "images/dev/", "dev/"])
def test_two_photographs_are_one_question(tmp_path, folder):
    found = questions(tmp_path, SEEN, [f"{folder}dev-850-{pair}-img{side}.png"
                                       for pair in (0, 1) for side in (0, 1)])
    assert [q.id for q in found] == ["dev-850-0-1", "dev-850-1-1"]
    assert [image.stored().name for image in found[0].images] == [
        "dev-850-0-img0.png", "dev-850-0-img1.png"]
    assert found[0].prompt == (None, None, "Both show dogs.\nIs this statement true of the two "
                                           "images? Please answer yes or no.")
    assert (found[0].answers, found[0].group) == (("no",), "dev-850-0")


def test_a_picture_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RecordError, match=r"dev.json:1: there is no picture 'dev-72-0-0.png'"):
        questions(tmp_path, DRAWN)
    with pytest.raises(RecordError, match=r"no picture 'dev-850-0-img1.png'"):
        questions(tmp_path, SEEN, ["images/dev-850-0-img0.png"])
