"""The command study: its page, and the tally of what raters answered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..report.study import kappa, share
from ..runs.study import DEFAULT_TRIALS, make_study, tally_study
from .console import Console
from .shared import watching


def make(
    console: Console,
    run_dir: str | None,
    *,
    trials: int | None,
    name: str | None,
    **options: Any,
) -> None:
    """Write the page and its key."""
    made = make_study(
        run_dir,
        trials=trials or DEFAULT_TRIALS,
        name=name or "quantized",
        watch=watching(console),
        **options,
    )
    payload = {
        "stage": "study",
        "run_dir": str(made.run.path),
        "page": str(made.page),
        "key": str(made.key),
        "trials": made.trials,
        "variants": list(made.variants),
    }

    def render() -> None:
        print(f"study: {made.trials} trials of {', '.join(made.variants)}")
        print(f"hand out {made.page}; keep {made.key} to yourself")

    console.result(payload, render)


def tally(console: Console, run_dir: str | None, files: Sequence[str]) -> None:
    """Count answers and print what they say."""
    done = tally_study(run_dir, files)
    found = done.found

    def render() -> None:
        compared = [
            [row["first"], row["second"], row["count"], share(row)] for row in found["comparisons"]
        ]
        title = f"{found['question']} Intervals: {found['interval']}"
        console.table(["preferred", "over", "answers", "share"], compared, title, keys=2)
        classes = [
            [row["label"], row["first"], row["second"], row["count"], share(row)]
            for row in found["classes"]
        ]
        console.table(["class", "preferred", "over", "answers", "share"], classes, keys=3)
        raters = [
            [
                rater["rater"],
                rater["answers"],
                share(rater["full_preferred"]),
                rater["left"],
                f"{rater['catch_failures']} of {rater['catches']}",
            ]
            for rater in found["raters"]
        ]
        headings = ["rater", "answers", "full preferred", "left", "failed catches"]
        console.table(headings, raters)
        for rater in found["raters"]:
            if rater["left_out"]:
                print(f"{rater['rater']} {rater['left_out']}, and is not counted")
        print(f"Of two equal images the left one: {share(found['null_left'])}.")
        print(kappa(found))
        print(f"study: {done.file}; the next qncd eval shows it in the report")

    console.result({**found, "run_dir": str(done.run.path)}, render)
