"""The strict form of tests/test_kill.py: kills over the whole length of a run, each from nothing.

    python tests/benchmarks/kill.py [KILLS] [SEED]

Each time: a fresh store, SIGKILL at a uniformly random moment of the whole run, the same command to
its end, and then every artifact must be that of an undisturbed run. About half a minute a kill.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kill_runs import leftovers, orphans, results, run_for, short_recipe


def main(kills: int, seed: int) -> int:
    """Kill and compare; return how many runs ended otherwise than they should."""
    chance = random.Random(seed)
    bad = 0
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        recipe, temporary, out = short_recipe(home), home / "tmp", home / "out"
        temporary.mkdir()
        whole = run_for(recipe, home / "whole", None, temporary, home)
        if whole.code:
            print(f"the undisturbed run failed: {whole.err}")
            return kills
        expected = results(home / "whole")
        print(f"undisturbed: {whole.seconds:.1f} s, {len(expected)} artifacts", flush=True)
        number, length = 0, whole.seconds
        while number < kills:
            moment = chance.uniform(0.0, length)
            first = run_for(recipe, out, moment, temporary, home)
            if first.code == 0:
                length = first.seconds  # the machine is less busy now: it was done before the kill
                shutil.rmtree(out)
                continue
            number += 1
            left = orphans(temporary)
            done = [line for line in first.err.splitlines() if line.endswith(" s")]
            again = run_for(recipe, out, None, temporary, home)
            same = results(out) == expected
            good = again.code == 0 and same and not left and not leftovers(out)
            bad += not good
            print(
                f"{number:3}: killed after {moment:5.1f} s (code {first.code}, {len(done):2} "
                f"stages done); again: code {again.code}, {again.seconds:.1f} s, artifacts "
                f"{'identical' if same else 'DIFFERENT'}, orphans {left}, left {leftovers(out)}",
                flush=True,
            )
            shutil.rmtree(out)
    print(f"{kills - bad} of {kills} as they should be")
    return bad


if __name__ == "__main__":
    arguments = [int(text) for text in sys.argv[1:]]
    sys.exit(bool(main(*arguments, *(20, 1)[len(arguments) :])))
