"""Video-MME without subtitles: questions about videos from eleven seconds to an hour."""

from __future__ import annotations

import re

from taid_vlm.benchmarks.choices import choice_rules, letter_of, listed
from taid_vlm.benchmarks.metrics.letters import lmms_option
from taid_vlm.benchmarks.question import Benchmark, Question
from taid_vlm.benchmarks.rows import Row

ASK = ("Select the best answer to the following multiple-choice question based on the video. "
       "Respond with only the letter (A, B, C, or D) of the correct option.")
FILES = ("{}.mp4", "{}.MP4", "{}.mkv")  # in the folder data/ beside the table
_LETTER = re.compile(r"^[A-D]\.\s*")


def read(row: Row) -> list[Question]:
    """One question; questions about one video share a group.

    VLMEvalKit's table calls the options `candidates` and the video's name `video`; its file is in
    `video_path`.
    """
    options = tuple(_LETTER.sub("", option) for option in row.texts(
        row.first("options", "candidates")))
    text = f"{ASK}\n{row.text('question')}\n{listed(options)}\nThe best answer is:"
    name = row.text(row.first("videoID", "video"))
    places = [row["video_path"]] if "video_path" in row else []
    places += [row["video"]] if "video" in row and not places else []
    video = row.video(*places) if places else row.video(
        *(f"data/{file.format(name)}" for file in FILES))
    return [Question(
        row.id("question_id", "index"), (None, text), (video,), (letter_of(row, options),), options,
        row.tags("duration", "domain", "sub_category", "task_type"), group=name)]


BENCHMARK = Benchmark(
    "videomme", "Video-MME", read,
    choice_rules(lmms=(lmms_option, "_task_utils/mcq_extract.py")),
    max_new_tokens=16, likelihood=True)
