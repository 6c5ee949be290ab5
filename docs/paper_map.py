"""Put the line numbers in docs/paper_map.md right; the tests fail where they are not.

python docs/paper_map.py
"""

import re
from pathlib import Path

PAGE = Path(__file__).with_suffix(".md")


def with_line_numbers(page: str) -> str:
    """`page` with the number of the first line that holds the text of each [`text`](../file#L1).

    Raises:
        ValueError: the text is on no line of the file.
    """

    def replace(match: re.Match) -> str:
        text, file = match[1], match[2]
        lines = (PAGE.parent / file).read_text().splitlines()
        numbers = [i for i, line in enumerate(lines, start=1) if text in line]
        if not numbers:
            raise ValueError(f"{file}: no line has {text!r}")
        return f"[`{text}`]({file}#L{numbers[0]})"

    return re.sub(r"\[`([^`]+)`\]\((\.\./[\w.]+)#L\d+\)", replace, page)


if __name__ == "__main__":
    PAGE.write_text(with_line_numbers(PAGE.read_text()))
