"""The command line of `cluster.scenarios`. Knows nothing of what is done with it."""

import argparse
from pathlib import Path

from cluster import client, loadtest_kill
from cluster.loadtest import add_lengths, count, positive, share, token_range
from cluster.loadtest_trace import BLOCK_TOKENS, Shape

MAX_MINUTES = 24 * 60


def parse(argv: list[str] | None) -> argparse.Namespace:
    """`scenario` is make-trace, replay, chats or sweep_rates."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.scenarios", description="Load tests that look like use, for a running server."
    )
    scenarios = parser.add_subparsers(dest="scenario", required=True)
    _make_trace(scenarios.add_parser("make-trace", help="make a trace in Mooncake's format"))
    _replay(scenarios.add_parser("replay", help="send what a trace in Mooncake's format says, when it says"))
    _chats(scenarios.add_parser("chats", help="conversations of several turns"))
    _sweep(scenarios.add_parser("sweep", help="find the highest rate that keeps the SLOs"))
    arguments = parser.parse_args(argv)
    if arguments.scenario == "make-trace":
        arguments.shape = Shape(
            minutes=min(arguments.minutes, MAX_MINUTES),
            sessions_per_minute=arguments.sessions_per_minute,
            turns=arguments.turns,
            max_input=arguments.max_input,
        )
    if arguments.scenario == "sweep":
        arguments.scenario = "sweep_rates"
        if arguments.slo_ttft_ms is None and arguments.slo_tpot_ms is None:
            parser.error("sweep needs --slo-ttft-ms or --slo-tpot-ms: without a promise there is no knee")
        if arguments.low > arguments.high:
            parser.error("--from is above --to")
    return arguments


def _make_trace(parser: argparse.ArgumentParser) -> None:
    usual = Shape()
    parser.add_argument("trace", type=Path, help="JSON lines are written here")
    parser.add_argument("--minutes", type=positive, default=usual.minutes, help="%(default)s")
    parser.add_argument(
        "--sessions-per-minute",
        type=positive,
        default=usual.sessions_per_minute,
        help="on average (%(default)s)",
    )
    parser.add_argument(
        "--turns", type=_at_least_one, default=usual.turns, help="of a session, on average (%(default)s)"
    )
    parser.add_argument(
        "--max-input", type=count, default=usual.max_input, help="tokens of a prompt (%(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="the same seed gives the same trace (%(default)s)"
    )


def _replay(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "trace", type=Path, help="JSON lines: timestamp (ms), input_length, output_length, hash_ids"
    )
    parser.add_argument(
        "--speed", type=positive, default=1.0, help="4: in a quarter of the trace's time (%(default)s)"
    )
    parser.add_argument(
        "--block-tokens",
        type=count,
        default=BLOCK_TOKENS,
        help="tokens sent for each block of %(default)s: fewer scale all lengths down",
    )
    _common(parser)


def _chats(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--users", type=count, default=4, help="at once (%(default)s)")
    parser.add_argument("--sessions", type=count, default=1, help="of each user (%(default)s)")
    parser.add_argument("--turns", type=count, default=5, help="of each session (%(default)s)")
    parser.add_argument("--system-words", type=int, default=300, help="that all have in common (%(default)s)")
    parser.add_argument("--turn-words", type=count, default=40, help="of each question (%(default)s)")
    parser.add_argument("--output", type=token_range, default=(64, 64), help="output tokens (64)")
    parser.add_argument(
        "--think", type=positive, default=1.0, help="seconds between turns, on average (%(default)s)"
    )
    _common(parser)


def _sweep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from", dest="low", type=positive, default=0.25, help="requests a second (%(default)s)"
    )
    parser.add_argument(
        "--to", dest="high", type=positive, default=8.0, help="requests a second (%(default)s)"
    )
    parser.add_argument("--step", type=positive, default=20.0, help="seconds for each rate (%(default)s)")
    parser.add_argument(
        "--target",
        type=share,
        default=0.9,
        help="share of the requests that must meet every SLO (%(default)s)",
    )
    add_lengths(parser)
    _common(parser)


def _common(parser: argparse.ArgumentParser) -> None:
    client.add_options(parser)
    parser.add_argument(
        "--timeout", type=positive, default=300.0, help="seconds for one request (%(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of prompts, arrivals and cancellations (%(default)s)"
    )
    parser.add_argument(
        "--cancel-rate", type=share, default=0.0, help="share of the clients that hang up early (0)"
    )
    parser.add_argument(
        "--kill",
        type=loadtest_kill.read,
        action="append",
        default=[],
        metavar="SECONDS:PID",
        help="kill this process then; repeat it. GET /ready tells the workers' processes",
    )
    bill = parser.add_mutually_exclusive_group()
    bill.add_argument("--ledger", metavar="URL", help="check every request's bill in this ledger")
    bill.add_argument("--usage", action="store_true", help="check the sum of the bills with GET /v1/usage")
    parser.add_argument("--slo-ttft-ms", type=positive, help="goodput: time to first token at most")
    parser.add_argument("--slo-tpot-ms", type=positive, help="goodput: time per output token at most")
    parser.add_argument("--json", type=Path, help="write settings, summary and every request here")
    parser.add_argument("--html", type=Path, help="write a report with plots here")


def _at_least_one(text: str) -> float:
    value = positive(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not at least 1")
    return value
