"""Images for prompts at a tiny size: guided from the empty prompt, and made once."""

from pathlib import Path

import numpy as np
import pytest
import sample_prompts
import torch
from common.demo import TEXT_LENGTH, save_text_encoder
from common.loading import mmdit_from_checkpoint
from common.mmdit import MMDiT
from common.options import Mistake
from common.samplers import image_generator
from common.text import load_text_encoder
from common.vae import decode, load_vae
from PIL import Image
from tiny_runs import MMDIT_SIZES, SCALE, write_checkpoint, write_vae

PROMPTS = ("a red ring on a blue ground", "white ground with a black cross", "a green circle on a red ground")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder: two checkpoints, the VAE and the text encoder that they name."""
    folder = tmp_path_factory.mktemp("runs") / "self"
    save_text_encoder(folder / "text_encoder", seed=0)
    args = {"vae": str(write_vae(folder / "vae")), "text_encoder": str(folder / "text_encoder"), "scale_factor": SCALE}
    args |= MMDIT_SIZES | {"context_length": TEXT_LENGTH, "path": "linear"}
    for step in (2, 4):
        write_checkpoint(folder / f"checkpoints/{step:07d}.pt", step, args, MMDiT)
    return folder


def sample(run: Path, out: Path, *more: str) -> None:
    given = [] if "--prompts-file" in more else ["--prompts", *PROMPTS]
    sample_prompts.main([f"--checkpoint={run}", f"--out={out}", "--steps=2", "--device=cpu", *given, *more])


def test_images_are_guided_from_the_empty_prompt_by_the_formula(run: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("\n".join(PROMPTS))
    options = "--sampler=euler", "--cfg-scale=3", "--guidance-high=0.7", "--seed=7"
    sample(run, tmp_path / "s", *options, "--prompts-file", str(tmp_path / "prompts"))
    model, _ = mmdit_from_checkpoint(run / "checkpoints/0000004.pt")
    features = load_text_encoder(str(run / "text_encoder")).encode(["", *PROMPTS])
    for number in range(3):
        x = torch.randn(4, 4, 4, generator=image_generator(7, number))[None].double()
        for t in (1.0, 0.5):  # two Euler steps; guidance acts in the second alone
            v_u, v_c = (model(x.float(), torch.tensor([t]), features[i : i + 1]).double() for i in (0, number + 1))
            x = x - 0.5 * (v_u + 3 * (v_c - v_u) if t <= 0.7 else v_c)
        expected = decode(load_vae(run / "vae"), x.float())[0].permute(1, 2, 0)
        found = np.asarray(Image.open(tmp_path / f"s/images/{number:06d}.png")).astype(np.float64)
        assert np.abs(found - (127.5 * expected.numpy() + 127.5)).max() <= 1.5  # rounding


def test_only_what_is_missing_is_made_and_another_runs_folder_is_never_written_over(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    sample(run, out, "--sampler=sde", "--batch-size=2")
    images = {path: path.read_bytes() for path in (out / "images").iterdir()}
    times = {path: path.stat().st_mtime_ns for path in images}
    (out / "images/000001.png").unlink()
    sample(run, out, "--sampler=sde", "--batch-size=2")
    assert {path: path.read_bytes() for path in images} == images
    assert [path.name for path in images if path.stat().st_mtime_ns != times[path]] == ["000001.png"]
    save_text_encoder(tmp_path / "other", seed=5)
    for more, match in [
        ("--seed=1", "seed: 0 there, 1 now"),
        ("--weights=model", "weights: "),
        (f"--text-encoder={tmp_path / 'other'}", "text_encoder_weights"),
    ]:
        with pytest.raises(Mistake, match=rf"other settings(.|\n)*{match}"):
            sample(run, out, "--sampler=sde", more)
    assert {path: path.read_bytes() for path in images} == images


def test_texts_of_another_length_are_named(run: Path, tmp_path: Path) -> None:
    args = torch.load(run / "checkpoints/0000004.pt")["args"] | {"context_length": 7}
    with pytest.raises(Mistake, match=r"16 tokens of width 64 a text; .*short.pt has 7 of width 64"):
        sample(write_checkpoint(tmp_path / "short.pt", 4, args, MMDiT), tmp_path / "s")
