"The table of what works is that of the tests."

import pytest
from what_works import TESTS, table


def test_the_table_of_what_works_is_made_from_these_tests(request):
    collected = {item.path for item in request.session.items}
    elsewhere = {TESTS / "test_peer.py", TESTS / "test_soak.py"}  # in CI's other steps
    if collected | elsewhere != set(TESTS.glob("test_*.py")) or request.config.option.keyword:
        pytest.skip("needs all tests to be collected")
    made = (TESTS.parent / "nbs" / "what_works.md").read_text()
    assert table(request.session.items) == made, "run python tests/what_works.py > nbs/what_works.md"
