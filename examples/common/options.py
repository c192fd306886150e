"""Command lines of the examples: parsers, types of options, and mistakes that end in one line.

Nothing here imports torch: a script reads its options before anything that takes seconds to import.
"""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn


class Mistake(ValueError):  # noqa: N818  # the user's, not the program's
    """What is wrong with how a script was called, what was found, and what to do."""


class Parser(argparse.ArgumentParser):
    """Shows every default, keeps the layout of the description, and says in one line what is wrong."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=_Formatter)

    def error(self, message: str) -> NoReturn:
        """End with a line on stderr."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (--help lists the options)\n")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing = any(action.default is nothing for nothing in (None, False)) or action.default == []
        if nothing or "default" in (action.help or ""):  # or the text says it
            return action.help
        return super()._get_help_string(action) if action.help else "default: %(default)s"


def run_script(main: Callable[[], object]) -> None:
    """Call ``main``; a mistake ends in one line instead of a traceback, as do the library's and the system's errors.

    Raises:
        SystemExit: With code 1, after such a mistake.
    """
    try:
        main()
    except Exception as error:
        library = sys.modules.get("selftrans_reg")  # an error of its own is raised only where it was imported
        if not isinstance(error, (Mistake, OSError) if library is None else (Mistake, OSError, library.SelfTransError)):
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}")


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number from ``least`` on."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be {least} or more; got {text}")
        return int(text)

    return number


def within(low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a number from ``low`` to ``high``."""

    def number(text: str) -> float:
        if not low <= float(text) <= high:
            raise argparse.ArgumentTypeError(f"must be from {low:g} to {high:g}; got {text}")
        return float(text)

    return number


def positive(text: str) -> float:
    """An argparse type: a number above 0."""
    if not float(text) > 0:
        raise argparse.ArgumentTypeError(f"must be above 0; got {text}")
    return float(text)


def finite(text: str) -> float:
    """An argparse type: a number that is neither infinite nor NaN."""
    if not abs(float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be finite; got {text}")
    return float(text)


def window(text: str) -> tuple[float, float] | str:
    """An argparse type: two noise fractions with a comma between, or "all"."""
    if text == "all":
        return text
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be two noise fractions, as 0.4,0.7, or all; got {text}") from None
    if not 0 <= low < high <= 1:
        raise argparse.ArgumentTypeError(f"must be two noise fractions within 0 and 1, the lower first; got {text}")
    return low, high


def imported(name: str, option: str) -> Callable[..., Any]:
    """What ``module:callable`` names; modules of the working directory are found too."""
    module, _, attribute = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise Mistake(f"{option} {name!r} is no module:callable that can be imported: {error}.") from error
    if not callable(found):
        raise Mistake(f"{option} {name!r} is a {type(found).__name__}, which cannot be called.")
    return found


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """What decides the images of a SiT, and with what speed they come: for `sample.py` and `evaluate.py`."""
    add = parser.add_argument_group("the model").add_argument
    add("--weights", choices=["ema", "model"], default="ema", help="averaged or raw")
    add("--model", help="the published name that the weights must have, as SiT-B/2")
    add("--num-heads", type=at_least(1), help="for files that do not say it")
    add("--num-classes", type=at_least(1), help="for files that do not say it")
    add(
        "--time",
        choices=["repa", "sit"],
        help="what training called t: repa, t = 1 is noise; sit, t = 1 is data, as for the published SiT. Needed for "
        "all files but those of this repository's trainer",
    )
    add("--path", choices=["linear", "cosine"], help="for files that do not say it (default: linear)")
    add("--vae", help="folder or hub name of diffusers' AutoencoderKL (default: the run's own)")
    add("--scale-factor", type=positive, help="of the latents (default: the run's, or the VAE's)")
    add = parser.add_argument_group("the sampler").add_argument
    add("--sampler", choices=["euler", "heun", "sde"], default="sde", help="two ODEs, or the SDE")
    add("--steps", type=at_least(1), default=250, help="of the sampler")
    add("--cfg-scale", type=finite, default=1.0, help="1 is the conditional model, unguided")
    add("--guidance-low", type=within(0, 1), default=0.0, help="smallest t, 1 being noise, with guidance")
    add("--guidance-high", type=within(0, 1), default=1.0, help="largest t with guidance")
    add("--num-samples", type=at_least(1), default=50_000, help="how many images")
    add("--labels", default="random", help="random, balanced (0, 1, 2, ...), or classes to go through, as 207,360")
    add("--seed", type=at_least(0), default=0, help="of noise and random labels")
    add("--batch-size", type=at_least(1), default=64, help="of each process")
    add("--precision", choices=["fp32", "tf32", "fp16", "bf16"], default="fp32", help="of the model")
    add("--device", help="of the model and the VAE (default: cuda where there is one)")


# --- The long runs ---------------------------------------------------------------------------------------------------

# What only some stages have; None unless given.
_ALIGNED = ("layer", "head_features", "weight", "window", "gating", "stop_step")
_TEACHING = ("teacher_layer", "guidance_scale", "teacher_weights")
STAGES = {
    "baseline": (),
    "1": (*_ALIGNED, *_TEACHING, "target"),
    "2": (*_ALIGNED, *_TEACHING, "teacher", "teacher_chunk"),
}

# What a run may change when it goes on; all else belongs to its folder.
CHANGEABLE = (
    "out", "resume", "cpu", "steps", "micro_batches", "precision", "tf32", "compile", "workers", "teacher_chunk",
    "log_every", "log_with", "checkpoint_every", "keep", "keep_every", "sample_every", "sample_steps", "sample_cfg",
    "vae", "prompts", "text_encoder",
)  # fmt: skip


def long_run_parser(
    description: str | None, blocks: str, published: dict[str, float], demo: dict[str, float]
) -> Parser:
    """The options that the long runs share, whatever their model: stages, alignment, training, logs.

    Args:
        description: Of the script.
        blocks: What the model calls its list of blocks.
        published: Values by option, where none is given; set by `common.long_runs`.
        demo: Those of the demo.
    """

    def by_default(name: str, text: str = "") -> str:
        return f"{text} (default: {published[name]:g}; for the demo {demo[name]:g})".strip()

    parser = Parser(description)
    add = parser.add_argument
    add("--stage", choices=list(STAGES), required=True, help="the model as it is, stage 1, or stage 2")
    add("--out", type=Path, required=True, help="folder of the run")
    add("--recipe", choices=["paper", "released"], default="paper", help="released: what the authors' code computes")
    add("--teacher", help="stage 2: the folder that a run of stage 1 left, a name on the hub, or a checkpoint")
    add("--init", help="checkpoint whose weights the run starts from")
    unsaid = "of a checkpoint of --teacher or --init that does not say what it called t: repa if t = 1 was noise"
    add("--file-time", choices=["repa", "sit"], help=f"{unsaid}, sit if it was data")
    add("--resume", default="auto", help="auto, never, or the path of a checkpoint")

    add = parser.add_argument_group("the alignment (default: what selftrans_reg.recipe says of the model)").add_argument
    add("--layer", help=f"layer that is aligned, as {blocks}.5")
    add("--teacher-layer", help=f"of the stage-1 model, as {blocks}.7")
    add("--guidance-scale", type=finite, help="of the teacher's features")
    add("--teacher-weights", choices=["ema", "model"], help="of the stage-1 checkpoint")
    add("--teacher-chunk", type=at_least(1), help="largest batch of the teacher, to save memory (default: the batch)")
    add("--window", type=window, help="noise fractions, as 0.4,0.7, or all")
    add("--weight", type=finite, help="of the alignment in the loss")
    add("--target", choices=["latents", "velocity"], help="of stage 1")
    add("--gating", choices=["per-sample", "released"], help="how the window applies")
    add("--stop-step", type=at_least(0), help="step from which training goes on without the alignment; 0 for never")
    add("--head-features", type=at_least(1), help=by_default("head_features", "inner width of the projection head"))

    add = parser.add_argument_group("training").add_argument
    add(
        "--steps",
        type=at_least(1),
        help=f"{by_default('steps', 'in all; more go on with a run')}; stage 1 has the recipe's",
    )
    add("--batch-size", type=at_least(1), help=by_default("batch_size", "over all processes and micro-batches"))
    add("--micro-batches", type=at_least(1), default=1, help="parts of a process's batch, to save memory")
    add("--lr", type=within(0, 1), help=by_default("lr", "learning rate"))
    add("--betas", type=within(0, 1), nargs=2, default=[0.9, 0.999], help="of AdamW")
    add("--weight-decay", type=within(0, 1), default=0.0, help="of AdamW")
    add("--warmup-steps", type=at_least(0), help=by_default("warmup_steps"))
    add("--clip", type=positive, default=1.0, help="largest norm of the gradient; inf for any")
    add("--ema-decay", type=within(0, 1), help=by_default("ema_decay", "of the averaged weights"))
    add("--precision", choices=["fp16", "bf16", "no"], help="default: fp16, as published, or no without CUDA")
    add("--tf32", action=argparse.BooleanOptionalAction, default=True, help="for what is float32 on a GPU")
    add("--compile", action="store_true", help="compile the blocks of model and teacher")
    add("--seed", type=at_least(0), default=0, help="of weights, data order and noise")
    add("--cpu", action="store_true", help="even where there is a GPU")

    add = parser.add_argument_group("data, logs, checkpoints, pictures").add_argument
    add("--workers", type=at_least(0), help="processes that read data, for each GPU (default: 4; for the demo 0)")
    add("--log-every", type=at_least(1), help=by_default("log_every", "steps"))
    trackers = ["tensorboard", "wandb", "trackio", "mlflow", "comet_ml"]
    add("--log-with", nargs="*", default=trackers[:1], choices=trackers, metavar="TRACKER",
        help=f"accelerate's trackers beside log.jsonl: {', '.join(trackers)} (default: tensorboard)")  # fmt: skip
    add("--checkpoint-every", type=at_least(1), help=by_default("checkpoint_every", "steps"))
    add("--keep", type=at_least(1), default=3, help="newest checkpoints that stay")
    add("--keep-every", type=at_least(1), help=by_default("keep_every", "checkpoints at multiples stay too"))
    add("--sample-every", type=at_least(1), help=by_default("sample_every", "steps between pictures, which need --vae"))
    add("--sample-steps", type=at_least(1), default=25, help="of the sampler in these pictures")
    add("--sample-cfg", type=finite, default=1.0, help="its classifier-free guidance")
    add("--vae", help="AutoencoderKL that decodes them: folder or hub name, as stabilityai/sd-vae-ft-ema")
    return parser


def parse_long_run(parser: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; what the stage would ignore or lacks ends in one line."""
    run = parser.parse_args(argv)
    foreign = sorted({name for names in STAGES.values() for name in names} - {*STAGES[run.stage]})
    given = [f"--{name.replace('_', '-')}" for name in foreign if getattr(run, name) is not None]
    stage = run.stage if run.stage == "baseline" else f"stage {run.stage}"
    if given:
        parser.error(f"{', '.join(given)}: not an option of {stage}; leave it out")
    if run.stage == "2" and run.teacher is None:
        parser.error(
            "stage 2 needs --teacher: the folder that a run of --stage 1 left, a name on the hub, or a checkpoint"
        )
    if run.out.exists() and not run.out.is_dir():
        parser.error(f"--out {run.out} is a file, and a run needs a folder")
    run.workers = (0 if run.data == "demo" else 4) if run.workers is None else run.workers
    return run
