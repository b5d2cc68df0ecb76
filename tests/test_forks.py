"""The ideas in tests/forks: each patch applies, trains, resumes and is sampled."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
TINY = (
    "--dim 32 --depth 1 --heads 2 --patch 4 --bs 8 --num-samples 4 --sampling-steps 2 --compile off".split()
)


def test_attributes_in_place_of_classes(tmp_path, script):
    """The diff in the README: y is two numbers per image, read from a table by file name."""
    patch = (ROOT / "tests/forks/attributes.patch").read_text()
    assert re.search(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1] == patch
    for name in ("common.py", "rf_dit_cifar.py"):
        shutil.copy(ROOT / name, tmp_path)
    subprocess.run(["patch", "-p1"], input=patch, text=True, cwd=tmp_path, check=True)
    table = []
    for i in range(60):
        file = tmp_path / "set" / f"{i}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 4 * i, np.uint8)).save(file)
        table.append(f"{file.name} {i / 60},{i % 2}\n")
    (tmp_path / "attributes.txt").write_text("".join(table))
    p = script(tmp_path / "rf_dit_cifar.py", "--dataset", "set", "--steps", 4, "--save-every", 2, *TINY)
    assert p.returncode == 0, p.err
    (run,) = (tmp_path / "logs").glob("rf/*")
    p = script(
        "ddim_sample.py", run, "--classes", "0.2,1", "0.9,0", "--num-samples", 3, "--steps", 2, "--npz"
    )
    assert p.returncode == 0, p.err
    file = np.load(next((run / "samples").glob("*.npz")))
    np.testing.assert_allclose(file["arr_1"], [[0.2, 1], [0.9, 0], [0.2, 1]], rtol=1e-6)
    p = script(tmp_path / "rf_dit_cifar.py", "--resume", run / "checkpoints/step_00000002.pt")
    assert p.returncode == 0, p.err
