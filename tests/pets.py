"Generated pictures that stand in for Oxford-IIIT Pets: cats have upright stripes, dogs lying ones."

from pathlib import Path

import numpy as np
from PIL import Image

CATS = ("Abyssinian", "Bengal", "Birman", "Bombay", "Persian", "Ragdoll", "Siamese", "Sphynx")
DOGS = ("beagle", "boxer", "havanese", "keeshond", "pomeranian", "pug", "samoyed", "shiba_inu")


def make_pets(
    folder: Path,  # gets the pictures; made if missing
    n: int = 40,  # number of pictures, half of them cats
    size: int = 64,  # height and width
    tilt: float = 10,  # the stripes lean by up to that many degrees
    noise: float = 0.1,  # standard deviation; pixels are between 0 and 1
    wrong: float = 0.0,  # share of the pictures that have the other kind's stripes
    seed: int = 0,
) -> Path:
    "`n` pictures in `folder`, named as in Pets: cats' names start with a capital."
    rng = np.random.default_rng(seed)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        cat = i % 2 == 0
        upright = cat != (rng.random() < wrong)
        breed = (CATS if cat else DOGS)[i // 2 % 8]
        picture = _stripes(rng, size, upright, tilt) + rng.normal(0, noise, (size, size, 3))
        Image.fromarray((picture.clip(0, 1) * 255).astype(np.uint8)).save(folder / f"{breed}_{i + 1}.jpg", quality=90)
    return folder


def make_pets_home(home: Path, n: int = 40, size: int = 64, **kwargs) -> Path:
    "A FASTAI_HOME where `untar_data(URLs.PETS)` finds generated pictures, so that it downloads nothing."
    home = Path(home)
    make_pets(home / "data" / "oxford-iiit-pet" / "images", n, size, **kwargs)
    # fastai would write it too, but leave the file open
    (home / "config.ini").write_text("[DEFAULT]\ndata = data\narchive = archive\nstorage = tmp\nmodel = models\n")
    return home


def _stripes(rng: np.random.Generator, size: int, upright: bool, tilt: float) -> np.ndarray:
    "Stripes of random direction, width, place, contrast and colors, (size, size, 3) between 0 and 1."
    angle = np.deg2rad(rng.uniform(-tilt, tilt) + (0 if upright else 90))
    y, x = np.mgrid[:size, :size] / size
    wave = np.sin(2 * np.pi * (rng.uniform(2, 6) * (x * np.cos(angle) + y * np.sin(angle)) + rng.random()))
    color, contrast = rng.uniform(0.3, 0.7, 3), rng.uniform(0.1, 0.3, 3)
    return color + contrast * wave[..., None]
