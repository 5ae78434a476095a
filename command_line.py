"""What may be written after `python main.py`: the flags, the arguments of each verb and the parser; loads no torch."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from errors import nearest

Arguments = argparse.Namespace


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


def build_parser(described: Mapping[str, Verb]) -> tuple[Parser, dict[str, Parser]]:
    """The parser of the program, and that of each verb."""
    width = max(len(name) for name in described)
    below = " " * (width + 4)
    listing = "\n".join(
        textwrap.fill(verb.summary, 80, initial_indent=f"  {name:{width}}  ", subsequent_indent=below)
        + f"\n{below}  {verb.example}"
        for name, verb in described.items()
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
    return parser, {name: _add_verb(verbs, name, verb) for name, verb in described.items()}


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


# --- arguments of a verb ---------------------------------------------------------------------------------------


def train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output-dir", dest="runtime.output_dir", metavar="DIR", help="run folder (checkpoints)")
    parser.add_argument(
        "--resume", metavar="CHECKPOINT", default=None, help="go on from a checkpoint, or from a run folder"
    )


def film_train_arguments(parser: argparse.ArgumentParser) -> None:
    train_arguments(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        default=False,
        help="try one batch of everything, estimate time, memory and disk of the run, and write nothing",
    )


def distributed_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nproc-per-node", type=int, metavar="N", default=None, help="processes (one a visible GPU)")
    parser.add_argument(
        "--max-restarts", type=int, metavar="N", default=3, help="times all are started again when one is lost (3)"
    )
    train_arguments(parser)


def tune_arguments(parser: argparse.ArgumentParser) -> None:
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


def crossval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folds", type=int, metavar="K", default=5, help="parts, each held out once (5)")
    parser.add_argument("--repeats", type=int, metavar="R", default=1, help="times all of it, with other folds (1)")
    parser.add_argument("--output-dir", metavar="DIR", default="crossval_results", help="(crossval_results)")


def checkpoint_arguments(parser: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--checkpoint", metavar="FILE", default=None, help="best_model.pth of a run folder, or a folder of crossval"
    )
    what.add_argument("--bundle", metavar="DIR", default=None, help="a folder that optimize wrote")
    parser.add_argument("--model", default=None, help="only checked against the checkpoint")
    return what


def evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    what = checkpoint_arguments(parser)
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


def compare_arguments(parser: argparse.ArgumentParser) -> None:
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


def reader_study_arguments(parser: argparse.ArgumentParser) -> None:
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


def audit_arguments(parser: argparse.ArgumentParser) -> None:
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


def predict_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "films",
        nargs="+",
        metavar="FILE|DIR|CSV",
        help="image files, folders searched through, or a table with path and, for models that read them, text,age,sex",
    )
    parser.add_argument("--text", metavar="NOTE", default=None, help="the note of every film, for models that read one")
    checkpoint_arguments(parser)
    parser.add_argument("--output-dir", metavar="DIR", default="predictions", help="(predictions)")


def explain_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "films", nargs="*", metavar="FILE|DIR", default=[], help="image files, or folders searched through"
    )
    parser.add_argument("--text", metavar="NOTE", default=None, help="the note of every film, for models that read one")
    parser.add_argument(
        "--checkpoint", metavar="FILE", default=None, help="best_model.pth of a run folder, or a folder of crossval"
    )
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


def optimize_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", metavar="FILE", required=True, help="best_model.pth of a run folder")
    parser.add_argument("--model", default=None, help="only checked against the checkpoint")
    parser.add_argument(
        "--triton-repository", metavar="DIR", default=None, help="also write the model for a Triton server"
    )
    parser.add_argument("--output-dir", metavar="DIR", default="optimized_models", help="(optimized_models)")


def doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--benchmark", action="store_true", default=False, help="time decoding, augmentation and training (a minute)"
    )


def completion_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="bash, zsh or fish")


def demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--multimodal", action="store_true", default=False, help="the model also reads the notes, ages and sexes"
    )
    parser.add_argument("--output-dir", metavar="DIR", default="demo_output", help="(demo_output)")
