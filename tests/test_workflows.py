"What CI runs is what was looked at: actions by commit, build tools by version, publishing with nothing beside it."

import re
from pathlib import Path

import pytest
import yaml

FOLDER = Path(__file__).parents[1] / ".github" / "workflows"
WORKFLOWS = {p.name: yaml.safe_load(p.read_text()) for p in sorted(FOLDER.glob("*.yml"))}


def steps(workflow):
    return [step for job in workflow["jobs"].values() for step in job.get("steps", [job])]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_actions_are_pinned_by_commit(name):
    used = [step["uses"] for step in steps(WORKFLOWS[name]) if "uses" in step]
    assert used
    assert [u for u in used if not u.startswith("./") and not re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", u)] == []


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_token_may_read_and_no_more_unless_a_job_says_so(name):
    assert WORKFLOWS[name]["permissions"] == {"contents": "read"}


def test_tools_that_build_the_release_are_pinned():
    runs = "\n".join(step.get("run", "") for step in steps(WORKFLOWS["release.yml"]))
    (tools,) = re.findall(r"pip install (.*build.*)", runs)
    assert {t.split("==")[0] for t in tools.split() if re.fullmatch(r"\w+==[\d.]+", t)} == {
        "build",
        "hatchling",
        "twine",
    }
    assert "python -m build --no-isolation" in runs


def test_the_job_that_publishes_does_nothing_else():
    job = WORKFLOWS["release.yml"]["jobs"]["publish"]
    assert [re.split("[@]", step["uses"])[0] for step in job["steps"]] == [
        "actions/download-artifact",
        "pypa/gh-action-pypi-publish",
    ]
    assert job["permissions"] == {"id-token": "write"}


def test_what_is_said_of_pickle_stands_where_a_path_is_given():
    from fasterai_kd import Teacher

    page = (FOLDER.parents[1] / "nbs" / "options.md").read_text()
    for text in (" ".join(words.split()) for words in (Teacher.__doc__, page)):
        assert "pickle" in text
        assert "runs code" in text
        assert "files that you trust" in text
