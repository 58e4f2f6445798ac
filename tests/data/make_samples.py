"""Make the sample stores of the current format version and the checkpoints that they hold.

    python tests/data/make_samples.py [NAME ...]

Run once for a format version and commit the result: later releases must read these very files
(`tests/test_format.py`).
"""

import contextlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

from safetensors.torch import save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from runs import write_run  # noqa: E402

from relexkit import gram, import_checkpoints  # noqa: E402
from relexkit.store.format import json_checksum  # noqa: E402

SAMPLES = {
    "sparse": ({"dtype": "bfloat16", "head": "tied", "buffers": True, "metrics": True}, {}),
    "float": ({"dtype": "float32", "motion": "drift", "density": 1.0}, {"mantissa_bits": 7}),
    "exact": ({"dtype": "float32", "motion": "drift", "density": 1.0}, {"encoding": "exact"}),
    "reference": ({"dtype": "bfloat16", "head": "tied"}, {"base_by_reference": True}),
}
"""Name -> how the run is made, how it is imported. The base of the last one is not kept: it is step
0 of the weights beside the sample.
"""


NOWHERE = "/models/sample/base"
"""What the sample by reference says of its base, in place of a temporary folder."""


def move_base(path: Path) -> None:
    """Let a store whose base is by reference name ``NOWHERE``."""
    document = path / "zarr.json"
    content = json.loads(document.read_text())
    attributes = content["attributes"]["relexkit"]
    if "base_reference" in attributes:
        del attributes["checksum"]
        attributes["base_reference"]["place"] = NOWHERE
        attributes["checksum"] = json_checksum(attributes)
        document.write_text(json.dumps(content, indent=2))


def main() -> None:
    for name in sys.argv[1:] or SAMPLES:
        run_options, import_options = SAMPLES[name]
        stem = f"sample-v{3 if name == 'reference' else 1}-{name}"
        path = HERE / f"{stem}.zarr"
        shutil.rmtree(path, ignore_errors=True)
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            run = write_run(Path("sample"), steps=(1, 2, 5), **run_options)
            store = import_checkpoints(run.source, path, base=run.base, **import_options).store
            gram(store)
            move_base(path)
            tensors = {
                f"{step}:{key}": t
                for step, weights in run.weights.items()
                for key, t in weights.items()
            }
            save_file({k: t.clone() for k, t in tensors.items()}, HERE / f"{stem}.safetensors")


if __name__ == "__main__":
    main()
