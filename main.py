"""The one command line: python main.py VERB --help.

Builds the parser without loading torch; a verb's handler imports the one module it needs. Exit codes: 0 success,
2 the user's mistake (one line on stderr), 1 a fault of the program, 3 done, but audit found data that would invalidate
results or optimize found nothing inside its budget, 130 and 143 stopped by a signal after saving.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command_line import (
    DATA_FLAGS,
    DEVICE_FLAGS,
    EVALUATION_FLAGS,
    MULTIMODAL_FLAGS,
    OPTIMIZATION_FLAGS,
    SERVING_FLAGS,
    STUDY_OPTIONS,
    TRAIN_FLAGS,
    Arguments,
    Verb,
    audit_arguments,
    build_parser,
    checkpoint_arguments,
    compare_arguments,
    completion_arguments,
    crossval_arguments,
    demo_arguments,
    distributed_arguments,
    doctor_arguments,
    evaluate_arguments,
    explain_arguments,
    film_train_arguments,
    optimize_arguments,
    predict_arguments,
    reader_study_arguments,
    train_arguments,
    tune_arguments,
)
from config import Config, Overrides, parse_assignment, read_yaml, resolve, to_yaml
from errors import CollectiveError, ConfigError, UserError, nearest

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from process_group import Group
    from train import TrainResult

RECIPES = Path(__file__).resolve().parent / "examples" / "recipes"


def layers(arguments: Arguments) -> list[Overrides]:
    """The recipe's settings, the YAML file's, then those of the flags and --set: later wins."""
    flags = {name: value for name, value in vars(arguments).items() if "." in name}
    flags.update(parse_assignment(text) for text in arguments.set)
    recipe = getattr(arguments, "recipe", None)
    return [_recipe(recipe) if recipe else {}, read_yaml(arguments.config) if arguments.config else {}, flags]


def _recipe(name: str) -> Overrides:
    """The settings of examples/recipes/NAME.yaml."""
    known = {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}
    if name not in known:
        raise ConfigError(f"--recipe {name}: not one of {', '.join(known)}{nearest(name, known)}")
    return read_yaml(known[name])


def finish(arguments: Arguments, result: dict[str, Any], words: str = "") -> int:
    """Print the result: JSON when asked for, else `words` unless quiet. Of many processes the first one prints."""
    if not is_main():
        return 0
    if arguments.json:
        from runtime import to_json

        print(to_json(result), flush=True)
    elif words and not arguments.quiet:
        print(words, flush=True)
    return 0


# --- verbs -----------------------------------------------------------------------------------------------------


def run_train(arguments: Arguments) -> int:
    """Train, or go on from a checkpoint; one process of several where torchrun started it."""
    import train

    overrides = layers(arguments)
    if arguments.dry_run:
        return _run_dry(arguments, overrides)
    resume = Path(arguments.resume) if arguments.resume else None
    with _processes(overrides) as group:
        path, config = group.from_main(
            lambda: train.configured(overrides, resume=resume, processes=group.size), what="the settings"
        )
        result = train.train(config, resume=path, group=group)
    return _trained(arguments, result)


def _trained(arguments: Arguments, result: TrainResult) -> int:
    words = f"next: python main.py evaluate --checkpoint {result.best_model}"
    return finish(arguments, dataclasses.asdict(result), words)


def _run_dry(arguments: Arguments, overrides: Sequence[Overrides]) -> int:
    if arguments.resume:
        raise ConfigError("--dry-run tries a new run; drop --resume")
    import dry_run

    result = dry_run.dry_run(resolve(*overrides))
    return finish(arguments, result, dry_run.summary(result))


def run_train_multimodal(arguments: Arguments) -> int:
    """Train a model that reads films with notes and tables, or go on from a checkpoint."""
    import case_training

    overrides = layers(arguments)
    if arguments.resume is None:
        result = case_training.train_multimodal(resolve(*overrides))
    else:
        path, config = case_training.resume_config(Path(arguments.resume), *overrides)
        result = case_training.train_multimodal(config, resume=path)
    return _trained(arguments, result)


def _processes(overrides: Sequence[Overrides]) -> AbstractContextManager[Group]:
    """The processes that torchrun started this one with; alone where it was started by itself."""
    import process_group

    runtime = resolve(*overrides).runtime
    return process_group.joined(runtime.device, timeout_s=runtime.collective_timeout_s)


def run_distributed(arguments: Arguments) -> int:
    """Start `train` in several processes."""
    import launcher

    config = resolve(*layers(arguments))
    processes = launcher.process_count(arguments.nproc_per_node, config.runtime.device)
    words = launcher.own_words(arguments.words, ("--nproc-per-node", "--max-restarts"))
    return launcher.launch(words, processes=processes, max_restarts=arguments.max_restarts)


def run_evaluate(arguments: Arguments) -> int:
    """Measure a checkpoint, or the predictions of any program."""
    import evaluate

    folder = Path(arguments.output_dir)
    if arguments.predictions is not None:
        validation = arguments.validation_predictions
        report = evaluate.evaluate_table(
            Path(arguments.predictions),
            layers(arguments),
            output_dir=folder,
            validation_predictions=Path(validation) if validation else None,
        )
    elif arguments.validation_predictions is not None:
        raise ConfigError("--validation-predictions goes with --predictions; a checkpoint has its own validation films")
    else:
        with _processes(layers(arguments)) as group:
            report = evaluate.evaluate(
                _stored_model(arguments), layers(arguments), output_dir=folder, model_type=arguments.model, group=group
            )
        if not group.is_main:
            return 0
    words = f"{evaluate.summary(report)}\nwritten to {folder}: report.html and its figures"
    return finish(arguments, report, words + _after_evaluate(arguments, report))


def _after_evaluate(arguments: Arguments, report: dict[str, Any]) -> str:
    """The next step, as a line; none for another program's predictions."""
    if arguments.bundle is not None:
        return f"\nnext: python main.py api --bundle {arguments.bundle}"
    if arguments.checkpoint is None:
        return ""
    verb = "optimize" if report.get("modalities") else "explain --worst 24"  # a review is of films alone
    verb = "api" if report.get("task") == "multilabel" else verb  # and of one class a film
    return f"\nnext: python main.py {verb} --checkpoint {arguments.checkpoint}"


def run_compare(arguments: Arguments) -> int:
    """Compare two models on the same films."""
    import compare

    first, second = (Path(name) for name in arguments.predictions or arguments.checkpoints)
    result = compare.compare(
        first,
        second,
        layers(arguments),
        checkpoints=arguments.checkpoints is not None,
        output_dir=Path(arguments.output_dir),
        thresholds=arguments.thresholds,
        margin=arguments.margin,
    )
    better = second if result["auc_roc"]["difference"] < 0 else first
    verb = "optimize --checkpoint" if arguments.checkpoints else "evaluate --predictions"
    words = f"{compare.summary(result)}\nwritten to {arguments.output_dir}\nnext: python main.py {verb} {better}"
    return finish(arguments, result, words)


def run_reader_study(arguments: Arguments) -> int:
    """Analyse a reader study, or plan one."""
    config = resolve(*layers(arguments))
    study: dict[str, Any] = {name: getattr(arguments, name) for name in STUDY_OPTIONS if hasattr(arguments, name)}
    if "modalities" in study:
        study["modalities"] = [name.strip() for name in study["modalities"].split(",")]
    study |= {"level": config.evaluation.level, "threshold": config.evaluation.threshold}
    study |= {"n_boot": config.evaluation.bootstrap_resamples, "seed": config.training.seed}
    if arguments.plan is not None:
        return _run_plan(arguments, study)
    if arguments.table is None:
        raise ConfigError("--table T.csv is missing: give the readings to analyse, or --plan a study")
    import reader_study_report

    folder = Path(arguments.output_dir)
    result = reader_study_report.study_report(Path(arguments.table), output_dir=folder, **study)
    words = f"{reader_study_report.summary(result)}\nwritten to {folder}"
    if result["pairwise"]:
        plan = f"--plan mrmc_cases readers={result['readers']} effect=0.05 power=0.8"
        words += f"\nnext: python main.py reader_study --table {arguments.table} {plan}"
    return finish(arguments, result, words)


def _run_plan(arguments: Arguments, study: dict[str, Any]) -> int:
    import study_plan
    from reader_study import load_table
    from runtime import write_json

    pilot = load_table(arguments.table, cluster=study.get("cluster")) if arguments.table else None
    result = study_plan.plan(arguments.plan, pilot=pilot, study=study)
    path = Path(arguments.output_dir) / "study_plan.json"
    write_json(path, result)
    return finish(arguments, result, f"{study_plan.summary(result)}\nwritten to {path}")


def run_audit(arguments: Arguments) -> int:
    """Say what is wrong with a data set; exit code 3 when it would invalidate results."""
    import audit

    folder = Path(arguments.output_dir)
    report = audit.audit(
        Path(arguments.source) if arguments.source else None,
        *layers(arguments),
        output_dir=folder,
        write_manifest=Path(arguments.write_manifest) if arguments.write_manifest else None,
    )
    code = audit.exit_code(report)
    config = resolve(*layers(arguments))
    source = arguments.source or config.data.manifest or config.data.data_dir
    data = f"{'--manifest' if source.endswith('.csv') else '--data-dir'} {source}"
    first = f"mend what {folder / 'audit.html'} lists, then " if code else ""
    words = f"{audit.summary(report)}\nwritten to {folder}: audit.html, audit.json, findings.csv"
    finish(arguments, report, f"{words}\nnext: {first}python main.py train {data}")
    return code


def run_predict(arguments: Arguments) -> int:
    """Predict films into a CSV."""
    import predict

    config = resolve(*layers(arguments))
    with _processes(layers(arguments)) as group:
        result = predict.predict(
            arguments.films,
            checkpoint=_stored_model(arguments),
            output_dir=Path(arguments.output_dir),
            batch_size=config.data.batch_size,
            device=config.runtime.device,
            precision=config.runtime.precision,
            model_type=arguments.model,
            note=arguments.text,
            group=group,
        )
    words = predict.summary(result)
    if arguments.checkpoint is not None:
        words += f"\nnext: python main.py explain {arguments.films[0]} --checkpoint {arguments.checkpoint}"
    return finish(arguments, result, words)


def run_explain(arguments: Arguments) -> int:
    """Show where a model looks, or which films to look at again."""
    if arguments.worst is not None:
        return _run_review(arguments)
    if not arguments.films:
        raise ConfigError("explain: name films or folders, or ask for the worst ones of a split with --worst 24")
    import case_explain
    import explain

    config = resolve(*layers(arguments))
    folder = Path(arguments.output_dir)
    result = case_explain.explain(
        arguments.films,
        checkpoint=Path(arguments.checkpoint) if arguments.checkpoint else None,
        bundle=Path(arguments.bundle) if arguments.bundle else None,
        output_dir=folder,
        settings=explain.Settings(**_explain_settings(arguments, config)),
        device=config.runtime.device,
        model_type=arguments.model,
        note=arguments.text,
    )
    words = f"{case_explain.summary(result)}\nwritten to {folder}: explanation_report.html"
    use = f"api --bundle {arguments.bundle}" if arguments.bundle else f"optimize --checkpoint {arguments.checkpoint}"
    return finish(arguments, result, f"{words}\nnext: python main.py {use}")


def _explain_settings(arguments: Arguments, config: Config) -> dict[str, Any]:
    methods = arguments.method.split(",")
    return {
        "methods": tuple(dict.fromkeys(name.strip().replace("-", "_") for name in methods)),
        "target": arguments.target,
        "layer": arguments.layer,
        "opacity": arguments.opacity,
        "sanity_films": arguments.sanity_films,
        "batch_size": config.data.batch_size,
        "seed": config.training.seed,
        "level": config.evaluation.level,
        "n_boot": config.evaluation.bootstrap_resamples,
    }


def _run_review(arguments: Arguments) -> int:
    if arguments.films:
        raise ConfigError("--worst looks through a split (--split, --data-dir, --manifest); drop the films named")
    import explain
    import review

    overrides = layers(arguments)
    folder = Path(arguments.output_dir)
    result = review.review(
        checkpoint=Path(arguments.checkpoint) if arguments.checkpoint else None,
        bundle=Path(arguments.bundle) if arguments.bundle else None,
        overrides=overrides,
        count=arguments.worst,
        output_dir=folder,
        settings=explain.Settings(**_explain_settings(arguments, resolve(*overrides))),
        model_type=arguments.model,
    )
    return finish(arguments, result, review.summary(result))


def run_optimize(arguments: Arguments) -> int:
    """Find the fastest way of running a checkpoint here that keeps its accuracy; 3 when there is none."""
    import case_optimization as optimization

    folder = Path(arguments.output_dir)
    report = optimization.optimize(
        Path(arguments.checkpoint),
        layers(arguments),
        output_dir=folder,
        model_type=arguments.model,
        triton_repository=Path(arguments.triton_repository) if arguments.triton_repository else None,
    )
    words = f"{optimization.summary(report)}\nwritten to {folder}: bundle.json and its report"
    finish(arguments, report, f"{words}\nnext: python main.py evaluate --bundle {folder}")
    return 0 if report["chosen"] else optimization.NOTHING_PASSED


def run_api(arguments: Arguments) -> int:
    """Serve predictions over HTTP."""
    # Idle threads of the engine must sleep, not spin: decoders and the event loop need the same cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import inference_api

    config = resolve(*layers(arguments))
    return inference_api.serve(_stored_model(arguments), config, model_type=arguments.model)


def run_crossval(arguments: Arguments) -> int:
    """Cross-validate a recipe by patient."""
    import crossval

    folder = Path(arguments.output_dir)
    result = crossval.crossval(
        resolve(*layers(arguments)), folds=arguments.folds, repeats=arguments.repeats, output_dir=folder
    )
    words = f"{crossval.summary(result)}\nwritten to {folder}: crossval.json and its tables"
    return finish(arguments, result, f"{words}\nnext: python main.py evaluate --checkpoint {folder}")


def run_demo(arguments: Arguments) -> int:
    """The tour on synthetic films."""
    import demo

    result = demo.demo(Path(arguments.output_dir), multimodal=arguments.multimodal, overrides=layers(arguments))
    return finish(arguments, result, demo.summary(result))


def run_config(arguments: Arguments) -> int:
    """Print the resolved configuration."""
    config = resolve(*layers(arguments))
    return finish(arguments, config.to_dict(), to_yaml(config).rstrip())


def run_doctor(arguments: Arguments) -> int:
    """Report on the machine."""
    import doctor

    facts = doctor.examine(resolve(*layers(arguments)), benchmark=arguments.benchmark)
    verb = "audit" if facts["default_data_dir_exists"] else "demo"
    return finish(arguments, facts, f"{doctor.summary(facts)}\nnext: python main.py {verb}")


def _stored_model(arguments: Arguments) -> Path:
    """The checkpoint or bundle named; ConfigError for a --bundle that is none."""
    if arguments.bundle is None:
        return Path(arguments.checkpoint)
    if not (Path(arguments.bundle) / "bundle.json").is_file():
        raise ConfigError(
            f"--bundle {arguments.bundle}: no folder that optimize finished; run optimize, or use --checkpoint"
        )
    return Path(arguments.bundle)


def run_tune(arguments: Arguments) -> int:
    """Search settings."""
    import tune

    result = tune.tune(
        layers(arguments),
        search=arguments.search,
        trials=arguments.trials,
        output_dir=Path(arguments.output_dir),
        storage=arguments.storage,
        study_name=arguments.study,
    )
    return finish(arguments, result, tune.summary(result))


def run_completion(arguments: Arguments) -> int:
    """Print the script that completes this command line in a shell."""
    import completion

    recipes = tuple(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    script = completion.script(build_parser(VERBS)[0], arguments.shell, recipes=recipes)
    return finish(arguments, {"shell": arguments.shell, "script": script}, script)


VERBS = {
    "demo": Verb(
        run_demo,
        "make synthetic films, train a small model on them, measure, explain and compress it; a page shows all",
        "python main.py demo",
        ("--epochs", "--seed", *DEVICE_FLAGS),
        demo_arguments,
    ),
    "audit": Verb(
        run_audit,
        "what is wrong with a data set: damage, copies, leaks, conflicts, shortcuts (exit code 3 if it is grave)",
        "python main.py audit data/chest_xray",
        ("--data-dir", "--manifest", "--positive-class", "--workers"),
        audit_arguments,
    ),
    "train": Verb(
        run_train,
        "fine-tune a network on a folder or table of films",
        "python main.py train --model resnet50 --epochs 50",
        (*TRAIN_FLAGS, "--positive-class"),
        film_train_arguments,
    ),
    "train_multimodal": Verb(
        run_train_multimodal,
        "fine-tune a network on films with clinical notes and values; measure what the fusion adds with evaluate",
        "python main.py train_multimodal --manifest cases.csv --epochs 30",
        (*(name for name in TRAIN_FLAGS if name != "--head-search"), *MULTIMODAL_FLAGS, "--positive-class"),
        train_arguments,
    ),
    "crossval": Verb(
        run_crossval,
        "K-fold cross-validation by patient on all but the test films: to choose a recipe by",
        "python main.py crossval --model resnet50 --epochs 10 --folds 5 --repeats 2",
        (*TRAIN_FLAGS, "--positive-class", "--level"),
        crossval_arguments,
    ),
    "distributed": Verb(
        run_distributed,
        "train in several processes of this machine, one a GPU; the same run as train's",
        "python main.py distributed --model resnet50 --epochs 50",
        (*TRAIN_FLAGS, "--positive-class"),
        distributed_arguments,
    ),
    "tune": Verb(
        run_tune,
        "search any settings on validation, breaking off what is clearly worse; several workers may share a study",
        "python main.py tune --model resnet50 --epochs 10 --trials 40 --search training.learning_rate=1e-4..1e-2:log",
        (*TRAIN_FLAGS, "--positive-class"),
        tune_arguments,
    ),
    "evaluate": Verb(
        run_evaluate,
        "measure a checkpoint, or any predictions.csv, with intervals, and write a report",
        "python main.py evaluate --checkpoint checkpoints/best_model.pth",
        (*DATA_FLAGS, *EVALUATION_FLAGS, "--seed", "--mask-terms", *DEVICE_FLAGS),
        evaluate_arguments,
    ),
    "compare": Verb(
        run_compare,
        "two models on the same films: AUROC, McNemar, reclassification, every metric",
        "python main.py compare --predictions A.csv B.csv",
        (*DATA_FLAGS, "--split", "--positive-class", "--level", "--seed", *DEVICE_FLAGS),
        compare_arguments,
    ),
    "reader_study": Verb(
        run_reader_study,
        "several readers, several cases, with and without assistance; or the size such a study needs",
        "python main.py reader_study --table T.csv --method or --covariance jackknife",
        ("--threshold", "--level", "--seed"),
        reader_study_arguments,
    ),
    "predict": Verb(
        run_predict,
        "films or folders to a CSV of probabilities",
        "python main.py predict films/ --checkpoint checkpoints/best_model.pth",
        ("--batch-size", *DEVICE_FLAGS),
        predict_arguments,
    ),
    "explain": Verb(
        run_explain,
        "where a model looks on films, with checks of the maps; or the films to look at again",
        "python main.py explain films/ --checkpoint checkpoints/best_model.pth --method gradcam",
        (*DATA_FLAGS, "--split", "--level", "--seed", "--device"),
        explain_arguments,
    ),
    "optimize": Verb(
        run_optimize,
        "the smallest, fastest model that keeps its accuracy here: ONNX, INT8, pruning, every engine measured",
        "python main.py optimize --checkpoint checkpoints/best_model.pth --quantize --prune --prune-amount 0.3",
        ("--data-dir", "--manifest", "--seed", *OPTIMIZATION_FLAGS, *DEVICE_FLAGS),
        optimize_arguments,
    ),
    "api": Verb(
        run_api,
        "serve predictions over HTTP, with a page at /",
        "python main.py api --checkpoint checkpoints/best_model.pth --port 8000",
        (*SERVING_FLAGS, "--threshold", *DEVICE_FLAGS),
        checkpoint_arguments,
    ),
    "config": Verb(
        run_config,
        "print the resolved configuration as YAML",
        "python main.py config --set training.num_epochs=5",
        (*TRAIN_FLAGS, *MULTIMODAL_FLAGS, *EVALUATION_FLAGS, *OPTIMIZATION_FLAGS, *SERVING_FLAGS),
    ),
    "doctor": Verb(
        run_doctor,
        "versions, device, instruction sets and weight cache of this machine; --benchmark: how fast it is",
        "python main.py doctor --benchmark",
        ("--model", "--image-size", *DEVICE_FLAGS),
        doctor_arguments,
    ),
    "completion": Verb(
        run_completion,
        "print what a shell needs to complete this command line: verbs, flags, choices, files",
        "python main.py completion bash",
        (),
        completion_arguments,
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0].replace("-", "_") in VERBS:
        words[0] = words[0].replace("-", "_")
    elif words and not words[0].startswith("-"):
        known = nearest(words[0], VERBS)
        print(f"main.py: unknown verb {words[0]!r}{known} (verbs: {', '.join(VERBS)})", file=sys.stderr)
        return 2
    parser, of_verb = build_parser(VERBS)
    arguments, extras = parser.parse_known_args(words)
    if arguments.verb is None:
        if extras:
            parser.refuse(extras)
        parser.print_help()
        return 0
    if extras:
        of_verb[arguments.verb].refuse(extras)
    arguments.words = words[1:]
    return _run(arguments)


def _run(arguments: Arguments) -> int:
    from runtime import Interrupted, setup_logging

    ended = threading.Event()

    def terminate(number: int, frame: object) -> None:
        if not ended.is_set():  # what has ended is only to be told, and then leaves by itself
            raise Interrupted(number, "stopped before there was anything to save")

    setup_logging(quiet=arguments.quiet, speaks=is_main())
    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, terminate) if in_main_thread else None
    try:
        try:
            return VERBS[arguments.verb].run(arguments)
        finally:
            ended.set()
    except UserError as error:
        _say_once(f"error: {error}")
        return 2
    except CollectiveError as error:
        _say_once(f"error: {error}")
        return 1
    except Interrupted as stopped:
        _say_once(str(stopped))
        return 128 + stopped.number
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who read the output, as in `| head`, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a program that SIGPIPE ended
    except OSError as error:
        if error.filename is None or error.strerror is None:
            raise
        print(f"error: {error.filename}: {error.strerror}; free it or name another with --output-dir", file=sys.stderr)
        return 2
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, previous)


def is_main() -> bool:
    """Whether this process is alone, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def _say_once(line: str) -> None:
    """Print `line` on stderr; of many processes that fail together the first one does."""
    joined = sys.modules.get("process_group")
    if joined.speaks_first() if joined is not None else is_main():
        print(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
