"""Ask a served student, with a picture or without: the standard library alone.

    vllm serve runs/first/student --max-model-len 4096
    python scripts/ask_served.py "What is shown?" --image picture.png
"""

from __future__ import annotations

import argparse
import base64
import json
import mimetypes
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any


def content(question: str, images: list[Path]) -> list[dict[str, Any]]:
    """The pictures, then the question, as OpenAI's protocol has them."""
    urls = [f"data:{mimetypes.guess_type(image)[0] or 'image/png'};base64,"
            f"{base64.b64encode(image.read_bytes()).decode()}" for image in images]
    return [*({"type": "image_url", "image_url": {"url": url}} for url in urls),
            {"type": "text", "text": question}]


def call(url: str, body: dict[str, Any] | None = None, timeout: float = 120.0) -> Any:
    """JSON from a server; with a body it is posted."""
    request = urllib.request.Request(
        url, None if body is None else json.dumps(body).encode(),
        {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return json.load(answer)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("question")
    parser.add_argument("--image", type=Path, action="append", default=[], metavar="FILE")
    parser.add_argument("--url", default="http://localhost:8000/v1")
    parser.add_argument("--model", help="default: the first that the server serves")
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N")
    told = parser.parse_args()
    if missing := [str(image) for image in told.image if not image.is_file()]:
        parser.error(f"no such picture: {', '.join(missing)}")
    try:
        model = told.model or call(f"{told.url}/models")["data"][0]["id"]
        answer = call(f"{told.url}/chat/completions", {
            "model": model, "temperature": 0, "max_tokens": told.max_tokens,
            "messages": [{"role": "user", "content": content(told.question, told.image)}]})
    except urllib.error.HTTPError as error:
        print(f"error: {told.url}: {error.code}, {error.read().decode()[:400]}", file=sys.stderr)
        return 1
    except urllib.error.URLError as error:
        print(f"error: {told.url} cannot be asked: {error.reason}. Is it served there?",
              file=sys.stderr)
        return 1
    print(answer["choices"][0]["message"]["content"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
