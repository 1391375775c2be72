"""A run's study with human raters: its page and its key; the tally of what raters answered."""

from __future__ import annotations

import random
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.loading import load_config
from ..errors import ArtifactError, ConfigError
from ..store.files import finite, read_json, write_bytes, write_sealed_json
from ..store.lock import locked
from ..store.run_dir import RunDir, find_run
from ..study.tally import LEFT, RIGHT, Answer, tally
from ..study.trials import FULL, make_trials
from .model import open_model
from .sets import check_model, check_quantized, config_of, full_folder
from .watch import SILENT, Watch

if TYPE_CHECKING:
    from ..lineage.sample_set import SampleSet

DEFAULT_TRIALS = 40
QUESTION = "Which of the two pictures looks better?"
COMMAND = "qncd study"


@dataclass(frozen=True)
class Study:
    """page: for raters; key: for the experimenter alone; trials: controls included."""

    run: RunDir
    page: Path
    key: Path
    trials: int
    variants: Sequence[str]


@dataclass(frozen=True)
class Tallied:
    """found: the content of study.json."""

    run: RunDir
    file: Path
    found: Mapping[str, Any]


def make_study(
    run_dir: str | Path | None = None,
    *,
    against: Sequence[str | Path] = (),
    name: str = "quantized",
    trials: int = DEFAULT_TRIALS,
    seed: int | None = None,
    device: str = "auto",
    force: bool = False,
    watch: Watch = SILENT,
) -> Study:
    """Write the page of a blinded study, and its key.

    Draws full-precision images that are missing. run_dir: a sampled run, None for the current one.
    against: runs of the same model, whose sets of the same name are compared as well. trials: that
    count; a tenth of controls of either kind comes on top. seed: of order and sides, None for one
    that nobody knows. force: replace a study, whose results can no longer be tallied then.

    Raises ArtifactError where a study is there, sets are missing, or share no seeds; ConfigError
    for runs of one name.
    """
    run = find_run(None if run_dir is None else str(run_dir))
    if run.study_key.exists() and not force:
        raise ArtifactError(
            f"{run.study_key}: is there already, and results of raters belong to it",
            "--force makes another study",
        )
    runs = {run.path.name: run}
    for place in against:
        other = find_run(str(place))
        if other.path.name in {*runs, FULL}:
            raise ConfigError(f"two runs are called {other.path.name}", "name each run once")
        runs[other.path.name] = other
    sets = _sets(runs, name, device, watch)
    from ..study.page import study_page

    seeds, labels = sets[FULL].seeds, _labels(sets[FULL])
    draw = random.Random(secrets.randbits(64) if seed is None else seed)
    made = make_trials(list(sets), seeds, labels, trials, draw)
    study = f"{draw.getrandbits(64):016x}"
    rows = {seed: row for row, seed in enumerate(seeds)}
    page = study_page(study, made, lambda v, s: sets[v].images[rows[s]], QUESTION)
    key = {
        "study": study,
        "question": QUESTION,
        "variants": {variant: str(samples.folder) for variant, samples in sets.items()},
        "trials": [vars(trial) for trial in made],
    }
    with locked(run.path, watch.note):
        write_sealed_json(run.study_key, key)
        write_bytes(run.study_page, page.encode())
        run.study.unlink(missing_ok=True)
    return Study(run, run.study_page, run.study_key, len(made), list(sets))


def _sets(runs: Mapping[str, RunDir], name: str, device: str, watch: Watch) -> dict[str, SampleSet]:
    """Full precision and each run's set, cut down to the seeds that all share."""
    from ..lineage.sample_set import match_sets, read_set

    sets: dict[str, SampleSet] = {}
    for variant, run in runs.items():
        quantized = read_set(run.samples(name))
        check_quantized(run, quantized)
        if FULL not in sets:
            config = load_config(str(run.config))
            model = open_model(config_of(config, quantized), device, run.path, watch)
            check_model(quantized, model)
            with locked(run.path, watch.note):
                sets[FULL] = read_set(full_folder(run, config, model, quantized, watch))
        sets[FULL], sets[variant] = match_sets(sets[FULL], quantized)
    return {variant: samples.cut(sets[FULL].seeds) for variant, samples in sets.items()}


def _labels(samples: SampleSet) -> list[str]:
    prompts = samples.manifest["sampling"].get("prompts")
    return [prompts[label] if prompts else str(label) for label in samples.manifest["classes"]]


# ------------------------------------------------------------------ results


def tally_study(run_dir: str | Path | None, files: Sequence[str | Path]) -> Tallied:
    """Tally raters' results and write study.json, which the next report shows.

    run_dir: the run whose study it is, None for the current one; files: that raters downloaded.
    Raises ArtifactError where the key is missing, or a file is damaged, of another study, or of a
    rater whose answers are there already.
    """
    run = find_run(None if run_dir is None else str(run_dir))
    key = _read_key(run)
    results: dict[str, list[Answer]] = {}
    for file in map(Path, files):
        rater, answers = _read_results(file, key)
        if rater in results:
            raise ArtifactError(
                f"{file}: answers of {rater}, whose are there already",
                "name each file once; two raters of one name need other ones in their files",
            )
        results[rater] = answers
    found = tally(key, results)
    with locked(run.path, SILENT.note):
        write_sealed_json(run.study, finite(found))
    return Tallied(run, run.study, found)


def read_tally(run: RunDir) -> dict[str, Any] | None:
    """The content of study.json, None where there is none. Raises ArtifactError where damaged."""
    if not run.study.is_file():
        return None
    found = read_json(run.study, f"{COMMAND} --tally")
    known = {"question", "interval", "raters", "comparisons", "classes", "null_left"}
    if not isinstance(found, dict) or not found.keys() >= {*known, "fleiss_kappa", "kappa_trials"}:
        raise ArtifactError(f"{run.study}: damaged", f'repeat "{COMMAND} --tally FILE..."')
    return found


def _read_key(run: RunDir) -> dict[str, Any]:
    found = read_json(run.study_key, COMMAND)
    trials = found.get("trials") if isinstance(found, dict) else None
    known = {"kind", "label", LEFT, RIGHT}
    if not (
        isinstance(trials, list)
        and all(isinstance(t, dict) and t.keys() >= known for t in trials)
        and isinstance(found.get("study"), str)
        and isinstance(found.get("question"), str)
    ):
        raise ArtifactError(f"{run.study_key}: damaged", "restore it; no other key fits the study")
    return found


def _read_results(path: Path, key: Mapping[str, Any]) -> tuple[str, list[Answer]]:
    hint = "give the file as the rater downloaded it"
    try:
        found = read_json(path, COMMAND)
    except ArtifactError as error:
        raise ArtifactError(error.message, hint) from error
    if not isinstance(found, dict) or not isinstance(found.get("answers"), list):
        raise ArtifactError(f"{path}: not the results of a study", hint)
    if found.get("study") != key["study"]:
        raise ArtifactError(
            f"{path}: results of another study than {key['study']}",
            "name the run that its page was made for (--run-dir)",
        )
    answers = [_answer(path, entry, len(key["trials"])) for entry in found["answers"]]
    if len({answer.trial for answer in answers}) < len(answers):
        raise ArtifactError(f"{path}: a trial is answered twice", hint)
    rater = found.get("rater")
    if not isinstance(rater, str) or not rater:
        raise ArtifactError(f"{path}: without the rater's name", hint)
    return rater, answers


def _answer(path: Path, entry: Any, count: int) -> Answer:
    known = entry if isinstance(entry, dict) else {}
    trial, side, flipped = (known.get(name) for name in ("trial", "side", "flipped"))
    sound = type(trial) is int and 0 <= trial < count and side in (LEFT, RIGHT)
    if not sound or type(flipped) is not bool:
        raise ArtifactError(f"{path}: damaged answer {str(entry)[:80]}", "ask the rater again")
    assert isinstance(trial, int) and isinstance(side, str)
    return Answer(trial, side, flipped)
