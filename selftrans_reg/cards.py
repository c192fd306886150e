"""The model cards of saved artefacts: what it is, how to use it, where it came from, licence and citation."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from .fields import is_unsaved

_CITATION = """\
```bibtex
@misc{sun2026selftranscendence,
  author = {Sun and others}, title = {Self-Transcendence}, year = {2026}, eprint = {2601.07773}, archivePrefix = {arXiv}
}
```
"""


def teacher_card(settings: Mapping[str, Any], name: str) -> str:
    """The card of a saved teacher."""
    backbone = settings["backbone"]["class"]
    null = {".".join(map(str, entry["path"])): _shown_null(entry) for entry in settings["null"]}
    rows = {
        "backbone": backbone,
        "layer": settings["layer"],
        "guidance scale": settings["guidance_scale"],
        "null condition": ", ".join(f"{path}: {value}" for path, value in null.items()),
        "feature width": settings["hidden_size"],
        "time convention": _shown(settings["time"]),
        "latent scale": settings["latent_scale"],
        "latent shape": settings["latent_shape"],
        "training step": settings["step"],
        "whole": "yes" if not settings["dropped"] else "no, up to the layer only",
    }
    arguments = "".join(
        [
            "".join(f", null={_nested(e['path'])}" for e in settings["null"] if "unsaved" in e),
            *(f", {key}=..." for key in ("select", "tokens", "time") if is_unsaved(settings[key])),
        ]
    )
    use = f"teacher = st.CFGFeatureTeacher.from_pretrained({json.dumps(name)}, model={backbone}{arguments})"
    about = (
        f"The frozen teacher of stage 2: layer `{settings['layer']}` of a {backbone}, guided as "
        "f_u + w (f_c − f_u) by condition and null condition."
    )
    then = (
        f"`{backbone}` is the class that the weights were trained with, or a function that builds the model with the "
        "same settings; the class is not part of this artefact. The criterion `st.SelfTransLoss.stage2(model, "
        "teacher=teacher, ...)` then runs it."
    )
    return _card("Self-Transcendence teacher", about, rows, use, then, settings)


def criterion_card(settings: Mapping[str, Any], name: str) -> str:
    """The card of a saved criterion."""
    keys = ["stage", "layers", "target", "distance", "weight", "window", "gating", "schedule", "stop_step"]
    keys += ["hidden_sizes", "hidden_features", "target_size", "latent_channels", "patch_size"]
    rows = {key.replace("_", " "): "none" if settings[key] is None else settings[key] for key in keys}
    rows["time convention"] = _shown(settings["time"])
    arguments = ", teacher=teacher" if settings["stage"] == 2 else ""
    arguments += "".join(f", {key}=..." for key in ("select", "tokens", "time") if is_unsaved(settings[key]))
    use = f"criterion = st.SelfTransLoss.from_pretrained({json.dumps(name)}, model=model{arguments})"
    about = f"Head, settings and counters of the loss of stage {settings['stage']}, to go on with a run."
    then = "`model` is the model in training; its own weights, and the optimiser's state, are kept by the loop."
    return _card("Self-Transcendence criterion", about, rows, use, then, settings)


def _card(title: str, about: str, rows: Mapping[str, object], use: str, then: str, settings: Mapping[str, Any]) -> str:
    licence, source = settings["licence"], settings["source"]
    # The hub knows licences by short names, and refuses a card with any other than "other".
    short = licence if licence and re.fullmatch(r"[a-z0-9.-]+", licence) else "other"
    header = ["library_name: selftrans-reg", *([f"license: {json.dumps(short)}"] if licence else [])]
    header += ["tags:", "- self-transcendence", "- diffusion"]
    table = [f"| {key} | {_cell(value)} |" for key, value in rows.items()]
    return "\n".join(
        [
            *("---", *header, "---", f"# {title}", "", about, ""),
            *("| setting | value |", "|---|---|", *table, ""),
            *("## Use", "", "```python", "import selftrans_reg as st", "", use, "```", "", then, ""),
            *("## Source", "", f"Trained in: {_plain(source)}." if source else "The source run was not stated.", ""),
            *("## Licence", "", f"{_plain(licence)}." if licence else "The licence of these weights was not stated."),
            *(
                "",
                "## Citation",
                "",
                "The method is by Sun et al., 2026, https://arxiv.org/abs/2601.07773",
                "",
                _CITATION,
            ),
        ]
    )


def _shown(value: object) -> object:
    return f"{value['unsaved']}, not saved" if isinstance(value, dict) else value


def _shown_null(entry: Mapping[str, Any]) -> object:
    return "a tensor" if "tensor" in entry else entry.get("value", f"{entry.get('unsaved')}, not saved")


def _nested(path: list[str | int]) -> str:
    text = "..."
    for key in reversed(path):
        text = f"{{{json.dumps(key)}: {text}}}"
    return text


def _plain(text: str) -> str:
    return text.rstrip(".")


def _cell(value: object) -> str:
    return "not stated" if value is None else str(value).replace("|", "\\|")
