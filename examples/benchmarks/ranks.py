"""Keep what a run's picture of ranks needs: directions in use and captured mass by layer and side, from scao_statistics.jsonl.

make demo && python examples/benchmarks/ranks.py runs/demo --title "make demo: SmolLM2-135M in 4 bit, LoRA r = 16"
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from scao_hf.options import LARGEST_RANK
from scao_hf.tools.matrices import grid, read_matrices

RECORD = Path(__file__).resolve().parent / "results" / "ranks.json"


def record(run: Path, title: str) -> dict[str, object]:
    """What is drawn of a run, and what the run was.

    Args:
        run: an output folder with the statistics of SCAO in it.
        title: what the picture calls the run.
    """
    found = read_matrices(run)
    if found is None:
        raise SystemExit(f"error: {run} holds no scao_statistics.jsonl")
    figures = {
        key: {
            side: [[round(value, 3) for value in row] for row in rows] for side, (_, rows) in grid(found, key).items()
        }
        for key in ("rank", "captured_mass")
    }
    return {
        "title": title,
        "run": dict(found.about),
        "k_max": found.options["k_max"] or LARGEST_RANK,
        "steps": found.steps,
        **figures,
    }


def main() -> None:
    """Write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--title", required=True)
    arguments = parser.parse_args()
    RECORD.write_text(json.dumps(record(arguments.run, arguments.title)) + "\n", encoding="utf-8")
    print(RECORD)


if __name__ == "__main__":
    main()
