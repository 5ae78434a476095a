"""What a shell needs to complete the command line: verbs, flags, choices, files.

    python main.py completion bash >> ~/.bashrc
    python main.py completion zsh > ~/.zsh_medimg && echo 'eval "$(<~/.zsh_medimg)"' >> ~/.zshrc      # after compinit
    python main.py completion fish > ~/.config/fish/conf.d/medimg.fish

The script completes `python main.py ...`, and `main.py ...` where that is on the path. `shtab` writes it, and it starts
no Python while you type.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import shtab

SHELLS = ("bash", "zsh", "fish")
CHOICES = {
    "--split": ("train", "val", "test", "all"),
    "--precision": ("auto", "fp32", "bf16", "fp16"),
    "--device": ("auto", "cpu", "cuda", "mps"),
    "--tracker": ("none", "mlflow", "tensorboard"),
    "--fusion": ("concatenation", "cross_attention", "gated", "film", "bilinear", "late"),
    "--objective": ("throughput", "latency"),
    "--interval": ("wilson", "clopper_pearson", "jeffreys", "agresti_coull", "wilson_cc"),
}
"""Flag → the values it takes, or those of them that everybody has."""
MODELS = ("resnet50", "efficientnet_b4", "densenet121")
FILE_FLAGS = frozenset({"--manifest", "--weights", "--exclude", "--mask-terms", "--audit-log", "--record-scores"})
FILE_METAVARS = ("FILE", "CSV", ".csv", ".yaml", ".pth", "CHECKPOINT")
AFTER_PYTHON = {
    "bash": """
_medimg_python() {
  if (( COMP_CWORD > 1 )) && [[ "${COMP_WORDS[1]##*/}" == main.py ]]; then
    COMP_WORDS=("${COMP_WORDS[@]:1}")
    COMP_CWORD=$(( COMP_CWORD - 1 ))
    _shtab_main_py
  fi
}
complete -o bashdefault -o default -F _medimg_python python python3
""",
    "zsh": """
_medimg_python() {
  if (( CURRENT > 2 )) && [[ "${words[2]:t}" == main.py ]]; then
    shift words
    (( CURRENT -= 1 ))
    _shtab_main_py
  else
    _python "$@" 2>/dev/null || _files
  fi
}
compdef _medimg_python python python3
""",
    "fish": """
function _medimg_rest
  set -l words (commandline -opc)
  complete -C (string join ' ' -- main.py $words[3..] (commandline -ct | string collect --allow-empty))
end
for name in python python3
  complete -c $name -n 'string match -q "*main.py" -- (commandline -opc)[2]' -f -a '(_medimg_rest)'
end
""",
}
"""Completion of `python main.py`, by shell: the script's name goes, the rest is completed as that of main.py."""


def script(parser: argparse.ArgumentParser, shell: str, *, recipes: tuple[str, ...] = ()) -> str:
    """The completion script of `shell` for `parser`, a fresh one: its actions are marked with what completes them."""
    for verb in _subparsers(parser):
        verb.help = "verb"
        for of_verb in verb.choices.values():
            for action in of_verb._actions:
                _mark(action, recipes)
    return f"{shtab.complete(parser, shell).rstrip()}\n{AFTER_PYTHON[shell]}"


def _subparsers(parser: argparse.ArgumentParser) -> Iterator[argparse._SubParsersAction[argparse.ArgumentParser]]:
    return (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))


def _mark(action: argparse.Action, recipes: tuple[str, ...]) -> None:
    flag = action.option_strings[0] if action.option_strings else ""
    shown = " ".join(action.metavar) if isinstance(action.metavar, tuple) else action.metavar or ""
    choices = {**CHOICES, "--model": MODELS, "--recipe": recipes}.get(flag)
    if choices:
        action.choices = choices
    elif flag in FILE_FLAGS or shown.endswith(FILE_METAVARS) or "FILE" in shown:
        action.complete = shtab.FILE  # type: ignore[attr-defined]
    elif shown.endswith("DIR") or flag == "--text-model":
        action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
