r"""Look into a model: which layer sees what, whether guidance has an effect, and which settings that speaks for.

Writes a folder with one page to look at (`index.html`), the table, the numbers as JSON and the pictures. What was
measured there is not measured again. Any checkpoint of the examples is read as it is; a model of your own is made by a
function of yours, and its batches too, as `layer_report` takes them:

    python examples/inspect_features.py runs/quickstart/stage1.pt --out runs/inspect/stage1
    python examples/inspect_features.py runs/b2/stage1 --out runs/inspect/b2 --device cuda
    python examples/inspect_features.py mine.pt --model my_model:build --data my_data:batches --time sit --null y=1000 \
        --out runs/inspect/mine
"""
# ruff: noqa: E402

import argparse
import base64
import html
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from common.options import Mistake, Parser, at_least, run_script


def numbers(text: str) -> list[float]:
    """An argparse type: numbers with commas between."""
    return [float(part) for part in text.split(",")]


def token_range(text: str) -> slice:
    """An argparse type: a slice such as ``1:`` or ``0:256``."""
    first, last = text.split(":")
    return slice(int(first) if first else None, int(last) if last else None)


def index_or_key(text: str) -> int | str:
    """An argparse type: an index, or a name."""
    return int(text) if text.lstrip("-").isdecimal() else text


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    kinds = "quickstart, sit_imagenet, mmdit_coco, SiT or REPA"
    add("checkpoint", type=Path, help=f"a file of {kinds}, or of your own with --model; or a run's folder: its newest")
    add("--out", type=Path, default=Path("runs/inspect"), help="folder of the report")
    add("--weights", choices=["ema", "model"], default="ema", help="which of the checkpoint's")
    add("--device", help="of the model (default: cuda where there is one)")

    group = parser.add_argument_group("what is measured").add_argument
    group("--layers", help="names with commas between (default: all blocks)")
    group("--scales", type=numbers, default=[1, 2, 4, 8, 16, 30], help="guidance scales (default: 1,2,4,8,16,30)")
    group("--noise-fractions", type=numbers, default=[0.4, 0.55, 0.7], help="0 is data (default: 0.4,0.55,0.7)")
    group("--samples", type=at_least(8), default=2000, help="how many")
    group("--batch-size", type=at_least(1), default=32, help="doubled by the null condition")
    group("--k", type=at_least(1), default=10, help="nearest neighbours")
    group("--seed", type=int, default=0, help="of the samples and their noise")

    group = parser.add_argument_group("what the checkpoint does not say").add_argument
    group("--data", help="folder of latents; with --model module:function, which returns batches")
    group("--time", help="what the model calls t, as sit or repa")
    group("--path", choices=["linear", "cosine"], help="of a SiT's file that does not say it")
    group("--vae", help="AutoencoderKL that decodes the pictures: folder or hub name")
    group("--log", type=Path, help="log.jsonl of its training, for the curves")

    group = parser.add_argument_group("a model of your own").add_argument
    group("--model", metavar="MODULE:FUNCTION", help="function of no arguments that builds it")
    group("--null", action="append", metavar="NAME=NUMBER", help="null condition; or module:function that returns it")
    group("--select", type=index_or_key, help="which tensor of a layer's output: an index or a key")
    group("--tokens", type=token_range, metavar="FIRST:LAST", help="which tokens are the image's, as 1:")

    run = parser.parse_args(argv)
    if run.model is not None and None in (run.data, run.time):
        parser.error("with --model, --data and --time must be given too")
    foreign = [f"--{name}" for name in ("null", "select", "tokens") if getattr(run, name) is not None]
    if run.model is None and foreign:
        parser.error(f"{foreign[0]} goes with --model; the examples' checkpoints say it themselves")
    return run


if __name__ == "__main__":
    options()  # --help and wrong options end here, before the imports below take their seconds

import torch
from common.data_files import read_json
from common.loading import Checkpoint, mmdit_from_checkpoint, saved_args, sit_from_checkpoint
from common.options import imported
from common.processes import default_device
from common.run_folder import newest_checkpoint, open_run_folder, read_log, write_whole
from common.sampling import matching_vae, vae_place
from common.training import progress
from common.vae import Scaling, decode, encode_moments, load_vae, recorded_scaling, scaling_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

import selftrans_reg as st
from selftrans_reg.analysis.draw import draw_features, draw_report

MOST_ROWS = 6  # layers in the picture of tokens
PICTURE_SCALES = (0.0, 1.0, 4.0)  # and the proposed one
MOST_PICTURED = 128  # samples that the colours are taken from
SIT_TIMES = {
    ("repa", "linear"): "repa",
    ("repa", "cosine"): "repa-cosine",
    ("sit", "linear"): "sit",
    ("sit", "cosine"): "sit-gvp",
}
PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: #8884; }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem }} h2 {{ font-size: 1.2rem; margin-top: 2.5rem }} h3 {{ font-size: 1rem }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.85rem; margin: 1rem 0 }}
th, td {{ padding: 0.15rem 0.6rem; text-align: right; border-bottom: 1px solid var(--line) }}
th {{ text-align: center }} td:first-child, th:first-child, .plan td {{ text-align: left }}
.layer-report {{ overflow-x: auto }} img {{ max-width: 100%; background: white; border-radius: 4px }}
pre {{ white-space: pre-wrap }} figcaption, .small {{ font-size: 0.85rem; opacity: 0.8 }}
</style></head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


# --- What is looked into ---------------------------------------------------------------------------------------------


class Subject(NamedTuple):
    """A model with all that it takes to measure it.

    Attributes:
        title: What it is, for the page.
        model: On the device, in eval mode.
        batches: Batches of about a size, ``(latents, *condition)`` or mappings: the same each time.
        measured: How `layer_report` and `draw_features` are to call it: time, null, select, tokens.
        decode: From latents to images, if there is a VAE.
        logs: Of its training, by the names of the runs, if there are any.
    """

    title: str
    model: nn.Module
    batches: Callable[[int], Iterable[Any]]
    measured: dict[str, Any]
    decode: Callable[[Tensor], Tensor] | None
    logs: Mapping[str, Sequence[Mapping[str, Any]]]


def open_subject(run: argparse.Namespace) -> Subject:
    """The model of a checkpoint with its data, by what the options and the file say."""
    if run.model is not None:
        return of_user(run)
    beside = run.checkpoint.parent
    if (beside / "settings.json").is_file() and "classifier_steps" in read_json(beside / "settings.json"):
        return of_quickstart(run)
    args = saved_args(st.read_checkpoint(run.checkpoint), run.checkpoint)
    return of_mmdit(run) if "context_size" in args else of_sit(run)


def of_user(run: argparse.Namespace) -> Subject:
    """A model that a function of the user's builds, on batches that another yields."""
    model = imported(run.model, "--model")()
    if not isinstance(model, nn.Module):
        raise Mistake(f"--model {run.model} must return the model; it returned {type(model).__name__}.")
    st.load_weights(model, run.checkpoint, weights=run.weights)
    measured = {"time": run.time, "null": null_condition(run.null or []), "select": run.select, "tokens": run.tokens}
    batches, vae = imported(run.data, "--data"), None if run.vae is None else load_vae(run.vae)
    decode = None if vae is None else decoder(vae, scaling_of(vae.config, run.vae), run.device)
    title = f"{type(model).__name__} of {run.checkpoint.name}"
    return Subject(title, model.to(run.device).eval(), lambda size: batches(), measured, decode, logs_of(run))


def null_condition(given: list[str]) -> Mapping[str, Any] | None:
    """The null condition of ``y=1000`` and the like, or what a function returns; None without."""
    if len(given) == 1 and ":" in given[0]:
        null: Mapping[str, Any] = imported(given[0], "--null")()
        return null
    try:
        pairs = [entry.split("=") for entry in given]
        return {name: int(value) if value.isdecimal() else float(value) for name, value in pairs} or None
    except ValueError as error:
        raise Mistake(f"--null is name=number, or one module:function; got {given}.") from error


def of_quickstart(run: argparse.Namespace) -> Subject:
    """A run of `quickstart.py` on all digits; the curves are those of its three runs."""
    import quickstart
    from common.data import digits
    from common.demo import MemoryLatents

    folder = run.checkpoint.parent
    model = quickstart.new_sit(argparse.Namespace(**read_json(folder / "settings.json"), device=run.device))
    st.load_weights(model, run.checkpoint, weights=run.weights)
    vae = load_vae(folder / "vae").to(run.device)
    scaling = scaling_of(vae.config, f"The VAE of {folder}")
    images, labels = (torch.cat(parts) for parts in zip(*digits(quickstart.IMAGE_SIZE), strict=True))
    classes = quickstart.NUM_DIGIT_CLASSES
    data = MemoryLatents(*encode_moments(vae, images), labels, num_classes=classes, scaling=scaling, vae=None)
    runs = {name: folder / f"{way}.pt" for way, name in quickstart.WAYS.items()}
    logs = logs_of(run) or {name: st.read_checkpoint(path)["log"] for name, path in runs.items() if path.exists()}
    measured = {"time": quickstart.TIME, "null": {"y": classes}}
    title = f"{run.checkpoint.stem} of {folder.name}"
    batches = partial(latent_batches, data, run.samples, run.seed)
    return Subject(title, model.eval(), batches, measured, decoder(vae, scaling, run.device), logs)


def of_sit(run: argparse.Namespace) -> Subject:
    """A SiT: of `sit_imagenet.py`, of REPA or of the SiT repository."""
    model, found = sit_from_checkpoint(run.checkpoint, weights=run.weights)
    convention, classes = found.conventions(said_time=run.time, said_path=run.path), found.settings["num_classes"]
    if convention not in SIT_TIMES:
        raise Mistake(f"--time of a SiT is repa or sit; got {run.time}.")
    name, demo_vae = run.data or found.args.get("data"), Path(found.args.get("demo_vae") or "")
    if name is None or name == "random":
        raise Mistake(f"{run.checkpoint} does not name the latents that it was trained on: pass --data FOLDER.")
    if name != "demo":
        from common.latents import open_latents

        data: Any = open_latents(Path(name), num_classes=classes)
    elif demo_vae.is_dir():
        from common.demo import demo_latents

        data, _ = demo_latents(demo_vae, vae_steps=found.args["demo_vae_steps"], device="cpu")
    else:
        raise Mistake(f"The demo's VAE is not at {demo_vae}. Start this where the run was started.")
    null = {"y": classes} if found.settings["class_dropout_prob"] else None
    return on_data(run, found, model, data, {"time": SIT_TIMES[convention], "null": null})


def of_mmdit(run: argparse.Namespace) -> Subject:
    """An MMDiT of `mmdit_coco.py`: captions are no labels, so what needs labels is not measured."""
    from common.coco_features import CocoFeatures

    model, found = mmdit_from_checkpoint(run.checkpoint, weights=run.weights)
    folder = run.data or found.args.get("demo_data") or found.args.get("data")
    if folder is None:
        raise Mistake(f"{run.checkpoint} does not name the features that it was trained on: pass --data FOLDER.")
    data = CocoFeatures(Path(folder), dropout=0.0, second=found.args.get("moments", "std"))
    return on_data(run, found, model, data, {"time": "repa", "null": {"context": data.empty}, "select": 1})


def on_data(
    run: argparse.Namespace, found: Checkpoint, model: nn.Module, data: Any, measured: dict[str, Any]
) -> Subject:
    """A model on the latents that it was trained on, with its run's VAE and log where these are within reach."""
    sizes, trained = found.settings, recorded_scaling(found.args, run.checkpoint)
    if (sizes["in_channels"], sizes["input_size"]) != (data.channels, data.size) or not (
        trained is None or trained.equals(data.scaling)
    ):
        raise Mistake(
            f"{run.checkpoint} was trained on other latents than these.\nFound: {data.channels} channels, {data.size} "
            f"pixels a side, {data.scaling}; trained on {sizes['in_channels']}, {sizes['input_size']} and {trained}.\n"
            "Pass with --data those that it was trained on."
        )
    place = vae_place(found.args.get("vae"), run.checkpoint)
    name = run.vae or (place if place is not None and Path(place).is_dir() else None)  # no download for a picture
    vae = None if name is None else matching_vae(name, data.scaling, data.channels, run.checkpoint)[0]
    return Subject(
        f"{found.args.get('model', found.family)} of {run.checkpoint}",
        model.to(run.device),
        partial(latent_batches, data, run.samples, run.seed),
        measured,
        None if vae is None else decoder(vae, data.scaling, run.device),
        logs_of(run, run.checkpoint.parent.parent / "log.jsonl"),
    )


def latent_batches(data: Any, samples: int, seed: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Latents as the model sees them, drawn from their posteriors, and conditions: as many at random as are wanted."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data), generator=generator)[:samples]
    for mean, std, condition in DataLoader(Subset(data, order.tolist()), size):
        yield data.scaling.drawn(mean, std, torch.randn(mean.shape, generator=generator)), condition


def logs_of(run: argparse.Namespace, usual: Path | None = None) -> dict[str, list[dict[str, Any]]]:
    """The log that was named, or the usual one if it is there."""
    path = run.log or usual
    return {"": records} if path is not None and (records := read_log(path)) else {}


def decoder(vae: Any, scaling: Scaling, device: str) -> Callable[[Tensor], Tensor]:
    """Latents to images, grey ones as ink on paper."""
    vae.to(device)
    sign = -1 if vae.config.out_channels == 1 else 1
    return lambda latents: sign * decode(vae, latents, scaling)


# --- The report ------------------------------------------------------------------------------------------------------


def measured_report(run: argparse.Namespace, subject: Subject) -> st.LayerReport:
    """The report: read if it is there, else measured and saved."""
    path = run.out / "report.json"
    if path.exists():
        print(f"{path}: measured before")
        return st.LayerReport.load(path)
    report = st.layer_report(
        subject.model,
        subject.batches(run.batch_size),
        run.layers.split(",") if run.layers else None,
        run.scales,
        noise_fractions=run.noise_fractions,
        samples=run.samples,
        k=run.k,
        seed=run.seed,
        progress=progress,
        **subject.measured,
    )
    report.save(path)
    return report


def token_picture(run: argparse.Namespace, subject: Subject, report: st.LayerReport) -> str:
    """The picture of the tokens as HTML; where there can be none, why."""
    count, scales, proposed = len(report.layers), {*PICTURE_SCALES}, set()
    if report.recipe is not None:
        scales.add(report.recipe.guidance_scale)
        proposed = {report.recipe.student_layer, report.recipe.teacher_layer}
    shown = {report.layers[round(row * (count - 1) / (MOST_ROWS - 1))] for row in range(MOST_ROWS)} | proposed
    path = run.out / "features.png"
    try:
        draw_features(
            subject.model,
            next(iter(subject.batches(MOST_PICTURED))),
            path,
            [layer for layer in report.layers if layer in shown],
            sorted(scales),
            noise_fraction=run.noise_fractions[len(run.noise_fractions) // 2],
            decode=subject.decode,
            seed=run.seed,
            **subject.measured,
        )
    except st.ShapeError as error:
        return f"<p>Not drawn: {html.escape(str(error))}</p>"
    return f"<p>Rows are layers, columns are guidance scales.</p>{embedded(path)}"


def draw_curves(logs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Draw every number of the logs over their steps, one panel each."""
    from matplotlib.figure import Figure

    terms = [key for log in logs.values() for entry in log for key, value in entry.items() if type(value) is float]
    terms = list(dict.fromkeys(terms))
    rows = -(-len(terms) // 3) or 1
    figure = Figure(figsize=(12, 2.6 * rows), layout="constrained")
    for index, term in enumerate(terms, 1):
        axes = figure.add_subplot(rows, 3, index, title=term, xlabel="step")
        for name, log in logs.items():
            points = [(entry["step"], entry[term]) for entry in log if term in entry]
            axes.plot([step for step, _ in points], [value for _, value in points], label=name)
    if len(logs) > 1:
        figure.legend(logs, loc="outside upper center", ncols=len(logs))
    figure.savefig(path, dpi=150)


def embedded(picture: Path) -> str:
    """A PNG as HTML that needs no other file."""
    data = base64.b64encode(picture.read_bytes()).decode("ascii")
    return f'<img alt="{picture.stem}" src="data:image/png;base64,{data}">'


def main(argv: Sequence[str] | None = None) -> st.LayerReport:
    """Measure, draw, and write the page."""
    run = options(argv)
    run.device = default_device(run.device)
    if not run.checkpoint.exists():
        raise Mistake(f"There is no file {run.checkpoint}. Name a checkpoint, or a run's folder.")
    run.checkpoint = newest_checkpoint(run.checkpoint)
    subject = open_subject(run)
    settings = {
        name: str(value) if isinstance(value, Path | slice) else value
        for name, value in vars(run).items()
        if name not in ("out", "device")
    }
    open_run_folder(run.out, settings)
    report = measured_report(run, subject)
    text = str(report)
    (run.out / "report.txt").write_text(text + "\n", "utf-8")
    draw_report(report, run.out / "report.png")
    sections = {
        "Layers and guidance scales": report._repr_html_(),
        "Over the layers": embedded(run.out / "report.png"),
        "Tokens as colours": token_picture(run, subject, report),
    }
    if subject.logs:
        draw_curves(subject.logs, run.out / "curves.png")
        sections["Training"] = embedded(run.out / "curves.png")
    body = "\n".join(f"<h2>{heading}</h2>\n{content}" for heading, content in sections.items())
    page = PAGE.format(title=html.escape(subject.title), body=body)
    write_whole(run.out / "index.html", lambda file: file.write(page.encode()))
    print(f"\n{text}\n\nThe page to look at: {run.out / 'index.html'}")
    return report


if __name__ == "__main__":
    run_script(main)
