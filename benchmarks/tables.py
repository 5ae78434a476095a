"""The published tables, row by row: measured by the program's own verbs, kept, printed beside what was promised.

    python benchmarks/tables.py --films FILMS --weights WEIGHTS --notes NOTES --text-model MINILM --work DIR --table 1
    python benchmarks/tables.py --work DIR --list                  # the rows, what is done, and expected minutes
    python benchmarks/tables.py --work DIR --render                # prints them, writes docs/figures/table<N>.svg
    python benchmarks/tables.py --work DIR --render --into docs/results.md README.md
    python benchmarks/tables.py ... --work OTHER --smoke           # every row on a few films with tiny networks

1 models on the test films, 2 what compression costs and gains, 3 how fast training is, 4 beside what users would
otherwise run (first: benchmarks/peers/requirements.txt, --peer-python). Each row is one or more jobs; a job whose
result is in --work is not run again, a training goes on from its checkpoint, and a job that fails is named while the
others go on; what the commands say is in log.txt. What was made before can be given: --checkpoint, --bundle, --pruned
and --serving take NETWORK=PATH.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

from benchmarks import table_jobs, table_render
from benchmarks.table_jobs import ROOT, Job, Options
from errors import ConfigError, UserError
from runtime import library_versions, write_json, write_text

STOPPED = 143
BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"


def machine() -> dict[str, Any]:
    """What a row was measured on."""
    cpu = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")]
    return {"cpu": names[0] if names else "", "cores": os.cpu_count(), "libraries": library_versions()}


def result_file(work: Path, job: Job) -> Path:
    """Where a job's result is kept."""
    return work / "results" / f"{job.name}.json"


def run(job: Job, options: Options) -> bool:
    """Measure and keep; False when it fails."""
    print(f"{datetime.now():%H:%M:%S} {job.name} ...", flush=True)
    started, load = time.perf_counter(), os.getloadavg()[0]
    try:
        result = job.work(options)
    except Exception as error:  # the next row must not wait for this one to be mended
        if not isinstance(error, UserError):
            traceback.print_exc()
        print(f"{job.name} failed: {error}", flush=True)
        return False
    record = {
        "row": job.row,
        "table": job.table,
        "part": job.part,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": _command(options, job),
        "seconds": time.perf_counter() - started,
        "load_before": load,
        "machine": machine(),
        "smoke": options.smoke,
        "result": result,
    }
    write_json(result_file(options.work, job), record)
    print(f"{datetime.now():%H:%M:%S} {job.name}: {record['seconds']:.0f} s", flush=True)
    return True


def run_all(chosen: Sequence[Job], options: Options) -> list[str]:
    """Run what has no result yet; the names of those that failed."""
    (options.work / "results").mkdir(parents=True, exist_ok=True)
    waiting = [job for job in chosen if not result_file(options.work, job).exists()]
    return [job.name for job in waiting if not run(job, options)]


def _command(options: Options, job: Job) -> str:
    """How this row alone is measured again, places by their names."""
    places = "--films FILMS --weights WEIGHTS --notes NOTES --text-model MINILM --peer-python PYTHON --work DIR"
    usual = parser().get_default
    asked = {"recipe": options.recipe, "prune_epochs": options.prune_epochs, "rounds": options.rounds}
    chosen = "".join(f" --{name.replace('_', '-')} {value}" for name, value in asked.items() if value != usual(name))
    given = {
        "checkpoint": options.checkpoints,
        "bundle": options.bundles,
        "pruned": options.pruned,
        "serving": options.serving,
    }
    made = "".join(f" --{flag} NETWORK=PATH" for flag, networks in given.items() if networks)
    smoke = " --smoke" if options.smoke else ""
    return f"python benchmarks/tables.py {places}{chosen}{made} --rows {job.row}{smoke}"


def results(work: Path) -> list[dict[str, Any]]:
    """Every record kept."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((work / "results").glob("*.json"))]


def put_into(page: Path, text: str) -> None:
    """Replace what stands between the marks of `page`; ConfigError when it has none."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ConfigError(f"--into {page}: no {BEGIN} with {END} after it; put both where the tables go")
    write_text(page, f"{before}{BEGIN}\n{text}\n{END}{after}")


def listing(chosen: Sequence[Job], work: Path) -> str:
    """One line a job."""
    lines = []
    for job in chosen:
        state = "done" if result_file(work, job).exists() else f"about {job.minutes:g} min"
        lines.append(f"{job.name:40} {state}")
    return "\n".join(lines)


def _pairs(words: Sequence[str]) -> dict[str, Path]:
    pairs = dict(word.split("=", 1) for word in words)
    return {name: Path(path).resolve() for name, path in pairs.items()}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--work", type=Path, required=True, metavar="DIR", help="results, run folders and variants")
    found.add_argument("--table", type=int, nargs="+", choices=(1, 2, 3, 4), default=[1, 2, 3, 4])
    found.add_argument("--rows", nargs="+", default=None, metavar="ROW", help="only these (see --list)")
    found.add_argument("--films", type=Path, metavar="DIR", help="class folders with train and test")
    found.add_argument("--weights", type=Path, metavar="FILE", help=f"ImageNet weights of {table_jobs.LITE}")
    found.add_argument("--notes", type=Path, metavar="MANIFEST", help="films with notes, for the multimodal row")
    found.add_argument("--text-model", type=Path, metavar="FOLDER", help="a BERT-family encoder")
    found.add_argument("--recipe", default="robust", help=f"of the fine-tuned {table_jobs.LITE} (robust)")
    for name in ("checkpoint", "bundle", "pruned", "serving"):
        found.add_argument(f"--{name}", nargs="+", default=[], metavar="NETWORK=PATH", help="made before")
    found.add_argument("--peer-python", type=Path, default=Path(sys.executable), help="where the peers are installed")
    found.add_argument("--prune-epochs", type=int, default=1, help="of teaching a pruned network (1)")
    found.add_argument("--rounds", type=int, default=2, help="turns of each way of tables 3 and 4 (2)")
    found.add_argument("--smoke", action="store_true", help="a few films, tiny networks: whether every row runs")
    found.add_argument("--list", action="store_true", help="print the rows and end")
    found.add_argument("--render", action="store_true", help="print the tables, write the figures and end")
    found.add_argument(
        "--into",
        type=Path,
        nargs="+",
        default=[],
        metavar="PAGE",
        help=f"put them between {BEGIN} and {END} of these pages",
    )
    found.add_argument("--figures", type=Path, default=ROOT / "docs" / "figures", metavar="DIR")
    return found


def options_of(arguments: argparse.Namespace) -> Options:
    """The command line, with every path absolute."""

    def absolute(path: Path | None) -> Path | None:
        return path.resolve() if path else None

    return Options(
        films=absolute(arguments.films),
        weights=absolute(arguments.weights),
        notes=absolute(arguments.notes),
        text_model=absolute(arguments.text_model),
        work=arguments.work.resolve(),
        recipe=arguments.recipe,
        checkpoints=_pairs(arguments.checkpoint),
        bundles=_pairs(arguments.bundle),
        pruned=_pairs(arguments.pruned),
        serving=_pairs(arguments.serving),
        # The interpreter of an environment is a link: resolved, it would be the one it was made from.
        peer_python=arguments.peer_python.absolute(),
        prune_epochs=arguments.prune_epochs,
        rounds=arguments.rounds,
        smoke=arguments.smoke,
    )


def _stop(number: int, frame: object) -> None:
    raise SystemExit(STOPPED)


def main() -> None:
    arguments = parser().parse_args()
    options = options_of(arguments)
    if arguments.render:
        found = results(options.work)
        for page in arguments.into:
            put_into(page, table_render.render(found, arguments.figures, page_folder=page.parent))
        if not arguments.into:
            print(table_render.render(found, arguments.figures))
        return
    chosen = [job for job in table_jobs.jobs(options) if job.table in arguments.table]
    if arguments.rows:
        known = {job.row for job in chosen}
        if unknown := sorted(set(arguments.rows) - known):
            raise SystemExit(f"--rows {unknown[0]}: no such row; there are {', '.join(sorted(known))}")
        chosen = [job for job in chosen if job.row in arguments.rows]
    if arguments.list:
        print(listing(chosen, options.work))
        return
    signal.signal(signal.SIGTERM, _stop)
    os.environ.setdefault("TABLES_LOG", str(options.work / "log.txt"))
    if failed := run_all(chosen, options):
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
