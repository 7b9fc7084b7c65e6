"""The course of a training as a picture: `python -m demo.curves --run DIR --plot FILE`, from DIR/curve.jsonl."""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def plot(curve: Path, path: Path) -> None:
    lines: list[dict[str, Any]] = [json.loads(line) for line in curve.read_text().splitlines()]
    steps = [line for line in lines if "step" in line]
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    axes = figure.subplots(2, 2)
    dense, warm_up, sparse, mtp = (
        [line for line in steps if line["stage"] == name] for name in ("dense", "warmup", "sparse", "mtp")
    )

    axis = axes[0, 0]
    axis.semilogy(
        *_points(dense, "longest"),
        color="tab:orange",
        drawstyle="steps-post",
        label="longest documents, sentences",
    )
    axis.semilogy(*_points(dense, "value_loss"), ".", ms=2, label="loss of a value token, nats")
    axis.set(title="dense: one rung up when values are learned", xlabel="s")
    axis.legend()
    axes[0, 1].plot(*_points(warm_up, "index_loss"), ".")
    axes[0, 1].set(title="warm-up: KL of the indexer, added up over layers, nats", xlabel="s", ylim=(0, None))
    axis = axes[1, 0]
    axis.plot(*_points(sparse, "index_loss"), ".", label="KL of the indexer within its selection")
    axis.plot(*_points(sparse, "value_loss"), ".", label="loss of a value token")
    axis.set(title="sparse, nats", xlabel="s", ylim=(0, None))
    axis.legend()
    axes[1, 1].plot(*_points(mtp, "accuracy"), ".")
    axes[1, 1].set(title="MTP: the token after the next guessed right", xlabel="s", ylim=(0, 1))
    figure.savefig(path, dpi=110)


def _points(lines: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    return [line["seconds"] for line in lines], [line[name] for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.curves", description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of the training")
    parser.add_argument("--plot", type=Path, required=True, help="PNG")
    arguments = parser.parse_args()
    plot(arguments.run / "curve.jsonl", arguments.plot)


if __name__ == "__main__":
    main()
