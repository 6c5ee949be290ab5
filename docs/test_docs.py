"""Tests of what the documents say of the code."""

import re
from pathlib import Path

from docs.paper_map import PAGE, with_line_numbers

README = Path(__file__).parents[1] / "README.md"


def test_line_numbers_of_the_paper_map_are_right():
    page = PAGE.read_text()
    assert page.count("#L") > 30
    assert page == with_line_numbers(page), "run python docs/paper_map.py"


def test_readme_snippets_work():
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    for snippet in snippets:
        variables = {}
        exec(snippet, variables)
        assert variables["actions"].abs().max() <= 1
    assert snippets
