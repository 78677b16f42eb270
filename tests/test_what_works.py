"The table of what works is that of the tests."

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def test_the_table_of_what_works_is_made_from_these_tests():
    made = subprocess.run([sys.executable, TESTS / "what_works.py"], capture_output=True, text=True, check=True).stdout
    assert made == (TESTS.parent / "nbs" / "what_works.md").read_text(), (
        "run python tests/what_works.py > nbs/what_works.md"
    )
