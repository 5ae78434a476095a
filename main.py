"""The one command line: python main.py VERB --help.

Builds the parser without loading torch; a verb's handler imports the one module it needs. Exit codes: 0 success,
2 the user's mistake (one line on stderr), 1 a fault of the program, 3 done, but audit found data that would invalidate
results or optimize found nothing inside its budget, 130 and 143 stopped by a signal after saving.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from config import Config, Overrides, parse_assignment, read_yaml, resolve, to_yaml
from errors import CollectiveError, ConfigError, UserError, nearest

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from process_group import Group
    from train import TrainResult

Arguments = argparse.Namespace
RECIPES = Path(__file__).resolve().parent / "examples" / "recipes"


@dataclass(frozen=True)
class Flag:
    """A flag that sets one configuration field, spelled the same on every verb."""

    field: str
    help: str
    kind: type = str


FLAGS = {
    "--data-dir": Flag("data.data_dir", "folder DIR/{train,val,test}/CLASS/* or DIR/CLASS/*"),
    "--manifest": Flag("data.manifest", "CSV with path,label and, when known, split,patient_id,age,sex,view,site"),
    "--model": Flag("model.model_type", "resnet50, efficientnet_b4, densenet121 or any timm name"),
    "--weights": Flag("model.weights", "local weights file in timm layout (.safetensors, .pth); needs no network"),
    "--pretrained": Flag("model.pretrained", "start from the weights timm publishes", bool),
    "--freeze-backbone": Flag("model.freeze_backbone", "train the head only", bool),
    "--head-search": Flag("training.head_search", "train many heads at once on frozen features, keep the best", bool),
    "--epochs": Flag("training.num_epochs", "most epochs to train", int),
    "--batch-size": Flag("data.batch_size", "films per batch", int),
    "--image-size": Flag("data.image_size", "side of the square the model sees, in pixels", int),
    "--seed": Flag(
        "training.seed",
        "of all that is drawn: split, order, augmentation, first weights; of the bootstrap when measuring",
        int,
    ),
    "--device": Flag("runtime.device", "auto, cpu, cuda, cuda:N or mps"),
    "--precision": Flag("runtime.precision", "auto, fp32, bf16 or fp16"),
    "--workers": Flag("runtime.workers", "processes that prepare batches; -1 chooses", int),
    "--tracker": Flag("runtime.tracker", "none, mlflow or tensorboard (none)"),
    "--split": Flag("evaluation.split", "train, val, test or all"),
    "--positive-class": Flag("data.positive_class", "the class that is 'disease' in a binary task"),
    "--threshold": Flag(
        "evaluation.threshold", "positive from this probability (or score) on, stated in advance", float
    ),
    "--prevalence": Flag("evaluation.prevalence", "share of positives where the model will be used", float),
    "--adapt-prevalence": Flag(
        "evaluation.adapt_prevalence", "move the threshold to the prevalence that the scores themselves speak of", bool
    ),
    "--subgroups": Flag("evaluation.subgroups", "columns to compare groups by, such as age,sex,view"),
    "--min-subgroup": Flag("evaluation.min_subgroup", "films from which on a group is judged", int),
    "--interval": Flag("evaluation.proportion_interval", "wilson, clopper_pearson, jeffreys, agresti_coull, wilson_cc"),
    "--level": Flag("evaluation.level", "coverage of the intervals, such as 0.95", float),
    "--skip-unreadable": Flag("data.skip_unreadable", "leave unreadable films out and list them", bool),
    "--exclude": Flag("data.exclude", "CSV of films to leave out: all it lists, or those a review.csv marks exclude"),
}
FLAGS |= {
    "--host": Flag("serving.host", "address to listen on (127.0.0.1: this machine only)"),
    "--port": Flag("serving.port", "TCP port; 0 takes a free one (8000)", int),
    "--max-queue": Flag("serving.max_queue", "films taken on at one time; the next one gets a 503 (64)", int),
    "--latency-budget-ms": Flag("serving.latency_budget_ms", "longest time a batch may take (100)", float),
    "--abstain": Flag("serving.abstain", "refuse films unlike those the model was trained on", bool),
    "--api-keys-file": Flag("serving.api_keys_file", "one name:key a line; beside it, $MEDIMG_API_KEYS"),
    "--rate-limit": Flag("serving.rate_limit", "requests a second for each key; 0 does not limit (0)", float),
    "--audit-log": Flag("serving.audit_log", "append a JSON line for each answer: time, key, content hash, result"),
    "--record-scores": Flag("serving.record_scores", "JSON file with a histogram of scores for each day"),
}
DATA_FLAGS = ("--data-dir", "--manifest", "--skip-unreadable", "--batch-size")
DEVICE_FLAGS = ("--device", "--precision")
EVALUATION_FLAGS = (
    "--split",
    "--positive-class",
    "--threshold",
    "--prevalence",
    "--adapt-prevalence",
    "--subgroups",
    "--min-subgroup",
    "--interval",
    "--level",
)
FLAGS |= {
    "--quantize": Flag("optimization.quantize", "make INT8 candidates (on)", bool),
    "--prune": Flag("optimization.prune", "make pruned candidates, fine-tuned with the model as teacher (off)", bool),
    "--prune-amount": Flag("optimization.pruning_amount", "share of channels removed (0.3)", float),
    "--prune-epochs": Flag("optimization.pruning_epochs", "epochs of fine-tuning a pruned model (3)", int),
    "--max-auc-drop": Flag("optimization.max_auc_drop", "AUROC a candidate may lose on validation (0.005)", float),
    "--max-sensitivity-drop": Flag("optimization.max_sensitivity_drop", "the same for sensitivity (0.01)", float),
    "--max-accuracy-drop": Flag("optimization.max_accuracy_drop", "the same for accuracy (0.006)", float),
    "--objective": Flag("optimization.objective", "throughput (batches of 16) or latency (one film); (throughput)"),
    "--engines": Flag("optimization.engines", "of torch,compile,onnxruntime,openvino,cuda,tensorrt (all but compile)"),
}
FLAGS |= {
    "--text-model": Flag("multimodal.text_model", "folder or hub name of a BERT-family model (BioBERT)"),
    "--text-layers": Flag("multimodal.text_layers", "last layers of it to train; 0 none, -1 all (0)", int),
    "--fusion": Flag("multimodal.fusion", "concatenation, cross_attention, gated, film, bilinear or late"),
    "--columns": Flag("multimodal.columns", "columns of the manifest to read, such as age,sex"),
    "--modalities": Flag("multimodal.modalities", "of image,text,table (what the data have)"),
    "--mask-terms": Flag("multimodal.mask_terms", "file of words or phrases to blot out of every note, one a line"),
}
MULTIMODAL_FLAGS = tuple(name for name, flag in FLAGS.items() if flag.field.startswith("multimodal."))
OPTIMIZATION_FLAGS = tuple(name for name, flag in FLAGS.items() if flag.field.startswith("optimization."))
SERVING_FLAGS = tuple(name for name, flag in FLAGS.items() if flag.field.startswith("serving."))
TRAIN_FLAGS = tuple(
    name for name in FLAGS if name not in (*EVALUATION_FLAGS, *OPTIMIZATION_FLAGS, *SERVING_FLAGS, *MULTIMODAL_FLAGS)
)


@dataclass(frozen=True)
class Verb:
    """One verb of the command line."""

    run: Callable[[Arguments], int]
    summary: str
    example: str
    flags: Sequence[str]
    extra: Callable[[argparse.ArgumentParser], object] = lambda parser: None


class Parser(argparse.ArgumentParser):
    """argparse that answers a mistake with one line and the nearest known flag."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def refuse(self, extras: Sequence[str]) -> NoReturn:
        """Say which word was not understood, and the flag it may have meant."""
        flag = next((word.split("=")[0] for word in extras if word.startswith("-")), None)
        hint = nearest(flag, self._option_string_actions) if flag else ""
        self.error(f"unknown argument {flag or extras[0]!r}{hint}")


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser of the program, and that of each verb."""
    width = max(len(name) for name in VERBS)
    below = " " * (width + 4)
    listing = "\n".join(
        textwrap.fill(verb.summary, 80, initial_indent=f"  {name:{width}}  ", subsequent_indent=below)
        + f"\n{below}  {verb.example}"
        for name, verb in VERBS.items()
    )
    parser = Parser(
        prog="main.py",
        description="Medical images to a trained, honestly measured, compressed and served classifier.",
        epilog=f"verbs:\n{listing}\n\nhelp of a verb: python main.py VERB --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python main.py VERB [options]",
        allow_abbrev=False,
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", help=argparse.SUPPRESS, parser_class=Parser)
    return parser, {name: _add_verb(verbs, name, verb) for name, verb in VERBS.items()}


def _add_verb(verbs: Any, name: str, verb: Verb) -> Parser:
    parser: Parser = verbs.add_parser(
        name,
        prog=f"main.py {name}",
        help=verb.summary,
        description=verb.summary,
        epilog=f"example:\n  {verb.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for flag in verb.flags:
        setting = FLAGS[flag]
        if setting.kind is bool:
            parser.add_argument(flag, dest=setting.field, action=argparse.BooleanOptionalAction, help=setting.help)
        else:
            metavar = "N" if setting.kind is int else flag.lstrip("-").split("-")[-1].upper()
            parser.add_argument(flag, dest=setting.field, type=setting.kind, metavar=metavar, help=setting.help)
    verb.extra(parser)
    if "--weights" in verb.flags:
        parser.add_argument("--recipe", metavar="NAME", default=None, help="settings of examples/recipes/NAME.yaml")
    parser.add_argument("--config", metavar="FILE.yaml", default=None, help="settings; flags win over the file")
    parser.add_argument(
        "--set", metavar="section.field=value", action="append", default=[], help="any setting by name; may be repeated"
    )
    parser.add_argument("--json", action="store_true", default=False, help="print the main result as JSON on stdout")
    parser.add_argument("--quiet", action="store_true", default=False, help="say nothing but warnings and errors")
    return parser


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


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--benchmark", action="store_true", default=False, help="time decoding, augmentation and training (a minute)"
    )


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output-dir", dest="runtime.output_dir", metavar="DIR", help="run folder (checkpoints)")
    parser.add_argument(
        "--resume", metavar="CHECKPOINT", default=None, help="go on from a checkpoint, or from a run folder"
    )


def _film_train_arguments(parser: argparse.ArgumentParser) -> None:
    _train_arguments(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        default=False,
        help="try one batch of everything, estimate time, memory and disk of the run, and write nothing",
    )


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


def _tune_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--search",
        metavar="section.field=VALUES",
        action="append",
        default=[],
        help="LOW..HIGH, LOW..HIGH:log or A|B|C; may be repeated (rates, decay, dropout and augmentation)",
    )
    parser.add_argument("--trials", type=int, metavar="N", default=40, help="trials of the whole study (40)")
    parser.add_argument(
        "--storage", metavar="URL", default=None, help="where workers share the study (SQLite in the output folder)"
    )
    parser.add_argument("--study", metavar="NAME", default="study", help="its name in the storage (study)")
    parser.add_argument("--output-dir", metavar="DIR", default="tune_results", help="(tune_results)")


def _distributed_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nproc-per-node", type=int, metavar="N", default=None, help="processes (one a visible GPU)")
    parser.add_argument(
        "--max-restarts", type=int, metavar="N", default=3, help="times all are started again when one is lost (3)"
    )
    _train_arguments(parser)


def _checkpoint_arguments(parser: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--checkpoint", metavar="FILE", default=None, help="best_model.pth of a run folder, or a folder of crossval"
    )
    what.add_argument("--bundle", metavar="DIR", default=None, help="a folder that optimize wrote")
    parser.add_argument("--model", default=None, help="only checked against the checkpoint")
    return what


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    what = _checkpoint_arguments(parser)
    what.add_argument(
        "--predictions",
        metavar="FILE.csv",
        default=None,
        help="path,label and probability_<CLASS>..., or one column probability or score of the positive class",
    )
    parser.add_argument(
        "--validation-predictions",
        metavar="FILE.csv",
        default=None,
        help="films of other patients: operating points and calibration are chosen on them",
    )
    parser.add_argument("--output-dir", metavar="DIR", default="evaluation_results", help="(evaluation_results)")


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--predictions", nargs=2, metavar=("A.csv", "B.csv"), default=None, help="as for evaluate")
    what.add_argument("--checkpoints", nargs=2, metavar=("A.pth", "B.pth"), default=None, help="predicted on --split")
    parser.add_argument(
        "--thresholds",
        nargs=2,
        type=float,
        metavar=("A", "B"),
        default=None,
        help="positive from these on (the checkpoints' own, or 0.5)",
    )
    parser.add_argument(
        "--margin", type=float, default=None, help="also test whether one is worse by no more than this AUROC"
    )
    parser.add_argument("--output-dir", metavar="DIR", default="comparison", help="(comparison)")


STUDY_OPTIONS = {
    "method": "or (Obuchowski-Rockette), dbm (Dorfman-Berbaum-Metz) or ustat (Gallas); (or)",
    "covariance": "jackknife, delong, bootstrap, unbiased, or obuchowski for clusters",
    "readers": "random or fixed (random)",
    "cases": "random or fixed (random)",
    "outcome": "auc, sensitivity or specificity, the last two at --threshold (auc)",
    "modalities": "which to compare, and their order: first - second, as in with,without",
    "cluster": "column of what holds several cases, such as the patient",
    "missing": "readings not made: error, or available to use those there are (error)",
}
PLAN_HELP = """\
plans (--plan NAME PARAMETER=VALUE ...; leave out what is to be found):
  one_auc           auc n_positive n_negative power alpha ratio two_sided
  paired_auc        n_positive power alpha, and delta variance_a variance_b covariance ratio, or --table
  partial_auc       n_positive power alpha, and a1 b1 a2 b2 delta corr_positive corr_negative fpr_low fpr_high ratio
  auc_precision     auc margin power alpha ratio outcome icc lesions
  mrmc_power        readers cases effect alpha random, and the components, or --table
  mrmc_cases        readers power effect alpha random, and the components, or --table
  mrmc_readers      cases power effect alpha random, and the components, or --table
    components:     reader_by_modality error cov1 cov2 cov3 pilot_cases pilot_effect
  mrmc_conjectured  readers delta theta range_between range_within r1 r2 r3 rb ratio readings power alpha outcome
                    sessions range_rule binomial icc lesions
  precision         p margin level share
  accuracy_cohort   sensitivity specificity prevalence margin level
  two_proportions   p1 p2 power n alpha method two_sided
  kappa             kappa_null kappa prevalence raters power alpha
  kappa_precision   kappa lower upper prevalence raters alpha
example: python main.py reader_study --table pilot.csv --plan mrmc_cases readers=6 effect=0.05 power=0.8"""


def _reader_study_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--table", metavar="T.csv", default=None, help="reader,modality,case,truth,score; a row a reading"
    )
    for name, words in STUDY_OPTIONS.items():
        parser.add_argument(f"--{name}", metavar="NAME", help=words)
    parser.add_argument(
        "--plan", nargs="+", metavar="WORD", default=None, help="sample size or power of a study to come: see below"
    )
    parser.add_argument("--output-dir", metavar="DIR", default="reader_study", help="(reader_study)")
    parser.epilog = f"{parser.epilog}\n\n{PLAN_HELP}"


def _audit_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", nargs="?", default=None, metavar="DIR|CSV", help="folder or manifest (default: the data of --config)"
    )
    parser.add_argument(
        "--write-manifest",
        metavar="FILE.csv",
        default=None,
        help="also write path,label,split,patient_id,age,sex,view; of DICOM from the tags, patients as keyed hashes",
    )
    parser.add_argument("--output-dir", metavar="DIR", default="audit_results", help="(audit_results)")


def _predict_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "films",
        nargs="+",
        metavar="FILE|DIR|CSV",
        help="image files, folders searched through, or a table with path and, for models that read them, text,age,sex",
    )
    parser.add_argument("--text", metavar="NOTE", default=None, help="the note of every film, for models that read one")
    _checkpoint_arguments(parser)
    parser.add_argument("--output-dir", metavar="DIR", default="predictions", help="(predictions)")


def _explain_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "films", nargs="*", metavar="FILE|DIR", default=[], help="image files, or folders searched through"
    )
    parser.add_argument("--text", metavar="NOTE", default=None, help="the note of every film, for models that read one")
    parser.add_argument("--checkpoint", metavar="FILE", default=None, help="best_model.pth of a run folder")
    parser.add_argument(
        "--bundle", metavar="DIR", default=None, help="explain the checkpoint that this bundle was made from"
    )
    parser.add_argument("--model", default=None, help="only checked against the checkpoint")
    parser.add_argument(
        "--method",
        metavar="NAME,...",
        default="gradcam",
        help="gradcam, gradcam++, hirescam, layercam, integrated_gradients, occlusion, shap; several by commas",
    )
    parser.add_argument(
        "--target", metavar="CLASS", default=None, help="the class explained (each film's predicted one)"
    )
    parser.add_argument("--layer", metavar="NAME", default=None, help="module that is mapped (the last feature stage)")
    parser.add_argument("--opacity", type=float, default=0.5, help="of the hottest place, 0 to 1 (0.5)")
    parser.add_argument(
        "--sanity-films", type=int, metavar="N", default=16, help="films the checks are made on; 0: no checks (16)"
    )
    parser.add_argument(
        "--worst",
        type=int,
        metavar="N",
        default=None,
        help="instead of FILE|DIR: the N films of --split to look at again, as a contact sheet and a review.csv",
    )
    parser.add_argument("--output-dir", metavar="DIR", default="explanations", help="(explanations)")


def _optimize_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", metavar="FILE", required=True, help="best_model.pth of a run folder")
    parser.add_argument("--model", default=None, help="only checked against the checkpoint")
    parser.add_argument(
        "--triton-repository", metavar="DIR", default=None, help="also write the model for a Triton server"
    )
    parser.add_argument("--output-dir", metavar="DIR", default="optimized_models", help="(optimized_models)")


def _crossval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folds", type=int, metavar="K", default=5, help="parts, each held out once (5)")
    parser.add_argument("--repeats", type=int, metavar="R", default=1, help="times all of it, with other folds (1)")
    parser.add_argument("--output-dir", metavar="DIR", default="crossval_results", help="(crossval_results)")


def run_completion(arguments: Arguments) -> int:
    """Print the script that completes this command line in a shell."""
    import completion

    recipes = tuple(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    script = completion.script(build_parser()[0], arguments.shell, recipes=recipes)
    return finish(arguments, {"shell": arguments.shell, "script": script}, script)


def _completion_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="bash, zsh or fish")


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--multimodal", action="store_true", default=False, help="the model also reads the notes, ages and sexes"
    )
    parser.add_argument("--output-dir", metavar="DIR", default="demo_output", help="(demo_output)")


VERBS = {
    "demo": Verb(
        run_demo,
        "make synthetic films, train a small model on them, measure, explain and compress it; a page shows all",
        "python main.py demo",
        ("--epochs", "--seed", *DEVICE_FLAGS),
        _demo_arguments,
    ),
    "audit": Verb(
        run_audit,
        "what is wrong with a data set: damage, copies, leaks, conflicts, shortcuts (exit code 3 if it is grave)",
        "python main.py audit data/chest_xray",
        ("--data-dir", "--manifest", "--positive-class", "--workers"),
        _audit_arguments,
    ),
    "train": Verb(
        run_train,
        "fine-tune a network on a folder or table of films",
        "python main.py train --model resnet50 --epochs 50",
        (*TRAIN_FLAGS, "--positive-class"),
        _film_train_arguments,
    ),
    "train_multimodal": Verb(
        run_train_multimodal,
        "fine-tune a network on films with clinical notes and values; measure what the fusion adds with evaluate",
        "python main.py train_multimodal --manifest cases.csv --epochs 30",
        (*(name for name in TRAIN_FLAGS if name != "--head-search"), *MULTIMODAL_FLAGS, "--positive-class"),
        _train_arguments,
    ),
    "crossval": Verb(
        run_crossval,
        "K-fold cross-validation by patient on all but the test films: to choose a recipe by",
        "python main.py crossval --model resnet50 --epochs 10 --folds 5 --repeats 2",
        (*TRAIN_FLAGS, "--positive-class", "--level"),
        _crossval_arguments,
    ),
    "distributed": Verb(
        run_distributed,
        "train in several processes of this machine, one a GPU; the same run as train's",
        "python main.py distributed --model resnet50 --epochs 50",
        (*TRAIN_FLAGS, "--positive-class"),
        _distributed_arguments,
    ),
    "tune": Verb(
        run_tune,
        "search any settings on validation, breaking off what is clearly worse; several workers may share a study",
        "python main.py tune --model resnet50 --epochs 10 --trials 40 --search training.learning_rate=1e-4..1e-2:log",
        (*TRAIN_FLAGS, "--positive-class"),
        _tune_arguments,
    ),
    "evaluate": Verb(
        run_evaluate,
        "measure a checkpoint, or any predictions.csv, with intervals, and write a report",
        "python main.py evaluate --checkpoint checkpoints/best_model.pth",
        (*DATA_FLAGS, *EVALUATION_FLAGS, "--seed", "--mask-terms", *DEVICE_FLAGS),
        _evaluate_arguments,
    ),
    "compare": Verb(
        run_compare,
        "two models on the same films: AUROC, McNemar, reclassification, every metric",
        "python main.py compare --predictions A.csv B.csv",
        (*DATA_FLAGS, "--split", "--positive-class", "--level", "--seed", *DEVICE_FLAGS),
        _compare_arguments,
    ),
    "reader_study": Verb(
        run_reader_study,
        "several readers, several cases, with and without assistance; or the size such a study needs",
        "python main.py reader_study --table T.csv --method or --covariance jackknife",
        ("--threshold", "--level", "--seed"),
        _reader_study_arguments,
    ),
    "predict": Verb(
        run_predict,
        "films or folders to a CSV of probabilities",
        "python main.py predict films/ --checkpoint checkpoints/best_model.pth",
        ("--batch-size", *DEVICE_FLAGS),
        _predict_arguments,
    ),
    "explain": Verb(
        run_explain,
        "where a model looks on films, with checks of the maps; or the films to look at again",
        "python main.py explain films/ --checkpoint checkpoints/best_model.pth --method gradcam",
        (*DATA_FLAGS, "--split", "--level", "--seed", "--device"),
        _explain_arguments,
    ),
    "optimize": Verb(
        run_optimize,
        "the smallest, fastest model that keeps its accuracy here: ONNX, INT8, pruning, every engine measured",
        "python main.py optimize --checkpoint checkpoints/best_model.pth --quantize --prune --prune-amount 0.3",
        ("--data-dir", "--manifest", "--seed", *OPTIMIZATION_FLAGS, *DEVICE_FLAGS),
        _optimize_arguments,
    ),
    "api": Verb(
        run_api,
        "serve predictions over HTTP, with a page at /",
        "python main.py api --checkpoint checkpoints/best_model.pth --port 8000",
        (*SERVING_FLAGS, "--threshold", *DEVICE_FLAGS),
        _checkpoint_arguments,
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
        _doctor_arguments,
    ),
    "completion": Verb(
        run_completion,
        "print what a shell needs to complete this command line: verbs, flags, choices, files",
        "python main.py completion bash",
        (),
        _completion_arguments,
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
    parser, of_verb = build_parser()
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
