"""The command verify: a few seeds of both models, for CI."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..errors import VerificationFailed
from ..metrics.rows import SETS
from ..runs.verify import Verified
from ..runs.verify import verify as verify_run
from ..vocabulary import said
from .console import Console
from .shared import watching


def verify(console: Console, run_dir: str | None, **options: Any) -> None:
    """Print every fault. Raises VerificationFailed, exit code 7, where there is one."""
    found = verify_run(run_dir, **options, watch=watching(console))
    payload = {
        "stage": "verify",
        "run_dir": str(found.run.path),
        "ok": not found.faults,
        "seeds": list(found.seeds),
        "min_psnr_db": options["min_psnr"],
        "psnr_db": {str(seed): value for seed, value in found.psnr_db.items()},
        "faults": [asdict(fault) for fault in found.faults],
        "sets": {kind: str(folder) for kind, folder in found.folders.items()},
    }
    console.result(payload, lambda: _render(console, found))
    if found.faults:
        seeds = sorted({fault.seed for fault in found.faults if fault.seed is not None})
        named = f" (seeds {', '.join(map(str, seeds))})" if seeds else ""
        raise VerificationFailed(
            f"{len(found.faults)} faults in the images of {len(found.seeds)} seeds{named}",
            f"look at {found.folders['quantized']}",
        )


def _render(console: Console, found: Verified) -> None:
    for fault in found.faults:
        who = "some seed" if fault.seed is None else f"seed {fault.seed}"
        print(f"{who}, {SETS[fault.kind]}: {fault.says}")
    if found.psnr_db:
        worst = min(found.psnr_db, key=lambda seed: found.psnr_db[seed])
        least = f"PSNR at least {said('psnr_db', found.psnr_db[worst])} (seed {worst})"
        print(
            f"verify: done in {console.lap():.1f} s ({len(found.seeds)} seeds, "
            f"{len(found.faults)} faults, {least})"
        )
