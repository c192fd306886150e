"""Command lines of the examples: parsers, types of options, and mistakes that end in one line.

Nothing here imports torch: a script reads its options before anything that takes seconds to import.
"""

import argparse
import math
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
        from_library = type(error).__module__.partition(".")[0] == "selftrans_reg"
        if not (from_library or isinstance(error, (Mistake, OSError))):
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}")


def _checked(kind: Callable[[str], Any], fits: Callable[[Any], bool], must: str) -> Callable[[str], Any]:
    def number(text: str) -> Any:
        value = kind(text)
        if not fits(value):
            raise argparse.ArgumentTypeError(f"must be {must}; got {text}")
        return value

    return number


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number from ``least`` on."""
    return _checked(int, lambda value: value >= least, f"{least} or more")


def within(low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a number from ``low`` to ``high``."""
    return _checked(float, lambda value: low <= value <= high, f"from {low:g} to {high:g}")


positive = _checked(float, lambda value: value > 0, "above 0")
finite = _checked(float, math.isfinite, "finite")


def window(text: str) -> tuple[float, float] | str:
    """An argparse type: two noise fractions with a comma between, or "all"."""
    if text == "all":
        return text
    low, high = map(float, text.split(","))
    if not 0 <= low < high <= 1:
        raise argparse.ArgumentTypeError(f"must be two noise fractions within 0 and 1, the lower first; got {text}")
    return low, high


def add_image_options(
    parser: argparse.ArgumentParser, *, sampler: str, steps: int, cfg_scale: float, batch_size: int
) -> None:
    """The weights, the VAE and the sampler that make images, with these defaults."""
    add = parser.add_argument_group("the weights, the VAE and the sampler").add_argument
    add("--weights", choices=["ema", "model"], default="ema", help="averaged or raw")
    add("--vae", help="folder or hub name of diffusers' AutoencoderKL (default: the run's own)")
    add("--sampler", choices=["euler", "heun", "sde"], default=sampler, help="two ODEs, or the SDE")
    add("--steps", type=at_least(1), default=steps, help="of the sampler")
    add("--cfg-scale", type=finite, default=cfg_scale, help="1 is the conditional model, unguided")
    add("--guidance-low", type=within(0, 1), default=0.0, help="smallest t, 1 being noise, with guidance")
    add("--guidance-high", type=within(0, 1), default=1.0, help="largest t with guidance")
    add("--seed", type=at_least(0), default=0, help="of the noise, and of random labels")
    add("--batch-size", type=at_least(1), default=batch_size, help="of each process")
    add("--device", help="of all models (default: cuda where there is one)")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """What decides the images of a SiT, and with what speed they come: for `sample.py` and `evaluate.py`."""
    add_image_options(parser, sampler="sde", steps=250, cfg_scale=1.0, batch_size=64)
    add = parser.add_argument_group("the model and its images").add_argument
    what = "what training called t: repa, t = 1 is noise; sit, t = 1 is data, as for the published SiT."
    add("--time", choices=["repa", "sit"], help=f"{what} Needed for all files but those of this repository's trainer")
    add("--path", choices=["linear", "cosine"], help="for files that do not say it (default: linear)")
    add("--num-samples", type=at_least(1), default=50_000, help="how many images")
    add("--labels", default="random", help="random, balanced (0, 1, 2, ...), or classes to go through, as 207,360")
    add("--precision", choices=["fp32", "tf32", "fp16", "bf16"], default="fp32", help="of the model")


# --- The long runs ---------------------------------------------------------------------------------------------------

# What only some stages have; None unless given.
_ALIGNED = (
    "layer", "head_features", "weight", "window", "gating", "stop_step",
    "teacher_layer", "guidance_scale", "teacher_weights",
)  # fmt: skip
STAGES = {"baseline": (), "1": (*_ALIGNED, "target"), "2": (*_ALIGNED, "teacher", "teacher_chunk")}

# What a run may change when it goes on; all else belongs to its folder.
CHANGEABLE = (
    "out", "resume", "cpu", "steps", "micro_batches", "precision", "compile", "workers", "teacher_chunk", "log_every",
    "log_with", "checkpoint_every", "keep", "keep_every",
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
    parser = Parser(description)

    def group(title: str) -> Callable[..., object]:
        add_argument = parser.add_argument_group(title).add_argument

        def add(flag: str, help: str, **settings: Any) -> None:  # noqa: A002
            name = flag[2:].replace("-", "_")
            if name in published:
                help += f" (default: {published[name]:g}; for the demo {demo[name]:g})"  # noqa: A001
            add_argument(flag, help=help, **settings)

        return add

    add = group("the run")
    add("--stage", "the model as it is, stage 1, or stage 2", choices=list(STAGES), required=True)
    add("--out", "folder of the run", type=Path, required=True)
    add("--recipe", "released: what the authors' code computes", choices=["paper", "released"], default="paper")
    add("--teacher", "stage 2: the folder that a run of stage 1 left, a name on the hub, or a checkpoint")
    add("--init", "checkpoint whose weights the run starts from")
    unsaid = "of a checkpoint of --teacher or --init that does not say what it called t: repa if t = 1 was noise"
    add("--file-time", f"{unsaid}, sit if it was data", choices=["repa", "sit"])
    add("--resume", "checkpoint of another run, which this one continues from there; its own newest comes first")

    add = group("the alignment (default: what selftrans_reg.recipe says of the model)")
    add("--layer", f"layer that is aligned, as {blocks}.5")
    add("--teacher-layer", f"of the stage-1 model, as {blocks}.7")
    add("--guidance-scale", "of the teacher's features", type=finite)
    add("--teacher-weights", "of the stage-1 checkpoint", choices=["ema", "model"])
    add("--teacher-chunk", "largest batch of the teacher, to save memory (default: the batch)", type=at_least(1))
    add("--window", "noise fractions, as 0.4,0.7, or all", type=window)
    add("--weight", "of the alignment in the loss", type=finite)
    add("--target", "of stage 1", choices=["latents", "velocity"])
    add("--gating", "how the window applies", choices=["per-sample", "released"])
    add("--stop-step", "from which training goes on without the alignment; 0: never", type=at_least(0))
    add("--head-features", "inner width of the projection head", type=at_least(1))

    add = group("training")
    add("--steps", "in all; more go on with a run; stage 1 has the recipe's", type=at_least(1))
    add("--batch-size", "over all processes and micro-batches", type=at_least(1))
    add("--micro-batches", "parts of a process's batch, to save memory", type=at_least(1), default=1)
    add("--lr", "learning rate", type=within(0, 1))
    add("--betas", "of AdamW", type=within(0, 1), nargs=2, default=[0.9, 0.999])
    add("--weight-decay", "of AdamW", type=within(0, 1), default=0.0)
    add("--warmup-steps", "to the whole learning rate", type=at_least(0))
    add("--clip", "largest norm of the gradient; inf for any", type=positive, default=1.0)
    add("--ema-decay", "of the averaged weights", type=within(0, 1))
    add("--precision", "default: fp16, as published, or no without CUDA", choices=["fp16", "bf16", "no"])
    add("--compile", "compile the blocks of model and teacher", action="store_true")
    add("--seed", "of weights, data order and noise", type=at_least(0), default=0)
    add("--cpu", "even where there is a GPU", action="store_true")

    add = group("data, logs, checkpoints")
    add("--workers", "processes that read data, for each GPU (default: 4; for the demo 0)", type=at_least(0))
    add("--log-every", "steps between lines of the log", type=at_least(1))
    trackers = ["tensorboard", "wandb", "trackio", "mlflow", "comet_ml"]
    text = f"accelerate's trackers beside log.jsonl: {', '.join(trackers)} (default: tensorboard)"
    add("--log-with", text, nargs="*", default=trackers[:1], choices=trackers, metavar="TRACKER")
    add("--checkpoint-every", "steps between checkpoints", type=at_least(1))
    add("--keep", "newest checkpoints that stay", type=at_least(1), default=3)
    add("--keep-every", "checkpoints at multiples stay too", type=at_least(1))
    add("--demo-data", "where what the demo needs is made and kept (default: beside --out)", type=Path)
    return parser


def parse_long_run(parser: Parser, argv: Sequence[str] | None, *, model: str, demo_data: str) -> argparse.Namespace:
    """Read the command line; what the stage would ignore or lacks ends in one line.

    Args:
        parser: As from `long_run_parser`.
        argv: The command line.
        model: The default one, but for the demo.
        demo_data: The default name of the folder of what the demo needs.
    """
    run = parser.parse_args(argv)
    foreign = sorted({name for names in STAGES.values() for name in names} - {*STAGES[run.stage]})
    given = [f"--{name.replace('_', '-')}" for name in foreign if getattr(run, name) is not None]
    if given:
        stage = run.stage if run.stage == "baseline" else f"stage {run.stage}"
        parser.error(f"{', '.join(given)}: not an option of {stage}; leave it out")
    if run.stage == "2" and run.teacher is None:
        parser.error(
            "stage 2 needs --teacher: the folder that a run of --stage 1 left, a name on the hub, or a checkpoint"
        )
    demo = run.data == "demo"
    run.workers = (0 if demo else 4) if run.workers is None else run.workers
    run.model = run.model or ("demo" if demo else model)
    run.demo_data = (run.demo_data or run.out.parent / demo_data) if demo else None
    return run
