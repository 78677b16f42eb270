"""Before a release is built: makes the README's links absolute and names the repository, which PyPI cannot know.

python .ci/for_pypi.py https://github.com/OWNER/NAME v1.2.3
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT_URLS = """
[project.urls]
Repository = "{0}"
Changelog = "{0}/blob/{1}/CHANGELOG.md"
Issues = "{0}/issues"
"""


def absolute(readme: str, url: str, ref: str) -> str:
    "Pictures are shown as they are, pages as GitHub renders them."
    readme = re.sub(r"(!\[[^]]*\]\()(?!https?:|#)", rf"\g<1>{url}/raw/{ref}/", readme)
    return re.sub(r"(?<!!)(\[[^]]*\]\()(?!https?:|#)", rf"\g<1>{url}/blob/{ref}/", readme)


def main(url: str, ref: str, root: Path = ROOT) -> None:
    readme, pyproject = root / "README.md", root / "pyproject.toml"
    readme.write_text(absolute(readme.read_text(encoding="utf-8"), url, ref), encoding="utf-8")
    pyproject.write_text(pyproject.read_text(encoding="utf-8") + PROJECT_URLS.format(url, ref), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
