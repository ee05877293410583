"""Runs every figure and table of the paper, one after the other, and says how long each took.

    python python/paper/all.py --toy --out runs/paper

Other flags are handed to the programs that know them: --data to all, --checkpoint to those that
take a trained network.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from iddpm_ext.text import duration

HERE = Path(__file__).parent


def main() -> int:
    """Returns 1 if any program failed, after all of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--data")
    parser.add_argument("--checkpoint")
    parser.add_argument("--out", default="python/paper/results")
    flags = parser.parse_args()
    failed = []
    for program in sorted([*HERE.glob("fig*.py"), *HERE.glob("table*.py")]):
        command = [sys.executable, str(program), "--out", flags.out]
        command += ["--toy"] if flags.toy else []
        command += ["--data", flags.data] if flags.data else []
        if flags.checkpoint and "checkpoint=False" not in program.read_text():
            command += ["--checkpoint", flags.checkpoint]
        began = time.perf_counter()
        status = subprocess.run(command).returncode
        taken = duration(time.perf_counter() - began)
        print(f"{program.stem}: {'failed' if status else 'done'} in {taken}")
        failed += [program.stem] if status else []
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
