"""Texts of many kinds, and how much of them is aligned between two tokenizers."""

from __future__ import annotations

from taid_vlm.adapters import ModelAdapter
from taid_vlm.alignment import Pairing
from taid_vlm.batch.collator import DistillationCollator

TEXTS = {
    "english": "The quick brown fox doesn't jump over 12 lazy dogs; it's asleep, isn't it? YES!",
    "prose": "“I wouldn’t,” said she — half-asleep —\n\n“have come … had I known.”  He laughed.",
    "japanese": "吾輩は猫である。名前はまだ無い。どこで生れたか、見当がつかぬ。カタカナ、ｶﾅ。",
    "chinese": "图片里有3只红色的猫，和两个蓝色的圆。請描述這張圖片：左邊是紅色、右邊是藍色。",
    "arabic": "السَّلامُ عليكم! كيف حالك؟ عندي ٣ كتب و 12 قلمًا، والثمن ٤٥٫٥ ريالًا.",
    "code": "def f(xs):\n    for i, x in enumerate(xs):\n        if x  and not i % 2:\n"
            "            yield  x[i:], {\"a\": 1}\n\n\n\tprint('tab')\t\t# end\n    return None",
    "emoji": "Great 👍🏽👍🏽! 👩‍🚀🚀 👨‍👩‍👧‍👦 ❤️ 🇯🇵🇫🇷 :-) 😂😂😂",
    "digits": "0 12 345 6789 1234567890 3.14159 1,000,000 2024-11-29 10:59:07 +49-30-1234 1e-10",
    "table": "| name   |  price |\n|:-------|-------:|\n| apple  |   1.20 |\n| pear\t|  10.00 |",
    "mathematics": "$$\\int_0^\\infty e^{-x^2}\\,dx = \\frac{\\sqrt{\\pi}}{2}$$, ∀ε>0 ∃δ: "
                   "|x−a|<δ ⇒ x² ≤ √ε·10⁻³",
    "white space": "a  b   c    d\n\n\n\ne \n  \n f\t\tg        h",
    "european": "Straße, Übergrößen; déjà-vu, naïve façade, señor ñandú; Привет, Ελλάδα, Łódź",
    "korean, hindi, thai": "안녕하세요, 그림이 두 개 있어요. नमस्ते दुनिया। สวัสดีชาวโลก",
    "names of tokens": "<html><b>x</b></html> <|im_sta [INST <0x41> ## Ġthe <think> </s",
}


def counted(
    teacher: ModelAdapter, student: ModelAdapter, pairing: Pairing, text: str
) -> tuple[int, int, int]:
    """Tokens of the student to be learned, those of them that are aligned, and those in chunks."""
    rows = [{"prompt": "Write something, please:\n", "completion": text}]
    counts = DistillationCollator(student, teacher, pairing)(rows)["counts"]
    assert counts["dropped"] == {}, counts["dropped"]
    return counts["supervised_tokens"], counts["aligned_tokens"], counts["chunk_tokens"]
