"""Several video encoders on the same clips: one pass over the files against a pass each.

python benchmarks/compare.py FOLDER-PER-CLASS [--models builtin x-clip vifi-clip m2-clip] [--rounds 3]
"""

from __future__ import annotations

import argparse
import statistics

import moviola
from turns import in_turns, ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data")
    parser.add_argument("--models", nargs="+", default=["builtin", "x-clip", "vifi-clip", "m2-clip"])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    models = [
        moviola.load(name, init=None if name == "builtin" else "builtin", device="cpu")
        for name in options.models
    ]

    def each() -> None:
        for model in models:
            moviola.evaluate_zero_shot(model, options.data)

    times = in_turns({"once": lambda: moviola.compare(models, options.data), "each": each}, options.rounds)
    for name, seconds in times.items():
        print(f"{name}: {statistics.median(seconds):.2f} s")
    print(f"a pass each / one pass: {ratio(times, 'each', 'once'):.2f}")


if __name__ == "__main__":
    main()
