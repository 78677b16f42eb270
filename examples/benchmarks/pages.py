"What the pages of results share: a head with its command, numbers with their spread, tables."

import numpy as np
from benchmarks.report import unique
from scipy.stats import t as student_t

MEAN = "Accuracy is in % on the test images, mean ± standard deviation over the seeds."
GAIN = "Differences are by seed, with the half width of their 95 % interval (Student's t); few seeds make it wide."
ABOUT = {"digits": "scikit-learn's digits, 8x8", "fashion-mnist": "Fashion-MNIST, 28x28"}


def difference(accs, how, base):
    "By seed, where both have been run."
    a, b = accs.get(how, {}), accs.get(base, {})
    return np.array([a[seed] - b[seed] for seed in a if seed in b])


def flow(text):
    "One line."
    return " ".join(text.split())


def listed(words):
    "One, two and three."
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def count(n):
    return f"{n:,}" if n else "all"


def half_width(d):
    "Of the 95 % interval of the mean (Student's t)."
    return student_t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / len(d) ** 0.5 if len(d) > 1 else float("inf")


def gain(d):
    "Mean, interval and in how many seeds it is above 0."
    if not len(d):
        return ""
    interval = f" ± {half_width(d):.1f}" if len(d) > 1 else ""
    return f"{d.mean():+.1f}{interval}, better in {sum(d > 0)} of {len(d)}"


def page_head(title, rows, some, options, file, script="benchmark_unlabeled.py"):
    "Title, command and versions."
    seeds = len(unique(row["settings"]["seed"] for row in some))
    command = " ".join(f"--{name} {value}" for name, value in options.items())
    versions = " and ".join(unique(f"torch {r['torch']}, fastai {r['fastai']}, {r['device']}" for r in some))
    return f"""# {title}

```bash
OMP_NUM_THREADS=1 python examples/{script} {command} --seeds {seeds} --out nbs/results
```

Made by this script with {versions}, seeds 0 to {seeds - 1}. The single runs are in [{file}]({file}).
"""


def teacher_row(rows, data):
    return next(r for r in rows if r["settings"]["stage"] == "teacher" and r["settings"]["data"] == data)


def about_teacher(rows, data):
    row = teacher_row(rows, data)
    images = row["settings"]["teacher_recipe"][0]
    return (
        f"The teacher has {row['settings']['teacher']} channels and learned from "
        f"{f'{images:,}' if images else 'all'} labeled images; it reaches {row['test']:.1f} %."
    )


def markdown(lines):
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
