"""One run in a process of its own: ``python worker.py network "numpyro NUTS x4" --seed 0`` prints one line of JSON."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
import warnings

from catalogue import CATALOGUE
from outcome import judge
from works import load

MISSING = 3
"""Exit status of a run whose method does not exist; the reason is on stderr."""


def main() -> None:
    """Run, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work")
    parser.add_argument("sampler", choices=list(CATALOGUE))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # packages announce changes of their own; a run is judged by its figures
    entry, work = CATALOGUE[options.sampler], load(options.work)
    function = getattr(importlib.import_module(entry.module), entry.function)
    arguments = entry.arguments(options.work, options.scale)
    began = time.perf_counter()
    try:
        if entry.kind == "gradient":
            result = function(work, **arguments)
        else:
            result = judge(work, function(work, options.seed, **arguments))
    except LookupError as missing:
        print(missing, file=sys.stderr)
        sys.exit(MISSING)
    result["wall_total_s"] = time.perf_counter() - began
    print(json.dumps(result))


if __name__ == "__main__":
    main()
