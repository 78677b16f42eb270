"What stands beside the code: workflows, citation, metadata."

import re
from pathlib import Path

import pytest

import fasterai_kd

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_by_commit_and_name_their_version(path):
    for action in re.findall(r"uses: (?!\./)(.*)", path.read_text(encoding="utf-8")):
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v[\d.]+", action)


def test_what_publishes_does_nothing_else():
    publish = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8").partition("  publish:")[2]
    assert "run:" not in publish
    assert re.findall(r"uses: ([\w/-]+)@", publish) == ["actions/download-artifact", "pypa/gh-action-pypi-publish"]


def test_the_citation_is_of_this_version():
    citation = (ROOT / ".github" / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {fasterai_kd.__version__}\n" in citation
    assert re.search(r"\ndate-released: \d{4}-\d\d-\d\d\n", citation)


def test_no_address_of_a_repository_is_made_up():
    assert "\n[project.urls]" not in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
