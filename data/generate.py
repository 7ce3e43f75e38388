"""Regenerates the demo's data sets (seconds) and, with `--models`, its trained models.

The models take about an hour of one CPU core. Run as `python data/generate.py`; `--only-models` is
what `taid-vlm demo --train-teacher` does.
"""

import argparse
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from worlds import scenes, words
from worlds.scenes import Scene, Turn

DATA = Path(__file__).resolve().parent
SPLITS = {"train": (4000, 11), "eval": (600, 12)}  # rows and seed

PART = pa.struct({"type": pa.string(), "text": pa.string()})
MESSAGE = pa.struct({"role": pa.string(), "content": pa.list_(PART)})
SCHEMA = pa.schema(
    {
        "messages": pa.list_(MESSAGE),
        "images": pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()})),
        "categories": pa.list_(pa.string()),
        "caption_log_probability": pa.float64(),
    }
)


def scenes_rows(n: int, seed: int) -> Iterator[dict]:
    """`n` conversations about drawn scenes."""
    rng = random.Random(seed)
    for _ in range(n):
        image, scene = scenes.draw(rng)
        turns = scenes.turns(scene, rng)
        png = io.BytesIO()
        image.save(png, "PNG", optimize=True)
        images = [{"bytes": png.getvalue(), "path": None}]
        yield {"messages": scenes.messages(turns), "images": images} | _facts(scene, turns)


def words_rows(n: int, seed: int) -> Iterator[dict]:
    """`n` conversations about scenes told in words."""
    rng = random.Random(seed)
    for _ in range(n):
        telling, scene = words.tell(rng)
        turns = words.turns(telling, scene, rng)
        yield {"messages": words.messages(turns)} | _facts(scene, turns)


def _facts(scene: Scene, turns: list[Turn]) -> dict:
    """What is known about the turns: their categories, and log p of the caption in nats."""
    said = next(turn.answer for turn in turns if turn.category == "caption")
    return {
        "categories": [turn.category for turn in turns],
        "caption_log_probability": scenes.caption_log_probability(scene, said),
    }


def write(folder: Path) -> None:
    """Write every split of both data sets under `folder`."""
    for world in ("scenes", "words"):
        (folder / world).mkdir(parents=True, exist_ok=True)
    for split, (n, seed) in SPLITS.items():
        table = pa.Table.from_pylist(list(scenes_rows(n, seed)), SCHEMA)
        pq.write_table(table, folder / "scenes" / f"{split}.parquet", compression="zstd")
        lines = [json.dumps(row) + "\n" for row in words_rows(n, seed)]
        (folder / "words" / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", action="store_true", help="train the models, too")
    parser.add_argument("--only-models", action="store_true", help="train them and nothing else")
    parser.add_argument("--output-dir", type=Path, default=DATA, help="default: this folder")
    args = parser.parse_args(arguments)
    if not args.only_models:
        write(args.output_dir)
    if args.models or args.only_models:
        from worlds.pretrain import train_all  # slow to import, and needed only here

        train_all(args.output_dir / "models")


if __name__ == "__main__":
    main()
