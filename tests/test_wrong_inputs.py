"""Every verb, and what a newcomer gets wrong: exit code 2 and one line that says what, where and what to do."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest

import main

# COMMAND | what the line names | what it says to do. CK stands for a trained checkpoint, FILMS for its films.
TABLE = """
# the command line itself
trane | unknown verb 'trane' | did you mean 'train'
train --epoch 3 | unknown argument '--epoch' | did you mean '--epochs'
train extra | unknown argument 'extra' | --help
train --epochs three | argument --epochs: invalid int value: 'three' | --help
evaluate | --checkpoint --bundle --predictions is required | --help
evaluate --checkpoint CK --predictions good.csv | --predictions: not allowed with argument --checkpoint | --help
compare | --predictions --checkpoints is required | --help
compare --predictions good.csv | --predictions: expected 2 arguments | --help
compare --predictions good.csv good.csv --thresholds 0.5 high | --thresholds: invalid float value: 'high' | --help
predict --checkpoint CK | required: FILE|DIR|CSV | --help
predict FILMS | --checkpoint --bundle is required | --help
optimize | required: --checkpoint | --help
api | --checkpoint --bundle is required | --help

# numbers out of range
train --epochs 0 | training.num_epochs: 0 | at least 1
train --batch-size 0 | data.batch_size: 0 | at least 1
train --image-size 3 | data.image_size: 3 | at least 16 and at most 2048
train --seed -1 | training.seed: -1 | at least 0
train --workers -5 | runtime.workers: -5 | at least -1
train --set training.learning_rate=-1 | training.learning_rate: -1.0 | at least 0
train --set data.val_fraction=2 | data.val_fraction: 2.0 | at most 0.5
demo --epochs 0 | training.num_epochs: 0 | at least 1
evaluate --checkpoint CK --level 95 | evaluation.level: 95.0 | at most 0.999
evaluate --checkpoint CK --threshold 1.5 | evaluation.threshold: 1.5 is not a probability | from 0 to 1
evaluate --checkpoint CK --prevalence 0 | evaluation.prevalence: 0.0 | give the share of positives
explain FILMS --checkpoint CK --opacity 2 | --opacity: 2 | give 0 (film only) to 1 (map only)
explain --worst 0 --checkpoint CK | --worst: 0 is no number of films | 1 or more
optimize --checkpoint CK --prune-amount 1.5 | optimization.pruning_amount: 1.5 | at most 0.9
optimize --checkpoint CK --max-auc-drop -1 | optimization.max_auc_drop: -1.0 | at least 0
api --checkpoint CK --port 99999 | serving.port: 99999 | at most 65535
api --checkpoint CK --max-queue 0 | serving.max_queue: 0 | at least 1
crossval --folds 1 --data-dir FILMS | --folds 1 | at least 2 folds
crossval --folds 999 --data-dir FILMS --config tiny.yaml | 999 folds | lower --folds
crossval --repeats 0 --data-dir FILMS | --repeats 0 | 1 repeat
tune --trials 0 --data-dir FILMS | --trials 0 | at least one
distributed --nproc-per-node 0 | --nproc-per-node 0 | at least one process
distributed --max-restarts -1 --data-dir FILMS | --max-restarts -1 | 0 or more
reader_study --plan one_auc auc=1.8 n_positive=20 n_negative=20 | auc 1.8 is not between 0 and 1 | correct it

# values of no meaning
train --set training.learning_rate=fast | training.learning_rate: 'fast' | give a number
train --config type.yaml | training.num_epochs: 'many' | give a whole number
train --set training.use_amp=perhaps | training.use_amp: 'perhaps' | give true or false
train --precision fp8 | runtime.precision: 'fp8' | did you mean 'fp32'
train --precision fp16 --device cpu --data-dir FILMS | fp16 training needs a GPU | use bf16 or fp32
train --device tpu | runtime.device: 'tpu' | use auto, cpu, cuda
train --device cuda:99 | 'cuda:99' is not here | use cpu or auto
train --set training.loss=hinge | training.loss: 'hinge' | cross_entropy, focal
train --set data.resize=stretch | data.resize: 'stretch' | squash, pad, crop
train --set data.balance=weights | data.balance: 'weights' | none, sampler, loss
train --set training.monitor=luck | training.monitor: 'luck' | auc_roc, accuracy
train --tracker wandb | runtime.tracker: 'wandb' | none, mlflow, tensorboard
train --recipe robus | --recipe robus | did you mean 'robust'
train --head-search --data-dir FILMS | training.head_search | add --freeze-backbone
train --model resnet500 --data-dir FILMS | unknown model 'resnet500' | did you mean 'resnet50'
doctor --model nope | unknown model 'nope' | all names
doctor --benchmark --model nope | unknown model 'nope' | all names
doctor --device tpu | 'tpu' is no device | use auto, cpu
train --positive-class ILL --data-dir FILMS --no-pretrained | data.positive_class: 'ILL' | NORMAL, PNEUMONIA
evaluate --checkpoint CK --split tests | evaluation.split: 'tests' | did you mean 'test'
evaluate --checkpoint CK --interval wilsn | 'wilsn' | did you mean 'wilson'
evaluate --checkpoint CK --positive-class ILL | 'ILL' is not that of the checkpoint | drop the flag
evaluate --checkpoint CK --subgroups eye_colour | no column 'eye_colour' | there are split
evaluate --checkpoint CK --model resnet50 | --model resnet50 | drop the flag or correct it
explain FILMS --checkpoint CK --method gradcamm | --method: 'gradcamm' | did you mean 'gradcam'
explain FILMS --checkpoint CK --target ILL | --target: 'ILL' | use one of NORMAL, PNEUMONIA
explain FILMS --checkpoint CK --layer block | --layer: the model has no module 'block' | did you mean 'backbone.blocks'
explain FILMS --checkpoint CK --layer nowhere | --layer: the model has no module 'nowhere' | leave it out
predict FILMS --checkpoint CK --text Cough | --text | drop the flag
optimize --checkpoint CK --engines onnx | 'onnx' | did you mean 'onnxruntime'
optimize --checkpoint CK --objective size | 'size' | throughput, latency
api --checkpoint CK --host 999.1.1.1 | --host 999.1.1.1 | use 127.0.0.1
train_multimodal --manifest cases.csv --fusion gatd --config tiny.yaml | 'gatd' | did you mean 'gated'
train_multimodal --manifest cases.csv --modalities image,sound | 'sound' | image, text, table
reader_study --table readers.csv --method orr | 'orr' | did you mean 'or'
reader_study --plan one_auk auc=0.8 | 'one_auk' | did you mean 'one_auc'
reader_study --plan one_auc auc=high | auc=high is not a number | write auc=NUMBER
reader_study --plan one_auc aucc=0.8 | unknown parameter 'aucc' | did you mean 'auc'

# settings that are none
train --set training.learning_rates=0.1 | 'training.learning_rates' | did you mean 'training.learning_rate'
train --set learning_rate=0.1 | 'learning_rate' | did you mean 'training.learning_rate'
train --set training.learning_rate | --set 'training.learning_rate' | section.field=value
train --config typo.yaml | unknown section 'trainig' | did you mean 'training'
config --set a.b=1 | unknown setting 'a.b' | main.py config lists them all
tune --search training.learning_rate=fast --data-dir FILMS | --search 'training.learning_rate=fast' | LOW..HIGH
tune --search training.learning_rates=1e-4..1e-2 | 'training.learning_rates' | did you mean
tune --search training.learning_rate=1e-2..1e-4 | LOW must be below HIGH | above 0 on a logarithmic scale
tune --search training.learning_rate | --search 'training.learning_rate' | for example
evaluate --checkpoint CK --validation-predictions good.csv | --validation-predictions | goes with --predictions
explain FILMS --checkpoint CK --worst 3 | --worst looks through a split | drop the films named
explain --checkpoint CK | explain: name films or folders | --worst 24
explain FILMS | name the model | --checkpoint FILE
reader_study | --table T.csv is missing | --plan

# files that are not there, or not what they should be
train --data-dir nowhere | nowhere: no such data folder | --data-dir or --manifest
train --data-dir file | file: no such data folder | --data-dir or --manifest
train --data-dir empty | empty: no class folders with films | expected empty/train/CLASS
train --data-dir one_class | only one class ('NORMAL') | add films of another
train --manifest nowhere.csv | nowhere.csv: no such manifest | check the name
train --manifest FILMS | a folder, not a CSV | name the manifest in it
train --manifest void.csv | void.csv: not a readable CSV (it is empty) | begin with
train --manifest header.csv | header.csv: the manifest has no rows | add one for each film
train --manifest no_label.csv | no_label.csv: no column 'label' | header must name path,label
train --manifest bad_split.csv | bad_split.csv:2: split 'training' | correct the row
train --manifest leak.csv --no-pretrained | patients are in more than one split | give each patient one split
train --data-dir FILMS --weights nowhere.safetensors | nowhere.safetensors: no such weights file | check --weights
train --data-dir FILMS --weights text.pth --config tiny.yaml | text.pth: not a readable weights file | fetch it again
train --data-dir FILMS --weights CK --model test_resnet | another architecture | name theirs with --model
train --data-dir FILMS --exclude nowhere.csv | nowhere.csv: no such list of films | check the name
train --resume nowhere.pth | nowhere.pth: no such checkpoint | train one first
train --resume text.pth | text.pth: not a checkpoint | use another one
train --resume empty | empty: holds no checkpoint_epoch | to resume from
train --resume CK | holds weights only | --weights
train --config nowhere.yaml | nowhere.yaml: no such configuration file | check the name
train --config broken.yaml | broken.yaml:2: not valid YAML | expected
train --config list.yaml | list.yaml: must hold sections | such as `training:`
train --data-dir FILMS --no-pretrained --output-dir file/run | --output-dir file/run: cannot be written | another folder
train_multimodal --manifest cases.csv --mask-terms nowhere.txt --config tiny.yaml | nowhere.txt | phrase a line
evaluate --checkpoint nowhere.pth | nowhere.pth: no such checkpoint | train one first
evaluate --checkpoint empty | empty: is a folder | name a checkpoint file in it
evaluate --checkpoint empty.pth | empty.pth: truncated or damaged | use an earlier one
evaluate --checkpoint CK --data-dir nowhere | nowhere: no such data folder | another with --data-dir
evaluate --checkpoint CK --output-dir file/out | --output-dir file/out: cannot be written | another folder
evaluate --bundle nowhere | --bundle nowhere | use --checkpoint
evaluate --predictions nowhere.csv | nowhere.csv: no such predictions file | check the name
evaluate --predictions above_one.csv | above_one.csv:3: probability_PNEUMONIA is 1.8 | sigmoid or softmax
evaluate --predictions a_word.csv | a_word.csv:2: probability_NORMAL is 'high' | give a number
evaluate --predictions unlabelled.csv | unlabelled.csv: no column 'label' | predictions need path,label
compare --predictions good.csv nowhere.csv | nowhere.csv: no such predictions file | check the name
compare --predictions good.csv other.csv | must hold the same films | give both the same table
compare --checkpoints CK nowhere.pth | nowhere.pth: no such checkpoint | train one first
predict nowhere.jpeg --checkpoint CK | nowhere.jpeg: no such file or folder | check the name
predict empty --checkpoint CK | empty: no films in this folder | name another
predict damaged.jpeg --checkpoint CK | damaged.jpeg: damaged or truncated | fetch it again or remove it
predict text.png --checkpoint CK | text.png: not an image (it holds text) | remove it or convert it
predict FILMS --checkpoint CK --output-dir file/out | --output-dir file/out: cannot be written | name another
explain nowhere.jpeg --checkpoint CK | nowhere.jpeg: no such file or folder | check the name
explain damaged.jpeg --checkpoint CK | damaged.jpeg: damaged or truncated | fetch it again or remove it
optimize --checkpoint nowhere.pth | nowhere.pth: no such checkpoint | train one first
optimize --checkpoint CK --data-dir nowhere | nowhere: no such data folder | --data-dir
api --checkpoint CK --api-keys-file nowhere.txt | --api-keys-file nowhere.txt: cannot be read | another file
api --checkpoint CK --api-keys-file short.txt | short.txt:1: write name:key | at least 16 characters
api --checkpoint CK --api-keys-file comments.txt | comments.txt: holds no key | write one name:key a line
api --checkpoint CK --api-keys-file twice.txt | twice.txt:2: the name 'ward' occurs twice | its own
api --checkpoint CK --audit-log file/audit.jsonl | --audit-log file/audit.jsonl: cannot be written | another file
api --checkpoint CK --record-scores file/s.json | --record-scores file/s.json: cannot be written | another file
audit nowhere | nowhere: no such folder or CSV | audit DIR or audit FILE.csv
audit empty | empty: no films | expected DIR/train/CLASS
audit FILMS --write-manifest file/m.csv | --write-manifest | name another
tune --data-dir nowhere | nowhere: no such data folder | --data-dir or --manifest
tune --data-dir FILMS --model resnet500 | unknown model 'resnet500' | did you mean 'resnet50'
reader_study --table nowhere.csv | nowhere.csv: no such reader study table | check the name
reader_study --table good.csv | column reader, modality, case, truth, score missing | rename or add it
reader_study --table readers.csv | only modality 'a' in the table | add the readings of another
demo --output-dir file/x | --output-dir file/x: cannot be written | another folder
"""
LINES = [line for line in TABLE.splitlines() if line and not line.startswith("#")]
CASES = [tuple(part.strip() for part in line.rsplit(" | ", 2)) for line in LINES]

FILES = {
    "file": "no folder",
    "text.pth": "text\n",
    "text.png": "no picture\n",
    "empty.pth": "",
    "void.csv": "",
    "header.csv": "path,label\n",
    "no_label.csv": "path,klass\na.jpeg,NORMAL\n",
    "bad_split.csv": "path,label,split\na.jpeg,NORMAL,training\n",
    "leak.csv": "path,label,split,patient_id\na.png,A,train,p1\nb.png,B,test,p1\nc.png,B,train,p2\nd.png,A,test,p3\n",
    "cases.csv": "path,label,patient_id,text\nfilm.jpeg,A,p1,Cough.\nother.jpeg,B,p2,None.\n",
    "good.csv": "path,label,probability_NORMAL,probability_PNEUMONIA\na,NORMAL,0.9,0.1\nb,PNEUMONIA,0.2,0.8\n",
    "above_one.csv": "path,label,probability_NORMAL,probability_PNEUMONIA\na,NORMAL,0.9,0.1\nb,PNEUMONIA,0.2,1.8\n",
    "a_word.csv": "path,label,probability_NORMAL,probability_PNEUMONIA\na,NORMAL,high,0.1\nb,PNEUMONIA,0.2,0.8\n",
    "unlabelled.csv": "path,probability_NORMAL,probability_PNEUMONIA\na,0.9,0.1\n",
    "other.csv": "path,label,probability_NORMAL,probability_PNEUMONIA\nx,NORMAL,0.9,0.1\ny,PNEUMONIA,0.2,0.8\n",
    "readers.csv": "reader,modality,case,truth,score\nr1,a,c1,0,0.1\nr1,a,c2,1,0.9\n",
    "tiny.yaml": "model: {model_type: test_efficientnet, pretrained: false}\ndata: {image_size: 32}\n",
    "type.yaml": "training: {num_epochs: many}\n",
    "typo.yaml": "trainig: {num_epochs: 3}\n",
    "broken.yaml": "training: [1, 2\n",
    "list.yaml": "- 1\n",
    "short.txt": "ward:short\n",
    "comments.txt": "# none yet\n",
    "twice.txt": f"ward:{'k' * 20}\nward:{'l' * 20}\n",
}


@pytest.fixture(scope="module")
def desk(films: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything the table names. Not to be changed."""
    folder = tmp_path_factory.mktemp("desk")
    for name, content in FILES.items():
        (folder / name).write_text(content, encoding="utf-8")
    (folder / "damaged.jpeg").write_bytes(b"\xff\xd8\xff\xe0 cut off")
    (folder / "empty").mkdir()
    (folder / "one_class" / "NORMAL").mkdir(parents=True)
    film = next((films / "train" / "NORMAL").iterdir())
    for name in ("film.jpeg", "other.jpeg", "one_class/NORMAL/a.jpeg"):
        shutil.copy(film, folder / name)
    return folder


def test_the_table_is_long_and_covers_every_verb_that_can_be_given_something_wrong() -> None:
    verbs = {command.split()[0] for command, _, _ in CASES}
    assert len(CASES) >= 60 and verbs - {"trane"} >= set(main.VERBS) - {"completion"}


@pytest.mark.parametrize(("command", "names", "remedy"), CASES, ids=[command for command, _, _ in CASES])
def test_a_mistake_is_one_line_that_can_be_acted_on(
    command: str,
    names: str,
    remedy: str,
    desk: Path,
    films: Path,
    trained: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(desk)
    places = {"CK": str(trained / "best_model.pth"), "FILMS": str(films)}
    words = [places.get(word, word) for word in shlex.split(command)]
    try:
        code = main.main([*words, "--quiet"] if words[0] in main.VERBS else words)
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    said = capfd.readouterr()
    assert (code, said.out) == (2, ""), said
    (line,) = said.err.splitlines()
    assert names in line and remedy in line
    assert "Traceback" not in line and "Errno" not in line
