"The table of what works is that of the tests."

import pytest
from what_works import TESTS, table


def test_the_table_of_what_works_is_made_from_these_tests(request):
    items = request.session.collected  # slow ones too
    if {item.path for item in items} | {TESTS / "test_peer.py"} != set(TESTS.glob("test_*.py")):
        pytest.skip("needs all tests to be collected")
    made = (TESTS.parent / "nbs" / "what_works.md").read_text()
    assert table(items) == made, "run python tests/what_works.py > nbs/what_works.md"
